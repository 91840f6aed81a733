"""Kept patches over pictures: which ones they are, on which grid, and where none can be told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import parvts_fx
from parvts_fx.patches import grid_of, kept_patches
from tests import llava
from tests.comparing import expected

OPTIONS = dict(keep_tokens=3, migration_depth=1)


def picture(height: int = 16, width: int = 16) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), 200, dtype=np.uint8))


@pytest.mark.slow
@pytest.mark.supports("Command", "parvts_fx.show: the reference's kept patches, over each of several pictures")
def test_kept_patches_are_the_references(tmp_path: Path) -> None:
    """Two pictures in one prompt and one in another: what is bright in the drawing is what the eager reference keeps."""
    model = llava.build(layers=3)
    prompt = llava.prompt(model, [[3, "image", 5, "image", 1], [2, "image", 2]])
    wanted = []
    for row in (prompt.row(0), prompt.row(1)):
        rows = expected(model, row, row.with_positions, **OPTIONS)[0].rows
        kept = torch.isin(torch.arange(row.visual.shape[1]), rows)[row.visual[0]]
        wanted += list(kept.view(-1, 4, 4))
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    with torch.no_grad():
        model(**prompt.with_positions)
    figure = parvts_fx.show(model, [picture()] * 3, tmp_path / "kept.png")
    Image.open(tmp_path / "kept.png").verify()
    drawn = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    assert len(drawn) == 6 and all(np.allclose(pixels, 200 / 255, atol=1e-6) for pixels in drawn[:3])
    for pixels, patches in zip(drawn[3:], wanted):
        bright = np.kron(patches.numpy(), np.ones((4, 4))) == 1
        np.testing.assert_array_equal(pixels[..., 0] > 0.5, bright)
        np.testing.assert_allclose(pixels[~bright], 50 / 255, atol=1e-6)
    assert sum(int(patches.sum()) for patches in wanted) == 6
    with pytest.raises(ValueError, match="runs of 16, 16, 16 visual tokens are no grid of the shape of picture 1 of 2"):
        parvts_fx.show(model, [picture()] * 2)
    with pytest.raises(ValueError, match="nothing tells where one ends|no visual tokens for picture 4 of 4"):
        parvts_fx.show(model, [picture()] * 4)
    with pytest.raises(ValueError, match="would be a square: give the picture as the processor cuts or stretches it"):
        parvts_fx.show(model, [picture(16, 24)] * 3)


@pytest.mark.parametrize("tokens, height, width, grid", [
    (16, 96, 96, (4, 4)), (12, 300, 400, (3, 4)), (12, 400, 300, (4, 3)), (37 * 28, 1036, 784, (37, 28)),
    (1, 5, 5, (1, 1)), (7, 10, 70, (1, 7)), (24, 1, 1, None), (22, 16, 16, None), (144, 480, 640, None), (2928, 672, 672, None)])
def test_grids(tokens: int, height: int, width: int, grid: tuple[int, int] | None) -> None:
    """Thumbnails with tiles and ends of rows (24 and 2928 tokens of a square), two features around it (22): none."""
    assert grid_of(tokens, height, width) == grid


@pytest.mark.parametrize("patch", [4, 7, 14, 28])
@pytest.mark.parametrize("rounded", [round, int, lambda side: -int(-side // 1)], ids=["nearest", "down", "up"])
def test_grids_of_rounded_sides(patch: int, rounded: Any) -> None:
    """Whatever way a processor rounds both sides to patches: its grid, for every shape up to twice as wide as high."""
    for height in range(3 * patch, 9 * patch, 5):
        for width in range(height, 2 * height, 7):
            rows, columns = rounded(height / patch), rounded(width / patch)
            found = grid_of(rows * columns, height, width)
            assert found is not None
            if min(rows, columns) >= 5:  # of few patches several shapes are as near
                assert found == (rows, columns)


def runs(*counts: int) -> torch.Tensor:
    """[1, seq] bool: so many visual tokens one behind the other, with text around."""
    return torch.cat([torch.tensor([False] + [True] * count) for count in counts] + [torch.tensor([False])])[None]


def test_layouts() -> None:
    """A row at a time with text between; pictures that nothing separates; other shapes in one prompt."""
    visual = runs(4, 4, 4)
    kept = visual & (torch.arange(visual.shape[1]) % 2 == 0)[None]
    (grid,) = kept_patches(visual, kept, [(30, 40)])
    assert grid.shape == (3, 4) and torch.equal(grid.flatten(), kept[visual])
    two = kept_patches(runs(18), runs(18), [(30, 30), (30, 30)])
    assert [tuple(grid.shape) for grid in two] == [(3, 3), (3, 3)]
    with pytest.raises(ValueError, match="4 visual tokens are left over behind the pictures given"):
        kept_patches(runs(4, 4, 4, 4), runs(4, 4, 4, 4), [(30, 40)])
    several = kept_patches(runs(6, 12), runs(6, 12), [(20, 30), (40, 30)])
    assert [tuple(grid.shape) for grid in several] == [(2, 3), (4, 3)]


@pytest.mark.parametrize("counts, sizes, words", [
    ((24,), [(10, 10)], "24 visual tokens are no grid of the shape of the picture, 10 x 10"),
    ((16, 16, 16), [(10, 20)], "runs of 16, 16, 16 visual tokens are no grid.*tiles, features that end"),
    ((18,), [(30, 30), (30, 60)], "18.* stand for 2 pictures, and nothing tells where one ends"),
    ((17,), [(30, 30), (30, 30)], "17.* stand for 2 pictures")])
def test_no_grid(counts: tuple[int, ...], sizes: list[tuple[int, int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kept_patches(runs(*counts), runs(*counts), sizes)


@pytest.mark.slow
def test_what_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llava.build(layers=3)
    prompt = llava.prompt(model, [[3, "image", 5]])
    with pytest.raises(ValueError, match="no call with a prompt"):
        parvts_fx.show(model, picture())
    parvts_fx.compile(model, lowering="eager", **OPTIONS)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    with pytest.raises(ValueError, match="not known which visual tokens are kept: no visual features are merged"):
        parvts_fx.show(model, picture())
    with torch.no_grad():
        model(**prompt.inputs)
    with pytest.raises(ValueError, match=r"a picture \[height, width, 3\], got an array of shape \(16, 16\)"):
        parvts_fx.show(model, np.zeros((16, 16)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install \"parvts_fx\[demo\]\""):
        parvts_fx.show(model, picture())
