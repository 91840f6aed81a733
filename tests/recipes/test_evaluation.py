"""The command lines of lm-eval and lmms-eval on a compiled model, each as a process of its own that reaches no network."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import parvts_fx
from parvts_fx.evaluation.pruned import Tally, take_options
from tests.small_processors import CHAT, save
from tests.supported import ROOT

ITEMS = 5
VISUAL, KEPT = 16, 4
"""Tokens of a picture, and those that a quarter of them are."""

FUNCTIONS = """
from PIL import Image


def pictures(doc):
    return [Image.open(doc["picture"])]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def compared(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
"""
TASK = """
task: five_pictures
dataset_path: json
dataset_kwargs: {data_files: {test: ITEMS}}
test_split: test
output_type: generate_until
process_results: !function functions.compared
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
"""


@dataclasses.dataclass(frozen=True)
class Package:
    """One of the two, by its command lines."""

    name: str
    stock: tuple[str, ...]
    """A model class of its own, without us."""

    ours: tuple[str, ...]
    task: str
    """What its tasks are written with besides."""

    arguments: str = "dtype=float32"

    def run(self, command: tuple[str, ...], folder: Path, out: str, *options: str) -> Outcome:
        """Score five items with a model, and read what has been written."""
        written = folder / self.name / out
        given = ",".join((f"pretrained={folder / 'model'}", self.arguments, *options))
        line = [sys.executable, "-m", *command, "--model_args", given, "--tasks", "five_pictures", "--include_path",
                str(folder / self.name), "--device", "cpu", "--batch_size", "1", "--log_samples", "--output_path", str(written)]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=900)
        samples = [json.loads(line) for file in written.rglob("*samples_*.jsonl") for line in file.read_text().splitlines()]
        results = [json.loads(file.read_text()) for file in written.rglob("*results*.json")]
        return Outcome(done.returncode, done.stdout + done.stderr, samples, results)


@dataclasses.dataclass(frozen=True)
class Outcome:
    code: int
    log: str
    samples: list[dict[str, Any]]
    results: list[dict[str, Any]]

    @property
    def answers(self) -> dict[int, str]:
        told = {sample["doc_id"]: sample["filtered_resps"] for sample in self.samples}
        return {item: held[0] if isinstance(held, list) else held for item, held in told.items()}

    @property
    def summary(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith("parvts_fx: ")]


LM_EVAL = Package(
    "lm_eval", ("lm_eval", "run", "--model", "hf-multimodal"),
    ("parvts_fx.evaluation.lm_eval_model", "run", "--model", "parvts"), """
doc_to_image: !function functions.pictures
doc_to_text: "<image> {{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["</s>"], max_gen_toks: 6, do_sample: false}
metadata: {version: 0}
""")
LMMS_EVAL = Package(
    "lmms_eval", ("lmms_eval", "--model", "llava_hf"), ("lmms_eval", "--model", "parvts_llava_hf"), """
doc_to_visual: !function functions.pictures
doc_to_text: !function functions.question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 6, do_sample: false}
metadata: [{version: 0}]
""", "dtype=float32,device_map=cpu")


def installed(*given: Package) -> pytest.MarkDecorator:
    """A case for each of the packages, skipped where it is not there."""
    return pytest.mark.parametrize("package", [
        pytest.param(package, id=package.name, marks=pytest.mark.skipif(
            importlib.util.find_spec(package.name) is None, reason=f"{package.name} is not installed"))
        for package in given])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaVA with its processor, five pictures with questions of unlike lengths, and a task of them for each package."""
    held = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    processor = transformers.AutoProcessor.from_pretrained(save("llava", held / "model"))
    processor.chat_template = CHAT.replace("PLACE", "<image>")
    processor.save_pretrained(held / "model")
    draw = np.random.default_rng(0)
    items = []
    for item in range(ITEMS):
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(held / f"{item}.png")
        question = " ".join(f"w{word}" for word in draw.integers(7, 90, 4 + item))
        items.append({"picture": str(held / f"{item}.png"), "question": question, "answer": "w9"})
    (held / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    for package in (LM_EVAL, LMMS_EVAL):
        (held / package.name).mkdir()
        (held / package.name / "functions.py").write_text(FUNCTIONS)
        (held / package.name / "five.yaml").write_text(TASK.replace("ITEMS", str(held / "items.jsonl")) + package.task)
    return held


@installed(LM_EVAL, LMMS_EVAL)
def test_five_items_of_a_pruned_model(package: Package, folder: Path) -> None:
    done = package.run(package.ours, folder, "pruned", "keep_ratio=1/4", "migration_depth=1", "lowering=eager", "strict=True")
    assert done.code == 0, done.log
    assert done.summary == [
        f"parvts_fx: {ITEMS} of {ITEMS} prompts pruned, with {ITEMS * KEPT} of their {ITEMS * VISUAL} visual tokens kept"]
    assert sorted(done.answers) == list(range(ITEMS)) and all(done.answers.values())
    (results,) = done.results
    assert "right,none" in results["results"]["five_pictures"]


@installed(LM_EVAL, LMMS_EVAL)
def test_all_kept_answers_as_the_stock_class(package: Package, folder: Path) -> None:
    stock = package.run(package.stock, folder, "stock")
    done = package.run(package.ours, folder, "all", "keep_ratio=1", "lowering=eager", "strict=True")
    assert stock.code == done.code == 0, stock.log + done.log
    assert not stock.summary
    assert done.summary == [
        f"parvts_fx: 0 of {ITEMS} prompts pruned", f"parvts_fx: {ITEMS} not pruned: all visual tokens are kept"]
    assert len(set(stock.answers.values())) > 1, "answers that depend on the item, so that equal ones tell something"
    assert done.answers == stock.answers


@installed(LMMS_EVAL)
def test_a_model_that_runs_whole_is_told_of(package: Package, folder: Path) -> None:
    """Where all warnings are ignored."""
    done = package.run(package.ours, folder, "whole", "prune=video", "lowering=eager")
    assert done.code == 0 and len(done.answers) == ITEMS, done.log
    assert "ParvtsWarning" not in done.log
    assert done.summary == [
        f"parvts_fx: 0 of {ITEMS} prompts pruned",
        f"parvts_fx: {ITEMS} not pruned: no visual features are merged into embeddings"]


@installed(LM_EVAL, LMMS_EVAL)
def test_strict_ends_with_an_error_and_no_results(package: Package, folder: Path) -> None:
    done = package.run(package.ours, folder, "strict", "prune=video", "lowering=eager", "strict=True")
    assert done.code == 1 and not done.results and not done.samples
    assert "parvts_fx: this multimodal prefill cannot be rewritten: no visual features are merged into embeddings" in done.log


@installed(LMMS_EVAL)
def test_empty_answers_in_place_of_errors_are_an_error(package: Package, folder: Path) -> None:
    """An option that does not fit the model is found in its first call."""
    done = package.run(package.ours, folder, "deep", "migration_depth=99", "lowering=eager")
    assert done.code == 1 and not done.results
    assert "option migration_depth=99: expected at most the model's 3 decoder layers" in done.log
    assert f"parvts_fx: {ITEMS} requests have not reached the model" in done.log


def test_options_among_the_arguments_of_a_model() -> None:
    given = {"pretrained": "folder", "keep_ratio": "1/9", "merge": "None", "migration_depth": 0.5, "score": "diverse",
             "strict": True, "batch_size": 1}
    assert take_options(given) == {
        "keep_ratio": 1 / 9, "merge": None, "migration_depth": 0.5, "score": "diverse", "strict": True}
    assert given == {"pretrained": "folder", "batch_size": 1}


def test_a_count_of_prompts() -> None:
    tally = Tally()
    visual = torch.ones(2, 8, dtype=torch.bool)
    for record in (parvts_fx.CallRecord(True, "", 8, 3, visual), parvts_fx.CallRecord(False, "why", 8, None, visual[:1]),
                   parvts_fx.CallRecord(False, "no graph has told")):
        tally(record)
    tally.lose(1)
    assert str(tally).splitlines() == [
        "parvts_fx: 2 of 4 prompts pruned, with 6 of their 16 visual tokens kept", "parvts_fx: 1 not pruned: why",
        "parvts_fx: 1 not pruned: no graph has told",
        "parvts_fx: 1 requests have not reached the model: an error in generate counts as an empty answer, see the log above"]
    with pytest.raises(SystemExit, match="1 requests have not reached the model"):
        Tally(strict=True).lose(1)
