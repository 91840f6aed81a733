"""Seeded synthetic pictures: a large subject, small things and a written word on a textured background.

A picture has 96 x 96 pixels: 12 x 12 patches of 8 pixels as the model cuts it, 6 x 6 cells of 16 pixels as things are
placed. The subject lies in a box of 3 x 3 cells about the middle. Small things have 12 pixels, one to a cell, and do
not line up with patches, so each is spread over two to four of them. Every corner cell holds one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

IMAGE, PATCH, CELL = 96, 8, 16
GRID, CELLS = IMAGE // PATCH, IMAGE // CELL
SMALL = 12
SUBJECT_BOX = 3
SUBJECT_SIZES = (34, 40, 46)

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (40, 60, 230),
           "yellow": (240, 225, 40), "purple": (140, 30, 170), "cyan": (40, 210, 220)}
SHAPES = ("square", "circle", "triangle", "cross")
GROUNDS = {"white": (240, 240, 240), "grey": (130, 130, 130), "brown": (125, 80, 40), "pink": (250, 165, 190)}
TEXTURES = ("plain", "striped", "dotted", "checked")
FONT = {
    "A": (0x0E, 0x11, 0x11, 0x1F, 0x11, 0x11, 0x11), "C": (0x0F, 0x10, 0x10, 0x10, 0x10, 0x10, 0x0F),
    "H": (0x11, 0x11, 0x11, 0x1F, 0x11, 0x11, 0x11), "I": (0x04, 0x04, 0x04, 0x04, 0x04, 0x04, 0x04),
    "L": (0x10, 0x10, 0x10, 0x10, 0x10, 0x10, 0x1F), "T": (0x1F, 0x04, 0x04, 0x04, 0x04, 0x04, 0x04),
    "V": (0x11, 0x11, 0x11, 0x11, 0x11, 0x0A, 0x04), "Z": (0x1F, 0x01, 0x02, 0x04, 0x08, 0x10, 0x1F),
}
"""Letters in 5 x 7 pixels, a number a row, the left pixel its highest bit."""

LETTERS = 3
CORNERS = {"top left": (0, 0), "top right": (0, CELLS - 1), "bottom left": (CELLS - 1, 0),
           "bottom right": (CELLS - 1, CELLS - 1)}
COUNT_WEIGHTS = (0.2, 0.3, 0.2, 0.15, 0.15)
"""How likely a colour is to be borne by zero, one, ... four small things."""


@dataclasses.dataclass(frozen=True)
class Thing:
    """One drawn object; ``top``, ``left`` and ``size`` in pixels."""

    colour: str
    shape: str
    top: int
    left: int
    size: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """All that a picture shows, and so all that questions can ask about."""

    ground: str
    texture: str
    subject: Thing
    small: tuple[Thing, ...]
    """The first four stand in the corners, in the order of ``CORNERS``."""

    word: str
    word_at: tuple[int, int]
    """Row and column of the first letter, in patches; a letter fills one."""

    noise: int
    """Seed of the pixels' noise."""


def sample_scene(rng: np.random.Generator) -> Scene:
    """A random scene with 6 to 11 small things and at least two colours that only one of them bears."""
    while True:
        counts = rng.choice(len(COUNT_WEIGHTS), size=len(COLOURS), p=COUNT_WEIGHTS)
        if 6 <= counts.sum() <= 11 and (counts == 1).sum() >= 2:
            break
    colours = rng.permutation(np.repeat(list(COLOURS), counts))
    box = rng.integers(1, CELLS - SUBJECT_BOX, size=2)
    size = int(rng.choice(SUBJECT_SIZES))
    top, left = box * CELL + rng.integers(0, SUBJECT_BOX * CELL - size + 1, size=2)
    subject = Thing(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), int(top), int(left), size)

    taken = np.zeros((CELLS, CELLS), dtype=bool)
    taken[box[0]:box[0] + SUBJECT_BOX, box[1]:box[1] + SUBJECT_BOX] = True
    for cell in CORNERS.values():
        taken[cell] = True
    starts = np.argwhere(~(taken[:, :-1] | taken[:, 1:]))
    row, column = starts[rng.integers(len(starts))]
    taken[row, column:column + 2] = True
    per_cell = CELL // PATCH
    word_at = (int(row * per_cell + rng.integers(per_cell)),
               int(column * per_cell + rng.integers(2 * per_cell - LETTERS + 1)))
    word = "".join(rng.choice(list(FONT), size=LETTERS))

    cells = list(CORNERS.values()) + [tuple(cell) for cell in rng.permutation(np.argwhere(~taken))]
    shapes = rng.choice(SHAPES, size=len(colours))
    jitter = rng.integers(0, CELL - SMALL + 1, size=(len(colours), 2))
    small = tuple(
        Thing(str(colour), str(shape), int(cell[0] * CELL + shift[0]), int(cell[1] * CELL + shift[1]), SMALL)
        for colour, shape, cell, shift in zip(colours, shapes, cells, jitter))
    return Scene(str(rng.choice(list(GROUNDS))), str(rng.choice(TEXTURES)), subject, small, word, word_at,
                 int(rng.integers(2**31)))


