"""Compute in the last migration layer only the rows that something reads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node

from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.values import ancestors, needed_for, output_node
from parvts_fx.passes.base import PassResult, State
from parvts_fx.passes.duplicate_attention import attend, duplicate
from parvts_fx.passes.editing import Rows
from parvts_fx.passes.restrict import restrict


@dataclasses.dataclass(frozen=True)
class SkipDeadRows:
    """Prune behind the keys and values of the last migration layer, instead of at the input of layer K.

    ``h[K] = layer(h)[A]``  ==>  the same rows of ``h[K]``, with queries, attention output and MLP on path A's rows

    Where the last attention call before the cut is the last to mix rows: of what stands behind it only path A's rows are
    ever read, and of what stands in front of it all rows are needed only where its keys and values depend on them.
    Nothing that leaves the graph changes. Refuses when an operation does not work on fewer rows.
    """

    name: ClassVar[str] = "skip_dead_rows"
    paths: str

    def run(self, state: State) -> PassResult:
        parts, decoder = state.partition, state.decoder
        if not state.migration_attentions:
            return PassResult(0, "no attention in the migration layers")
        last = state.migration_attentions[-1]
        graph = state.module.graph
        read_in_full = needed_for(graph, [operand.node for operand in last.keys])
        if last.output in read_in_full:  # a residual stream that is updated in place
            if self.paths == "parallel":
                duplicate(state, last)
            return PassResult(0, "the layer writes into what its keys and values are computed from")
        alive = needed_for(graph, [output_node(graph)])
        short = [node for node in decoder.nodes if node in alive and node not in read_in_full and node not in last.nodes]
        if any(mixer.output in short for mixer in state.migration_mixers if mixer.attention is not last):
            if self.paths == "parallel":
                duplicate(state, last)
            return PassResult(0, "tokens meet beside the last attention, or behind it")
        in_front = ancestors(operand.node for operand in last.queries)
        copies = restrict(state, [node for node in short if node in in_front], {}, parts.subject)
        with state.editor.graph.inserting_before(last.output.next):
            result = self._attend(state, last, copies)
        state.pruned = {**copies, last.output: result}
        state.behind_cut = [node for node in short if node not in copies]
        return PassResult(1, f"{len(short)} operations on path A's rows")

    def _attend(self, state: State, attention: Attention, copies: dict[Node, Node]) -> Node:
        """The call's output on path A's rows."""
        parts, editor, axis = state.partition, state.editor, attention.output_axis
        if self.paths == "joint":
            return attend(state, attention, parts.subject, parts.everything, copies)
        text_queries = {
            operand.node: state.alike(editor.gather(
                copies[operand.node], operand.axis, parts.text_in_subject, state.samples_of(operand.node),
                attention.output.next), operand.node)
            for operand in attention.queries if operand.node in copies
        }
        outputs = [
            attend(state, attention, parts.subject, parts.subject, copies),
            attend(state, attention, parts.text, parts.everything, text_queries),
        ]
        joined = editor.call(torch.cat, outputs, dim=axis)
        slots = Rows("subject_slots", parts.subject_slots, parts.subject.count)
        return state.alike(editor.gather(joined, axis, slots, state.samples_of(attention.output)), attention.output)
