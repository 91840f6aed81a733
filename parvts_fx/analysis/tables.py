"""Tables made from sizes alone, where what they hold may be positions, which dropped rows take with them, or numbers of the rows
that are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from parvts_fx.analysis.calls import is_fused_attention
from parvts_fx.analysis.lengths import for_more, may_count
from parvts_fx.analysis.records import Attention, Layer
from parvts_fx.analysis.small_runs import SmallRuns, local_argument, really
from parvts_fx.analysis.tokens import AtMost, AxisLabels
from parvts_fx.analysis.values import (
    ancestors,
    call,
    is_tensor,
    leaves,
    symbols,
    value,
    with_leaves,
)
from parvts_fx.errors import Refusal


@dataclasses.dataclass
class _Table:
    """A tensor made from sizes alone, with rows along the prompt."""

    extends: bool | None
    """Whether a longer prompt only adds rows to it; None if that cannot be tried."""

    counts: bool
    """Whether its first rows are others than those of some choice of tokens."""


class Tables:
    """Looks at the tables that the decoder reads."""

    def __init__(self, runs: SmallRuns):
        self.runs = runs
        self._known: dict[Any, _Table | None] = {}

    def check(
        self, nodes: Sequence[Node], meeting: Collection[Node], attentions: Iterable[Attention], layers: Sequence[Layer]
    ) -> None:
        """Refuse tables whose reading cannot be told.

        Positions belong to attention (rotary angles, biases, learned positions in front of it). Where tokens meet
        otherwise, and behind that up to the residual stream, a table may number the rows that are there.

        Raises:
            Refusal: names the reader.
        """
        own = {node for attention in attentions for node in attention.nodes}
        stops = own | {layer.input for layer in layers}
        behind: set[Node] = set()
        for node in nodes:
            if node in meeting or node not in stops and any(source in behind for source in node.all_input_nodes):
                behind.add(node)
            if node in meeting and self._chooses(node):
                raise Refusal("how many tokens are chosen where tokens meet may follow from the prompt's length", node)
            for index, axes in self._tables_read(node):
                side = leaves(node)[index]
                table = self.look(side, axes)
                if table is None:
                    if node in meeting and any(isinstance(value(source), torch.nn.Parameter) for source in ancestors([side])):
                        raise Refusal("weights for each of the prompt's positions are read where tokens meet", node)
                    continue
                if node in own or is_fused_attention(node):
                    continue  # masks and biases belong to pairs of positions
                if table.extends is False or table.extends is None and node in behind:
                    raise Refusal("a table made for the prompt's length holds numbers that depend on it", node)
                if table.counts and node in behind and (node in meeting or not self.ends_in(node, own, stops)):
                    raise Refusal("a table of positions is read where tokens meet other than by attention: whether it numbers "
                                  "the rows that are there or the prompt's positions cannot be told", node)

    def _chooses(self, node: Node) -> bool:
        """Whether a node takes a number of tokens that may be a constant or a share of the prompt."""
        bindings = self.runs.tokens.bindings.get(node, {})
        static = not symbols(self.runs.tokens.size)
        return any(isinstance(binding, AtMost) and (static or isinstance(leaves(node)[index], Node))
                   for index, binding in bindings.items())

    def _tables_read(self, node: Node) -> Iterable[tuple[int, tuple[int, ...]]]:
        for index, binding in self.runs.tokens.bindings.get(node, {}).items():
            if isinstance(binding, AxisLabels) and is_tensor(leaves(node)[index]):
                yield index, tuple(axis for axis, _ in binding.axes)

    def ends_in(self, node: Node, own: Collection[Node], stops: Collection[Node]) -> bool:
        """Whether all that a node leads to, up to the next link of the residual stream, is attention."""
        seen, stack = set(), [node]
        while stack:
            for user in stack.pop().users:
                if user in own or user in seen:
                    continue
                if user in stops or user.op == "output":
                    return False
                seen.add(user)
                stack.append(user)
        return True

    def look(self, side: Node, axes: tuple[int, ...]) -> _Table | None:
        """None for what an input or a weight enters."""
        if (side, axes) not in self._known:
            self._known[side, axes] = self._look(side, axes)
        return self._known[side, axes]

    def is_first_of_longer(self, side: Node, axes: tuple[int, ...]) -> bool:
        """Whether a table is made from sizes alone, and for any prompt is the first rows, along some axes, of a longer one's."""
        table, length = self.look(side, axes), self.runs.length
        if table is None or not table.extends:
            return False
        held, shorter = self.runs.constant(side), self._for_more(side, -(length // 2))
        assert held is not None, "a table has a value"
        for axis in axes:
            held = held.narrow(axis, 0, length - length // 2)
        return shorter is not None and torch.equal(shorter, held)

    def _look(self, side: Node, axes: tuple[int, ...]) -> _Table | None:
        table = self.runs.constant(side)
        if table is None:
            return None
        length = self.runs.length
        kept = [row for row in range(length) if row % 3 != 1]
        first, chosen = table, table
        for axis in axes:
            if table.shape[axis] != length:
                return None
            first = first.narrow(axis, 0, len(kept))
            chosen = chosen.index_select(axis, torch.tensor(kept))
        longer = self._for_more(side, 2)
        extends = None
        if longer is not None:
            for axis in axes:
                longer = longer.narrow(axis, 0, min(length, longer.shape[axis]))
            extends = torch.equal(longer, table)
        return _Table(extends, not torch.equal(first, chosen))

    def _for_more(self, side: Node, more: int) -> torch.Tensor | None:
        """The table for a longer prompt; None if it cannot be made."""
        length, held = self.runs.length, dict[Node, Any]()
        of_prompt = symbols(self.runs.tokens.size)

        def changed(leaf: Any) -> Any:
            if isinstance(leaf, Node):
                return held[leaf]
            if not of_prompt and may_count(leaf, length):
                return for_more(leaf, length, more)
            return local_argument(leaf, None)

        try:
            with really():
                for source in sorted(ancestors([side])):
                    if source.op.startswith("call"):
                        args, kwargs = with_leaves(source, [changed(leaf) for leaf in leaves(source)])
                        held[source] = call(self.runs.module, source.op, source.target, args, kwargs)
                    else:
                        held[source] = self.runs.scalar(source, length + more)
            return held[side] if isinstance(held[side], torch.Tensor) else None
        except Exception:  # it is as long as it is: a table of a fixed size, say
            return None

