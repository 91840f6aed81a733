"""Plots: lines with their scatter, and pictures with their kept patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parvts_fx.patches import dimmed

Row = dict[str, Any]

_STYLES = {  # Okabe and Ito's colours, and a marker each, so that nothing hangs on colour alone
    "inductor": ("#000000", "s"), "downsampled image": ("#E69F00", "^"), "random": ("#56B4E9", "v"),
    "FastV": ("#CC79A7", "D"), "joint": ("#009E73", "P"), "parvts": ("#D55E00", "o"),
    "parvts + kernels": ("#0072B2", "X"),
}


def plot_kept(rows: Sequence[Row], path: Path) -> Path:
    """Prefill against visual tokens kept, with the time that parvts' FLOPs allow drawn in."""
    figure, axes = open_figure()
    _methods(axes, rows, "asked", "prefill")
    _bound(axes, rows, "asked")
    axes.set(xlabel=f"visual tokens kept of {rows[0]['visual']}", ylabel="prefill, seconds", ylim=(0, None),
             xticks=sorted({row["asked"] for row in rows}))
    axes.legend()
    return save(figure, path)


def plot_lengths(rows: Sequence[Row], path: Path) -> Path:
    """Prefill and decode step against the length of the prompt."""
    figure, (left, right) = open_figure(2, 12)
    _methods(left, rows, "visual", "prefill")
    _bound(left, rows, "visual")
    _methods(right, rows, "visual", "step")
    least = min(row["kept"] for row in rows)
    for axes, what in ((left, "prefill"), (right, "decode step")):
        axes.set(xlabel=f"visual tokens of the prompt, {least} kept", ylabel=f"{what}, seconds",
                 ylim=(0, None), xticks=sorted({row["visual"] for row in rows}))
        axes.legend()
    return save(figure, path)


def _methods(axes: Any, rows: Sequence[Row], across: str, what: str) -> None:
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        colour, marker = _STYLES.get(name, (None, "x"))
        line(axes, [row[across] for row in own], [[row[what][which] for row in own] for which in ("median", "min", "max")],
             label=name, color=colour, marker=marker)


def _bound(axes: Any, rows: Sequence[Row], across: str) -> None:
    ours = [row for row in rows if row["method"] == "parvts"]
    axes.plot([row[across] for row in ours], [row["bound"]["seconds"] for row in ours], color=_STYLES["parvts"][0],
              linestyle="--", label="bound: Inductor's time x parvts' share of the FLOPs")


def line(axes: Any, across: Sequence[float], values: Sequence[Sequence[float]], **style: Any) -> None:
    """A line with its scatter: ``values`` are the middle, the least and the most at each point."""
    middle, least, most = np.asarray(values)
    axes.errorbar(across, middle, yerr=[middle - least, most - middle], capsize=3, **style)


def plot_patches(pixels: Any, kept: Any, path: Path, title: str = "", stands_for: Any = None) -> Path:
    """A picture as the model sees it, and the same with all but its kept patches dimmed.

    Args:
        pixels: [height, width, 3] in 0..1.
        kept: [rows, columns] bool, by patch.
        stands_for: [rows, columns] int, the number of the kept patch that each is merged into; drawn as a third picture,
            every patch in the mean colour of the kept one.
    """
    pixels, kept = np.asarray(pixels), np.asarray(kept)
    patch = np.ones([size // count for size, count in zip(pixels.shape, kept.shape)], dtype=int)
    panels = [(f"what the model sees: {kept.size} patches", pixels),
              (f"subject group: {kept.sum()} patches", dimmed(pixels, torch.from_numpy(kept)))]
    if stands_for is not None:
        whole = np.kron(np.asarray(stands_for), patch)
        colours = np.zeros_like(pixels)
        for number in np.unique(whole):
            colours[whole == number] = pixels[(whole == number) & (np.kron(kept, patch) == 1)].mean(0)
        panels.append(("what they stand for: each patch in the colour of its kept one", colours))
    figure, axes = open_figure(len(panels), 5 * len(panels))
    for axis, (heading, picture) in zip(axes, panels):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(heading)
        axis.axis("off")
    figure.suptitle(title)
    return save(figure, path)


def open_figure(columns: int = 1, width: float = 7.5) -> tuple[Any, Any]:
    """A figure with axes side by side."""
    return pyplot().subplots(1, columns, figsize=(width, 5.2), layout="constrained")


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('This needs matplotlib: pip install -e ".[bench]" (the demo: ".[demo]")') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
    return path
