"""Where the entries of each token lie behind nodes that only move data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from parvts_fx.analysis.other_lengths import OtherLengths
from parvts_fx.analysis.small_runs import is_plain
from parvts_fx.analysis.tokens import Axis, Binding
from parvts_fx.analysis.values import call, is_tensor, leaves, with_leaves


class MovedTokens:
    """Follows tokens through views and the like, by running these on the tokens' numbers."""

    def __init__(self, others: OtherLengths):
        self._others, self._found, self._lengths = others, others.found, others.lengths
        self._inner: dict[Node, dict[int, int]] = {}
        """For axes of several entries a token: how many of one token follow one another, where that is known."""

        self._moved: dict[tuple, int] = {}

    def note(self, node: Node, choice: Mapping[int, Binding], axes: Mapping[int, Axis] | None) -> None:
        """A reading of a node, and the token axes of what it comes to, hold from now on."""
        if axes and any(kind.multiple > 1 for kind in axes.values()):
            self._inner[node] = self._layout(node, choice, axes)

    def forget(self, node: Node) -> None:
        self._inner.pop(node, None)

    def _layout(self, node: Node, choice: Mapping[int, Binding], axes: Mapping[int, Axis]) -> dict[int, int]:
        """How the entries of each token lie in the result: as moved, or else as in an operand with such an axis."""
        current = leaves(node)
        moved = self.axes(node, current, choice, dict(axes))
        if moved is not None:
            return moved
        return {
            axis: self._inner[source][axis] for axis, kind in axes.items() for source in node.all_input_nodes
            if axis in self._inner.get(source, {}) and self._found.axes[source].get(axis) == kind
        }

    def axes(
        self, node: Node, current: Sequence[Any], choice: Mapping[int, Binding], axes: dict[int, Axis] | None
    ) -> dict[int, int] | None:
        """By axis, how many entries of one token follow one another behind a node that only moves data; None for others."""
        sources = [leaf for leaf in current if isinstance(leaf, Node) and leaf in self._found.probed]
        if len(sources) != 1 or axes is None:
            return None
        (source,) = sources
        origin = self._found.axes.get(source, {})
        if len(origin) != len(axes):
            return None
        found: dict[int, int] = {}
        for (source_axis, kind), (axis, out_kind) in zip(sorted(origin.items()), sorted(axes.items())):
            if kind.label != out_kind.label:
                return None
            known = self._inner.get(source, {}).get(source_axis)
            for inner in dict.fromkeys((kind.multiple, 1)) if known is None else (known,):
                key: tuple[Any, ...] = (
                    node.op, node.target, str(node.args), str(node.kwargs), tuple(choice.items()), source_axis, axis, inner)
                key = (*key[:2], key[2].replace(source.name, ""), *key[3:], tuple(self._found.probed[source].shape))
                if key not in self._moved:
                    self._moved[key] = self._moves_whole(node, current, choice, source, source_axis, axis, inner)
                each = self._moved[key]
                if each:
                    found[axis] = each
                    break
            else:
                return None
        return found

    def _moves_whole(
        self, node: Node, current: Sequence[Any], choice: Mapping[int, Binding], source: Node, source_axis: int, axis: int,
        inner: int,
    ) -> int:
        """How many entries of each token, ``inner`` of which follow one another in the source, do so in the result; 0 if they
        do not lie in order there."""
        probed, length = self._found.probed[source], next(iter(self._lengths.values()))
        shape = [1] * probed.dim()
        shape[source_axis] = probed.shape[source_axis]
        numbers = torch.arange(probed.shape[source_axis], dtype=torch.int32) // inner % length
        numbers = numbers.view(shape).expand(probed.shape).contiguous()

        def real_leaf(leaf: Any, binding: Binding | None) -> Any:
            if leaf is source:
                return numbers
            if is_tensor(leaf):
                raise NotImplementedError("only nodes with one tensor are run on numbers")
            return self._others.leaf(leaf, binding)

        try:
            args, kwargs = with_leaves(node, [real_leaf(leaf, choice.get(i)) for i, leaf in enumerate(current)])
            moved = call(self._others.module, node.op, node.target, args, kwargs)
        except Exception:  # no data movement (a product with weights, say): nothing to learn here
            return 0
        if not is_plain(moved):  # in parts, over several processes
            return 0
        entries = moved.shape[axis]
        if entries % length:
            return 0
        view = [1] * moved.dim()
        view[axis] = entries
        for each in range(1, entries // length + 1):
            if entries // length % each == 0 and bool(
                    (moved == (torch.arange(entries, dtype=torch.int32) // each % length).view(view)).all()):
                return each
        return 0
