"""Let what is kept take over what is dropped (DESIGN: the kept tokens stand for clusters)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch.fx import Node

from parvts_fx.analysis.attention import is_value_operand
from parvts_fx.analysis.calls import is_fused_attention, is_softmax
from parvts_fx.analysis.last_rows import last_rows_of
from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.tokens import TokenMap
from parvts_fx.analysis.values import is_tensor, output_node
from parvts_fx.passes.plan import Merging, Plan, PlanError
from parvts_fx.passes.prune_branch import rows_left
from parvts_fx.pipeline import PassResult
from parvts_fx.stages import PlacedStage


@dataclasses.dataclass(frozen=True)
class MergeClusters:
    """For every stage that merges, find what takes part in it; :mod:`parvts_fx.passes.clusters` writes it.

    ``rest(h[K][A])``  ==>  ``rest(mixed(h[K][A]))`` with ``log n`` on the logits of kept keys, and mixed values in the caches
    of the layers in front

    A model gets those of the steps that it has a place for: no logits, no bias (linear attention); no cached tensor from
    which values alone are made, no mixed values (latent caches, keys that are the values).
    """

    name: ClassVar[str] = "merge_clusters"

    def plan(self, plan: Plan) -> tuple[Plan, PassResult]:
        if len(plan.choices) < len(plan.stages):
            raise PlanError(f"parvts_fx: pass {self.name} needs the pass insert_partition in front of it")
        values, left = _cached_values(plan), rows_left(plan)
        mergings = {
            stage.number: self._merging(plan, stage, values, left) for stage in plan.stages if stage.stage.merge is not None}
        notes = "; ".join(steps(merging) for merging in mergings.values())
        return dataclasses.replace(plan, mergings=mergings), PassResult(len(mergings), notes)

    def _merging(self, plan: Plan, stage: PlacedStage, values: set[Node], left: dict[Node, int]) -> Merging:
        inside = stage.end < len(plan.layers)
        behind = [attention for layer in plan.layers[stage.end:] for attention in layer.attentions]
        biased = frozenset(attention.output for attention in behind if has_place_for_bias(attention, plan.decoder.tokens))
        return Merging(
            stage, plan.link(max(stage.at, stage.end - 1)), plan.link(stage.end) if inside else None,
            frozenset(node for node in values if left[node] <= stage.number), biased,
            frozenset(attention.output for attention in behind) - biased)


def steps(merging: Merging) -> str:
    """Which of the steps a model gets, in words."""
    done = []
    if merging.drop is not None:
        done.append(f"hidden states at the input of layer {merging.stage.end}")
    if merging.biased:
        done.append(f"log n on the logits of {len(merging.biased)} calls")
    if merging.unbiased:
        done.append(f"no place for that in {len(merging.unbiased)} calls")
    if merging.stage.end:
        count = len(merging.values)
        done.append(f"values in {count} caches in front" if count else "no cached values in front")
    return ", ".join(done)


def has_place_for_bias(attention: Attention, tokens: TokenMap) -> bool:
    """Whether logits of (queries, keys) can be added to: in a fused call's mask, or in front of a softmax over keys alone."""
    for node in attention.nodes:
        if is_fused_attention(node):
            return True
        if is_softmax(node):
            source = node.all_input_nodes[0]
            axes = tokens.axes.get(source, {})
            return sorted(axes) == [node.meta["example_value"].dim() - 2, node.meta["example_value"].dim() - 1] and all(
                kind.is_plain for kind in axes.values())
    return False


def _cached_values(plan: Plan) -> set[Node]:
    """The decoder's tensors that leave the graph, or whose last rows do, and of which attention makes values alone."""
    decoder = plan.decoder
    inside, axes = set(decoder.nodes), decoder.tokens.axes
    left: set[Node] = set()
    for node in output_node(decoder.merge.output.graph).all_input_nodes:
        if node in inside and is_tensor(node):
            left |= {node} if axes.get(node) else {
                source for member in last_rows_of(decoder, node) for source in member.all_input_nodes if axes.get(source)}
    owners = {node: attention for layer in decoder.layers for attention in layer.attentions for node in attention.nodes}
    return {node for node in left if decoder.tokens.plain_axis(node) is not None and _becomes_values(node, owners)}


def _becomes_values(node: Node, owners: dict[Node, Attention]) -> bool:
    seen, stack, found = {node}, [node], False
    while stack:
        source = stack.pop()
        for user in source.users:
            if user in owners:
                if not is_value_operand(source, user, owners[user]):
                    return False
                found = True
            elif user not in seen and user.op != "output":
                seen.add(user)
                stack.append(user)
    return found
