"""Training batches: one picture and many questions in one sequence.

The picture's tokens cost most, so they are paid once: a row is ``<s> USER:``, the picture, and then for each question
``question ASSISTANT: answer </s>``. Each of these segments sees what stands before the questions and itself only, and
its positions go on where the picture ends, so that its logits are those it has alone behind the picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from bench.accuracy.model import MEAN, STD
from bench.accuracy.questions import BEGIN, END, IMAGE_TOKEN, PAD, SHARES, Question, ask_many, vocabulary
from bench.accuracy.scenes import GRID, Scene, draw, patch_labels, sample_scene

IDS = {word: index for index, word in enumerate(vocabulary())}
PREFIX = [BEGIN, IDS["USER:"]] + [IMAGE_TOKEN] * GRID**2
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of pictures with their questions; S is the longest row's number of tokens."""

    pixels: torch.Tensor
    """[batch, 3, 96, 96] float32, normalised"""

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
    """[batch, 144, labels] int64: what each patch shows (scenes.LABELS)"""

    questions: list[list[Question]]


def stream(seed: int, split: str, step: int) -> np.random.Generator:
    """The random numbers of one batch: a function of its step, so that a resumed training sees the same pictures."""
    return np.random.default_rng([seed, {"vision": 0, "train": 1, "held out": 2}[split], step])


def normalise(pictures: np.ndarray) -> torch.Tensor:
    """[batch, 96, 96, 3] uint8 to [batch, 3, 96, 96] float32, as the processor does it."""
    return torch.from_numpy((pictures.astype(np.float32) / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def vision_batch(rng: np.random.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [size, 3, 96, 96] and what each patch shows, [size, 144, labels]."""
    scenes = [sample_scene(rng) for _ in range(size)]
    return (normalise(np.stack([draw(scene) for scene in scenes])),
            torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes])))


def question_batch(
    rng: np.random.Generator, size: int, questions: int, shares: Mapping[str, float] = SHARES
) -> Batch:
    """Random pictures with ``questions`` questions each, of kinds drawn in proportion to their shares."""
    scenes = [sample_scene(rng) for _ in range(size)]
    return pack(scenes, [ask_many(scene, questions, rng, shares) for scene in scenes])


def pack(scenes: list[Scene], questions: list[list[Question]]) -> Batch:
    """Lay out every scene with its questions, padded on the right."""
    rows = []
    for asked in questions:
        ids, positions, targets, segments = list(PREFIX), list(range(len(PREFIX))), [IGNORED] * len(PREFIX), [0] * len(PREFIX)
        for number, question in enumerate(asked, 1):
            words = [IDS[word] for word in f"{question.text} ASSISTANT:".split()]
            answer = [IDS[word] for word in question.answer.split()] + [END]
            ids += words + answer
            positions += range(len(PREFIX), len(PREFIX) + len(words) + len(answer))
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
    pixels = normalise(np.stack([draw(scene) for scene in scenes]))
    labels = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))
    return Batch(pixels, padded(0, PAD), padded(1, 0), mask[:, None], padded(2, IGNORED), segments, labels, questions)
