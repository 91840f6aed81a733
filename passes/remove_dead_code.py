"""Remove what nothing reads any more."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch.fx import Node

from parvts_fx.analysis.values import needed_for, output_node
from parvts_fx.passes.base import PassResult, State


@dataclasses.dataclass(frozen=True)
class RemoveDeadCode:
    """Drop the nodes that no output needs: the original attention calls, and what ran behind the cut on all rows.

    Last in the pipeline, because nodes that one pass makes may wait for another to read them. What stood outside the
    decoder stays: calls without a result may matter there (entering and leaving ``vmap``). A write into a tensor is
    needed as long as anything that shares the tensor's memory is; FX's own elimination drops writes by method
    (``x.add_(y)``) whose result nobody reads. Refuses nothing.
    """

    name: ClassVar[str] = "remove_dead_code"

    def run(self, state: State) -> PassResult:
        graph = state.module.graph
        needed = needed_for(graph, [output_node(graph), *state.side_nodes])
        dead: list[Node] = [node for node in graph.nodes if node not in needed]
        for node in reversed(dead):
            graph.erase_node(node)
        return PassResult(len(dead))
