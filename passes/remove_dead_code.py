"""Remove what nothing reads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from parvts_fx.analysis.values import needed_for, output_node
from parvts_fx.pipeline import PassResult, Work


@dataclasses.dataclass(frozen=True)
class RemoveDeadCode:
    """Drop the nodes that no output needs: rows that were laid out and are not read, and whatever other passes have left.

    What stood outside the decoder stays: calls without a result may matter there (entering and leaving ``vmap``). A write
    into a tensor is needed as long as anything that shares the tensor's memory is; FX's own elimination drops writes by
    method (``x.add_(y)``) whose result nobody reads. Refuses nothing.
    """

    name: ClassVar[str] = "remove_dead_code"

    def run(self, work: Work) -> PassResult:
        graph, side_nodes = work.module.graph, () if work.written is None else work.written.side_nodes
        here = set(graph.nodes)
        needed = needed_for(graph, [output_node(graph), *(node for node in side_nodes if node in here)])
        dead = [node for node in graph.nodes if node not in needed]
        for node in reversed(dead):
            graph.erase_node(node)
        return PassResult(len(dead))
