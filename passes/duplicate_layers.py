"""Give the non-subject path its own copy of the migration layers (constant fusion weights)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from parvts_fx.analysis.values import descendants, needed_for
from parvts_fx.errors import Refusal
from parvts_fx.passes.plan import Plan, Twin
from parvts_fx.pipeline import PassResult
from parvts_fx.stages import PlacedStage


@dataclasses.dataclass(frozen=True)
class DuplicateLayers:
    """Run the layers between a stage's choice and its end once more, on path B's rows.

    ``h[K] = layers(h0)``  ==>  ``layers(h0[A])`` and ``layers(h0[B])``, with the text rows ``w * A[T] + (1 - w) * B[T]``

    Each path attends only within itself, whatever mixes tokens in the layers.
    """

    name: ClassVar[str] = "duplicate_layers"

    def plan(self, plan: Plan) -> tuple[Plan, PassResult]:
        twins = {stage.number: self._twin(plan, stage) for stage in plan.stages if stage.is_weighed}
        layers = sum(twin.stage.end - twin.stage.at for twin in twins.values())
        return dataclasses.replace(plan, twins={**plan.twins, **twins}), PassResult(layers)

    def _twin(self, plan: Plan, stage: PlacedStage) -> Twin:
        graph, start, end = plan.decoder.merge.output.graph, plan.link(stage.at), plan.end_of(stage)
        needed, behind = needed_for(graph, [end]), set(descendants(graph, [start]))
        nodes = tuple(node for node in plan.decoder.nodes if node in needed and node in behind and node is not start)
        kept = next((node for node in nodes if node in plan.decoder.kept and node is not end), None)
        if kept is not None:
            raise Refusal("later layers choose among states of which both paths have their own (use fusion=\"attention\")", kept)
        return Twin(stage, start, end, nodes)
