"""What is being done, on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A line that goes when all is done; nothing where standard error is no terminal.

    Gives a function that is told what comes next, ``steps`` times.
    """
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task("", total=steps)
        begun: list[str] = []

        def advance(what: str) -> None:
            display.update(task, description=what, advance=1 if begun else 0)
            begun.append(what)

        yield advance
