"""Give the non-subject path its own copy of the migration layers (constant fusion weights)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch.fx import Node

from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.values import ancestors, needed_for
from parvts_fx.passes.base import PassResult, State
from parvts_fx.passes.duplicate_attention import attend
from parvts_fx.passes.fewer_rows import find_tail, write_tail
from parvts_fx.passes.restrict import gather_rows, restrict


@dataclasses.dataclass(frozen=True)
class DuplicateLayers:
    """Write the layers in front of layer K again, on path B's rows alone.

    ``h[K] = layers(h0)``  ==>  the same, and ``h[K](B) = layers(h0[B])``, whose text rows the pruning merges

    Each path attends only within itself, whatever mixes tokens in the layers. Where :class:`SharePrefix` has found rows
    that both compute alike, path B reads their keys and values from path A. Refuses when a layer's operation does not work
    on fewer rows.
    """

    name: ClassVar[str] = "duplicate_layers"
    skip_dead_rows: bool = True
    """In the last of these layers compute path B's text rows alone, whatever the keys and values do not need: the
    visual rows that come out of it are read by nothing."""

    def run(self, state: State) -> PassResult:
        merge, graph = state.decoder.merge.output, state.module.graph
        rows = state.prefix or state.partition
        needed = needed_for(graph, [state.cut])
        region = [node for node in state.decoder.nodes if node in needed and node is not merge]
        start = {merge: gather_rows(state, merge, rows.non_subject, merge.next)}
        last = state.migration_mixers[-1].attention if state.migration_mixers else None
        texts = state.partition.text.count
        some = not isinstance(texts, int) or texts > 0  # operations on no rows at all may not know their sizes
        tail = find_tail(state, last, [merge, *region]) if self.skip_dead_rows and last is not None and some else None
        if tail is None:
            copies = self._write(state, region, start, state.migration_attentions)
            state.non_subject_rows, notes = rows.non_subject, ""
        else:
            late = {*tail, *last.nodes}
            front = [node for node in region if node not in late]
            copies = self._write(state, front, start, state.migration_attentions[:-1])

            def take_text(node: Node, axis: int) -> Node:
                return state.alike(
                    state.editor.gather(node, axis, rows.text_in_non_subject, state.samples_of(node)), node)

            def ask(ready: Mapping[Node, Node]) -> Node:
                return attend(state, last, rows.text, state.partition.non_subject, self._lend(state, last, ready))

            copies |= write_tail(state, last, tail, copies, rows.text, take_text, ask)
            state.non_subject_rows, notes = rows.text, f"{len(tail)} operations on text rows alone"
        state.non_subject_link = copies[state.cut]
        return PassResult(state.depth, notes)

    def _write(
        self, state: State, region: Sequence[Node], start: Mapping[Node, Node], attentions: Sequence[Attention]
    ) -> dict[Node, Node]:
        """A region of the layers on path B's rows; where it leaves a prefix to path A, each attention call takes its keys."""
        if state.prefix is None:
            return restrict(state, region, start, state.partition.non_subject)
        rows, copies = state.prefix.non_subject, dict(start)
        inside = {node for attention in attentions for node in attention.nodes}
        for attention in attentions:
            in_front = ancestors(operand.node for operand in (*attention.queries, *attention.keys))
            front = [node for node in region if node in in_front and node not in inside]
            copies = restrict(state, front, copies, rows)
            ready = {operand.node: copies[operand.node]
                     for operand in (*attention.queries, *attention.keys) if operand.node in copies}
            with state.editor.graph.inserting_before(attention.output.next):
                copies[attention.output] = attend(
                    state, attention, rows, state.partition.non_subject, self._lend(state, attention, ready))
        return restrict(state, [node for node in region if node not in inside], copies, rows)

    def _lend(self, state: State, attention: Attention, ready: Mapping[Node, Node]) -> Mapping[Node, Node]:
        """The call's operands, keys and values with path A's in front."""
        if state.prefix is None:
            return ready
        full = dict(ready)
        for node, axis in ((operand.node, operand.axis) for operand in attention.keys if operand.node in ready):
            lent = state.editor.call(torch.narrow, node, axis, 0, state.prefix.count)
            state.lent[lent] = node
            full[node] = state.alike(state.editor.call(torch.cat, [lent, ready[node]], dim=axis), node)
        return full
