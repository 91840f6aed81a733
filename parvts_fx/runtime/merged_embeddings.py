"""Hands a merge on to the decoder where a graph break stands between them.

Some models compute positions from data between the merge of visual features and the decoder, or merge pictures in one
graph and videos or sound in the next. Every graph but the last then also tells where the tokens stand that have been merged
so far, which is remembered by the identity of the merged embeddings; the next one is recognised by that very tensor among
its inputs.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
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
from parvts_fx.errors import ParvtsWarning
from parvts_fx.pipeline import Work
from parvts_fx.runtime.caches import Watch, current_call, merged_rows
from parvts_fx.runtime.input_origins import is_lost, note_lost, noted_origins, noting_origins

if TYPE_CHECKING:
    from parvts_fx.rewriting import Rewriting


@dataclasses.dataclass
class _Merged:
    reference: weakref.ref[torch.Tensor]
    visual: torch.Tensor
    merged: torch.Tensor
    by_graph: bool
    """Whether a graph has merged them, whose report lists what they are."""

    call: Watch | None
    """In which call; None under the plain backend."""

    received: bool = False
    """Whether a decoder's graph has taken it."""


_MERGED: dict[int, _Merged] = {}
"""By identity of merged embeddings that are alive: which of their rows are visual tokens, and which are merged at all."""


def hand_over(
    embeddings: torch.Tensor, visual: torch.Tensor, unreceived: Callable[[], None] | None = None,
    merged: torch.Tensor | None = None,
) -> None:
    """``embeddings`` [batch, seq, hidden] have visual features where ``visual`` [batch, seq] is true.

    Args:
        unreceived: called if they are forgotten before any graph has taken them, and if any is visual.
        merged: where features of any modality stand, sound as well; None if they are all visual.
    """
    key = id(embeddings)

    def forget(_: object) -> None:
        held = _MERGED.pop(key, None)
        if held is not None and not held.received and held.visual.any():
            note_lost(tuple(held.visual.shape), held.call)
            if unreceived is not None:
                unreceived()

    _MERGED[key] = _Merged(weakref.ref(embeddings, forget), visual, visual if merged is None else merged, merged is not None,
                           current_call())


def _held(embeddings: object) -> _Merged | None:
    held = _MERGED.get(id(embeddings))
    return held if held is not None and held.reference() is embeddings else None


def visual_rows(embeddings: object, receive: bool = True) -> torch.Tensor | None:
    """The [batch, seq] bool mask of embeddings merged in front of a graph; None for any other object.

    Merged by an earlier graph or by a watched ``generate``; or by code that Dynamo has not captured, in a call whose ids
    tell what the rows were.

    Args:
        receive: note that a decoder's graph has taken them.
    """
    held = _held(embeddings)
    if held is None:
        return merged_rows(embeddings) if receive and isinstance(embeddings, torch.Tensor) else None
    held.received |= receive
    return held.visual


def received(embeddings: torch.Tensor) -> bool:
    """Whether a decoder's graph has taken embeddings that were handed over."""
    held = _held(embeddings)
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
        has_attention = bool(attention_nodes(module.graph))
        for position, given in enumerate(example_inputs):
            if not isinstance(given, torch.Tensor) or given.dim() != 3:
                continue
            held = _held(given)
            if held is not None and (has_attention or _merges(module, example_inputs, position)):
                held.received = True
                return MergedInput(position, held.visual, held.by_graph)
            if held is None and has_attention and (rows := merged_rows(given)) is not None:
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


def merged_in_front(example_inputs: Sequence[object], position: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of embeddings that a graph merges into: rows [batch, seq] that earlier graphs have merged, and those that are not
    the embeddings of the call's ids. None where nothing tells."""
    given = example_inputs[position]
    held = _held(given)
    return held and held.merged, merged_rows(given) if isinstance(given, torch.Tensor) else None


def lost_merges(embeddings: torch.Tensor) -> bool:
    """Whether an earlier graph of the running call has merged visual features into embeddings [batch, seq, hidden] of this
    size that no graph took, or none has taken yet."""
    size = tuple(embeddings.shape[:2])
    waiting = any(
        not held.received and held.call is current_call() and tuple(held.visual.shape) == size and bool(held.visual.any())
        for held in _MERGED.values() if held.reference() is not embeddings)
    return waiting or is_lost(size)


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
    position = _place(done.merge.output)
    lowered = noting_origins(module, example_inputs, lower(module), position)

    def announcing(*inputs: object) -> Any:
        outputs = lowered(*inputs)
        visual, everything = _masks(done, inputs, handed)
        watched = current_call() is not None  # then a caller notices if no graph takes it
        hand_over(outputs[position], visual, None if watched else _tell_unreceived, everything)
        return outputs

    return announcing


def _masks(
    done: Rewriting, inputs: Sequence[object], handed: MergedInput | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, seq] bool: visual tokens, and all merged ones."""
    if handed is None:
        return done.visual_mask(*inputs), done.merged_mask(*inputs)
    held = _held(inputs[handed.position])
    nothing = torch.zeros_like(handed.visual[:1, :1]).expand(inputs[handed.position].shape[:2])
    if held is not None:
        held.received = True
    visual = done.visual_mask(*inputs, nothing if held is None else held.visual)
    return visual, done.merged_mask(*inputs, nothing if held is None else held.merged)


def _tell_unreceived() -> None:
    warnings.warn(
        "parvts_fx: this multimodal prefill runs unrewritten: the graph breaks behind the merge of visual features, "
        "and no later graph with attention took the merged embeddings as they were", ParvtsWarning, stacklevel=2)
