"""The command line that the studies share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench import figures
from bench.methods import LOWERINGS


def parser_of(study: str, description: str | None, numbers: Sequence[tuple[str, int, str]]) -> argparse.ArgumentParser:
    """
    Args:
        study: its module's name, which its file of results has as well.
        description: its module's docstring, of which the first line is shown.
        numbers: name, default and meaning of each.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{study}", description=(description or "").partition("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default, meaning in numbers:
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    parser.add_argument("--lowering", choices=LOWERINGS, default="inductor", help="eager: nothing is compiled")
    parser.add_argument("--out", default=str(figures.RESULTS / f"{study}.json"), help="JSON file")
    return parser


def add_keep_ratio(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep-ratio", type=float, default=1 / 9, help="share of the visual tokens that stays")
