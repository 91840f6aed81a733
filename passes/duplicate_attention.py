"""Give each path its own attention call in the migration layers."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from parvts_fx.analysis.calls import asks_tokens, is_fused_attention
from parvts_fx.errors import Refusal
from parvts_fx.passes.plan import Plan
from parvts_fx.pipeline import PassResult
from parvts_fx.stages import PlacedStage


@dataclasses.dataclass(frozen=True)
class DuplicateAttention:
    """In the layers where both groups run beside each other, ask by group.

    ``attend(Q, K, V)``  ==>  ``attend(Q[A], K[A], V[A])``, ``attend(Q[B], K[B], V[B])`` and ``attend(Q[T], K, V)``,
    each visual row taking its result from its own path, each text row from the third.

    The same as attending over both paths and merging by softmax mass, keys of the text counted once. Everything else
    in the layer runs once, over all rows in prompt order. Refuses where the prompt's last rows ask by themselves.
    """

    name: ClassVar[str] = "duplicate_attention"

    def plan(self, plan: Plan) -> tuple[Plan, PassResult]:
        groups = {
            attention.output: stage.number
            for stage in plan.stages if stage.is_parallel for attention in self._calls(plan, stage)
        }
        return dataclasses.replace(plan, groups={**plan.groups, **groups}), PassResult(len(groups))

    def _calls(self, plan: Plan, stage: PlacedStage) -> list:
        calls = plan.attentions(stage)
        if stage.end == len(plan.layers):
            known = {node for layer in plan.layers for attention in layer.attentions for node in attention.nodes}
            for node in plan.decoder.nodes:
                if is_fused_attention(node) and node not in known and node > plan.link(stage.at) and asks_tokens(
                        node, plan.decoder.tokens):
                    raise Refusal("the prompt's last rows ask by themselves in a layer where both groups run (use a smaller "
                                  "migration_depth)", node)
        return calls
