"""Held-out scenes with one question of each kind, laid out in batches of one size for every way to answer them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bench.accuracy.batches import draw_all, stream
from bench.accuracy.model import build_tokenizer
from bench.accuracy.questions import END, IMAGE_TOKEN, PAD, Question
from bench.accuracy.tasks import PER_PICTURE, TIDY, Task

VISUAL = TIDY.visual


@dataclasses.dataclass(frozen=True)
class Examples:
    """Questions with their pictures, as many to a scene as there are kinds and one of each."""

    pixels: torch.Tensor
    """[scenes, pictures, 3, 96, 96] float32"""

    scene: torch.Tensor
    """[questions] int64: which scene is asked about"""

    ids: torch.Tensor
    """[questions, prompt] int64, padded on the left; one image token a patch"""

    mask: torch.Tensor
    """[questions, prompt] int64"""

    answers: torch.Tensor
    """[questions, longest answer + 1] int64: the words, the end, padding"""

    kinds: list[str]

    def __len__(self) -> int:
        return len(self.kinds)

    def batches(self, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """What ``generate`` takes; the last batch is dropped if it is smaller."""
        for start in range(0, len(self) - size + 1, size):
            rows = slice(start, start + size)
            yield {"input_ids": self.ids[rows], "attention_mask": self.mask[rows],
                   "pixel_values": self.pixels[self.scene[rows]].flatten(0, 1)}

    def with_visual(self, count: int) -> Examples:
        """The same prompts with ``count`` image tokens each, as many to each picture."""
        visual = self.ids == IMAGE_TOKEN
        within = (visual.cumsum(1) - 1) % PER_PICTURE
        left = ~visual | (within < count // self.pixels.shape[1])
        kept = self.ids[left].view(len(self.ids), -1)
        return dataclasses.replace(self, ids=kept, mask=(kept != PAD).long())


def sample_examples(scenes: int, seed: int, task: Task = TIDY) -> Examples:
    """Scenes that no training of the same seed sees."""
    rng = stream(seed, "held out", 10**6)
    sampled = [task.sample(rng) for _ in range(scenes)]
    return lay_out(sampled, [task.ask(scene, kind, rng) for scene in sampled for kind in task.kinds], task)


def lay_out(scenes: Sequence[Any], questions: Sequence[Question], task: Task = TIDY) -> Examples:
    """Prompts for as many questions to every scene, those of a scene one behind the other."""
    tokenizer = build_tokenizer(task)
    texts = tokenizer([task.prompt(question.text) for question in questions], padding=True, return_tensors="pt")
    ids = torch.stack([_spread(row) for row in texts["input_ids"]])
    answers = torch.full((len(questions), task.longest + 1), PAD)
    for row, question in zip(answers, questions):
        said = tokenizer.convert_tokens_to_ids(question.answer.split())
        row[:len(said) + 1] = torch.tensor([*said, END])
    scene = torch.arange(len(scenes)).repeat_interleave(len(questions) // len(scenes))
    return Examples(draw_all(scenes, task).unflatten(0, (len(scenes), -1)), scene, ids, (ids != PAD).long(), answers,
                    [question.kind for question in questions])


def _spread(row: torch.Tensor) -> torch.Tensor:
    """Every image token becomes one a patch."""
    return row.repeat_interleave(torch.where(row == IMAGE_TOKEN, PER_PICTURE, 1))


Answer = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""From a batch to the generated ids, [batch, any number]."""


@torch.no_grad()
def grade(answer: Answer, examples: Examples, size: int) -> np.ndarray:
    """[questions] bool: whether every word is right and nothing follows."""
    right = []
    for number, batch in enumerate(examples.batches(size)):
        wanted = examples.answers[number * size:(number + 1) * size]
        given = answer(batch)[:, :wanted.shape[1]]
        given = torch.nn.functional.pad(given, (0, wanted.shape[1] - given.shape[1]), value=PAD)
        after = (given == END).int().cumsum(1) - (given == END).int() > 0
        right.append((given.masked_fill(after, PAD) == wanted).all(1))
    return torch.cat(right).numpy()
