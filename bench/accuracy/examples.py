"""Held-out pictures with one question of each kind, laid out in batches of one size for every way to answer them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from bench.accuracy.batches import normalise, stream
from bench.accuracy.model import build_tokenizer, prompt
from bench.accuracy.questions import END, IMAGE_TOKEN, PAD, SHARES, Question, ask
from bench.accuracy.scenes import GRID, Scene, draw, sample_scene

VISUAL = GRID**2
LONGEST_ANSWER = 4
"""In words."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Questions with their pictures, ``len(SHARES)`` to a picture and one of each kind."""

    pixels: torch.Tensor
    """[pictures, 3, 96, 96] float32"""

    picture: torch.Tensor
    """[questions] int64: which picture is asked about"""

    ids: torch.Tensor
    """[questions, prompt] int64, padded on the left; VISUAL image tokens each"""

    mask: torch.Tensor
    """[questions, prompt] int64"""

    answers: torch.Tensor
    """[questions, LONGEST_ANSWER + 1] int64: the words, the end, padding"""

    kinds: list[str]

    def __len__(self) -> int:
        return len(self.kinds)

    def batches(self, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """What ``generate`` takes; the last batch is dropped if it is smaller."""
        for start in range(0, len(self) - size + 1, size):
            rows = slice(start, start + size)
            yield {"input_ids": self.ids[rows], "attention_mask": self.mask[rows],
                   "pixel_values": self.pixels[self.picture[rows]]}

    def with_visual(self, count: int) -> Examples:
        """The same prompts with ``count`` image tokens each."""
        start = (self.ids == IMAGE_TOKEN).int().argmax(1)
        kept = torch.stack([torch.cat([row[:s], row[s:s + 1].expand(count), row[s + VISUAL:]])
                            for row, s in zip(self.ids, start.tolist())])
        return dataclasses.replace(self, ids=kept, mask=(kept != PAD).long())


def sample_examples(pictures: int, seed: int) -> Examples:
    """Pictures that no training of the same seed sees."""
    rng = stream(seed, "held out", 10**6)
    scenes = [sample_scene(rng) for _ in range(pictures)]
    return lay_out(scenes, [ask(scene, kind, rng) for scene in scenes for kind in SHARES])


def lay_out(scenes: Sequence[Scene], questions: Sequence[Question]) -> Examples:
    """Prompts for as many questions to every scene, those of a scene one behind the other."""
    tokenizer = build_tokenizer()
    texts = tokenizer([prompt(question.text) for question in questions], padding=True, return_tensors="pt")
    ids = torch.stack([_spread(row) for row in texts["input_ids"]])
    answers = torch.full((len(questions), LONGEST_ANSWER + 1), PAD)
    for row, question in zip(answers, questions):
        said = tokenizer.convert_tokens_to_ids(question.answer.split())
        row[:len(said) + 1] = torch.tensor([*said, END])
    picture = torch.arange(len(scenes)).repeat_interleave(len(questions) // len(scenes))
    return Examples(normalise(np.stack([draw(scene) for scene in scenes])), picture, ids, (ids != PAD).long(), answers,
                    [question.kind for question in questions])


def _spread(row: torch.Tensor) -> torch.Tensor:
    """One image token becomes one a patch."""
    at = int((row == IMAGE_TOKEN).nonzero()[0, 0])
    return torch.cat([row[:at], row[at:at + 1].expand(VISUAL), row[at + 1:]])


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