@functools.cache
def stencil(shape: str, size: int) -> np.ndarray:
    """The pixels of a shape, [size, size] bool."""
    y, x = np.mgrid[:size, :size] + 0.5
    y, x = 2 * y / size - 1, 2 * x / size - 1
    if shape == "circle":
        return y * y + x * x <= 1
    if shape == "triangle":
        return np.abs(x) <= (y + 1) / 2
    if shape == "cross":
        return np.minimum(np.abs(x), np.abs(y)) <= 0.34
    return np.maximum(np.abs(x), np.abs(y)) <= 0.93


@functools.cache
def _texture(name: str) -> np.ndarray:
    """Brightness factors of a background, [96, 96, 1]; all repeat with the patch but are no two alike in one."""
    y, x = np.mgrid[:IMAGE, :IMAGE] % PATCH
    dark = {"plain": np.zeros_like(y, dtype=bool), "striped": y < 3, "dotted": (y - 4) ** 2 + (x - 4) ** 2 < 6,
            "checked": (y < 4) ^ (x < 4)}[name]
    return np.where(dark, 0.72, 1.0)[..., None].astype(np.float32)


@functools.cache
def _letter(letter: str) -> np.ndarray:
    """White on black, [8, 8, 1] in 0..255."""
    tile = np.zeros((PATCH, PATCH), dtype=np.float32)
    for row, bits in enumerate(FONT[letter]):
        tile[row, 1:6] = [255 * (bits >> (4 - column) & 1) for column in range(5)]
    return tile[..., None]


@functools.cache
def _noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 8, (IMAGE, IMAGE, 3)).astype(np.float32)


def background(ground: str, texture: str) -> np.ndarray:
    """A picture of nothing else, [96, 96, 3] float32 in 0..255."""
    return _texture(texture) * np.array(GROUNDS[ground], dtype=np.float32)


def draw(scene: Scene) -> np.ndarray:
    """The picture, [96, 96, 3] uint8."""
    things = (scene.subject, *scene.small)
    return finish(background(scene.ground, scene.texture), things, scene.word, scene.word_at, scene.noise)


def finish(picture: np.ndarray, things: Sequence[Thing], word: str, word_at: tuple[int, int], noise: int) -> np.ndarray:
    """Things, a word and noise on a background: the picture as [96, 96, 3] uint8."""
    for thing in things:
        region = picture[thing.top:thing.top + thing.size, thing.left:thing.left + thing.size]
        region[stencil(thing.shape, thing.size)] = COLOURS[thing.colour]
    row, column = (place * PATCH for place in word_at)
    for index, letter in enumerate(word):
        picture[row:row + PATCH, column + index * PATCH:column + (index + 1) * PATCH] = _letter(letter)
    # one of 64 fixed fields of noise, shifted: a fresh one would take longer than all the rest
    shift = np.random.default_rng(noise).integers(IMAGE, size=2)
    picture += np.roll(_noise(noise % 64), shift, (0, 1))
    return picture.clip(0, 255).astype(np.uint8)


LABELS = {"kind": 4, "colour": len(COLOURS) + 1, "shape": len(SHAPES) + 1, "letter": len(FONT) + 1,
          "middle": 3,
          "order": LETTERS + 1, "row": GRID, "column": GRID, "ground": len(GROUNDS), "texture": len(TEXTURES)}
"""What a patch can be asked about, with the number of classes. 0 means none, but for the last four. "middle" marks the
one patch with the middle of a thing, 1 for the subject and 2 for small ones: what counting needs; "order" says which of the
word's letters stands here."""

EVERYWHERE = ("row", "column", "ground", "texture")
"""Labels without a class for none."""


def patch_labels(scene: Scene) -> np.ndarray:
    """What each patch shows, [144, labels] int64 in the order of ``LABELS``."""
    grounds = np.full((GRID, GRID), list(GROUNDS).index(scene.ground))
    textures = np.full((GRID, GRID), TEXTURES.index(scene.texture))
    things = [(1, scene.subject), *((2, thing) for thing in scene.small)]
    return label_patches(things, scene.word, scene.word_at, grounds, textures)


def label_patches(
    things: Sequence[tuple[int, Thing]], word: str, word_at: tuple[int, int], grounds: np.ndarray, textures: np.ndarray
) -> np.ndarray:
    """The same of things with their kinds, a word, and the numbers of each patch's ground and texture, [12, 12] both."""
    kinds, colours, shapes, letters, middles, order = (np.zeros((GRID, GRID), dtype=np.int64) for _ in range(6))
    for kind, thing in things:
        full = np.zeros((IMAGE, IMAGE), dtype=bool)
        full[thing.top:thing.top + thing.size, thing.left:thing.left + thing.size] = stencil(thing.shape, thing.size)
        covered = full.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)) >= 8
        kinds[covered] = kind
        colours[covered] = list(COLOURS).index(thing.colour) + 1
        shapes[covered] = SHAPES.index(thing.shape) + 1
        middles[(thing.top + thing.size // 2) // PATCH, (thing.left + thing.size // 2) // PATCH] = kind
    row, column = word_at
    kinds[row, column:column + len(word)] = 3
    letters[row, column:column + len(word)] = [list(FONT).index(letter) + 1 for letter in word]
    order[row, column:column + len(word)] = range(1, len(word) + 1)
    rows, columns = np.mgrid[:GRID, :GRID]
    labels = [kinds, colours, shapes, letters, middles, order, rows, columns, grounds, textures]
    return np.stack(labels, -1).astype(np.int64).reshape(GRID * GRID, -1)
