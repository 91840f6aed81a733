"""Which tests run where time is short, and of a grid of parameters which cases: each value is met, not each combination."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import pytest

SELECTIONS = ("quick", "rest", "covered", "all")
"""What ``--cases`` takes: all cases; grids of up to six cases and of larger ones as many as meet each value of each parameter; of
tests that are not marked ``slow`` as many as meet each value; and the difference of the last two."""

_QUICK, _COVERED = (2, 1), (6, 1)
"""Grids of so many cases run whole; of larger ones each value is met so often, if it stands in as many cases."""


def left_out(items: Sequence[pytest.Item], selection: str) -> set[pytest.Item]:
    """The cases that a selection (:data:`SELECTIONS`) does without."""
    if selection == "all":
        return set()
    if selection == "covered":
        return _thinned(items, *_COVERED)
    slow = {item for item in items if item.get_closest_marker("slow")}
    others = slow | _thinned([item for item in items if item not in slow], *_QUICK)
    if selection == "quick":
        return others
    return (set(items) - others) | _thinned(items, *_COVERED)


def _thinned(items: Sequence[pytest.Item], few: int, times: int) -> set[pytest.Item]:
    grids: dict[object, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if len(_values_of(item)) > 1:
            grids[item.function].append(item)
    return {item for cases in grids.values() if len(cases) > few for item in _left_out_of(cases, times)}


def _values_of(item: pytest.Item) -> list[tuple]:
    """One for each ``parametrize`` and each fixture with parameters: the names, and which objects stand for them."""
    given = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    axes = [tuple(name.strip() for name in (held.split(",") if isinstance(held, str) else held)) for held in names]
    axes += [(name,) for name in given if not any(name in axis for axis in axes)]
    return [(axis, tuple(id(given[name]) for name in axis)) for axis in axes]


def _left_out_of(cases: list[pytest.Item], times: int) -> list[pytest.Item]:
    """Greedily: next comes the case with the most values that are not met often enough, the first of these."""
    values = {case: _values_of(case) for case in cases}
    missing = {value: min(times, count) for value, count in collections.Counter(
        value for held in values.values() for value in held).items()}
    rest = list(cases)
    while any(missing.values()):
        best = max(rest, key=lambda case: sum(missing[value] > 0 for value in values[case]))
        rest.remove(best)
        for value in values[best]:
            missing[value] = max(missing[value] - 1, 0)
    return rest
