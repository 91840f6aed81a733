"""A picture with the patches whose tokens a model has kept."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parvts_fx.runtime.record import last_call

_DIMMED = 0.25
"""How bright a patch is whose token was dropped."""


def show(model: torch.nn.Module, image: Any, path: str | Path | None = None) -> Any:
    """Draw the picture or pictures of a model's last prompt: beside each one itself, with all but its kept patches dimmed.

    A token's place is told from numbers alone: how many visual tokens stand in the prompt for each picture, one behind the other
    or a row of the picture at a time with text between, and the picture's height and width.

    Args:
        model: compiled with :func:`parvts_fx.compile`, and called with the pictures.
        image: a PIL image, an array or tensor [height, width, 3] (uint8, or numbers in 0..1), or a sequence of these: as many as
            the prompt had, in order, as the model sees them. A processor that cuts out or stretches a square, say, must have
            done so.
        path: where to save the drawing; its ending says in which format.

    Returns:
        the matplotlib figure.

    Raises:
        ValueError: the model has had no such call, or a picture's tokens are no grid of its shape: thumbnails and tiles, features
            that end rows, learned queries.
        ImportError: matplotlib is missing (it comes with ``pip install parvts_fx[demo]``).
    """
    record = last_call(model)
    if record is None:
        raise ValueError("parvts_fx.show: the model has had no call with a prompt since parvts_fx.compile(model). Call it first.")
    if record.visual is None or record.kept is None:
        raise ValueError(f"parvts_fx.show: it is not known which visual tokens are kept: {record.reason or 'no graph tells'}")
    pictures = [_pixels(one) for one in (image if isinstance(image, (list, tuple)) else [image])]
    return draw_patches(pictures, kept_patches(record.visual, record.kept, [one.shape[:2] for one in pictures]), path)


def draw_patches(pictures: Sequence[Any], kept: Sequence[torch.Tensor], path: str | Path | None = None) -> Any:
    """Draw pictures, [height, width, 3] in 0..1 each, above what is kept of their patches, [rows, columns] bool each.

    Returns:
        the matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('parvts_fx: pictures need matplotlib: pip install "parvts_fx[demo]"') from error
    tallest = max(pixels.shape[0] / pixels.shape[1] for pixels in pictures)
    figure = Figure(figsize=(4.2 * len(pictures), min(24.0, 8.0 * tallest + 0.8)), layout="constrained")
    axes = figure.subplots(2, len(pictures), squeeze=False)
    for column, (pixels, patches) in enumerate(zip(pictures, kept, strict=True)):
        axes[0, column].imshow(pixels)
        axes[0, column].set_title(f"{patches.shape[0]} x {patches.shape[1]} visual tokens")
        axes[1, column].imshow(dimmed(pixels, patches))
        axes[1, column].set_title(f"{int(patches.sum())} of {patches.numel()} are kept")
    for each in axes.flat:
        each.axis("off")
    if path is not None:
        figure.savefig(path)
    return figure


def dimmed(pixels: Any, patches: torch.Tensor) -> Any:
    """A picture, an array [height, width, 3] of numbers, with all but its kept patches, [rows, columns] bool, dark."""
    rows, columns = (torch.arange(length) * count // length for length, count in zip(pixels.shape, patches.shape))
    return pixels * torch.where(patches.cpu()[rows][:, columns], 1.0, _DIMMED).numpy()[..., None]


def _pixels(image: Any) -> Any:
    """[height, width, 3] in 0..1."""
    import numpy as np

    held = image.convert("RGB") if hasattr(image, "convert") else image
    array = np.asarray(held.cpu() if isinstance(held, torch.Tensor) else held)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"parvts_fx.show: expected a picture [height, width, 3], got an array of shape {tuple(array.shape)}")
    scaled = array / 255 if array.dtype == np.uint8 else array
    return np.clip(scaled.astype(np.float32), 0, 1)


