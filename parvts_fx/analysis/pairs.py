"""Shows that an attention written out computes each score from its own query and key alone.

Its scores are then written again for some queries and some keys. That is right if L(q[rows], k[columns]) = L(q, k)[rows,
columns] for all that comes in front of the softmax, and if behind it no query's output depends on another query. Both are
shown on small real tensors, as for other operations in :mod:`parvts_fx.analysis.independence`: a shift of scores by
reshaping, say, does neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.extents import Scale
from parvts_fx.analysis.records import Operand
from parvts_fx.analysis.small_runs import SmallRuns, Unproven, local_argument, really
from parvts_fx.analysis.tokens import AtMost, AxisLabels, Computed, Count, TokenMap
from parvts_fx.analysis.values import ancestors, call, for_length, hint, hint_shape, is_tensor, leaves, value, with_leaves

_COUNTS = {"query": 11, "key": 13}
_CHOICES = ((1, 2, 5, 9), (0, 3, 4, 7, 10))


def keeps_pairs_apart(
    module: GraphModule, region: Sequence[Node], softmax: Node | None, output: Node, labelled: TokenMap,
    operands: Mapping[str, Sequence[Operand]], others_behind: bool = False,
) -> bool:
    """Whether scores and outputs commute with every choice of queries, and scores with every choice of keys.

    And what puts cached rows in front of the prompt's keys with every choice of these: they are the last, in their order.

    Args:
        region: the attention's own nodes, in graph order.
        softmax: None for a fused call, whose scores are known to be such.
        labelled: what a probe has found of them, with the labels "query" and "key".
        operands: what enters, by those labels.
        others_behind: whether what scores have beside the prompt's keys stands behind these (sinks), not in front.
    """
    in_front = set() if softmax is None else ancestors([softmax]) - {softmax}
    scores = [node for node in region if node in in_front and _is_pair(labelled, node) or _has_cached_keys(labelled, node)]
    for precision in ("double", "single", "own"):
        try:
            with really():
                runs = (_Runs(module, region, labelled, operands, precision, sees_all)
                        for sees_all in ((False,) if scores else (False, True)))
                return all(_commute(each, scores, output, labelled, others_behind) for each in runs)
        except Exception:  # these numbers are not what some operation takes
            continue
    return False


def _has_cached_keys(labelled: TokenMap, node: Node) -> bool:
    kinds = labelled.axes.get(node, {}).values()
    return len(kinds) == 1 and all(kind.label == "key" and kind.has_rows_in_front for kind in kinds)


def _is_pair(labelled: TokenMap, node: Node) -> bool:
    kinds = labelled.axes.get(node, {}).values()
    return {kind.label for kind in kinds} == set(_COUNTS) and all(kind.is_plain or kind.has_rows_in_front for kind in kinds)


def _commute(runs: _Runs, scores: Sequence[Node], output: Node, labelled: TokenMap, others_behind: bool) -> bool:
    full = runs.run({})
    for rows in _CHOICES:
        for columns in _CHOICES if scores else ():
            some = runs.run({"query": rows, "key": columns})
            for node in scores:
                chosen = full[node]
                for axis, kind in labelled.axes[node].items():
                    chosen = _select(chosen, axis, rows if kind.label == "query" else columns, kind.offset, others_behind)
                if not runs.equal(chosen, some[node]):
                    return False
        some = runs.run({"query": rows})
        ((axis, _),) = labelled.axes[output].items()
        if not runs.equal(full[output].index_select(axis, torch.tensor(rows)), some[output]):
            return False
    return True


def _select(tensor: torch.Tensor, axis: int, choice: Sequence[int], others: int, behind: bool = False) -> torch.Tensor:
    """Some of the tokens along an axis, and all other rows in front of them or behind them."""
    entries = tensor.shape[axis]
    rows = [*choice, *range(entries - others, entries)] if behind else [*range(others), *(others + token for token in choice)]
    return tensor.index_select(axis, torch.tensor(rows))


class _Runs:
    """Evaluates the region on noise, for some queries and some keys."""

    def __init__(
        self, module: GraphModule, region: Sequence[Node], labelled: TokenMap, operands: Mapping[str, Sequence[Operand]],
        precision: str, sees_all: bool,
    ):
        self._sees_all = sees_all
        """Whether every mask is true everywhere: blocks of keys are chosen only where all of one may be seen."""

        self._module, self._region, self._labelled = module, region, labelled
        self._scale, self._noise = Scale(1, 1, precision), SmallRuns(module, labelled, None)
        self._axes = {operand.node: {operand.axis: label} for label, own in operands.items() for operand in own}
        self._drawn: dict[tuple, torch.Tensor] = {}

    def equal(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Up to rounding; what is masked in one is masked in the other."""
        if one.shape != other.shape:
            return False
        return torch.allclose(one, other, rtol=self._scale.tolerance, atol=self._scale.tolerance, equal_nan=True)

    def run(self, choice: Mapping[str, tuple[int, ...]]) -> dict[Node, Any]:
        held: dict[Node, Any] = {}
        for node in self._region:
            bindings = self._labelled.bindings.get(node, {})
            given = [self._leaf(leaf, bindings.get(index), choice, held) for index, leaf in enumerate(leaves(node))]
            args, kwargs = with_leaves(node, given)
            held[node] = call(self._module, node.op, node.target, args, kwargs)
        return held

    def _leaf(self, leaf: Any, binding: object, choice: Mapping[str, tuple[int, ...]], held: dict[Node, Any]) -> Any:
        if isinstance(leaf, Node) and leaf in held:
            return held[leaf]
        if isinstance(binding, Count):
            return binding.of(self._count(binding.label, choice))
        if isinstance(binding, Computed):
            return for_length(value(leaf), self._labelled.size, self._count(binding.label, choice))
        if isinstance(binding, AtMost):
            return min(hint(value(leaf)) if isinstance(leaf, Node) else leaf, self._count(binding.label, choice))
        if is_tensor(leaf):
            axes = self._axes.get(leaf) or (dict(binding.axes) if isinstance(binding, AxisLabels) else {})
            return self._tensor(leaf, axes, choice)
        if isinstance(leaf, Node):
            return self._noise.scalar(leaf, hint(self._labelled.size))
        return local_argument(leaf, self._scale)

    def _count(self, label: str, choice: Mapping[str, tuple[int, ...]]) -> int:
        return len(choice[label]) if label in choice else _COUNTS[label]

    def _tensor(self, node: Node, axes: Mapping[int, str], choice: Mapping[str, tuple[int, ...]]) -> torch.Tensor:
        key = (node, tuple(axes.items()))
        if key not in self._drawn:
            sizes = hint_shape(value(node))
            if None in sizes:
                raise Unproven("a size depends on data")
            known = None if axes else self._noise.constant(node)
            shape = tuple(self._others(size) + _COUNTS[axes[axis]] if axis in axes else size for axis, size in enumerate(sizes))
            drawn = known if known is not None else self._noise.draw(
                value(node).dtype, shape, self._scale, len(self._drawn) + 1)
            masks = self._sees_all and known is None and drawn.dtype == torch.bool
            self._drawn[key] = torch.ones_like(drawn) if masks else drawn
        tensor = self._drawn[key]
        for axis, label in axes.items():
            if label in choice:
                tensor = _select(tensor, axis, choice[label], self._others(hint_shape(value(node))[axis]))
        return tensor

    def _others(self, entries: int) -> int:
        """How many rows stand in front of the tokens along an axis of so many entries."""
        return entries - hint(self._labelled.size)
