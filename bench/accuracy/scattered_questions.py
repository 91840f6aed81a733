"""Questions about pairs of scattered pictures with exact answers, by kind, and the words that they add to the vocabulary.

No answer is likelier than another before the pictures are seen, but for words of several letters, which are not guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from bench.accuracy.questions import NUMBERS, ORDINALS, Question, vocabulary
from bench.accuracy.scattered import ALIKE, LETTERS, Look, Pair, Scattered, ahead_in, only_in, telling
from bench.accuracy.scenes import COLOURS, SHAPES

PICTURES = ("first", "second")
PLACES = (*ORDINALS, "fourth", "fifth")[:LETTERS]

SCATTERED_SHARES = {"region": 3, "rest": 1, "only": 4, "long_word": 3, "count_alike": 4, "which_picture": 4, "more": 4}
"""Every kind of question, and how often each is drawn for training."""


def ask_pair(pair: Pair, kind: str, rng: np.random.Generator) -> Question:
    """A random question of one kind."""
    if kind in _BOTH:
        return Question(kind, *_BOTH[kind](pair, rng))
    which = int(rng.integers(2))
    text, answer = _ONE[kind](pair[which], rng)
    return Question(kind, f"in the {PICTURES[which]} picture {text}", answer)


def _region(scene: Scattered, rng: np.random.Generator) -> tuple[str, str]:
    region = scene.region
    return (("what colour is the region", region.ground), ("what texture is the region", region.texture),
            ("where is the region", region.side))[rng.integers(3)]


def _rest(scene: Scattered, rng: np.random.Generator) -> tuple[str, str]:
    return (("what colour is the rest", scene.ground), ("what texture is the rest", scene.texture),
            ("describe the rest", f"{scene.ground} {scene.texture}"))[rng.integers(3)]


def _only(scene: Scattered, rng: np.random.Generator) -> tuple[str, str]:
    """Of the things of one colour that all have one shape, or the other way round."""
    which = int(rng.integers(2))
    looks = telling(scene.looks, which)
    look = looks[rng.integers(len(looks))]
    return f"what {('shape', 'colour')[which]} are the {look[which]} things", look[1 - which]


def _long_word(scene: Scattered, rng: np.random.Generator) -> tuple[str, str]:
    if rng.integers(2):
        return "read the word", " ".join(scene.word)
    index = int(rng.integers(LETTERS))
    return f"read the {PLACES[index]} letter", scene.word[index]


def _count_alike(scene: Scattered, rng: np.random.Generator) -> tuple[str, str]:
    """Nothing and single things are to be had in every picture, a group's size in two of four: drawn so much more often."""
    by_count: dict[int, list[Look]] = {}
    for look in itertools.product(COLOURS, SHAPES):
        by_count.setdefault(scene.looks[look], []).append(look)
    weights = np.array([len(ALIKE) / 2 if count in ALIKE else 1.0 for count in by_count])
    count = int(rng.choice(list(by_count), p=weights / weights.sum()))
    colour, shape = by_count[count][rng.integers(len(by_count[count]))]
    return f"how many {colour} {shape} things", NUMBERS[count]


def _which_picture(pair: Pair, rng: np.random.Generator) -> tuple[str, str]:
    which = int(rng.integers(2))
    looks = only_in(pair, which)
    colour, shape = looks[rng.integers(len(looks))]
    return f"which picture has {colour} {shape} things", PICTURES[which]


def _more(pair: Pair, rng: np.random.Generator) -> tuple[str, str]:
    which = int(rng.integers(2))
    names = ahead_in(pair, which)
    return f"which picture has more {names[rng.integers(len(names))]} things", PICTURES[which]


_Asker = Callable[..., tuple[str, str]]
_ONE: dict[str, _Asker] = {"region": _region, "rest": _rest, "only": _only, "long_word": _long_word,
                           "count_alike": _count_alike}
"""About one of the two pictures."""

_BOTH: dict[str, _Asker] = {"which_picture": _which_picture, "more": _more}


def scattered_vocabulary() -> tuple[str, ...]:
    """Every token; those that the other task has come first, so that its model's embeddings can be taken over."""
    phrases = ("in where region rest are more has", *PICTURES, *PLACES)
    return tuple(dict.fromkeys((*vocabulary(), *" ".join(phrases).split())))
