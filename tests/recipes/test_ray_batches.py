"""``examples/ray_batches.py`` as a process of its own, with two actors, of which one is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import parvts_fx
from tests.small_processors import save
from tests.supported import ROOT

csv = pytest.importorskip("pyarrow.csv")
parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")
psutil = pytest.importorskip("psutil")
pytest.importorskip("ray.data")

OPTIONS = {"lowering": "eager", "keep_tokens": 4, "migration_depth": 1}
ARGUMENTS = ["--lowering", "eager", "--keep-tokens", "4", "--migration-depth", "1", "--actors", "2", "--batch-size", "3",
             "--rows-per-file", "3", "--new-tokens", "8", "--repetition-penalty", "3"]
"""Small models of random weights repeat one token unless told not to, and many prompts get the same answer."""
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(150 * 2**20)}
SIZES = [(24, 16), (16, 32), (32, 24), (48, 24), (32, 48)]
"""In pixels; eight by eight are a token."""
TEXTS = ["w7 w8", "w20 w21 w22 w23 w24", "w9 w31 w44", "w11"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pictures of five sizes, and what is none."""
    made = tmp_path_factory.mktemp("batches")
    save("paddleocr_vl", made / "model")
    (made / "pictures").mkdir()
    for number, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made / "pictures" / f"{number}.png")
    (made / "pictures" / "broken.png").write_bytes(b"none")
    return made


def rows_of_a_table() -> list[dict[str, Any]]:
    """20 rows with a picture and 4 without, mixed; and behind them 3 that cannot be answered."""
    rows = [{"picture": f"pictures/{number}.png", "question": text} for number in range(len(SIZES)) for text in TEXTS]
    rows += [{"picture": "", "question": text} for text in TEXTS]
    rows = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    rows += [{"picture": "pictures/broken.png", "question": "w7"}, {"picture": "pictures/none.png", "question": "w8"},
             {"picture": "pictures/0.png", "question": "w9 <image>"}]
    return [{"row": number, **row} for number, row in enumerate(rows)]


def answered_alone(folder: Path, rows: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
    """In this process, one row at a time: the answer, visual tokens, and those kept."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    processor = transformers.AutoProcessor.from_pretrained(folder / "model")
    parvts_fx.compile(model, **OPTIONS)
    found = []
    for row in rows:
        picture = [{"type": "image", "image": Image.open(folder / row["picture"]).convert("RGB")}] if row["picture"] else []
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*picture, {"type": "text", "text": row["question"]}]}], add_generation_prompt=True,
            tokenize=True, return_dict=True, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, repetition_penalty=3.0)
        assert parvts_fx.last_call(model).pruned == bool(picture)
        width, height = Image.open(folder / row["picture"]).size if row["picture"] else (0, 0)
        answer = processor.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        found.append((answer, width * height // 64, 4 if picture else 0))
    torch._dynamo.reset()
    return found


def actors_of(driver: int) -> set[int]:
    """The processes of a run's actors, by what Ray calls them."""
    found = set()
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def run_and_kill_one(command: list[str], answers: Path, log: Path) -> set[int]:
    """Kill an actor as soon as there are answers; returns the processes of all actors."""
    seen: set[int] = set()
    killed = None
    with log.open("w") as written:
        process = subprocess.Popen(command, cwd=ROOT, stdout=written, stderr=written, env=ENVIRONMENT)
    try:
        while process.poll() is None:
            seen |= (alive := actors_of(process.pid))
            if killed is None and len(alive) == 2 and any(answers.glob("*.parquet")):
                killed = min(alive)
                os.kill(killed, signal.SIGKILL)
            time.sleep(0.2)
    finally:
        process.kill()
    assert process.returncode == 0, log.read_text()[-4000:]
    assert killed is not None
    return seen


def test_two_actors_of_which_one_is_killed(folder: Path, tmp_path: Path) -> None:
    """Every row once, with the answer that it gets alone."""
    rows, table, answers, log = rows_of_a_table(), folder / "table.csv", tmp_path / "answers", tmp_path / "log.txt"
    csv.write_csv(pyarrow.Table.from_pylist(rows), table)
    command = [sys.executable, "examples/ray_batches.py", folder / "model", table, answers, *ARGUMENTS]
    actors = run_and_kill_one(list(map(str, command)), answers, log)
    assert len(actors) == 3, "two, and the one in place of the killed one"
    written = sorted(parquet.read_table(answers).to_pylist(), key=lambda row: row["row"])
    assert [{name: row[name] or "" for name in ("picture", "question")} | {"row": row["row"]} for row in written] == rows
    alone = answered_alone(folder, rows[:-3])
    assert len({answer for answer, *_ in alone}) > len(alone) * 0.9, "answers tell rows apart"
    assert {row["reason"] for row in written} == {""}, "each batch has a picture"
    assert [(row["answer"], row["visual_tokens"], row["kept_tokens"]) for row in written[:-3]] == alone
    assert [row["error"] for row in written[:-3]] == [""] * len(alone)
    reasons = ["cannot identify image file", "No such file", "Found total 2 <image> tokens and 1 images"]
    for row, words in zip(written[-3:], reasons, strict=True):
        assert row["answer"] == "" and words in row["error"]
    whole, kept = (sum(found[place] for found in alone) for place in (1, 2))
    assert f"{len(rows)} rows, 3 of them with an error; kept {kept} of {whole} visual tokens\n" in log.read_text()


def test_what_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    """One line, and an exit code."""
    (tmp_path / "columns.csv").write_text("picture,prompt\n")
    (tmp_path / "good.csv").write_text("picture,question\n,w7\n")
    for model, table, answers, words in [
        (folder / "model", tmp_path / "none.csv", tmp_path / "answers", "none.csv is no CSV or Parquet file"),
        (folder / "model", tmp_path / "good.csv", tmp_path, "is not empty: answers of two runs would be mixed"),
        ("/no/such/folder", tmp_path / "good.csv", tmp_path / "answers", "/no/such/folder"),
        (folder / "model", tmp_path / "columns.csv", tmp_path / "answers", "needs the columns picture, question"),
    ]:
        done = subprocess.run([sys.executable, "examples/ray_batches.py", model, table, answers, *ARGUMENTS], cwd=ROOT,
                              capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("ray_batches.py:")]
        assert done.returncode == 1 and words in line and "Traceback" not in done.stderr