def kept_patches(visual: torch.Tensor, kept: torch.Tensor, sizes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The grid of kept patches of every picture.

    Args:
        visual, kept: [batch, seq] bool: visual tokens, and those of them that are kept.
        sizes: height and width of each picture, in the order of the prompt, sample by sample.

    Returns:
        [rows, columns] bool for each.

    Raises:
        ValueError: the tokens are no grids of these shapes.
    """
    left = [kept[row, run.start:run.stop].cpu() for row in range(len(visual)) for run in _runs(visual[row].tolist())]
    if len(left) < len(sizes):
        left = _parted(left, sizes)
    grids, by_rows = list[torch.Tensor](), len(left) > len(sizes)
    for number, (height, width) in enumerate(sizes, 1):
        grid = _first_grid(left, height, width, by_rows)
        if grid is None:
            raise ValueError(_why_none([len(run) for run in left], number, len(sizes), height, width))
        taken, shape = grid
        grids.append(torch.cat(left[:taken]).view(shape))
        left = left[taken:]
    if left:
        raise ValueError(f"parvts_fx.show: {sum(map(len, left))} visual tokens are left over behind the pictures given "
                         f"({len(sizes)}): give all pictures of the prompt, in order; tiles of a picture cannot be drawn")
    return grids


def _runs(visual: Sequence[bool]) -> list[range]:
    """Where visual tokens stand one behind the other."""
    edges = [place for place in range(len(visual) + 1)
             if (place < len(visual) and visual[place]) != (place > 0 and visual[place - 1])]
    return [range(start, end) for start, end in zip(edges[::2], edges[1::2])]


def _parted(runs: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Runs of several pictures that nothing separates, one for each where all pictures are of one shape."""
    total, count = sum(map(len, runs)), len(sizes)
    if len({tuple(size) for size in sizes}) > 1 or total % count or any(len(run) % (total // count) for run in runs):
        counts = ", ".join(str(len(run)) for run in runs)
        raise ValueError(f"parvts_fx.show: {len(runs)} runs of visual tokens ({counts}) stand for {count} pictures, and nothing "
                         "tells where one ends and the next begins")
    return [part for run in runs for part in run.split(total // count)]


def _first_grid(runs: Sequence[torch.Tensor], height: int, width: int, by_rows: bool) -> tuple[int, tuple[int, int]] | None:
    """How many of the first runs hold a picture of this size, and its rows and columns: one run, or one for each row."""
    if not runs:
        return None
    columns = len(runs[0])
    if not by_rows:
        shape = grid_of(columns, height, width)
        return None if shape is None else (1, shape)
    alike = len(list(itertools.takewhile(lambda run: len(run) == columns, runs)))
    rows = [count for count in range(2, alike + 1) if columns > 1 and (count, columns) == grid_of(count * columns, height, width)]
    return (rows[-1], (rows[-1], columns)) if rows else None


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of so many patches of a picture; None where no grid of them has its shape.

    Processors round both sides to whole patches: both to the next number, both down or both up. Of several grids that can have
    come about so, the one whose shape is nearest. A number that fits by chance cannot be told from a grid.
    """
    able = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    able = [(rows, columns) for rows, columns in able if any(
        max((rows + low) / height, (columns + low) / width) < min((rows + high) / height, (columns + high) / width)
        or rows * width == columns * height
        for low, high in ((-0.5, 0.5), (0, 1), (-1, 0)))]
    return min(able, key=lambda grid: abs(grid[0] * width - grid[1] * height) / (grid[0] + grid[1]), default=None)


def _why_none(runs: Sequence[int], number: int, pictures: int, height: int, width: int) -> str:
    which = "the picture" if pictures == 1 else f"picture {number} of {pictures}"
    if not runs:
        return f"parvts_fx.show: there are no visual tokens for {which}: give the pictures of the prompt, and no others"
    counts = f"{runs[0]} visual tokens" if len(runs) == 1 else f"runs of {', '.join(map(str, runs[:4]))}" + (
        " ..." if len(runs) > 4 else "") + " visual tokens"
    remedy = (" (they would be a square: give the picture as the processor cuts or stretches it)"
              if runs[0] > 1 and len(runs) == pictures - number + 1 and grid_of(runs[0], 1, 1) else
              " (tiles, features that end rows, and learned queries have no place on a grid)")
    return f"parvts_fx.show: {counts} are no grid of the shape of {which}, {height} x {width}{remedy}"
