"""One writer of tables, for terminals and for pages, and what else a terminal shows."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import torch
import transformers
from rich import box
from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

Spread = dict[str, float]
"""Median, least and greatest of repeated measurements."""


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table: cells are text, in which ``**`` and backticks mean what they mean in Markdown."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Lines for a page; its own text says what the title says."""
        return markdown(self.headings, self.rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """For a terminal: as many columns side by side as fit, further ones below; headings are broken where that helps."""
        texts = [[Text.from_markup(_markup(cell)) for cell in line] for line in (self.headings, *self.rows)]
        widths = [max(*(text.cell_len for text in column[1:]), *map(len, column[0].plain.split()), 0)
                  for column in zip(*texts)]
        title, column = self.title, 1
        while column < len(widths):
            end = column + 1
            while end < len(widths) and widths[0] + sum(widths[column:end + 1]) + 3 * (end - column + 2) <= options.max_width:
                end += 1
            table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            for number in (0, *range(column, end)):
                table.add_column(texts[0][number], justify="right" if number else "left", max_width=widths[number])
            for line in texts[1:]:
                table.add_row(line[0], *line[column:end])
            yield table
            title, column = None, end


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The lines of a table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ") for line in lines)


def _markup(cell: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"[bold]\1[/bold]", escape(cell)).replace("`", "")


def seconds(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread['median']:.3f} s"


def milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{1e3 * spread['median']:.{0 if spread['median'] >= 0.01 else 2}f} ms"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def progress(console: Console) -> Progress:
    """A display of what is done and how long it has taken."""
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                    TimeElapsedColumn(), console=console)


def quieten() -> None:
    """Leave the terminal to the tables: no warnings of transformers', and of Dynamo's only those that are asked for."""
    transformers.logging.set_verbosity_error()
    if not os.environ.get("TORCH_LOGS"):
        torch._logging.set_logs(dynamo=logging.ERROR)
