"""The command ``parvts-fx``, in this process: what it tells is what direct calls come to."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import parvts_fx
from bench.accuracy.batches import stream
from bench.accuracy.examples import lay_out
from bench.accuracy.model import prompt as written
from bench.accuracy.questions import Question, ask
from bench.accuracy.scenes import draw, sample_scene
from bench.accuracy.ways import WEIGHTS, generate
from bench.accuracy.ways import load as load_trained
from bench.answers import words
from parvts_fx.command import listing, main, prompts, visuals
from parvts_fx.command.measuring import Flops, Side, Spread
from parvts_fx.command.preparing import load
from parvts_fx.command.results import Result
from parvts_fx.cost import telling
from parvts_fx.runtime.record import KEPT_ALL
from tests.models.page import PAGE
from tests.models.page import load as load_findings
from tests.small_processors import save

KINDS = ("subject", "count", "corner", "list")


@pytest.fixture
def scene() -> tuple[Any, list[Question]]:
    rng = stream(11, "held out", 10**6 + 1)
    found = sample_scene(rng)
    return found, [ask(found, kind, rng) for kind in KINDS]


@pytest.fixture
def square(tmp_path: Path, scene: Any) -> Path:
    path = tmp_path / "scene.png"
    Image.fromarray(draw(scene[0])).save(path)
    return path


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Twice as many patches of 8 x 8 in a row as in a column."""
    path = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 32, 3), dtype=np.uint8)).save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    out, error = capsys.readouterr()
    return code, out, error


