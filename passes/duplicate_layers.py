"""Give the non-subject path its own copy of the migration layers (constant fusion weights)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch.fx import Node

from parvts_fx.analysis.values import needed_for
from parvts_fx.passes.base import PassResult, State
from parvts_fx.passes.duplicate_attention import attend
from parvts_fx.passes.editing import batch_of
from parvts_fx.passes.fewer_rows import find_tail, write_tail
from parvts_fx.passes.restrict import restrict


@dataclasses.dataclass(frozen=True)
class DuplicateLayers:
    """Write the layers in front of layer K again, on path B's rows alone.

    ``h[K] = layers(h0)``  ==>  the same, and ``h[K](B) = layers(h0[B])``, whose text rows the pruning merges

    Each path attends only within itself, whatever mixes tokens in the layers. Refuses when a layer's operation does
    not work on fewer rows.
    """

    name: ClassVar[str] = "duplicate_layers"
    skip_dead_rows: bool = True
    """In the last of these layers compute path B's text rows alone, whatever the keys and values do not need: the
    visual rows that come out of it are read by nothing."""

    def run(self, state: State) -> PassResult:
        parts, merge, graph = state.partition, state.decoder.merge.output, state.module.graph
        needed = needed_for(graph, [state.cut])
        region = [node for node in state.decoder.nodes if node in needed and node is not merge]
        start = {merge: state.editor.gather(merge, 1, parts.non_subject, (0, state.batch))}
        last = state.migration_mixers[-1].attention if state.migration_mixers else None
        texts = parts.text.count
        some = not isinstance(texts, int) or texts > 0  # operations on no rows at all may not know their sizes
        tail = find_tail(state, last, [merge, *region]) if self.skip_dead_rows and last is not None and some else None
        if tail is None:
            copies = restrict(state, region, start, parts.non_subject)
            state.non_subject_rows, notes = parts.non_subject, ""
        else:
            late = {*tail, *last.nodes}
            copies = restrict(state, [node for node in region if node not in late], start, parts.non_subject)

            def take_text(node: Node, axis: int) -> Node:
                return state.editor.gather(node, axis, parts.text_in_non_subject, batch_of(node, axis, state.batch))

            def ask(ready: Mapping[Node, Node]) -> Node:
                return attend(state, last, parts.text, parts.non_subject, ready)

            copies |= write_tail(state, last, tail, copies, parts.text, take_text, ask)
            state.non_subject_rows, notes = parts.text, f"{len(tail)} operations on text rows alone"
        state.non_subject_link = copies[state.cut]
        return PassResult(state.depth, notes)
