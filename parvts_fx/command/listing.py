"""``parvts-fx models``: the architectures that have been examined, and what came of it."""

from __future__ import annotations

import argparse
import collections
import json
from importlib import resources
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parvts_fx.command.errors import BadInput

FILE = "models.json"
"""Written beside the page docs/supported-models.md, by the same run."""


def known() -> dict[str, Any]:
    """The versions of torch and transformers that were used, and ``models``: name, verdict, trait and reason of each."""
    return json.loads(resources.files("parvts_fx.command").joinpath(FILE).read_text(encoding="utf-8"))


def run(given: argparse.Namespace) -> int:
    """
    Raises:
        BadInput: a verdict that no model has.
    """
    held = known()
    verdicts = collections.Counter(model["verdict"] for model in held["models"])
    if given.verdict is not None and given.verdict not in verdicts:
        raise BadInput(f"--verdict {given.verdict}: no model has this one; there are: {', '.join(sorted(verdicts))}")
    models = [model for model in held["models"] if given.verdict in (None, model["verdict"])]
    if given.json:
        print(json.dumps(held | {"models": models}, indent=1))
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("model", "verdict", "what is peculiar; why it is unrewritten"):
        table.add_column(heading, overflow="fold")
    for model in models:
        table.add_row(*(Text(cell) for cell in (
            model["name"], model["verdict"], "; ".join(filter(None, [model["trait"], model["reason"]])))))
    console = Console()
    console.print(table)
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    versions = f"transformers {held['transformers']} and torch {held['torch']}"
    console.print(Text(f"{len(held['models'])} examined with {versions}: {counts}. Models outside this list work the same way: "
                       "what is looked for is data flow, not a name."))
    return 0
