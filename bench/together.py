"""Several measurements on one machine: they compile beside each other, each in a process of its own, and measure one by one."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

Prepared = TypeVar("Prepared")
PATIENCE = 900.0
"""Seconds that those which have compiled wait for the others."""

_turns: tuple[Any, Any] | None = None


class Task(Generic[Prepared]):
    """What is measured: ``prepare`` builds and compiles, ``measure`` has the machine for itself. Both are called in one process;
    the task itself is pickled on its way there."""

    def prepare(self) -> Prepared:
        raise NotImplementedError

    def measure(self, prepared: Prepared) -> dict[str, Any]:
        raise NotImplementedError


def run(tasks: Mapping[str, Task[Any]]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The tasks' names with their results, as they come; with a traceback in place of the result of one that failed.

    A single task runs in this process.
    """
    if len(tasks) == 1:
        (name, task), = tasks.items()
        yield name, task.measure(task.prepare())
        return
    context = multiprocessing.get_context("spawn")
    turns = context.Barrier(len(tasks)), context.Lock()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // len(tasks))))
    with concurrent.futures.ProcessPoolExecutor(
            len(tasks), context, _take_turns, turns, max_tasks_per_child=1) as pool:  # what is done frees its memory
        waiting = {pool.submit(_run, task): name for name, task in tasks.items()}
        for done in concurrent.futures.as_completed(waiting):
            yield waiting[done], done.result()


def _take_turns(*turns: Any) -> None:
    global _turns
    _turns = turns


def _run(task: Task[Any]) -> dict[str, Any] | str:
    assert _turns is not None
    everybody, alone = _turns
    begun = time.monotonic()
    try:
        try:
            prepared = task.prepare()
        finally:
            ready, quiet = time.monotonic(), True
            try:
                everybody.wait(float(os.environ.get("PATIENCE", PATIENCE)))
            except threading.BrokenBarrierError:
                quiet = False
        with alone:
            return task.measure(prepared) | {"prepared_in": ready - begun, "others_were_done": quiet}
    except Exception:
        return traceback.format_exc()


