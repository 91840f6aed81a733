"""The CPU at hand: rates of products, attention and copies, measured once a process in a few seconds."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F

from parvts_fx.backends.linear import LEAST_FLOPS, prefers_onednn
from parvts_fx.cost.fusing import Operation
from parvts_fx.cost.processors import CPU, Bound, at_least, bound_by
from parvts_fx.torch_private import disable_current_modes, onednn_linear

_ROWS = (1, 16, 128, 640)
_INNER, _COLUMNS, _WEIGHTS = 1024, 4096, 6
"""So many weights of that size take turns, so that none of them is in a cache when it is read."""

_QUERIES, _HEADS, _HEAD_SIZE = 384, 16, 64
_COPIED = (1 << 20, 1 << 22, 1 << 26)
"""Bytes, from what lies in a core's cache to what lies in memory."""

_TURNS = 5


@dataclasses.dataclass(frozen=True)
class Cpu:
    """What was measured. Between two points it is linear, beyond the last it stays as it is there."""

    products: Mapping[int, float]
    """Seconds for each weight of a product, by its number of rows."""

    other_products: Mapping[int, float]
    """The same on the other library that ``linear_kernels="auto"`` takes where it is quicker."""

    attention: Mapping[bool, float]
    """FLOP/s over all pairs, of causal calls and of those with a mask."""

    copies: Mapping[int, float]
    """Seconds for as many bytes read and written together."""

    least: float
    """Seconds of a call on next to nothing."""

    name: str = CPU
    launch: float = 0.0
    quicker: bool = False
    """Whether products are on the library that is quicker for their sizes, as :mod:`parvts_fx.backends.linear` finds."""

    def kernel(self, operation: Operation) -> tuple[float, Bound]:
        moving = _at(self.copies, operation.moved)
        if operation.kind not in ("product", "attention"):
            return at_least(self.least, moving, "memory")
        if operation.kind == "attention":
            computing = operation.flops / self.attention[operation.causal]
        else:
            points = self.other_products if self.quicker and _prefers_other(operation) else self.products
            rows = max(1, operation.rows)
            computing = operation.flops / (2 * rows) * _at(points, rows)
        return at_least(self.least, max(computing, moving), bound_by(operation, computing, moving))


def _prefers_other(operation: Operation) -> bool:
    """What is chosen for a linear layer when it is compiled in this process."""
    if operation.dtype != torch.float32 or not operation.weights or operation.flops < LEAST_FLOPS:
        return False
    inner = operation.flops // (2 * operation.rows * operation.columns)
    return prefers_onednn(operation.rows, operation.columns, inner, operation.name == "aten.addmm", torch.get_num_threads())


def _at(points: Mapping[int, float], place: int) -> float:
    """Seconds at a place between points, or in proportion beyond them."""
    places = sorted(points)
    if place <= places[0]:
        return points[places[0]] * (place / places[0] if place else 0)
    for low, high in zip(places, places[1:]):
        if place <= high:
            share = (place - low) / (high - low)
            return points[low] * (1 - share) + points[high] * share
    return points[places[-1]] * place / places[-1]


def measured(dtype: torch.dtype, quicker_products: bool = False) -> Cpu:
    """The CPU at hand with as many threads as torch has now, measured at the first call.

    Args:
        dtype: what is multiplied.
        quicker_products: as with ``linear_kernels="auto"``.
    """
    return dataclasses.replace(_measured(dtype, torch.get_num_threads()), quicker=quicker_products)


@functools.cache
def _measured(dtype: torch.dtype, threads: int) -> Cpu:
    with torch.no_grad(), disable_current_modes():
        usual = _products(F.linear, dtype)
        other = _products(lambda x, weight: onednn_linear(x, weight, None), dtype) if dtype == torch.float32 and (
            torch.backends.mkldnn.is_available()) else usual
        small = torch.ones(8, 8, dtype=dtype)
        return Cpu(usual, other, _attention(dtype), _copies(),
                   _seconds([lambda: torch.add(small, small, out=small)] * _TURNS))


def forget() -> None:
    """Measure again at the next call: other work on the machine may have come or gone."""
    _measured.cache_clear()


def _products(multiply: Callable[..., torch.Tensor], dtype: torch.dtype) -> dict[int, float]:
    weights = cycle([torch.ones(_COLUMNS, _INNER, dtype=dtype) for _ in range(_WEIGHTS)])
    found = {}
    for rows in _ROWS:
        given = torch.ones(rows, _INNER, dtype=dtype)
        calls = [functools.partial(multiply, given, next(weights)) for _ in range(_TURNS)]
        found[rows] = _seconds(calls) / (_INNER * _COLUMNS)
    return found


def _attention(dtype: torch.dtype) -> dict[bool, float]:
    given = [torch.ones(1, _HEADS, _QUERIES, _HEAD_SIZE, dtype=dtype) for _ in range(3)]
    mask = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool).tril()
    flops = 4 * _HEADS * _QUERIES**2 * _HEAD_SIZE
    attend: Callable[..., torch.Tensor] = F.scaled_dot_product_attention
    return {True: flops / _seconds([lambda: attend(*given, is_causal=True)] * _TURNS),
            False: flops / _seconds([lambda: attend(*given, attn_mask=mask)] * _TURNS)}


def _copies() -> dict[int, float]:
    found = {}
    for size in _COPIED:
        source, target = (torch.zeros(size // 8) for _ in range(2))
        found[size] = _seconds([functools.partial(target.copy_, source)] * _TURNS)
    return found


def _seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """The median of several calls, behind one that warms up."""
    calls[0]()
    taken, clock = [], clock_of(torch.get_num_threads())
    for call in calls:
        start = clock()
        call()
        taken.append(clock() - start)
    return statistics.median(taken)


def clock_of(threads: int) -> Callable[[], float]:
    """What tells how long a call takes: of one thread its own time, which other work on the machine does not lengthen."""
    return time.thread_time if threads == 1 else time.perf_counter
