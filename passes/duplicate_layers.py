"""Give the non-subject path its own copy of the migration layers (constant fusion weights)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from parvts_fx.analysis.values import needed_for
from parvts_fx.passes.base import PassResult, State
from parvts_fx.passes.restrict import restrict


@dataclasses.dataclass(frozen=True)
class DuplicateLayers:
    """Write the layers in front of layer K again, on path B's rows alone.

    ``h[K] = layers(h0)``  ==>  the same, and ``h[K](B) = layers(h0[B])``, whose text rows the pruning merges

    Each path attends only within itself, whatever mixes tokens in the layers. Refuses when a layer's operation does
    not work on fewer rows.
    """

    name: ClassVar[str] = "duplicate_layers"

    def run(self, state: State) -> PassResult:
        rows = state.partition.non_subject
        merge = state.decoder.merge.output
        needed = needed_for(state.module.graph, [state.cut])
        region = [node for node in state.decoder.nodes if node in needed and node is not merge]
        start = {merge: state.editor.gather(merge, 1, rows, (0, state.batch))}
        copies = restrict(state, region, start, rows)
        state.non_subject_link = copies[state.cut]
        for attention in state.migration_attentions:
            state.attention_calls.setdefault("non_subject", []).append(copies[attention.output])
        return PassResult(state.depth)
