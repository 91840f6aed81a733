"""What the evaluation found: shares of right answers with confidence intervals, as tables and as plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from bench.accuracy.tasks import TIDY
from bench.plots import line, open_figure, save
from bench.tables import Sheet

RESAMPLES = 2000
Row = dict[str, Any]
_MARKERS = "osD^vPX*<>hp"


def unpack(row: Row, pictures: int) -> np.ndarray:
    """[pictures, kinds] float: 1 for a right answer. There are whole bytes of them, since a batch has 40 questions."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), dtype=np.uint8))
    return bits.reshape(pictures, -1).astype(float)


def _interval(statistic: Callable[..., Any], *samples: np.ndarray) -> tuple[float, float]:
    """95 % of resampled pictures, since the questions of one picture share its difficulty; paired, as samples are."""
    return bootstrap(samples, statistic, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile",
                     rng=np.random.default_rng(0)).confidence_interval


def _share(right: np.ndarray, base: np.ndarray, axis: int = -1) -> Any:
    return 100 * right.mean(axis) / base.mean(axis)


def share_of(row: Row, full: Row, pictures: int) -> float:
    """Right answers in per cent of the full model's."""
    return float(_share(unpack(row, pictures).mean(1), unpack(full, pictures).mean(1)))


def share_of_kinds(row: Row, full: Row, pictures: int, kinds: Sequence[str] = TIDY.kinds) -> dict[str, float]:
    """The same by kind of question."""
    right, base = (unpack(way, pictures).mean(0) for way in (row, full))
    return dict(zip(kinds, (100 * right / np.maximum(base, 1e-9)).tolist()))


def summarise(rows: Sequence[Row], full: Row, pictures: int, kinds: Sequence[str] = TIDY.kinds) -> list[Row]:
    """The rows with accuracy in per cent of the full model's, overall and by kind, and 95 % intervals."""
    base = unpack(full, pictures)
    summaries = []
    for row in rows:
        right = unpack(row, pictures)
        low, high = _interval(_share, right.mean(1), base.mean(1))
        by_kind = share_of_kinds(row, full, pictures, kinds)
        summaries.append({**row, "accuracy": 100 * right.mean(), "share": _share(right.mean(1), base.mean(1)), "low": low,
                          "high": high, "by_kind": by_kind, "by_kind_alone": dict(zip(kinds, 100 * right.mean(0))),
                          "flops_share": 100 * row["decoder_flops"] / full["decoder_flops"]})
    return summaries


def ahead(one: Row, other: Row, full: Row, pictures: int) -> tuple[float, float, float]:
    """By how many points of the full model's accuracy one way is ahead of another: (difference, low, high)."""
    base = unpack(full, pictures).mean(1)
    difference = unpack(one, pictures).mean(1) - unpack(other, pictures).mean(1)
    return (_share(difference, base), *_interval(_share, difference, base))


def tables(study: str, rows: Sequence[Row], kinds: Sequence[str] = TIDY.kinds) -> list[Sheet]:
    """One table of the study, in per cent of the full model; for methods one more by kind of question."""
    label = {"rules": lambda row: row["options"].get("score", ""), "depth": _depth, "methods": lambda row: row["name"]}[study]
    pruned = [row for row in rows if row["name"] != "full"]
    points = list(dict.fromkeys(row["kept"] for row in pruned))
    of = {(label(row), row["kept"]): row for row in pruned}
    names = list(dict.fromkeys(map(label, pruned)))
    sheets = [Sheet(f"{study}: right answers in per cent of the full model's (95 % interval), decoder FLOPs",
                    [study, *(f"{point} kept" for point in points)],
                    [[name, *(_cell(of.get((name, point))) for point in points)] for name in names])]
    if study == "methods":
        full = next(row for row in rows if row["name"] == "full")
        sheets.append(Sheet("Right answers in per cent by kind of question", ["method", "kept", *kinds], [
            [row["name"], str(row["kept"]), *(f"{row['by_kind_alone'][kind]:.0f}" for kind in kinds)]
            for row in (full, *pruned)]))
    return sheets


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row['share']:.1f} ({row['low']:.1f} to {row['high']:.1f}), {row['flops_share']:.0f} %"


def _depth(row: Row) -> str:
    return f"K = {row['options']['migration_depth']}, {_form(row)}"


def _form(row: Row) -> str:
    return f"fusion {row['options']['fusion']}" + (", merged" if row["options"].get("merge") else "")


def plot(study: str, rows: Sequence[Row], path: Path, visual: int = TIDY.visual) -> Path:
    """Rules: accuracy against visual tokens kept; depth: against migration depth; methods: against the decoder's FLOPs."""
    figure, axes = open_figure()
    pruned = [row | {"depth": row["options"].get("migration_depth")} for row in rows if row["name"] != "full"]
    across, name_of, heading = {
        "rules": ("kept", lambda row: row["options"]["score"], f"visual tokens kept of {visual}"),
        "depth": ("depth", lambda row: f"{_form(row)}, {row['kept']} kept", "migration depth, in layers"),
        "methods": ("flops_share", lambda row: row["name"], "the decoder's FLOPs, % of the full prompt's"),
    }[study]
    for number, name in enumerate(dict.fromkeys(map(name_of, pruned))):
        own = sorted((row for row in pruned if name_of(row) == name), key=lambda row: row[across])
        line(axes, [row[across] for row in own], [[row[which] for row in own] for which in ("share", "low", "high")],
             label=name, marker=_MARKERS[number % len(_MARKERS)])
    axes.set(xlabel=heading, ylabel="right answers, % of the full model's")
    if study == "rules":
        points = sorted({row["kept"] for row in pruned})
        axes.set(xscale="log")
        axes.set_xticks(points, points)
    if study == "methods":
        front = pareto(pruned)
        axes.plot([row["flops_share"] for row in front], [row["share"] for row in front], color="0.6", linewidth=6, alpha=0.4,
                  zorder=0, label="Pareto front")
    axes.legend(fontsize="small")
    return save(figure, path)


def pareto(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in accuracy at as few FLOPs, by rising FLOPs."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["flops_share"], -row["share"])):
        if not front or row["share"] > front[-1]["share"]:
            front.append(row)
    return front
