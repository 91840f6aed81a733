"""The evaluation's plots: accuracy against tokens, depth and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.plots import open_figure, save

Row = dict[str, Any]
_MARKERS = "osD^vPX*<>hp"


def plot_rules(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against visual tokens kept, a line for each rule."""
    figure, axes = open_figure()
    pruned = [row for row in rows if row["name"] != "full"]
    for number, name in enumerate(dict.fromkeys(row["options"]["score"] for row in pruned)):
        own = [row for row in pruned if row["options"]["score"] == name]
        _line(axes, own, "kept", name, number)
    axes.set(xscale="log", xlabel="visual tokens kept of 144", ylabel="right answers, % of the full model's")
    axes.set_xticks(sorted({row["kept"] for row in pruned}), sorted({row["kept"] for row in pruned}))
    axes.legend()
    return save(figure, path)


def plot_depth(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against migration depth, a line for each fusion and number of tokens."""
    figure, axes = open_figure()
    pruned = [row | {"depth": row["options"]["migration_depth"]} for row in rows if row["name"] != "full"]
    for number, (fusion, kept) in enumerate(dict.fromkeys((row["options"]["fusion"], row["kept"]) for row in pruned)):
        own = [row for row in pruned if (row["options"]["fusion"], row["kept"]) == (fusion, kept)]
        _line(axes, own, "depth", f"fusion {fusion}, {kept} kept", number)
    axes.set(xlabel="migration depth, of 8 layers", ylabel="right answers, % of the full model's")
    axes.legend()
    return save(figure, path)


def plot_methods(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy against the decoder's FLOPs, with the Pareto front."""
    figure, axes = open_figure()
    pruned = [row for row in rows if row["name"] != "full"]
    for number, name in enumerate(dict.fromkeys(row["name"] for row in pruned)):
        own = sorted((row for row in pruned if row["name"] == name), key=lambda row: row["flops_share"])
        _line(axes, own, "flops_share", name, number)
    front = pareto(pruned)
    axes.plot([row["flops_share"] for row in front], [row["share"] for row in front], color="0.6", linewidth=6, alpha=0.4,
              zorder=0, label="Pareto front")
    axes.set(xlabel="the decoder's FLOPs, % of the full prompt's", ylabel="right answers, % of the full model's")
    axes.legend(fontsize="small")
    return save(figure, path)


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in accuracy at as few FLOPs, by rising FLOPs."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["flops_share"], -row["share"])):
        if not front or row["share"] > front[-1]["share"]:
            front.append(row)
    return front


def _line(axes: Any, rows: Sequence[Row], across: str, label: str, number: int) -> None:
    reach = [[row["share"] - row["low"] for row in rows], [row["high"] - row["share"] for row in rows]]
    axes.errorbar([row[across] for row in rows], [row["share"] for row in rows], yerr=reach, capsize=2, label=label,
                  marker=_MARKERS[number % len(_MARKERS)])
