"""Find the text in front of every image, which both paths would compute alike (constant fusion weights)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch.fx import Node

from parvts_fx.analysis.last_rows import keeps_rows_apart
from parvts_fx.analysis.masks import Mask, masks_of
from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.values import ancestors, changed_in_place, fake_mode_of, hint, is_tensor, value
from parvts_fx.passes.plan import Choice, Plan, PlanError, Twin
from parvts_fx.pipeline import PassResult


@dataclasses.dataclass(frozen=True)
class SharePrefix:
    """Leave out of a twin the leading rows whose results it may read from the subject path.

    ``layers(h0[A])``, ``layers(h0[B])``  ==>  the second on B's rows behind the prefix alone, with A's keys in front

    These are the positions in front of the first visual token of any sample, if none of them sees a later one. Both are
    data, so the count is read from the tensors at each call: zero where a mask lets the prefix look ahead, or where it
    hides a prefix row from itself (padding, whose rows may attend to anything). Leaves a twin alone in whose layers
    tokens meet other than by masked attention on an empty cache (or all read the last row's, which differs from path to
    path), or a graph that may not hold numbers that depend on data: where torch._dynamo.config.capture_scalar_outputs is off
    (parvts_fx.compile switches it on), where CUDA graphs are asked for, and where the lowering is not known to take them.
    """

    name: ClassVar[str] = "share_prefix"

    def plan(self, plan: Plan) -> tuple[Plan, PassResult]:
        if len(plan.choices) < len(plan.stages):
            raise PlanError("parvts_fx: pass share_prefix needs the pass insert_partition in front of it")
        if not _may_hold_data(plan):
            return plan, PassResult(0, "the graph may not hold numbers that depend on data")
        places = [self._place(plan, choice) for choice in plan.choices]
        plan = dataclasses.replace(plan, choices=tuple(
            dataclasses.replace(choice, behind=place) for choice, place in zip(plan.choices, places)))
        twins = {number: self._shared(plan, twin) for number, twin in plan.twins.items()}
        found = sum(twin.prefix is not None for twin in twins.values())
        notes = "how many rows is read at each call" if found else "not all of these layers are masked attention"
        return dataclasses.replace(plan, twins=twins), PassResult(found, notes)

    def _place(self, plan: Plan, choice: Choice) -> Node:
        """As late as the choice can stand in front of a twin's layers, whose masks are known there."""
        twin = plan.twins.get(choice.stage.number)
        if twin is None or not twin.nodes or twin.nodes[0] < choice.behind:
            return choice.behind
        between, inside = choice.behind.next, set(plan.decoder.nodes)
        while between is not twin.nodes[0]:
            if between in inside:
                return choice.behind
            between = between.next
        return between.prev

    def _shared(self, plan: Plan, twin: Twin) -> Twin:
        region = [node for node in twin.nodes if is_tensor(node)]
        texts = hint(plan.text_count)
        if not region or texts is not None and texts < 2 or any(map(changed_in_place, twin.nodes)):
            return twin
        if any(keeps_rows_apart(node, plan.decoder.tokens) for node in twin.nodes):
            return twin
        inside, behind = set(plan.decoder.nodes), plan.choices[twin.stage.number].behind
        mixers = [mixer for layer in plan.layers[twin.stage.at:twin.stage.end] for mixer in layer.mixers]
        calls = [self._masks(mixer.attention, behind, inside) for mixer in mixers]
        if not calls or any(masks is None for masks in calls) or region[0] < behind:
            return twin
        return dataclasses.replace(twin, prefix=tuple(dict.fromkeys(tuple(masks or ()) for masks in calls)))

    def _masks(self, attention: Attention | None, behind: Node, inside: set[Node]) -> list[Mask] | None:
        """What forbids a call's rows to look ahead; None where that is not known where the rows are chosen."""
        masks = [] if attention is None else masks_of(attention)
        if attention is None or attention.on_filled_cache or not (masks or attention.is_causal):
            return None
        early = all(mask.node <= behind for mask in masks)
        return masks if early and not inside & ancestors(mask.node for mask in masks) else None


def _may_hold_data(plan: Plan) -> bool:
    merged, options = plan.decoder.merge.output, plan.options
    shapes = fake_mode_of(merged.graph).shape_env
    captured = value(merged).device.type == "cuda" and options.mode in ("reduce-overhead", "max-autotune")
    known = callable(options.lowering) or options.lowering in ("inductor", "eager", "aot_eager")
    return shapes is not None and shapes.allow_scalar_outputs and known and not captured
