"""What ``parvts-fx`` says of what it cannot use: one line on standard error, another exit code than 0, and no traceback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from bench.accuracy.ways import WEIGHTS
from parvts_fx.command import main, prompts, visuals
from parvts_fx.command.errors import BadInput
from tests.small_processors import PROCESSORS, save, tokenizer
from tests.test_command import run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.zeros((96, 96, 3), dtype=np.uint8)).save(path)
    return path


def refused(capsys: Any, *arguments: object, code: int = 1) -> str:
    """The line."""
    left, out, error = run(capsys, *arguments)
    assert left == code and out == "" and error.endswith("\n") and error.count("\n") == 1 and "Traceback" not in error, error
    assert error.startswith("parvts-fx")
    return error


@pytest.mark.supports("Command", "parvts-fx: one line and an exit code for what cannot be used")
@pytest.mark.parametrize("command", ["try", "explain"])
def test_models_and_pictures(capsys: Any, tmp_path: Path, picture: Path, command: str) -> None:
    def told(model: object, *more: object) -> str:
        return refused(capsys, command, model, "--prompt", "what", *more)

    given = "--image", picture
    assert "there is no folder /no/such/model" in told("/no/such/model", *given)
    assert "there is no folder nowhere" in told("nowhere", *given)
    (tmp_path / "empty").mkdir()
    assert "no model's folder: it has no config.json" in told(tmp_path / "empty", *given)
    assert "is a file; give the folder" in told(picture, *given)
    bare = tmp_path / "bare"
    shutil.copytree(WEIGHTS, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert "bare cannot be loaded: OSError:" in told(bare, *given)
    text = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1))
    text.save_pretrained(tmp_path / "text")
    tokenizer({}).save_pretrained(tmp_path / "text")
    assert 'is a model of type "llama", which takes no pictures' in told(tmp_path / "text", *given)
    alone = tmp_path / "alone"
    shutil.copytree(WEIGHTS, alone, ignore=shutil.ignore_patterns("processor_config.json", "chat_template*"))
    assert "processor" in told(alone, *given)
    assert "there is no picture gone.png" in told(WEIGHTS, "--image", "gone.png")
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png cannot be read: UnidentifiedImageError" in told(WEIGHTS, "--image", tmp_path / "text.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:60])
    assert "cut.png cannot be read" in told(WEIGHTS, "--image", cut)
    assert "nothing to prune: give a picture" in told(WEIGHTS)
    assert "--processor: 'B300' is not one of cpu, NVIDIA H100, " in told(WEIGHTS, *given, "--processor", "B300")
    assert "--device gpu9" in told(WEIGHTS, *given, "--device", "gpu9")


def test_prompts(capsys: Any, tmp_path: Path, picture: Path) -> None:
    """Places for pictures: more, fewer, and none that the model would know."""
    start = "try", WEIGHTS, "--lowering", "eager", "--image", picture
    told = refused(capsys, *start, "--image", picture, "--prompt", "USER: <image> what ASSISTANT:")
    assert "the prompt has 1 place for images (<image>), and 2 are given" in told
    told = refused(capsys, *start, "--prompt", "<image> and <image>")
    assert "the prompt has 2 places for images (<image>), and 1 is given" in told
    placeless = tmp_path / "placeless"
    save("llava", placeless)
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer({}))
    for file in placeless.glob("*processor*"):
        file.unlink()
    processor.save_pretrained(placeless)
    told = refused(capsys, "try", placeless, "--lowering", "eager", "--image", picture, "--prompt", "w7 w8")
    assert "the model cannot answer this prompt: " in told


@pytest.mark.slow
@pytest.mark.parametrize("more, words", [
    (["--keep-tokens", "0"], "option keep_tokens=0"), (["--keep-ratio", "2"], "option keep_ratio=2"),
    (["--stages", "slowv"], "slowv"), (["--score", "nrom"], 'Did you mean "norm"?'), (["--fusion", "1.5"], "option fusion=1.5"),
    (["--stages", "fastv", "--keep-tokens", "4"], "keep_tokens"), (["--migration-depth", "9"], "migration_depth=9"),
    (["--lowering", "slowly"], "slowly"), (["--out", "picture.png"], "--out picture.png"),
    (["--json", "no/such/folder/x.json"], "there is no folder no/such/folder")])
def test_options(capsys: Any, picture: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], words: str) -> None:
    """parvts_fx's own words, where it is an option of its own."""
    monkeypatch.chdir(picture.parent)
    lowering = [] if "--lowering" in more else ["--lowering", "eager"]
    assert words in refused(capsys, "try", WEIGHTS, "--image", picture, "--prompt", "what", "--repeats", 1, "--new-tokens", 1,
                            *lowering, *more)


