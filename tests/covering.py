"""Which cases of a large grid of parameters run where time is short: each value is met, not each combination."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import pytest

_FEW = 12
"""Grids of so many cases run whole."""

_TIMES = 2
"""So often each value is met, if it stands in as many cases."""


def left_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The cases without which each value of each parameter of a test is still met, and still in different company."""
    grids: dict[object, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if len(_values_of(item)) > 1:
            grids[item.function].append(item)
    return [item for cases in grids.values() if len(cases) > _FEW for item in _left_out_of(cases)]


def _values_of(item: pytest.Item) -> list[tuple]:
    """One for each ``parametrize`` and each fixture with parameters: the names, and which objects stand for them."""
    given = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    axes = [tuple(name.strip() for name in (held.split(",") if isinstance(held, str) else held)) for held in names]
    axes += [(name,) for name in given if not any(name in axis for axis in axes)]
    return [(axis, tuple(id(given[name]) for name in axis)) for axis in axes]


def _left_out_of(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Greedily: next comes the case with the most values that are not met often enough, the first of these."""
    values = {case: _values_of(case) for case in cases}
    missing = {value: min(_TIMES, count) for value, count in collections.Counter(
        value for held in values.values() for value in held).items()}
    rest = list(cases)
    while any(missing.values()):
        best = max(rest, key=lambda case: sum(missing[value] > 0 for value in values[case]))
        rest.remove(best)
        for value in values[best]:
            missing[value] = max(missing[value] - 1, 0)
    return rest
