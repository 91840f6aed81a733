"""Drop the non-subject branch at the input of layer K."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node

from parvts_fx.analysis.last_rows import last_rows_of
from parvts_fx.analysis.values import descendants, output_node, value
from parvts_fx.passes.base import PassResult, State
from parvts_fx.passes.editing import along
from parvts_fx.passes.restrict import gather_rows, restrict


@dataclasses.dataclass(frozen=True)
class PruneBranch:
    """Run what follows layer K's input on path A's rows alone, and shorten every output to them.

    ``out = rest(h[K])``  ==>  ``out = rest(h[K][A])``; sizes, masks, rotary tables and cache outputs follow

    With constant weights all layers run on path A, and at layer K's input its text rows become
    ``w * A[T] + (1 - w) * B[T]``. Refuses when something behind the cut does not work on fewer rows.
    """

    name: ClassVar[str] = "prune_branch"
    fusion: str | float

    def run(self, state: State) -> PassResult:
        rows, graph = state.partition.subject, state.module.graph
        fused = state.non_subject_link is not None
        seed = state.decoder.merge.output if fused else state.cut
        start = state.pruned or {seed: gather_rows(state, seed, rows, seed.next)}

        def fuse(node: Node, copy: Node) -> Node:
            if node is not state.cut:
                return copy
            state.prune_node = self._fuse(state, copy)
            return state.prune_node

        inside = set(state.decoder.nodes)
        region = state.behind_cut
        if region is None:
            region = [node for node in descendants(graph, [seed]) if node in inside and node is not seed]
        copies = restrict(state, region, start, rows, fuse if fused else None)
        if not fused:
            state.prune_node = copies[state.cut]
        state.copies = copies
        for reader, node in state.lent.items():
            reader.replace_input_with(node, copies[node])
        output = output_node(graph)
        for node in output.all_input_nodes:
            if node in copies:
                output.replace_input_with(node, copies[node])
            elif node in inside:
                short = last_rows_of(state.decoder, node)  # the last rows of a cache: those of the kept ones
                if short:
                    output.replace_input_with(node, restrict(state, short, {}, rows)[node])
                else:
                    output.replace_input_with(node, gather_rows(state, node, rows, output))
        return PassResult(len(region))

    def _fuse(self, state: State, subject: Node) -> Node:
        """Merge the text rows of both paths; the subject rows, and text that path A computes for both, stay. Both paths have
        their rows along one axis."""
        weight, rows, other = self.fusion, state.prefix or state.partition, state.non_subject_link
        axis = state.decoder.tokens.plain_axis(state.cut)
        samples, rank = state.samples_of(state.cut), value(state.cut).dim()

        def fuse(a: torch.Tensor, b: torch.Tensor, is_text: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
            partner = b.gather(axis, along(partners, samples, axis, rank).expand(a.shape))
            return torch.where(along(is_text, samples, axis, rank), weight * a + (1 - weight) * partner, a)

        partners = rows.text_partners if state.non_subject_rows is rows.text else rows.partners
        with state.editor.graph.inserting_before(max(subject, other).next):
            return state.editor.inline(fuse, subject, other, rows.is_text, partners)
