"""The plots of bench.compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_STYLES = {  # Okabe and Ito's colours, and a marker each, so that nothing hangs on colour alone
    "inductor": ("#000000", "s"), "downsampled image": ("#E69F00", "^"), "random": ("#56B4E9", "v"),
    "FastV": ("#CC79A7", "D"), "joint": ("#009E73", "P"), "parvts": ("#D55E00", "o"),
    "parvts + kernels": ("#0072B2", "X"),
}


def plot_kept(rows: Sequence[Row], path: Path) -> Path:
    """Prefill against visual tokens kept, with the time that parvts' FLOPs allow drawn in."""
    figure, axes = open_figure()
    _lines(axes, rows, "asked", lambda row: row["prefill"])
    ours = [row for row in rows if row["method"] == "parvts"]
    axes.plot([row["asked"] for row in ours], [row["bound"]["seconds"] for row in ours], color=_STYLES["parvts"][0],
              linestyle="--", label="bound: Inductor's time x parvts' share of the FLOPs")
    axes.set(xlabel=f"visual tokens kept of {rows[0]['visual']}", ylabel="prefill, seconds", ylim=(0, None),
             xticks=sorted({row["asked"] for row in rows}))
    axes.legend()
    return save(figure, path)


def plot_lengths(rows: Sequence[Row], path: Path) -> Path:
    """Prefill and decode step against the length of the prompt."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12, 5), layout="constrained")
    _lines(left, rows, "visual", lambda row: row["prefill"])
    _lines(right, rows, "visual", lambda row: row["step"])
    ours = [row for row in rows if row["method"] == "parvts"]
    left.plot([row["visual"] for row in ours], [row["bound"]["seconds"] for row in ours], color=_STYLES["parvts"][0],
              linestyle="--", label="bound: Inductor's time x parvts' share of the FLOPs")
    for axes, what in ((left, "prefill"), (right, "decode step")):
        axes.set(xlabel=f"visual tokens of the prompt, {ours[0]['kept']} kept", ylabel=f"{what}, seconds",
                 ylim=(0, None), xticks=sorted({row["visual"] for row in rows}))
        axes.legend()
    return save(figure, path)


def _lines(axes: Any, rows: Sequence[Row], across: str, of: Callable[[Row], dict[str, float]]) -> None:
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        least, middle, most = ([of(row)[which] for row in own] for which in ("min", "median", "max"))
        reach = [[m - low for m, low in zip(middle, least)], [high - m for m, high in zip(middle, most)]]
        colour, marker = _STYLES.get(name, (None, "x"))
        axes.errorbar([row[across] for row in own], middle, yerr=reach, color=colour, marker=marker, capsize=3,
                      label=name)


def open_figure() -> tuple[Any, Any]:
    """A figure with one pair of axes."""
    return pyplot().subplots(figsize=(7.5, 5), layout="constrained")


def pyplot() -> Any:
    """matplotlib's pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('This needs matplotlib: pip install -e ".[bench]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
    return path
