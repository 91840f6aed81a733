"""A second style of pictures, made to refute merging: alike things lie scattered and the background changes.

9 things of 10 pixels lie anywhere, free of cells and patches. Two groups of them are exactly alike in colour and shape,
2 to 4 things each, and what they have in common with the others is one of the two at most. A rectangle at one side of the
picture has another ground and another texture than the rest, and a word of five letters stands somewhere. Two pictures
make a pair, which one prompt shows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable

import numpy as np

from bench.accuracy.scenes import (
    COLOURS,
    FONT,
    GRID,
    GROUNDS,
    IMAGE,
    LABELS,
    PATCH,
    SHAPES,
    TEXTURES,
    Thing,
    background,
    finish,
    label_patches,
)

THINGS, SIZE = 9, 10
ALIKE = (2, 3, 4)
"""A group of alike things has one of these sizes, the other group another."""

LETTERS = 5
SIDES = ("left", "right", "top", "bottom")
LEAD = 2
"""By how many things one picture is ahead of the other where it is asked which has more."""

SCATTERED_LABELS = LABELS | {"order": LETTERS + 1, "region": 2}
"""What a patch can be asked about, as ``scenes.LABELS``, and whether it lies in the region; ground, texture and region are
those of a patch's middle."""

Look = tuple[str, str]
"""A colour and a shape: things of one look are exactly alike."""


@dataclasses.dataclass(frozen=True)
class Region:
    """The rectangle with a background of its own; in pixels, and at the side that it touches."""

    side: str
    top: int
    left: int
    height: int
    width: int
    ground: str
    texture: str

    @property
    def rows(self) -> tuple[slice, slice]:
        """Of an array with a picture's pixels."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


@dataclasses.dataclass(frozen=True)
class Scattered:
    """All that one picture shows."""

    ground: str
    texture: str
    """Of the rest, which the region leaves."""

    region: Region
    things: tuple[Thing, ...]
    word: str
    word_at: tuple[int, int]
    """Row and column of the first letter, in patches; a letter fills one."""

    noise: int

    @property
    def looks(self) -> Counter[Look]:
        """How many things are alike, for every colour with a shape that there is."""
        return Counter((thing.colour, thing.shape) for thing in self.things)

    @property
    def counts(self) -> Counter[str]:
        """How many things are of each colour, and how many of each shape."""
        return Counter(name for thing in self.things for name in (thing.colour, thing.shape))


Pair = tuple[Scattered, Scattered]


def telling(looks: Iterable[Look], which: int) -> list[Look]:
    """Looks that are alone with their colour (0), or with their shape (1)."""
    names = Counter(look[which] for look in set(looks))
    return sorted(look for look in set(looks) if names[look[which]] == 1)


def sample_pair(rng: np.random.Generator) -> Pair:
    """Two random pictures such that every kind of question can be asked about them, with either answer."""
    while True:
        pair = sample_scattered(rng), sample_scattered(rng)
        if all(only_in(pair, which) and ahead_in(pair, which) for which in range(2)):
            return pair


def only_in(pair: Pair, which: int) -> list[Look]:
    """Looks of things that one picture has and the other has not."""
    return [look for look in pair[which].looks if look not in pair[1 - which].looks]


def ahead_in(pair: Pair, which: int) -> list[str]:
    """Colours and shapes of which one picture has ``LEAD`` things or more above the other's."""
    counts, others = pair[which].counts, pair[1 - which].counts
    return [name for name in (*COLOURS, *SHAPES) if counts[name] >= others[name] + LEAD]


def sample_scattered(rng: np.random.Generator) -> Scattered:
    """A random picture with 9 things, two groups of which are alike, about which every kind of question can be asked."""
    sizes = rng.choice(ALIKE, size=2, replace=False)
    counts = [*sizes, *[1] * int(THINGS - sizes.sum())]
    known = list(itertools.product(COLOURS, SHAPES))
    while True:
        looks = [known[index] for index in np.repeat(rng.permutation(len(known))[:len(counts)], counts)]
        if telling(looks, 0) and telling(looks, 1):
            break
    (ground, other), (texture, another) = (rng.permutation(names)[:2] for names in (list(GROUNDS), TEXTURES))
    region = _sample_region(rng, str(other), str(another))
    word = "".join(rng.choice(list(FONT), size=LETTERS))
    word_at = int(rng.integers(GRID)), int(rng.integers(GRID - LETTERS + 1))
    return Scattered(str(ground), str(texture), region, _place(rng, looks, word_at), word, word_at, int(rng.integers(2**31)))


def _sample_region(rng: np.random.Generator, ground: str, texture: str) -> Region:
    """From a side 28 to 44 pixels deep, and 56 to 96 of the picture's 96 pixels along it."""
    side = str(rng.choice(SIDES))
    deep, along = int(rng.integers(28, 45)), int(rng.integers(56, IMAGE + 1))
    start = int(rng.integers(IMAGE - along + 1))
    far = IMAGE - deep if side in ("right", "bottom") else 0
    place = (start, far, along, deep) if side in ("left", "right") else (far, start, deep, along)
    return Region(side, *place, ground, texture)


def _place(rng: np.random.Generator, looks: list[Look], word_at: tuple[int, int]) -> tuple[Thing, ...]:
    """Things anywhere, a pixel or more apart and off the word; there is always room for one more."""
    free = np.ones((IMAGE - SIZE + 1,) * 2, dtype=bool)
    top, left = (place * PATCH for place in word_at)
    free[max(0, top - SIZE + 1):top + PATCH, max(0, left - SIZE + 1):left + LETTERS * PATCH] = False
    things = []
    for colour, shape in looks:
        while True:
            top, left = (int(place) for place in rng.integers(len(free), size=2))
            if free[top, left]:
                break
        free[max(0, top - SIZE):top + SIZE + 1, max(0, left - SIZE):left + SIZE + 1] = False
        things.append(Thing(colour, shape, top, left, SIZE))
    return tuple(things)


def draw_pair(pair: Pair) -> np.ndarray:
    """Both pictures, [2, 96, 96, 3] uint8."""
    return np.stack([draw_scattered(scene) for scene in pair])


def draw_scattered(scene: Scattered) -> np.ndarray:
    """The picture, [96, 96, 3] uint8."""
    picture, region = background(scene.ground, scene.texture), scene.region
    picture[region.rows] = background(region.ground, region.texture)[region.rows]
    return finish(picture, scene.things, scene.word, scene.word_at, scene.noise)


def label_pair(pair: Pair) -> np.ndarray:
    """What each patch of both pictures shows, [2, 144, labels] int64."""
    return np.stack([label_scattered(scene) for scene in pair])


def label_scattered(scene: Scattered) -> np.ndarray:
    """What each patch shows, [144, labels] int64 in the order of ``SCATTERED_LABELS``."""
    within = np.zeros((IMAGE, IMAGE), dtype=bool)
    within[scene.region.rows] = True
    inside = within[PATCH // 2::PATCH, PATCH // 2::PATCH]
    grounds = np.where(inside, list(GROUNDS).index(scene.region.ground), list(GROUNDS).index(scene.ground))
    textures = np.where(inside, TEXTURES.index(scene.region.texture), TEXTURES.index(scene.texture))
    labels = label_patches([(2, thing) for thing in scene.things], scene.word, scene.word_at, grounds, textures)
    return np.concatenate([labels, inside.reshape(-1, 1)], axis=1)
