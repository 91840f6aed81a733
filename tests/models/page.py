"""Writes ``docs/supported-models.md`` from the matrix's findings."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

from tests.models.matrix import TOLERANCE, Finding

DOCS = Path(__file__).parents[2] / "docs"
RESULTS, PAGE = DOCS / "supported-models.json", DOCS / "supported-models.md"


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


def write_page(found: dict[str, Finding]) -> None:
    lines = [
        "# Supported models", "",
        "Written by `python -m tests.models`; do not edit by hand.", "",
        counts(found), "",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}; every model is a small one with "
        "random weights, float32, lowering \"eager\", K = 1, a quarter of the visual tokens kept. *Rewritten* means: forward "
        "and generate (three greedy steps, a second prompt of another length, both fusions) equal the eager reference, all "
        f"logits and every cache tensor, to a relative error of {TOLERANCE:g}; and in a batch of two with left padding a "
        "sample's logits are what they are alone. *Unrewritten* means: runs as it is, with the same result as without this "
        "package (to 1e-6), and says why.", "",
        "| model | verdict | largest error | what is peculiar | reason, notes |", "| --- | --- | --- | --- | --- |",
    ]
    for name in sorted(found):
        entry = found[name]
        worst = max(entry.errors.values(), default=0.0)
        notes = "; ".join(filter(None, [entry.reason, *entry.notes])).replace("|", "\\|")
        lines.append(f"| {name} | {entry.verdict} | {worst:.0e} | {entry.trait} | {notes} |")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(lines) + "\n")
