"""Remove what nothing reads any more."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from parvts_fx.passes.base import PassResult, State


@dataclasses.dataclass(frozen=True)
class RemoveDeadCode:
    """Drop the nodes that no output needs: the original attention calls, and what ran behind the cut on all rows.

    Last in the pipeline, because nodes that one pass makes may wait for another to read them. What stood outside the
    decoder stays: calls without a result may matter there (entering and leaving ``vmap``). Refuses nothing.
    """

    name: ClassVar[str] = "remove_dead_code"

    def run(self, state: State) -> PassResult:
        before = len(state.module.graph.nodes)
        state.module.graph.eliminate_dead_code(lambda node: node.is_impure() or node in state.side_nodes)
        return PassResult(before - len(state.module.graph.nodes))
