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
from bench.accuracy.examples import VISUAL, lay_out
from bench.accuracy.questions import END, IMAGE_TOKEN, PAD, SHARES, Question, ask, vocabulary
from bench.accuracy.scenes import GRID, draw, sample_scene
from bench.accuracy.ways import generate, load
from bench.plots import plot_patches
from bench.tables import Sheet
from tests import reference
from tests.clusters_reference import clusters_of, pictures_of


@dataclasses.dataclass(frozen=True)
class Shown:
    """One picture, a question of each kind, and what was answered."""

    picture: np.ndarray
    """[96, 96, 3] uint8"""

    questions: Sequence[Question]
    whole: list[str]
    dropped: list[str]
    """With few tokens, the others dropped: no merging, and a choice that does not look at places."""

    pruned: list[str]
    """With as few, as by default."""

    kept: torch.Tensor
    """[12, 12] bool: the patches of the subject group, for the first question"""

    stands_for: torch.Tensor
    """[12, 12] int64: the number of the kept patch that each patch is merged into"""

    expected: list[str]
    """The first words of the eager reference's pruned prefill, which those of ``pruned`` must be."""

    @property
    def holds(self) -> bool:
        return [answer.split()[:1] for answer in self.pruned] == [word.split()[:1] for word in self.expected]


@torch.no_grad()
def show_answers(keep_ratio: float, seed: int = 11) -> Shown:
    """Ask the trained model about one picture, whole and compiled with pruning."""
    model, rng = load(), stream(seed, "held out", 10**6 + 1)
    scene = sample_scene(rng)
    questions = [ask(scene, kind, rng) for kind in SHARES]
    examples = lay_out([scene], questions)
    batch = next(examples.batches(len(questions)))
    whole = words(generate(model, batch))
    answered = []
    for options in ({"merge": None, "score": "balanced"}, {}):
        pruning = parvts_fx.compile(copy.deepcopy(model), strict=True, keep_ratio=keep_ratio, **options)
        answered.append(words(generate(pruning, batch)))
        torch._dynamo.reset()  # else the next model is taken for this one with other sizes, and shares its limit of compiles
    dropped, pruned = answered
    rows, stands_for, expected = _reference(model, batch, keep_ratio)
    kept = torch.zeros(batch["input_ids"].shape[1], dtype=torch.bool)
    kept[rows] = True
    visual = batch["input_ids"][0] == IMAGE_TOKEN
    return Shown(draw(scene), questions, whole, dropped, pruned, kept[visual].view(GRID, GRID),
                 stands_for[visual].view(GRID, GRID), expected)


def _reference(
    model: Any, batch: dict[str, torch.Tensor], keep_ratio: float
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """The first question's kept rows, [prompt] which of them each visual row stands with, and every question's first word."""
    text = model.model.language_model
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inputs, visual = {**batch, "position_ids": positions}, batch["input_ids"] == IMAGE_TOKEN
    prefills = reference.prefill(
        model, text.layers, lambda hidden: model.lm_head(text.norm(hidden)), inputs, visual,
        stages=parvts_fx.Options(keep_ratio=keep_ratio).schedule)
    first = torch.stack([prefill.logits[-1].argmax() for prefill in prefills])
    subject = torch.zeros_like(visual[0])
    subject[prefills[0].rows] = True
    found = clusters_of(
        reference.record(model, text.layers, inputs).hidden[0][0], visual[0], subject & visual[0], pictures_of(visual[0]),
        torch.ones(visual.shape[1]))
    stands_for = torch.zeros(visual.shape[1], dtype=torch.int64)
    for number, (row, others) in enumerate(found.members.items()):
        stands_for[[row, *others]] = number
    return prefills[0].rows, stands_for, words(first[:, None])


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
                 ["question", "right answer", "all tokens", "others dropped", "parvts: others merged"],
                 [[question.text, question.answer, *(marked(answer, question) for answer in answers)]
                  for question, *answers in zip(shown.questions, shown.whole, shown.dropped, shown.pruned)])


def picture(shown: Shown, path: Path) -> Path:
    """The picture beside its kept patches, and which patches each of these stands for."""
    return plot_patches(shown.picture / 255, shown.kept, path, stands_for=shown.stands_for)
