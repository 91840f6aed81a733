"""What a trained model answers, whole and pruned: the first part of ``python -m bench.demo``.

The model is the small one under bench/accuracy/weights, trained on generated pictures; its card says what it can do.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import parvts_fx
from bench.accuracy.batches import stream
from bench.accuracy.examples import VISUAL, Examples, lay_out
from bench.accuracy.questions import END, IMAGE_TOKEN, PAD, SHARES, Question, ask, vocabulary
from bench.accuracy.scenes import GRID, draw, sample_scene
from bench.accuracy.ways import generate, load
from bench.plots import plot_patches
from bench.tables import Sheet
from tests import reference


@dataclasses.dataclass(frozen=True)
class Shown:
    """One picture, a question of each kind, and what was answered."""

    picture: np.ndarray
    """[96, 96, 3] uint8"""

    questions: Sequence[Question]
    whole: list[str]
    pruned: list[str]
    kept: torch.Tensor
    """[12, 12] bool: the patches of the subject group, for the first question"""

    expected: list[str]
    """The first words of the eager reference's pruned prefill, which those of ``pruned`` must be."""

    @property
    def holds(self) -> bool:
        return [answer.split()[:1] for answer in self.pruned] == [word.split()[:1] for word in self.expected]


@torch.no_grad()
def show_answers(keep_ratio: float, seed: int = 7) -> Shown:
    """Ask the trained model about one picture, whole and compiled with pruning."""
    model, rng = load(), stream(seed, "held out", 10**6 + 1)
    scene = sample_scene(rng)
    questions = [ask(scene, kind, rng) for kind in SHARES]
    examples = lay_out([scene], questions)
    batch = next(examples.batches(len(questions)))
    whole = words(generate(model, batch))
    fast = parvts_fx.compile(copy.deepcopy(model), strict=True, keep_ratio=keep_ratio)
    pruned = words(generate(fast, batch))
    rows, expected = _reference(model, examples, batch, keep_ratio)
    kept = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
    kept[rows] = True
    visual = batch["input_ids"][0] == IMAGE_TOKEN
    return Shown(draw(scene), questions, whole, pruned, kept[visual].view(GRID, GRID), expected)


def _reference(model: Any, examples: Examples, batch: dict[str, torch.Tensor],
               keep_ratio: float) -> tuple[torch.Tensor, list[str]]:
    """The first question's kept rows, and every question's first word."""
    text = model.model.language_model
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    prefills = reference.prefill(
        model, text.layers, lambda hidden: model.lm_head(text.norm(hidden)), {**batch, "position_ids": positions},
        batch["input_ids"] == IMAGE_TOKEN, stages=parvts_fx.Options(keep_ratio=keep_ratio).schedule)
    first = torch.stack([prefill.logits[-1].argmax() for prefill in prefills])
    return prefills[0].rows, words(first[:, None])


def words(ids: torch.Tensor) -> list[str]:
    """Generated ids up to the end, as text."""
    names = vocabulary()
    texts = []
    for row in ids.tolist():
        row = row[:row.index(END)] if END in row else row
        texts.append(" ".join(names[word] for word in row if word != PAD))
    return texts


def table(shown: Shown) -> Sheet:
    """Questions, right answers, and what the whole and the pruned model said."""
    def marked(text: str, question: Question) -> str:
        return text if text == question.answer else f"{text} **(wrong)**"

    return Sheet(f"A trained model, {VISUAL} visual tokens or {int(shown.kept.sum())}",
                 ["question", "right answer", "all tokens", "parvts"],
                 [[question.text, question.answer, marked(whole, question), marked(pruned, question)]
                  for question, whole, pruned in zip(shown.questions, shown.whole, shown.pruned)])


def picture(shown: Shown, path: Path) -> Path:
    """The picture beside its kept patches."""
    return plot_patches(shown.picture / 255, shown.kept, path)
