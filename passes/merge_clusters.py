"""Let what is kept take over what is dropped: kept tokens stand for clusters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch.fx import Node

from parvts_fx.analysis.attention import is_value_operand
from parvts_fx.analysis.calls import fused_arguments, is_fused_attention, is_softmax
from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.tokens import TokenMap
from parvts_fx.analysis.values import ancestors, changed_in_place, is_tensor, output_node, value
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
        owners = {node: attention for layer in plan.layers for attention in layer.attentions for node in attention.nodes}
        (caches, values), asking, left = _caches(plan, owners), _asked_by_last_rows(plan, owners), rows_left(plan)
        mergings = {stage.number: self._merging(plan, stage, values, asking, left)
                    for stage in plan.stages if stage.stage.merge is not None}
        notes = "; ".join(steps(merging) for merging in mergings.values())
        return dataclasses.replace(plan, mergings=mergings, caches=caches), PassResult(len(mergings), notes)

    def _merging(
        self, plan: Plan, stage: PlacedStage, values: set[Node], asking: list[Node], left: dict[Node, int]
    ) -> Merging:
        inside = stage.end < len(plan.layers)
        behind = [attention for layer in plan.layers[stage.end:] for attention in layer.attentions]
        biased = frozenset(attention.output for attention in behind if has_place_for_bias(attention, plan.decoder.tokens))
        return Merging(
            stage, plan.entering(stage), plan.link(stage.end) if inside else None,
            frozenset(node for node in values if left[node] <= stage.number), biased,
            frozenset(node for node in asking if left[node] > stage.number),
            frozenset(attention.output for attention in behind) - biased)


def steps(merging: Merging) -> str:
    """Which of the steps a model gets, in words."""
    done = []
    if merging.drop is not None:
        done.append(f"hidden states at the input of layer {merging.stage.end}")
    if merging.biased or merging.asking:
        done.append(f"log n on the logits of {len(merging.biased) + len(merging.asking)} calls")
    if merging.unbiased:
        done.append(f"no place for that in {len(merging.unbiased)} calls")
    if merging.stage.end:
        count = len(merging.values)
        done.append(f"values in {count} caches in front" if count else "no cached values in front")
    return ", ".join(done)


def has_place_for_bias(attention: Attention, tokens: TokenMap) -> bool:
    """Whether logits of (queries, keys) can be added to: in a fused call's mask, or in front of a softmax over keys alone."""
    heart = attention.heart
    return is_fused_attention(heart) or _has_tokens_last(heart.all_input_nodes[0], tokens, 2, attention.on_filled_cache)


def _has_tokens_last(node: Node, tokens: TokenMap, count: int, has_cached: bool = False) -> bool:
    """Whether a tensor's last axes, so many and no other, run along the prompt and nothing else.

    Args:
        has_cached: whether scores may have other keys in front of the prompt's, the cached ones.
    """
    axes, rank = tokens.axes.get(node, {}), value(node).dim()
    alone = [kind.is_plain or has_cached and kind.has_rows_in_front for kind in axes.values()]
    return sorted(axes) == list(range(rank - count, rank)) and all(alone)


def _asked_by_last_rows(plan: Plan, owners: Mapping[Node, Attention]) -> list[Node]:
    """The softmax or fused call of every attention whose queries are the prompt's last rows alone, over tokens as keys."""
    tokens, inside = plan.decoder.tokens, set(plan.decoder.nodes)

    def asks(node: Node) -> bool:
        if is_fused_attention(node):
            named = fused_arguments(node)
            rank = value(named["key"]).dim()
            keys = tokens.axes.get(named["key"], {})
            return not tokens.axes.get(named["query"]) and list(keys) == [rank - 2] and keys[rank - 2].is_plain
        return is_softmax(node) and _has_tokens_last(node.all_input_nodes[0], tokens, 1) and is_of_queries(node)

    def is_of_queries(softmax: Node) -> bool:
        """Whether its scores come from something without rows and the tokens: a softmax over tokens may be no attention."""
        stack = [softmax]
        while stack:
            reads = [source for source in stack.pop().all_input_nodes if is_tensor(source) and source in inside]
            if any(not tokens.axes.get(source) for source in reads):
                return True
            stack.extend(source for source in reads if _has_tokens_last(source, tokens, 1))
        return False

    return [node for node in plan.decoder.nodes if node not in owners and asks(node)]


def _caches(
    plan: Plan, owners: Mapping[Node, Attention]
) -> tuple[dict[Node, tuple[Node, ...]], set[Node]]:
    """By output that holds values of layers: the operations between them and the output, in graph order. And the values:
    what leaves the graph so, and of which attention makes values alone."""
    decoder = plan.decoder
    asked = ancestors(source for node in owners for source in node.all_input_nodes)
    caches: dict[Node, tuple[Node, ...]] = {}
    values: set[Node] = set()
    for output in output_node(decoder.merge.output.graph).all_input_nodes:
        between, sources = _in_front(output, set(decoder.nodes), asked)
        found = {source for source in sources
                 if decoder.tokens.plain_axis(source) is not None and _becomes_values(source, owners)}
        if found and not any(node in owners or changed_in_place(node) is not None for node in between):
            caches[output] = tuple(node for node in decoder.nodes if node in between)
            values |= found
    return caches, values


def _in_front(output: Node, inside: set[Node], asked: set[Node]) -> tuple[set[Node], set[Node]]:
    """The decoder's nodes in front of an output, up to those that attention asks for; and these."""
    between: set[Node] = set()
    sources: set[Node] = set()
    stack = [output]
    while stack:
        node = stack.pop()
        if node in inside and node in asked:
            sources.add(node)
        elif node in inside and node not in between:
            between.add(node)
            stack.extend(node.all_input_nodes)
    return between, sources


def _becomes_values(node: Node, owners: Mapping[Node, Attention]) -> bool:
    """Whether attention reads what is made of a node, and as values alone."""
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
