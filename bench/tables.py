"""The results of bench.compare as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich import box
from rich.table import Table

Row = dict[str, Any]


def tables_of_methods(rows: Sequence[Row]) -> Iterable[Table]:
    """For each batch size two tables: the prefill's time, and everything else."""
    for batch in dict.fromkeys(row["batch"] for row in rows):
        here = [row for row in rows if row["batch"] == batch]
        title = f"batch {batch}, {here[0]['visual']} visual tokens, medians of answers in turns"
        yield _table(f"Prefill: {title}", here, {
            "kept": lambda row: str(row["kept"]),
            "ms": lambda row: milliseconds(row["prefill"]),
            "min": lambda row: milliseconds(row["prefill"], "min"),
            "max": lambda row: milliseconds(row["prefill"], "max"),
            "speedup": lambda row: f"{row['bound']['reached']:.2f}x",
            "allowed": lambda row: f"{row['bound']['allowed']:.2f}x",
            "floor ms": lambda row: milliseconds(row["floor"]),
            "of floor": lambda row: f"{row['prefill']['median'] / row['floor']['median']:.2f}",
        })
        yield _table(f"Answers and costs: {title}", here, {
            "first ms": lambda row: milliseconds(row["first_token"]),
            "step ms": lambda row: milliseconds(row["step"]),
            f"{here[0]['tokens']} tokens": lambda row: milliseconds(row["whole"]),
            "GFLOPs": lambda row: f"{row['flops'] / 1e9:.1f}",
            "peak MiB": lambda row: mebibytes(row["peak_memory"]),
            "cache MiB": lambda row: mebibytes(row["cache_bytes"]),
            "compile s": lambda row: "" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}",
        })


def table_of_kept(rows: Sequence[Row]) -> Table:
    """Prefill by visual tokens kept: a line for each method, with the time that its FLOPs allow."""
    points = list(dict.fromkeys(row["asked"] for row in rows))
    table = open_table(f"Prefill in ms by visual tokens kept of {rows[0]['visual']} (what the FLOPs allow)", "method",
                       *map(str, points))
    for name in dict.fromkeys(row["method"] for row in rows):
        own = {row["asked"]: row for row in rows if row["method"] == name}
        table.add_row(name, *(f"{milliseconds(own[point]['prefill'])} ({1e3 * own[point]['bound']['seconds']:.0f})"
                              for point in points))
    return table


def table_of_lengths(rows: Sequence[Row]) -> Table:
    """Prefill, decode step and memory by the visual tokens of the prompt."""
    return _table("By length of the prompt: one sample, features given", rows, {
        "visual": lambda row: str(row["visual"]),
        "kept": lambda row: str(row["kept"]),
        "prefill ms": lambda row: milliseconds(row["prefill"]),
        "speedup": lambda row: f"{row['bound']['reached']:.2f}x",
        "allowed": lambda row: f"{row['bound']['allowed']:.2f}x",
        "step ms": lambda row: milliseconds(row["step"]),
        "min": lambda row: milliseconds(row["step"], "min"),
        "max": lambda row: milliseconds(row["step"], "max"),
        "peak MiB": lambda row: mebibytes(row["peak_memory"]),
        "cache MiB": lambda row: mebibytes(row["cache_bytes"]),
    })


def milliseconds(spread: dict[str, float] | None, which: str = "median") -> str:
    if spread is None:
        return ""
    return f"{1e3 * spread[which]:.1f}" if spread[which] < 1 else f"{1e3 * spread[which]:.0f}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f}"


def open_table(title: str, first: str, *headings: str) -> Table:
    """A table without rows: the first column to the left, numbers to the right, narrow enough for 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _table(title: str, rows: Sequence[Row], columns: dict[str, Callable[[Row], str]]) -> Table:
    table = open_table(title, "method", *columns)
    for row in rows:
        style = "bold" if row["method"] == "parvts" else None
        table.add_row(row["method"], *(show(row) for show in columns.values()), style=style)
    return table
