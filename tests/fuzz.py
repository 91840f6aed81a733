"""Draws models and options at random, as many as wanted, and holds each against the reference: ``make fuzz``.

    python -m tests.fuzz --count 500 --seed 7 --workers 2

Prints how many were rewritten, refused (by reason) and wrong; what is wrong is first made as simple as it can be, and
stands there as an expression for the corners of the tests. The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import logging
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.drawing import is_sound, random_case, simpler
from tests.plain import Specification, words
from tests.plain_checking import Choice, Outcome, outcome

_ATTEMPTS = 60
"""Most simplifications that are tried on one failure."""
_STAGED = {"some": None, "none": False, "all": True}


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One example and what came of it."""

    seed: int
    spec: Specification
    choice: Choice
    outcome: Outcome

    def __str__(self) -> str:
        reason = " ".join(self.outcome.reason[:300].split())
        return f"({words(self.spec)}, {words(self.choice)}),  # {self.seed}: {self.outcome.kind}: {reason}"


def _prepare() -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)


def draw(seed: int, staged: bool | None = None) -> Drawn:
    spec, choice = random_case(seed, staged)
    return Drawn(seed, spec, choice, outcome(spec, choice))


def simplified(drawn: Drawn, deadline: float = float("inf")) -> Drawn:
    """The same failure with as few words as a greedy search finds: any wrong outcome counts as the same."""
    attempts, found = 0, True
    while found and attempts < _ATTEMPTS and time.monotonic() < deadline:
        found = False
        pairs = [(spec, drawn.choice) for spec in simpler(drawn.spec)]
        pairs += [(drawn.spec, choice) for choice in simpler(drawn.choice)]
        for spec, choice in pairs:
            if attempts >= _ATTEMPTS or time.monotonic() > deadline:
                break
            if not is_sound(spec, choice):
                continue
            attempts += 1
            result = outcome(spec, choice)
            if result.kind == drawn.outcome.kind:
                drawn, found = Drawn(drawn.seed, spec, choice, result), True
                break
    return drawn


def examples(seeds: list[int], workers: int, seconds: float, staged: bool | None = None) -> Iterator[Drawn]:
    """What comes of each seed, in any order, until the time is up."""
    end, one = time.monotonic() + seconds, functools.partial(draw, staged=staged)
    if workers < 2:
        for seed in seeds:
            if time.monotonic() > end:
                return
            yield one(seed)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _prepare, maxtasksperchild=200) as pool:
        for drawn in pool.imap_unordered(one, seeds):
            yield drawn
            if time.monotonic() > end:
                pool.terminate()
                return


def report(console: Console, results: list[Drawn], seed: int) -> None:
    counted = collections.Counter(drawn.outcome.kind for drawn in results)
    console.print(f"seed {seed}: {len(results)} drawn, {counted['rewritten']} rewritten, {counted['refused']} refused, "
                  f"{counted['wrong']} wrong", highlight=False)
    reasons = collections.Counter(d.outcome.summary for d in results if d.outcome.kind == "refused")
    for reason, count in reasons.most_common():
        console.print(f"  {count:4}  {reason}", markup=False, highlight=False, soft_wrap=True)
    internal = [drawn for drawn in results if drawn.outcome.is_internal]
    if internal:
        console.print("refused for reasons that say nothing of the model:", highlight=False)
    for drawn in internal:
        console.print(f"  {drawn}", markup=False, highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="examples")
    parser.add_argument("--seed", type=int, help="of the first example; at random unless given")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="a file for what is wrong, or refused without a good reason")
    parser.add_argument("--stages", choices=_STAGED, default="some", help="which examples have several stages")
    parser.add_argument("--plain", action="store_true", help="leave what is wrong as it was drawn")
    given = parser.parse_args(arguments)
    _prepare()
    seed = random.SystemRandom().randrange(10**9) if given.seed is None else given.seed
    console, results = Console(stderr=False), []
    seeds, staged = list(range(seed, seed + given.count)), _STAGED[given.stages]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("drawing", total=given.count)
        for drawn in examples(seeds, given.workers, given.seconds, staged):
            results.append(drawn)
            counted = collections.Counter(one.outcome.kind for one in results)
            said = ", ".join(f"{number} {kind}" for kind, number in sorted(counted.items()))
            progress.update(task, advance=1, description=said)
    report(console, results, seed)
    wrong = [drawn for drawn in results if drawn.outcome.kind == "wrong"]
    for at, drawn in enumerate(wrong):
        wrong[at] = drawn if given.plain else simplified(drawn)
        console.print(f"wrong: {wrong[at]}", markup=False, highlight=False, soft_wrap=True)
    if given.out is not None:
        listed = [*wrong, *(drawn for drawn in results if drawn.outcome.is_internal)]
        given.out.write_text("".join(f"{drawn}\n" for drawn in listed))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
