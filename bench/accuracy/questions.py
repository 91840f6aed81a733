"""Questions about a scene with exact answers, by kind; the vocabulary they are made of.

Kinds that ask about large things (subject, ground, summary) stand against those that ask about small ones away from the
subject (corner, word, count, relation, list); answers have one to four words.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping

import numpy as np

from bench.accuracy.scenes import CELL, COLOURS, CORNERS, FONT, GROUNDS, SHAPES, TEXTURES, Scene

NUMBERS = ("zero", "one", "two", "three", "four")
ORDINALS = ("first", "second", "third")

SHARES = {"subject": 1, "ground": 1, "summary": 1, "corner": 3, "word": 4, "count": 6, "relation": 5, "list": 2}
"""Every kind of question, and how often each is drawn for training: more often where there is more to learn."""


@dataclasses.dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    """Words with spaces between them."""


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    """A random question of one kind."""
    return Question(kind, *_ASKERS[kind](scene, rng))


def draw_kinds(count: int, rng: np.random.Generator, shares: Mapping[str, float]) -> list[str]:
    """Kinds of questions, each drawn in proportion to its share."""
    weights = np.array(list(shares.values()), dtype=float)
    return [str(kind) for kind in rng.choice(list(shares), size=count, p=weights / weights.sum())]


def _subject(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    colour, shape = scene.subject.colour, scene.subject.shape
    return (("what colour is the subject", colour), ("what shape is the subject", shape),
            ("describe the subject", f"{colour} {shape}"))[rng.integers(3)]


def _ground(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return (("what colour is the background", scene.ground), ("what texture is the background", scene.texture),
            ("describe the background", f"{scene.ground} {scene.texture}"))[rng.integers(3)]


def _summary(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    return "describe the picture", f"{scene.subject.colour} {scene.subject.shape} {scene.ground} {scene.texture}"


def _corner(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    index = int(rng.integers(len(CORNERS)))
    place, thing = list(CORNERS)[index], scene.small[index]
    return ((f"what colour is {place}", thing.colour), (f"what shape is {place}", thing.shape),
            (f"what is {place}", f"{thing.colour} {thing.shape}"))[rng.integers(3)]


def _word(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    if rng.integers(2):
        return "read the word", " ".join(scene.word)
    index = int(rng.integers(len(ORDINALS)))
    return f"read the {ORDINALS[index]} letter", scene.word[index]


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    colour = str(rng.choice(list(COLOURS)))
    return f"how many small {colour} things", NUMBERS[sum(thing.colour == colour for thing in scene.small)]


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Which of two things that are alone in their colours stands further left, or higher, by a cell or more."""
    counts = Counter(thing.colour for thing in scene.small)
    single = [thing for thing in scene.small if counts[thing.colour] == 1]
    choices = []
    for one, other in itertools.permutations(single, 2):
        if one.left // CELL != other.left // CELL:
            nearer = one if one.left < other.left else other
            choices.append((f"which is further left {one.colour} or {other.colour}", nearer.colour))
        if one.top // CELL != other.top // CELL:
            nearer = one if one.top < other.top else other
            choices.append((f"which is higher {one.colour} or {other.colour}", nearer.colour))
    return choices[rng.integers(len(choices))]


def _list(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    corners = scene.small[:len(CORNERS)]
    if rng.integers(2):
        return "list the corner colours", " ".join(thing.colour for thing in corners)
    return "list the corner shapes", " ".join(thing.shape for thing in corners)


_ASKERS = {"subject": _subject, "ground": _ground, "summary": _summary, "corner": _corner, "word": _word,
           "count": _count, "relation": _relation, "list": _list}

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BEGIN, END, UNKNOWN, IMAGE_TOKEN = range(len(SPECIAL))


def vocabulary() -> tuple[str, ...]:
    """Every token; its place is its id."""
    phrases = ("USER: ASSISTANT: what colour shape texture is the subject background describe picture",
               "read word letter how many small things which further left higher or list corner colours shapes",
               *CORNERS, *ORDINALS, *NUMBERS, *COLOURS, *SHAPES, *GROUNDS, *TEXTURES, *FONT)
    return tuple(dict.fromkeys((*SPECIAL, *" ".join(phrases).split())))
