"""Drop the non-subject branch where its stage ends."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch.fx import Node

from parvts_fx.analysis.values import descendants
from parvts_fx.passes.plan import Plan
from parvts_fx.pipeline import PassResult


@dataclasses.dataclass(frozen=True)
class PruneBranch:
    """Run what follows a stage's end on the rows that are left, and shorten every output to those left in the end.

    ``out = rest(h[K])``  ==>  ``out = rest(h[K][A])``; sizes, masks, rotary tables and cache outputs follow

    With constant weights all that follows the choice runs on path A, whose text rows join path B's at the end.
    """

    name: ClassVar[str] = "prune_branch"

    def plan(self, plan: Plan) -> tuple[Plan, PassResult]:
        live = rows_left(plan)
        return dataclasses.replace(plan, live=live, levels=live), PassResult(sum(map(bool, live.values())))


def rows_left(plan: Plan) -> dict[Node, int]:
    """By node of the decoder: the level of the rows that are left where it stands, as the schedule has it."""
    live = dict.fromkeys(plan.decoder.nodes, 0)
    for level, stage in enumerate(plan.stages, start=1):
        cut = plan.cut_of(stage)
        for node in descendants(plan.decoder.merge.output.graph, [cut]):
            if node is not cut and node in live:
                live[node] = level
    return live
