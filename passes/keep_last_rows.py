"""Compute in the last layer only the rows whose logits are asked for."""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

from torch.fx import Node

from parvts_fx.analysis.last_rows import takes_last_rows
from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.values import ancestors, changed_in_place, descendants, hint, is_tensor, needed_for, output_node, value
from parvts_fx.passes.base import PassResult, State
from parvts_fx.passes.duplicate_attention import attend
from parvts_fx.passes.editing import Rows
from parvts_fx.passes.restrict import restrict, with_their_tuples


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
        tail = self._tail(state, last, take)
        count = hint(value(take).shape[1]) if value(take).dim() == value(take.args[0]).dim() else 1
        kept = state.partition.subject
        if tail is None or not isinstance(kept.count, int) or count >= kept.count:
            return PassResult(0)
        new = self._write(state, last, tail, count)
        for user in [user for user in copies[take].users if user is not new[take]]:
            user.replace_input_with(copies[take], new[take])
        return PassResult(1, f"{len(tail)} operations on {count} of {kept.count} rows")

    def _tail(self, state: State, last: Attention, take: Node) -> list[Node] | None:
        """What is needed for the last rows and for nothing else; None where that cannot be told apart."""
        graph, decoder = state.module.graph, state.decoder
        before = set(decoder.nodes) & needed_for(graph, [take])
        outputs = [node for node in self._original_outputs(state) if take not in ancestors([node])]
        others = needed_for(graph, [*outputs, *(operand.node for operand in last.keys)])
        if last.output in others:
            return None
        tail = [node for node in decoder.nodes if node in before and node not in others and node not in last.nodes]
        mixers = [mixer.output for layer in decoder.layers for mixer in layer.mixers if mixer.attention is not last]
        if any(mixer in tail for mixer in mixers) or any(changed_in_place(node) for node in tail):
            return None
        if any(node not in state.copies for node in tail):
            return None
        tail = with_their_tuples(state, tail, {})
        starts = self._starts(state, tail, last)
        return tail if all(is_tensor(node) and decoder.tokens.plain_axis(node) is not None for node in starts) else None

    def _starts(self, state: State, tail: list[Node], last: Attention) -> list[Node]:
        """What the tail reads of path A's rows in front of it."""
        inside = {*tail, *last.nodes}
        sources = dict.fromkeys(source for node in tail for source in node.all_input_nodes)
        return [source for source in sources if source in state.copies and source not in inside]

    def _original_outputs(self, state: State) -> list[Node]:
        """The decoder's nodes whose copies leave the graph."""
        leaving = set(output_node(state.module.graph).all_input_nodes)
        return [node for node in state.decoder.nodes if node in leaving or state.copies.get(node) in leaving]

    def _write(self, state: State, last: Attention, tail: list[Node], count: int) -> dict[Node, Node]:
        """The tail again, on the last rows of path A."""
        parts, editor, copies, tokens = state.partition, state.editor, state.copies, state.decoder.tokens
        graph = editor.graph
        with graph.inserting_before(parts.subject.ready.next):
            index = editor.call(operator.getitem, parts.subject.index, (slice(None), slice(-count, None)))
        rows = Rows("last", index, count)
        start: dict[Node, Node] = {}
        for source in self._starts(state, tail, last):
            with graph.inserting_before(copies[source].next):
                where = (slice(None),) * tokens.plain_axis(source) + (slice(-count, None),)
                start[source] = editor.call(operator.getitem, copies[source], where)
        in_front = ancestors(operand.node for operand in last.queries)
        front = [node for node in tail if node in in_front]
        queries = restrict(state, front, start, rows)
        ready = {operand.node: copies[operand.node] for operand in last.keys}
        ready |= {operand.node: queries[operand.node] for operand in last.queries}
        with graph.inserting_before(copies[last.output].next):
            result = attend(state, last, rows, parts.subject, ready)
        return restrict(state, [node for node in tail if node not in front], {**queries, last.output: result}, rows)