def tried(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """What ``try`` writes as JSON; standard output holds nothing else, and standard error nothing."""
    code, out, error = run(capsys, "try", *arguments, "--lowering", "eager", "--repeats", 1, "--out", tmp_path / "out",
                           "--json", "-")
    assert (code, error) == (0, "")
    return json.loads(out)


@pytest.mark.slow
@pytest.mark.supports("Command", "parvts-fx try on the trained model: the answers of direct calls, whole and pruned")
def test_the_trained_model(capsys: Any, tmp_path: Path, scene: Any, square: Path) -> None:
    """The direct calls' prompt is the one that the evaluation lays out by itself."""
    picture, (question, *_) = scene
    model, batch = load_trained(), next(lay_out([picture], [question]).batches(1))
    found = tried(capsys, tmp_path, WEIGHTS, "--image", square, "--prompt", question.text, "--keep-tokens", 9,
                  "--new-tokens", 5, "--processor", "h100")
    (whole,) = words(generate(model, batch))
    parvts_fx.compile(model, lowering="eager", keep_tokens=9, strict=True)
    (few,) = words(generate(model, batch))
    record = parvts_fx.last_call(model)
    assert (found["all"]["answer"], found["few"]["answer"]) == (whole, few) and found["answers_equal"] == (whole == few)
    assert (found["visual_tokens"], found["kept_tokens"], found["prompt_tokens"]) == (144, 9, batch["input_ids"].shape[1])
    assert found["pruned"] and found["options"] == {"keep_tokens": 9}
    assert found["kept"] == record.kept[0].nonzero()[:, 0].tolist() and len(found["kept"]) == 9
    assert found["flops"]["allow"] == found["flops"]["whole"] / found["flops"]["pruned"] > 1.2
    (predicted,) = found["predicted"]
    assert (predicted["processor"], predicted["few"]["dtype"]) == ("NVIDIA H100", "bfloat16")
    assert predicted["ratio"] == predicted["all"]["seconds"] / predicted["few"]["seconds"]
    assert [Path(path).name for path in found["pictures"]] == ["kept_patches.png", "plan.png"]
    for path in found["pictures"]:
        Image.open(path).verify()
    check_ratios(found)


def check_ratios(found: dict[str, Any]) -> None:
    """They are of the medians, and the sentence has them."""
    medians = [found[side][what]["median"] for what in ("first_token", "step") for side in ("all", "few")]
    assert found["first_token_ratio"] == medians[0] / medians[1] and found["step_ratio"] == medians[2] / medians[3]
    ratio = found["first_token_ratio"]
    assert f"{max(ratio, 1 / ratio):.2f}x {'sooner' if ratio >= 1 else 'later'}" in found["verdict"]


def test_the_trained_models_processor_writes_what_the_evaluation_lays_out(scene: Any, square: Path) -> None:
    """Ids of every question, the picture's pixels, and the form of the prompt."""
    picture, questions = scene
    _, processor = load(str(WEIGHTS), torch.device("cpu"), None, False)
    for question in questions:
        batch = next(lay_out([picture], [question]).batches(1))
        inputs = prompts.build_inputs(processor, question.text, [visuals.read_picture(square)])
        assert torch.equal(inputs["input_ids"], batch["input_ids"])
        assert torch.equal(inputs["attention_mask"], batch["attention_mask"])
        torch.testing.assert_close(inputs["pixel_values"], batch["pixel_values"], atol=1e-5, rtol=0)
        by_hand = processor(text=written(question.text), images=Image.open(square), return_tensors="pt")
        assert torch.equal(by_hand["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("first, step, tokens, words", [
    (((3.0, 2.9, 3.1), (1.5, 1.4, 1.6)), ((1.0, 0.9, 1.1), (1.0, 0.9, 1.1)), [5],
     "It pays here: the first token comes 2.00x sooner (FLOPs allow 4.00x), and the answer is the same."),
    (((3.0, 2.9, 3.1), (1.5, 1.4, 1.6)), ((1.0, 0.9, 1.1), (2.0, 1.9, 2.1)), [6],
     "It is quicker here: the first token comes 2.00x sooner (FLOPs allow 4.00x), each further one 2.00x later, but the answer "
     "is another one: judge it, or keep more tokens."),
    (((3.0, 2.9, 3.1), (3.0, 2.9, 3.1)), None, [5],
     "It does not pay here: the first token comes 1.00x sooner (FLOPs allow 4.00x), and the answer is the same."),
    (((3.0, 2.0, 9.0), (2.5, 1.0, 3.2)), None, [5],
     "Whether it pays cannot be told here: the first token comes 1.20x sooner (FLOPs allow 4.00x), which is within the scatter "
     "of the calls, and the answer is the same.")])
def test_the_sentence(first: Any, step: Any, tokens: list[int], words: str) -> None:
    """By medians that differ by more than they scatter; wide scatter is noted."""
    spreads = [[Spread(*one) for one in pair] if pair else [None, None] for pair in (first, step)]
    sides = [Side("", ids, spreads[0][side], spreads[1][side], None) for side, ids in enumerate(([5], tokens))]
    record = parvts_fx.CallRecord(True, visual=torch.ones(1, 4).bool(), subject_tokens=2)
    result = Result.of({}, torch.zeros(1, 6), record, Flops(8, 2), (sides[0], sides[1]), None, None, [])
    assert result.verdict == words and (result.visual_tokens, result.kept_tokens, result.kept) == (4, 2, None)
    assert bool(result.notes) == (first[0][2] == 9.0)


SMALL = {  # pictures, visual tokens, whether they can be drawn, tokens of the answer
    "llava": (1, 16, True, 3), "paddleocr_vl": (2, 16, True, 1), "gemma3": (1, 16, True, 1), "idefics3": (1, 48, False, 1)}


@pytest.mark.slow
@pytest.mark.supports("Command", "parvts-fx try: prompts by the processor of llava (no chat template), paddleocr_vl, gemma3, "
                      "idefics3")
@pytest.mark.parametrize("name", SMALL)
def test_small_models(capsys: Any, tmp_path: Path, wide: Path, name: str) -> None:
    """Random weights, four families; the answers are those of direct calls with inputs from the processor itself."""
    count, visual, is_drawn, tokens = SMALL[name]
    folder = save(name, tmp_path / name)
    found = tried(capsys, tmp_path, folder, *["--image", wide] * count, "--prompt", "w7 w8 w9", "--new-tokens", tokens,
                  "--keep-ratio", "1/4", "--migration-depth", 1)
    model, processor = load(str(folder), torch.device("cpu"), None, False)
    pictures = [Image.open(wide)] * count
    place = {"llava": "<image>\n", "paddleocr_vl": "user <begin><image><end> <begin><image><end> ", "gemma3": "user <begin> ",
             "idefics3": "user <image> "}[name]
    inputs = processor(text=[place + ("w7 w8 w9" if name == "llava" else "w7 w8 w9 answer")], images=[pictures],
                       return_tensors="pt")
    size = inputs["input_ids"].shape[1]
    whole = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, size:]
    parvts_fx.compile(model, lowering="eager", keep_ratio=1 / 4, migration_depth=1, strict=True)
    few = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, size:]
    record = parvts_fx.last_call(model)
    assert (found["all"]["tokens"], found["few"]["tokens"]) == (whole.tolist(), few.tolist())
    assert (found["visual_tokens"], found["kept_tokens"]) == (visual, visual // 4) == (*record.visual_tokens, *record.kept_tokens)
    assert found["kept"] == record.kept[0].nonzero()[:, 0].tolist()
    assert ("kept_patches.png" in " ".join(found["pictures"])) == is_drawn
    assert any("no grid of the shape of the picture, 16 x 32" in note for note in found["notes"]) != is_drawn


@pytest.mark.slow
def test_the_reason_where_nothing_is_pruned(capsys: Any, tmp_path: Path, wide: Path) -> None:
    """That of the model's record, in the one sentence: where all is kept, and where pictures enter by cross-attention."""
    folder = save("llava", tmp_path / "llava")
    arguments = "--image", wide, "--prompt", "w7 w8 w9", "--new-tokens", 1
    found = tried(capsys, tmp_path, folder, *arguments, "--keep-tokens", 16)
    assert not found["pruned"] and found["reason"] == KEPT_ALL and KEPT_ALL in found["verdict"] and found["flops"] is None
    assert found["answers_equal"] and found["pictures"] == []
    torch._dynamo.reset()
    found = tried(capsys, tmp_path, save("blip", tmp_path / "blip"), *arguments)
    assert not found["pruned"] and found["reason"] in found["verdict"] and found["visual_tokens"] is None
    assert found["all"]["tokens"] == found["few"]["tokens"]


class Page(html.parser.HTMLParser):
    """Elements that were not closed, and what the page refers to."""

    VOID = {"meta", "img", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.referred: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.referred += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.slow
@pytest.mark.supports("Command", "parvts-fx try --html: one page that stands by itself")
def test_the_page(capsys: Any, tmp_path: Path, square: Path) -> None:
    """Every element is closed, both pictures are in it and decode, what was said and measured is there, escaped, and nothing
    is fetched: no reference but data, no script, no style from elsewhere. Chromium: ``tests/recipes/test_page.py``."""
    page, kept = tmp_path / "page.html", tmp_path / "found.json"
    code, out, error = run(
        capsys, "try", WEIGHTS, "--image", square, "--prompt", "what <b> & colour", "--lowering", "eager", "--repeats", 1,
        "--new-tokens", 1, "--out", tmp_path / "out", "--html", page, "--json", kept)
    assert (code, error) == (0, "") and str(page) in out and "visual tokens" in out
    found, read = json.loads(kept.read_text()), Page()
    read.feed(page.read_text())
    read.close()
    assert read.open == [] and not {"script", "link", "iframe"} & set(read.tags) and "url(" not in page.read_text()
    assert len(read.referred) == len(found["pictures"]) == 2
    for reference, path in zip(read.referred, found["pictures"]):
        kind, _, data = reference.partition(";base64,")
        assert kind == "data:image/png" and base64.b64decode(data) == Path(path).read_bytes()
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    text = " ".join(read.text)
    for told in (found["verdict"], "what <b> & colour", found["all"]["answer"], found["few"]["answer"], telling.TITLE):
        assert told in text
    assert found["verdict"] in " ".join(out.split())


@pytest.mark.supports("Command", "parvts-fx explain: the plan, printed and drawn")
def test_explain(capsys: Any, tmp_path: Path, square: Path) -> None:
    plan = tmp_path / "plan.png"
    code, out, error = run(capsys, "explain", WEIGHTS, "--image", square, "--prompt", "describe the subject", "--plan", plan,
                           "--keep-tokens", 20, "--migration-depth", 2, "--processor", "l4", "--processor", "A100")
    assert (code, error) == (0, "")
    assert telling.TITLE in out and "L4, bfloat16" in out and "A100, bfloat16" in out and "H100" not in out
    assert "150, of which 144 visual" in out and "26, of which 20 visual" in out and "8, in 2 of which two groups run" in out
    Image.open(plan).verify()


@pytest.mark.supports("Command", "parvts-fx models: the list of docs/supported-models.md, from the installed package")
def test_models(capsys: Any) -> None:
    code, out, error = run(capsys, "models", "--json")
    listed = json.loads(out)
    assert (code, error) == (0, "")
    findings = load_findings()
    assert {model["name"]: model["verdict"] for model in listed["models"]} == {
        name: finding.verdict for name, finding in findings.items()}, "run `python -m tests.models`"
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    assert {row[0].removeprefix("| "): row[1] for row in rows} == {
        model["name"]: model["verdict"] for model in listed["models"]}
    assert all(findings[model["name"]].reason == model["reason"] for model in listed["models"])
    code, out, _ = run(capsys, "models", "--verdict", "not compiled")
    assert code == 0 and sum(name in out.split() for name in findings) >= 1
    code, out, error = run(capsys, "models", "--verdict", "perfect")
    assert code == 1 and "no model has this one; there are:" in error and out == ""


@pytest.mark.slow
def test_the_list_is_part_of_the_package() -> None:
    """Its file and the command's entry point are named where the package is built."""
    import tomllib

    built = tomllib.loads((PAGE.parents[1] / "pyproject.toml").read_text())
    assert "parvts_fx.command" in built["tool"]["setuptools"]["packages"]
    assert built["tool"]["setuptools"]["package-data"]["parvts_fx.command"] == [listing.FILE]
    assert built["project"]["scripts"] == {"parvts-fx": "parvts_fx.command:main"}
    done = subprocess.run([sys.executable, "-m", "parvts_fx", "models", "--verdict", "wrong"], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 1 and done.stdout == "" and "parvts-fx models: --verdict wrong: no model" in done.stderr
