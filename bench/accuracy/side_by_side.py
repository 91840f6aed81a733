"""Several trained models side by side: ``python -m bench.accuracy.side_by_side merging merging_seed1 merging_seed2``.

For every number of tokens kept one table of what :mod:`bench.accuracy.evaluate` has found with each model, and one of how far
some methods are ahead of others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from bench.accuracy.evaluate import RESULTS
from bench.accuracy.results import ahead, summarise
from bench.tables import Sheet

Found = dict[tuple[str, int], dict[str, Any]]

PAIRS = (
    ("parvts, merged", "parvts"), ("parvts, merged", "parvts, balanced, merged"),
    ("parvts, merged", "pruned before layer 0, merged"),
    ("parvts, merged", "joint, merged"), ("looking ahead, merged", "parvts, merged"),
    ("looking ahead, merged", "chosen late, merged"), ("parvts, merged", "FastV's schedule, merged"),
)
"""What is worth a row: merging, places, migration, separate paths, looking ahead (and that without it), against FastV."""


def load(name: str) -> tuple[Found, dict[str, Any], int]:
    """What was found by method and number of tokens kept; the full model's row; how many pictures were asked about."""
    held = json.loads((RESULTS / f"{name}.json").read_text())
    pictures, rows = held["settings"]["pictures"], list(held["ways"].values())
    full = next(row for row in rows if row["name"] == "full")
    return {(row["name"], row["kept"]): row for row in summarise(rows, full, pictures)}, full, pictures


def shares(kept: int, models: Mapping[str, tuple[Found, dict[str, Any], int]]) -> Sheet:
    """Right answers in per cent of the full model's, by method and model."""
    names = dict.fromkeys(name for found, *_ in models.values() for name, count in found if count == kept)
    rows = []
    for name in names:
        each = [found.get((name, kept)) for found, *_ in models.values()]
        flops = next(row["flops_share"] for row in each if row is not None)
        cells = ["" if row is None else f"{row['share']:.1f} ({row['low']:.1f} to {row['high']:.1f})" for row in each]
        rows.append([name, *cells, f"{flops:.0f} %"])
    return Sheet(f"{kept} kept: right answers in per cent of the full model's (95 % interval)",
                 [f"{kept} kept", *models, "FLOPs"], rows)


def differences(counts: Sequence[int], models: Mapping[str, tuple[Found, dict[str, Any], int]]) -> Sheet:
    """By how many points of the full model's answers one method is ahead of another, with 95 % intervals."""
    rows = []
    for one, other in PAIRS:
        for kept in counts:
            cells = []
            for found, full, pictures in models.values():
                pair = found.get((one, kept)), found.get((other, kept))
                points = None if None in pair else ahead(*pair, full, pictures)
                cells.append("" if points is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*points))
            if any(cells):
                rows.append([f"{one}, against {other}", str(kept), *cells])
    return Sheet("Ahead by points", ["methods", "kept", *models], rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.side_by_side", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", help="of files under bench/results, without .json")
    parser.add_argument("--kept", type=int, nargs="+", default=[48, 32, 16], help="visual tokens kept")
    parser.add_argument("--markdown", action="store_true", help="print the tables as pages have them")
    options = parser.parse_args(arguments)
    models = {name: load(name) for name in options.names}
    for sheet in (*(shares(kept, models) for kept in options.kept), differences(options.kept, models)):
        if options.markdown:
            print(f"\n{sheet.markdown()}\n")
        else:
            Console().print(sheet)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
