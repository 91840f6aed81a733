"""Compute in the last layer only the rows whose logits are asked for."""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

from torch.fx import Node

from parvts_fx.analysis.last_rows import takes_last_rows
from parvts_fx.analysis.values import ancestors, descendants, hint, needed_for, output_node, value
from parvts_fx.passes.base import PassResult, State
from parvts_fx.passes.editing import Rows
from parvts_fx.passes.fewer_rows import find_tail, write_tail


@dataclasses.dataclass(frozen=True)
class KeepLastRows:
    """Take the last rows in front of the last layer's queries, where nothing else is read of that layer.

    ``logits = head(layer(h)[:, -1:])``  ==>  the same, with queries, attention output and MLP on the last row alone

    Keys and values are computed and cached for all rows of path A. Nothing that leaves the graph changes. Leaves a graph
    alone whose result needs more rows, or whose last layer mixes tokens in another way than by attention.
    """

    name: ClassVar[str] = "keep_last_rows"

    def run(self, state: State) -> PassResult:
        decoder, copies, graph = state.decoder, state.copies, state.module.graph
        last = decoder.layers[-1].mixers[-1].attention
        if state.depth >= len(decoder.layers) or last is None:
            return PassResult(0)
        behind = set(descendants(graph, [last.output]))
        takes = [node for node in decoder.nodes if node in behind and node in copies and takes_last_rows(node, decoder.tokens)]
        if len(takes) != 1:
            return PassResult(0)
        (take,) = takes
        tail = find_tail(state, last, self._needed_for(state, take), state.copies, self._other_results(state, take))
        count = hint(value(take).shape[1]) if value(take).dim() == value(take.args[0]).dim() else 1
        kept = state.partition.subject
        if tail is None or not isinstance(kept.count, int) or count >= kept.count:
            return PassResult(0)
        with graph.inserting_before(kept.ready.next):
            index = state.editor.call(operator.getitem, kept.index, (slice(None), slice(-count, None)))

        def take_last(node: Node, axis: int) -> Node:
            return state.editor.call(operator.getitem, node, (slice(None),) * axis + (slice(-count, None),))

        new = write_tail(state, last, tail, copies, kept, Rows("last", index, count), take_last)
        for user in [user for user in copies[take].users if user is not new[take]]:
            user.replace_input_with(copies[take], new[take])
        return PassResult(1, f"{len(tail)} operations on {count} of {kept.count} rows")

    def _needed_for(self, state: State, take: Node) -> list[Node]:
        needed = needed_for(state.module.graph, [take])
        return [node for node in state.decoder.nodes if node in needed]

    def _other_results(self, state: State, take: Node) -> list[Node]:
        """The decoder's nodes whose copies leave the graph by another way than through the last rows."""
        leaving = set(output_node(state.module.graph).all_input_nodes)
        results = [node for node in state.decoder.nodes if node in leaving or state.copies.get(node) in leaving]
        return [node for node in results if take not in ancestors([node])]
