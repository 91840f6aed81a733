"""Writes ``docs/supported-models.md`` from the matrix's findings, and what ``parvts-fx models`` prints of them."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

from parvts_fx.command.listing import FILE
from tests.models.generating import SCHEDULES
from tests.models.matrix import TOLERANCE, Finding

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, PAGE = DOCS / "supported-models.json", DOCS / "supported-models.md"
LIST = DOCS.parent / "parvts_fx" / "command" / FILE
"""Part of the package, where docs are not."""


def load() -> dict[str, Finding]:
    """What is known so far, by name."""
    if not RESULTS.exists():
        return {}
    return {entry["name"]: Finding(**entry) for entry in json.loads(RESULTS.read_text())["models"]}


def save(found: dict[str, Finding]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    ordered = [dataclasses.asdict(found[name]) for name in sorted(found)]
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    RESULTS.write_text(json.dumps(versions | {"models": ordered}, indent=1) + "\n")


def counts(found: dict[str, Finding]) -> str:
    """How many of the library's names have which verdict, in words."""
    verdicts = collections.Counter(found[name].verdict if name in found else "not examined" for name in NAMES)
    listed = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.most_common())
    return f"Of {len(NAMES)} image-text-to-text architectures: {listed}."


def _error(entry: Finding, schedule: str) -> str:
    """The largest one with a schedule; a dash where it does not run rewritten."""
    errors = [error for check, error in entry.errors.items() if check.split(", ")[1:2] == [schedule]]
    return f"{max(errors):.0e}" if errors and f", {schedule}" not in entry.reason else "-"


def write_page(found: dict[str, Finding]) -> None:
    lines = [
        "# Supported models", "",
        "Written by `python -m tests.models`; do not edit by hand.", "",
        counts(found), "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}; every model is a small one with "
        "random weights, float32, lowering \"eager\". *Rewritten* means: with each of four schedules forward and generate "
        "(three greedy steps, then a second prompt of another length) equal the eager reference, all logits and every cache "
        f"tensor, to a relative error of {TOLERANCE:g}; and in a batch of two with left padding a sample's logits are what "
        "they are alone. The schedules: a quarter of the visual tokens kept, the others beside them in the first layer (K = 1), "
        "with *attention* as fusion, or with a constant weight of *0.4*; *two stages*, of which the first keeps half, in the "
        "same way, and the second the quarter that the last row of the prompt attends to most in the layer in front: at the "
        "last layer that runs all rows and whose choice is clear (where that is the second one, the first stage drops at "
        "once); and *merged*, a quarter chosen at layer 1 and the others merged into them in front of layer 2, where the notes "
        "say which steps of merging the model has a place for. *Rewritten in one stage*: not with the third; *unmerged*: not "
        "with the fourth. *Unrewritten* means: runs as it is, with the same result as without this package (to 1e-6), and says "
        "why.", "",
        f"The columns {', '.join(SCHEDULES)} hold the largest error with that schedule.", "",
        f"| model | verdict | {' | '.join(SCHEDULES)} | what is peculiar | reason, notes |",
        "| --- | --- |" + " --- |" * len(SCHEDULES) + " --- | --- |",
    ]
    for name in sorted(found):
        entry = found[name]
        errors = " | ".join(_error(entry, schedule) for schedule in SCHEDULES)
        notes = "; ".join(filter(None, [entry.reason, *entry.notes])).replace("|", "\\|")
        lines.append(f"| {name} | {entry.verdict} | {errors} | {entry.trait} | {notes} |")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n")
    write_list()


def write_list() -> None:
    """The short form of what :func:`save` has written."""
    held = json.loads(RESULTS.read_text())
    short = [{name: model[name] for name in ("name", "verdict", "trait", "reason")} for model in held["models"]]
    LIST.write_text(json.dumps(held | {"models": short}, indent=1) + "\n")
