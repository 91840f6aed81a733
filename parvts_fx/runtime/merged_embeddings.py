"""Hands a merge on to the decoder where a graph break stands between them.

Some models compute positions from data between the merge of visual features and the decoder, or merge pictures in one
graph and videos or sound in the next. Every graph but the last then also tells where the tokens stand that have been merged
so far, which is remembered by the identity of the merged embeddings; the next one is recognised by that very tensor among
its inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.calls import attention_nodes
from parvts_fx.analysis.merge import find_merge
from parvts_fx.analysis.modality import Origin
from parvts_fx.analysis.records import Merge
from parvts_fx.analysis.values import fake_mode_of, output_node, value
from parvts_fx.capture import capture
from parvts_fx.capture.unify_merges import UnifyMerges
from parvts_fx.errors import tell_unrewritten
from parvts_fx.pipeline import Work
from parvts_fx.runtime.call import Handed, current_call
from parvts_fx.runtime.input_origins import noted_origins, noting_origins

if TYPE_CHECKING:
    from parvts_fx.rewritten import Rewriting


def hand_over(
    embeddings: torch.Tensor, visual: torch.Tensor, unreceived: Callable[[], None] | None = None,
    merged: torch.Tensor | None = None,
) -> None:
    """``embeddings`` [batch, seq, hidden] have visual features where ``visual`` [batch, seq] is true.

    Args:
        unreceived: called if they are forgotten before any graph has taken them, and if any is visual.
        merged: where features of any modality stand, sound as well; None if they are all visual.
    """
    call = current_call()
    call.hand_over(embeddings, Handed(visual, visual if merged is None else merged, merged is not None, call), unreceived)


def visual_rows(embeddings: object, receive: bool = True) -> torch.Tensor | None:
    """The [batch, seq] bool mask of embeddings merged in front of a graph; None for any other object.

    Merged by an earlier graph or by a watched ``generate``; or by code that Dynamo has not captured, in a call whose ids
    tell what the rows were.

    Args:
        receive: note that a decoder's graph has taken them.
    """
    call = current_call()
    held = call.handed_over(embeddings)
    if held is None:
        return call.rows_told_by_ids(embeddings) if receive and isinstance(embeddings, torch.Tensor) else None
    held.received |= receive
    return held.visual


def received(embeddings: torch.Tensor) -> bool:
    """Whether a decoder's graph has taken embeddings that were handed over."""
    held = current_call().handed_over(embeddings)
    return held is not None and held.received


@dataclasses.dataclass(frozen=True)
class MergedInput:
    """One of a graph's inputs, with features merged in."""

    position: int
    visual: torch.Tensor
    """[batch, seq] bool: visual tokens; none where only sound has been merged."""

    by_graph: bool = True
    """Whether a graph has merged them, which knew of what modality they are."""

    @staticmethod
    def find(module: GraphModule, example_inputs: Sequence[object]) -> MergedInput | None:
        """The merged embeddings among the inputs of a graph that has attention, or that merges more into them.

        What only the call's ids tell counts where the graph has no merge of its own: else the input is what its features
        are yet to be merged into.
        """
        has_attention, call = bool(attention_nodes(module.graph)), current_call()
        for position, given in enumerate(example_inputs):
            if not isinstance(given, torch.Tensor) or given.dim() != 3:
                continue
            held = call.handed_over(given)
            if held is not None and (has_attention or _merges(module, example_inputs, position)):
                held.received = True
                return MergedInput(position, held.visual, held.by_graph)
            if held is None and has_attention and (rows := call.rows_told_by_ids(given)) is not None:
                return None if _merges(module, example_inputs) else MergedInput(position, rows, False)
        return None

    def receive(self, module: GraphModule) -> Merge:
        """Give a graph the mask as one more input, and say where it stands."""
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        embeddings = placeholders[self.position]
        batch, size, _ = value(embeddings).shape
        with module.graph.inserting_after(placeholders[-1]):
            mask = module.graph.placeholder("visual_tokens")
        with fake_mode_of(module.graph):
            mask.meta["example_value"] = torch.empty(batch, size, dtype=torch.bool, device=self.visual.device)
        return Merge(embeddings, mask, None, False, Origin())


def _merges(module: GraphModule, example_inputs: Sequence[object], position: int | None = None) -> bool:
    """Whether features are merged in this graph; given a position, into that input."""
    work = capture(module, example_inputs)
    attentions = attention_nodes(work.graph)
    into = None if position is None else [node for node in work.graph.nodes if node.op == "placeholder"][position]
    texts, _ = noted_origins(work, example_inputs)
    UnifyMerges(attentions, into, texts).run(Work(work))
    handed = None if into is None else Merge(into, into, None, False, Origin())
    merge = find_merge(work.graph, attentions, handed=handed, texts=texts, prunes=lambda modality: True)
    return merge is not None and merge.output is not into


def merged_in_front(embeddings: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of embeddings that a graph merges into: rows [batch, seq] that earlier graphs have merged, and those that are not
    the embeddings of the call's ids. None where nothing tells."""
    call = current_call()
    held = call.handed_over(embeddings)
    return None if held is None else held.merged, call.rows_told_by_ids(embeddings)


def can_hand_on(merged: Node) -> bool:
    """Whether merged embeddings leave their graph as they are."""
    return _place(merged) is not None


def _place(merged: Node) -> int | None:
    results = output_node(merged.graph).args[0]
    if not isinstance(results, (tuple, list)):
        return None
    return next((index for index, result in enumerate(results) if result is merged), None)


def hand_on(
    module: GraphModule, done: Rewriting, lower: Callable[[GraphModule], Callable], handed: MergedInput | None = None,
    example_inputs: Sequence[object] = (),
) -> Callable[..., Any]:
    """Lower a graph that ends between the merge and the decoder, such that the next graph finds the merge.

    Args:
        done: with ``merge``, found in a copy of ``module``, and the masks as functions of the inputs.
        handed: the input into which an earlier graph has merged, if there is one; what it had merged is handed on too.
    """
    merge, visual_mask, merged_mask = done.merge, done.visual_mask, done.merged_mask
    if merge is None or visual_mask is None or merged_mask is None:
        raise ValueError("parvts_fx: nothing is merged in this graph")
    position = _place(merge.output)
    lowered = noting_origins(module, example_inputs, lower(module), position)

    def announcing(*inputs: Any) -> Any:
        outputs = lowered(*inputs)
        visual_before, merged_before = _masks_before(handed, inputs)
        visual, everything = visual_mask(*inputs, *visual_before), merged_mask(*inputs, *merged_before)
        watched = current_call().is_watched  # then its end notices if no graph takes it
        hand_over(outputs[position], visual, None if watched else _tell_unreceived, everything)
        return outputs

    return announcing


def _masks_before(
    handed: MergedInput | None, inputs: Sequence[Any]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """[batch, seq] bool: what earlier graphs have merged, as one more input of what tells the visual tokens, and of what
    tells all features; no input more where this graph's own merge is the first."""
    if handed is None:
        return (), ()
    held = current_call().handed_over(inputs[handed.position])
    if held is None:
        nothing = torch.zeros_like(handed.visual[:1, :1]).expand(inputs[handed.position].shape[:2])
        return (nothing,), (nothing,)
    held.received = True
    return (held.visual,), (held.merged,)


def _tell_unreceived() -> None:
    tell_unrewritten("the graph breaks behind the merge of visual features, and no later graph with attention took the merged "
                     "embeddings as they were")
