"""Where in its picture each visual token stands."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def places_of(visual: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """[batch, seq, 3] int64: of each visual token the number of its picture, its row and its column.

    A picture is a run of visual tokens. Where the positions of a run (or of a frame in it) are those of a grid, row by row, they
    tell. Else, where a run holds a square number of tokens, they are taken for the rows of a square. The grid of any other is not
    known, and its rows and columns are -1, as they are of text.

    Args:
        visual: [batch, seq] bool, of a whole prompt.
        positions: [3 or 4, batch, seq] int64, the last three of which may be time, row and column, counted from any number.
    """
    picture = (visual & ~F.pad(visual[:, :-1], (1, 0))).long().cumsum(1)
    length, number = _counted(picture, visual)
    side = length.double().sqrt().round().long().clamp(min=1)
    is_square = visual & (side * side == length)
    row, column = (torch.where(is_square, held, -1) for held in (number // side, number % side))
    if positions is not None:
        is_grid, *told = _grid_of(visual, positions)
        row, column = (torch.where(is_grid, ours, held) for ours, held in zip(told, (row, column)))
    return torch.stack([picture, row, column], -1)


def _counted(group: torch.Tensor, visual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, seq] int64, twice: how many visual tokens a token's group has, and how many of them stand in front of it.

    Args:
        group: [batch, seq] int64, counted from 1 in the order of the prompt; 0 or the last one's for text.
    """
    counts = torch.zeros_like(F.pad(group, (0, 1))).scatter_add(1, group, visual.long())
    return counts.gather(1, group), visual.long().cumsum(1) - 1 - (counts.cumsum(1) - counts).gather(1, group)


def _grid_of(visual: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[batch, seq]: whether the positions of a token's frame are those of a whole grid, row by row; its row; its column."""
    time, row, column = (held.long() for held in positions[-3:])

    def before(held: torch.Tensor) -> torch.Tensor:
        return F.pad(held[:, :-1], (1, 0))

    starts = visual & ~(before(visual) & (time == before(time)))
    frame = starts.long().cumsum(1)
    nothing = torch.zeros_like(F.pad(frame, (0, 1)))

    def summed(held: torch.Tensor) -> torch.Tensor:
        """Over the visual tokens of each token's frame."""
        return nothing.scatter_add(1, frame, torch.where(visual, held, 0)).gather(1, frame)

    row, column = (held - summed(torch.where(starts, held, 0)) for held in (row, column))
    count, number = _counted(frame, visual)
    width, height = summed((row == 0).long()), summed((column == 0).long())
    fits = (row >= 0) & (column >= 0) & (column < width) & (row * width + column == number)
    is_grid = visual & (summed((~fits).long()) == 0) & (width * height == count) & (count > 1)
    return is_grid, row, column
