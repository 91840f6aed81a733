"""The two tasks: what a prompt shows, what is asked about it, and the words that this takes.

"tidy" has one picture to a prompt: a large subject, small things in cells, one background. "scattered" has two, which were
made to refute merging. A model is trained on one of them, and evaluated on the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bench.accuracy.questions import BEGIN, IMAGE_TOKEN, SHARES, SPECIAL, Question, ask, vocabulary
from bench.accuracy.scattered import LETTERS, SCATTERED_LABELS, draw_pair, label_pair, sample_pair
from bench.accuracy.scattered_questions import SCATTERED_SHARES, ask_pair, scattered_vocabulary
from bench.accuracy.scenes import GRID, LABELS, draw, patch_labels, sample_scene

IMAGE_WORD = SPECIAL[IMAGE_TOKEN]
PER_PICTURE = GRID**2
"""Visual tokens."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that depends on the task. A scene is what one prompt shows."""

    name: str
    images: str
    """How a prompt begins behind ``USER:``, an image's word for every picture."""

    sample: Callable[[np.random.Generator], Any]
    """A random scene."""

    draw: Callable[[Any], np.ndarray]
    """A scene's pictures, [pictures, 96, 96, 3] uint8."""

    label: Callable[[Any], np.ndarray]
    """What each of their patches shows, [pictures, 144, labels] int64."""

    labels: Mapping[str, int]
    """The kinds of labels with their numbers of classes."""

    ask: Callable[[Any, str, np.random.Generator], Question]
    """A random question of one kind about a scene."""

    shares: Mapping[str, float]
    """Every kind of question, and how often each is drawn for training."""

    words: tuple[str, ...]
    """The vocabulary; a word's place is its id."""

    longest: int
    """Words of the longest answer."""

    @property
    def pictures(self) -> int:
        """To a prompt."""
        return self.images.split().count(IMAGE_WORD)

    @property
    def visual(self) -> int:
        """Visual tokens of a prompt."""
        return self.pictures * PER_PICTURE

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.shares)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """Of the words."""
        return {word: index for index, word in enumerate(self.words)}

    @functools.cached_property
    def prefix(self) -> list[int]:
        """The ids in front of a question, one image token a patch."""
        ids = [BEGIN]
        for word in f"USER: {self.images}".split():
            ids += [self.ids[word]] * (PER_PICTURE if word == IMAGE_WORD else 1)
        return ids

    def prompt(self, question: str) -> str:
        """LLaVA's format; the processor turns each image's word into one token a patch."""
        return f"USER: {self.images} {question} ASSISTANT:"


TIDY = Task("tidy", IMAGE_WORD, sample_scene, lambda scene: draw(scene)[None], lambda scene: patch_labels(scene)[None], LABELS,
            ask, SHARES, vocabulary(), longest=4)
SCATTERED = Task("scattered", f"first {IMAGE_WORD} second {IMAGE_WORD}", sample_pair, draw_pair, label_pair, SCATTERED_LABELS,
                 ask_pair, SCATTERED_SHARES, scattered_vocabulary(), longest=LETTERS)
TASKS = {task.name: task for task in (TIDY, SCATTERED)}
