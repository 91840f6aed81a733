"""What is predicted, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from parvts_fx.cost.predicting import Comparison, Prediction

TITLE = "Prefill, predicted by a model of cost: milliseconds of all tokens / of few"
HEADINGS = ("", "kernels", "ratio", "few: mostly", "launched", "ratio")
WORDS = {"arithmetic": "arithmetic", "weights": "weights", "memory": "other data", "starting": "small kernels"}
"""What the time of the pruned prefill's kernels goes into: multiplying, reading parameters, moving activations, or starting."""


def rows(costs: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """A row for each processor: kernels alone, and calls that launch them one after the other."""
    found: list[tuple[str, ...]] = []
    for cost in costs:
        launched = (f"{_time(cost.whole.seconds)} / {_time(cost.few.seconds)}", f"{cost.ratio:.2f}x")
        found.append((_name(cost.few), f"{_time(cost.whole.kernels)} / {_time(cost.few.kernels)}", f"{cost.kernels_ratio:.2f}x",
                      WORDS[cost.few.bound], *(launched if cost.few.launching else ("", ""))))
    return found


def table(costs: Sequence[Comparison]) -> Table:
    made = Table(title=TITLE, title_justify="left")
    for number, heading in enumerate(HEADINGS):
        made.add_column(heading, justify="right" if number not in (0, 3) else "left", no_wrap=True)
    for row in rows(costs):
        made.add_row(*row)
    return made


def _name(of: Prediction) -> str:
    return f"{of.processor.removeprefix('NVIDIA ')}, {str(of.dtype).removeprefix('torch.')}"


def _time(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
