"""Training batches: a prompt's pictures and many questions in one sequence.

The pictures' tokens cost most, so they are paid once: a row is ``<s> USER:``, the pictures, and then for each question
``question ASSISTANT: answer </s>``. Each of these segments sees what stands before the questions and itself only, and
its positions go on where the last picture ends, so that its logits are those it has alone behind the pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bench.accuracy.model import MEAN, STD
from bench.accuracy.questions import END, PAD, Question, draw_kinds
from bench.accuracy.tasks import TIDY, Task

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of pictures with their questions; S is the longest row's number of tokens."""

    pixels: torch.Tensor
    """[batch * pictures, 3, 96, 96] float32, normalised; those of a row one behind the other"""

    ids: torch.Tensor
    """[batch, S] int64"""

    positions: torch.Tensor
    """[batch, S] int64"""

    mask: torch.Tensor
    """[batch, 1, S, S] bool, true where a row's token (third axis) sees another (fourth)"""

    targets: torch.Tensor
    """[batch, S] int64: the next token where that is a word of an answer or its end, else -100"""

    segments: torch.Tensor
    """[batch, S] int64: 0 in front of the questions, then the question's number from 1, -1 padding"""

    labels: torch.Tensor
    """[batch * pictures, 144, labels] int64: what each patch shows (``Task.labels``)"""

    questions: Sequence[Sequence[Question]]


def stream(seed: int, split: str, step: int) -> np.random.Generator:
    """The random numbers of one batch: a function of its step, so that a resumed training sees the same pictures."""
    return np.random.default_rng([seed, {"vision": 0, "train": 1, "held out": 2}[split], step])


def normalise(pictures: np.ndarray) -> torch.Tensor:
    """[batch, 96, 96, 3] uint8 to [batch, 3, 96, 96] float32, as the processor does it."""
    return torch.from_numpy((pictures.astype(np.float32) / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def draw_all(scenes: Sequence[Any], task: Task) -> torch.Tensor:
    """Every scene's pictures, [scenes * pictures, 3, 96, 96] float32."""
    return normalise(np.concatenate([task.draw(scene) for scene in scenes]))


def label_all(scenes: Sequence[Any], task: Task) -> torch.Tensor:
    """What their patches show, [scenes * pictures, 144, labels] int64."""
    return torch.from_numpy(np.concatenate([task.label(scene) for scene in scenes]))


def vision_batch(rng: np.random.Generator, size: int, task: Task = TIDY) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [size, 3, 96, 96] and what each patch shows, [size, 144, labels]."""
    scenes = [task.sample(rng) for _ in range(size // task.pictures)]
    return draw_all(scenes, task), label_all(scenes, task)


def question_batch(
    rng: np.random.Generator, size: int, questions: int, shares: Mapping[str, float] | None = None, task: Task = TIDY
) -> Batch:
    """Rows of random scenes with ``questions`` questions each, of kinds drawn in proportion to their shares."""
    scenes = [task.sample(rng) for _ in range(size)]
    return pack(scenes, [[task.ask(scene, kind, rng) for kind in draw_kinds(questions, rng, shares or task.shares)]
                         for scene in scenes], task)


def pack(scenes: Sequence[Any], questions: Sequence[Sequence[Question]], task: Task = TIDY) -> Batch:
    """Lay out every scene with its questions, padded on the right."""
    rows, front = [], len(task.prefix)
    for asked in questions:
        ids, positions, targets, segments = list(task.prefix), list(range(front)), [IGNORED] * front, [0] * front
        for number, question in enumerate(asked, 1):
            words = [task.ids[word] for word in f"{question.text} ASSISTANT:".split()]
            answer = [task.ids[word] for word in question.answer.split()] + [END]
            ids += words + answer
            positions += range(front, front + len(words) + len(answer))
            targets += [IGNORED] * (len(words) - 1) + answer + [IGNORED]
            segments += [number] * (len(words) + len(answer))
        rows.append((ids, positions, targets, segments))
    # a multiple of 16, so that few different sizes come up
    longest = -(-max(len(ids) for ids, *_ in rows) // 16) * 16

    def padded(column: int, value: int) -> torch.Tensor:
        return torch.tensor([row[column] + [value] * (longest - len(row[column])) for row in rows])

    segments = padded(3, -1)
    asking, seen = segments[:, :, None], segments[:, None, :]
    mask = ((seen == 0) | (seen == asking)) & torch.ones(longest, longest, dtype=torch.bool).tril()
    return Batch(draw_all(scenes, task), padded(0, PAD), padded(1, 0), mask[:, None], padded(2, IGNORED), segments,
                 label_all(scenes, task), questions)
