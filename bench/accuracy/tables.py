"""The evaluation's results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from bench.accuracy.questions import SHARES
from bench.tables import open_table

Row = dict[str, Any]


def tables(study: str, rows: Sequence[Row]) -> Iterable[Table]:
    """One table of the study, in per cent of the full model; for methods one more by kind of question."""
    label = {"rules": lambda row: row["options"].get("score", ""), "depth": _depth, "methods": lambda row: row["name"]}
    pruned = [row for row in rows if row["name"] != "full"]
    points = list(dict.fromkeys(row["kept"] for row in pruned))
    title = "Right answers in per cent of the full model's (95 % interval; decoder FLOPs), by visual tokens kept"
    table = open_table(f"{study}: {title}", study, *map(str, points))
    for name in dict.fromkeys(map(label[study], pruned)):
        own = {row["kept"]: row for row in pruned if label[study](row) == name}
        table.add_row(name, *(_cell(own[point]) if point in own else "" for point in points))
    yield table
    if study == "methods":
        full = next(row for row in rows if row["name"] == "full")
        table = open_table("Right answers in per cent by kind of question", "method", "kept", *SHARES)
        for row in (full, *pruned):
            table.add_row(row["name"], str(row["kept"]), *(f"{row['by_kind_alone'][kind]:.0f}" for kind in SHARES))
        yield table


def _cell(row: Row) -> str:
    return f"{row['share']:.1f} ({row['low']:.1f}-{row['high']:.1f}; {row['flops_share']:.0f} %)"


def _depth(row: Row) -> str:
    return f"K = {row['options']['migration_depth']}, fusion {row['options']['fusion']}"
