"""Holds every architecture against the reference: ``python -m tests.models [names] [--jobs N] [--fresh]``.

Writes ``docs/supported-models.json`` after every model, so that a run that was stopped goes on where it was, and
``docs/supported-models.md`` from it.
"""

from __future__ import annotations

import argparse
import multiprocessing

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.models.builders import BUILDERS
from tests.models.matrix import examine
from tests.models.page import counts, load, save, write_page


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default: 2)")
    parser.add_argument("--fresh", action="store_true", help="examine again what is known already")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(BUILDERS))
    if unknown:
        parser.error(f"argument names: unknown: {', '.join(unknown)}")
    found = load()
    wanted = [name for name in given.names or BUILDERS if given.fresh or given.names or name not in found]
    console = Console()
    context = multiprocessing.get_context("spawn")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        Progress(*columns, console=console) as progress,
        context.Pool(given.jobs, maxtasksperchild=6) as pool,
    ):
        task = progress.add_task("models", total=len(wanted))
        for result in pool.imap_unordered(examine, wanted):
            found[result.name] = result
            save(found)
            worst = max(result.errors.values(), default=0.0)
            console.print(f"{result.name:32} {result.verdict:22} {worst:8.1e} {result.seconds:5.0f} s  {result.reason[:200]}",
                          markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)
    write_page(found)
    console.print(counts(found))


if __name__ == "__main__":
    main()
