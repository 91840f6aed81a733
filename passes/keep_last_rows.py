"""Compute in the last layer only the rows whose logits are asked for."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.fx import Node

from parvts_fx.analysis.last_rows import takes_last_rows
from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.values import descendants, hint, needed_for, output_node, value
from parvts_fx.passes.base import PassResult, State
from parvts_fx.passes.duplicate_attention import attend
from parvts_fx.passes.editing import Rows, along
from parvts_fx.passes.fewer_rows import find_tail, write_tail


@dataclasses.dataclass(frozen=True)
class KeepLastRows:
    """Take the last rows in front of the last layer's queries, where nothing else is read of that layer.

    ``logits = head(layer(h)[:, -1:])``  ==>  the same, with queries, attention output and MLP on the last row alone

    Keys and values are computed and cached for all rows of path A. Nothing that leaves the graph changes. Leaves a graph
    alone whose result needs more rows, whose last layer mixes tokens in another way than by attention, or whose last
    layer's text rows are still to be merged by constant weights.
    """

    name: ClassVar[str] = "keep_last_rows"

    def run(self, state: State) -> PassResult:
        decoder, copies, graph = state.decoder, state.copies, state.module.graph
        last = decoder.layers[-1].mixers[-1].attention
        migrates = state.depth >= len(decoder.layers)  # then the last rows still ask by the rules of their group
        if last is None or migrates and state.options.fusion != "attention":
            return PassResult(0)
        behind = set(descendants(graph, [last.output]))
        takes = [node for node in decoder.nodes if node in behind and node in copies and takes_last_rows(node, decoder.tokens)]
        if len(takes) != 1:
            return PassResult(0)
        (take,) = takes
        tail = find_tail(state, last, self._needed_for(state, take), state.copies, self._other_results(state, take))
        count = hint(value(take).shape[1]) if value(take).dim() == value(take.args[0]).dim() else 1
        kept = state.partition.subject
        fewer = count < kept.count if isinstance(kept.count, int) else count == 1
        if tail is None or not fewer:
            return PassResult(0)
        with graph.inserting_before(kept.ready.next):
            index = state.editor.call(operator.getitem, kept.index, (slice(None), slice(-count, None)))

        def take_last(node: Node, axis: int) -> Node:
            return state.alike(
                state.editor.call(operator.getitem, node, (slice(None),) * axis + (slice(-count, None),)), node)

        rows = Rows("last", index, count)

        def ask(ready: Mapping[Node, Node]) -> Node:
            return self._ask_in_groups(state, last, rows, ready) if migrates else attend(state, last, rows, kept, ready)

        new = write_tail(state, last, tail, copies, rows, take_last, ask)
        for user in [user for user in copies[take].users if user is not new[take]]:
            user.replace_input_with(copies[take], new[take])
        state.prune_node = new.get(state.cut, state.prune_node)
        return PassResult(1, f"{len(tail)} operations on {count} of {kept.count} rows")

    def _ask_in_groups(self, state: State, last: Attention, rows: Rows, ready: Mapping[Node, Node]) -> Node:
        """Text rows ask all rows, rows of the subject group ask path A's."""
        parts = state.partition
        everything = attend(state, last, rows, parts.everything, ready)
        if state.options.paths == "joint":
            return everything
        samples, rank = state.samples_of(last.output), value(last.output).dim()

        def choose(everything: torch.Tensor, subject: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
            return torch.where(along(is_text[:, -rows.count:], samples, last.output_axis, rank), everything, subject)

        subject = attend(state, last, rows, parts.subject, ready)
        return state.editor.inline(choose, everything, subject, parts.is_text)

    def _needed_for(self, state: State, take: Node) -> list[Node]:
        needed = needed_for(state.module.graph, [take])
        return [node for node in state.decoder.nodes if node in needed]

    def _other_results(self, state: State, take: Node) -> list[Node]:
        """The decoder's nodes whose copies leave the graph by another way than through the last rows."""
        leaving = set(output_node(state.module.graph).all_input_nodes)
        results = [node for node in state.decoder.nodes if node in leaving or state.copies.get(node) in leaving]
        behind = {take}
        for node in state.module.graph.nodes:
            if not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
        return [node for node in results if node not in behind]