@pytest.mark.parametrize("arguments, words", [
    ([], "required: COMMAND"), (["fly"], "invalid choice: 'fly'"), (["try", "x"], "required: --prompt"),
    (["try", "x", "--prompt", "y", "--kep-ratio", "1"], "unrecognized arguments: --kep-ratio 1"),
    (["try", "x", "--prompt", "y", "--keep-ratio", "few"], "'few' is neither a number nor a fraction"),
    (["try", "x", "--prompt", "y", "--new-tokens", "0"], "'0' is no positive whole number"),
    (["explain", "x", "--prompt", "y", "--merge", "all"], "--merge")])
def test_the_command_line(capsys: Any, arguments: list[str], words: str) -> None:
    assert words in refused(capsys, *arguments, code=2)


def test_an_error_can_be_traced(picture: Path) -> None:
    with pytest.raises(BadInput, match="no folder"):
        main(["try", "/no/such/model", "--prompt", "x", "--traceback", "--image", str(picture)])


@pytest.fixture
def frames(tmp_path: Path) -> Iterator[list[Image.Image]]:
    yield [Image.fromarray(np.full((8, 12, 3), 10 * number, dtype=np.uint8)) for number in range(10)]


def test_videos(tmp_path: Path, frames: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of frames and a moving picture come to the same ones; a file that nothing at hand reads is refused."""
    folder, moving = tmp_path / "frames", tmp_path / "moving.webp"
    folder.mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number:02}.png")
    frames[0].save(moving, save_all=True, append_images=frames[1:], lossless=True)
    wanted = np.stack([np.asarray(frames[number]) for number in (0, 3, 6, 9)])
    np.testing.assert_array_equal(visuals.read_video(folder, 4), wanted)
    np.testing.assert_array_equal(visuals.read_video(moving, 4), wanted)
    assert len(visuals.read_video(folder, 99)) == 10
    other = tmp_path / "video.mp4"
    other.write_bytes(b"\0" * 64)
    monkeypatch.setattr(visuals.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="no library at hand reads the video .*: install one .pip install av., or give a folder"):
        visuals.read_video(other, 4)
    with pytest.raises(BadInput, match="there is no video"):
        visuals.read_video(tmp_path / "gone.mp4", 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no frames"):
        visuals.read_video(tmp_path / "empty", 4)


def test_places_in_prompts() -> None:
    """A text that says where pictures stand keeps its words; a template that writes nothing for them gets their tokens."""
    processor, pictures = PROCESSORS["llava"](), [Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8))]

    def ids(text: str, template: str | None = None) -> list[int]:
        processor.chat_template = template
        found = prompts.build_inputs(processor, text, pictures)["input_ids"][0]
        return torch.unique_consecutive(found).tolist()

    assert ids("w7 w8") == [99, 7, 8] and ids("w7 <image> w8") == [7, 99, 8]
    parts = "{% for m in messages %}user {% for part in m['content'] %}{{ part['text'] }}{% endfor %} answer{% endfor %}"
    either = "{% for m in messages %}user {{ m['content'] if m['content'] is string else m['content'][-1]['text'] }}{% endfor %}"
    strict = "{% for m in messages %}{{ raise_exception('a list') if m['content'] is not string }}{{ m['content'] }}{% endfor %}"
    assert ids("w7", strict) == [99, 7] and ids("w7", either) == [5, 99, 7]
    assert ids("w7 <image> w8", parts) == [5, 7, 99, 8, 6]
    with pytest.raises(BadInput, match="does not take this prompt: ValueError: its chat template fails"):
        ids("w7", "{{ raise_exception('never') }}")
