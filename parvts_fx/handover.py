"""Hands a merge on to the decoder where a graph break stands between them.

Some models compute positions from data between the merge of visual features and the decoder, so that Dynamo hands over
two graphs. The first one then also returns where the visual tokens stand, which is remembered by the identity of the
merged embeddings; the second one is recognised by that very tensor among its inputs.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.calls import attention_nodes
from parvts_fx.analysis.merge import find_merge
from parvts_fx.analysis.records import VisualMerge
from parvts_fx.analysis.values import fake_mode_of, output_node, value
from parvts_fx.caches import is_watched, merged_rows
from parvts_fx.capture import capture
from parvts_fx.errors import ParvtsWarning
from parvts_fx.passes.unify_merges import UnifyMerges


@dataclasses.dataclass
class _Merged:
    reference: weakref.ref[torch.Tensor]
    visual: torch.Tensor
    received: bool = False
    """Whether a decoder's graph has taken it."""


_MERGED: dict[int, _Merged] = {}
"""By identity of merged embeddings that are alive: which of their rows are visual tokens."""


def hand_over(embeddings: torch.Tensor, visual: torch.Tensor, unreceived: Callable[[], None] | None = None) -> None:
    """``embeddings`` [batch, seq, hidden] have visual features where ``visual`` [batch, seq] is true.

    ``unreceived`` is called if they are forgotten before any graph has taken them.
    """
    key = id(embeddings)

    def forget(_: object) -> None:
        held = _MERGED.pop(key, None)
        if held is not None and not held.received and unreceived is not None:
            unreceived()

    _MERGED[key] = _Merged(weakref.ref(embeddings, forget), visual)


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
    """One of a graph's inputs, with visual features merged in."""

    position: int
    visual: torch.Tensor
    """[batch, seq] bool, as many true entries in every row."""

    @staticmethod
    def find(module: GraphModule, example_inputs: Sequence[object]) -> MergedInput | None:
        """The merged embeddings among the inputs of a graph with attention.

        What only the call's ids tell counts where the graph has no merge of its own: else the input is what its features
        are yet to be merged into.
        """
        if not attention_nodes(module.graph):
            return None
        for position, given in enumerate(example_inputs):
            held = isinstance(given, torch.Tensor) and given.dim() == 3 and visual_rows(given)
            if isinstance(held, torch.Tensor):
                if _held(given) is None and _merges(module, example_inputs):
                    return None
                return MergedInput(position, held)
        return None

    def receive(self, module: GraphModule) -> VisualMerge:
        """Give a graph the mask as one more input, and say where it stands."""
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        embeddings = placeholders[self.position]
        batch, size, _ = value(embeddings).shape
        with module.graph.inserting_after(placeholders[-1]):
            mask = module.graph.placeholder("visual_tokens")
        with fake_mode_of(module.graph):
            mask.meta["example_value"] = torch.empty(batch, size, dtype=torch.bool, device=self.visual.device)
        return VisualMerge(embeddings, (mask,), (), int(self.visual[0].sum()))


def _merges(module: GraphModule, example_inputs: Sequence[object]) -> bool:
    """Whether visual features are merged in this graph."""
    work = capture(module, example_inputs)
    attentions = attention_nodes(work.graph)
    UnifyMerges().run(work, attentions)
    return find_merge(work.graph, attentions) is not None


def can_hand_on(module: GraphModule, merged: Node) -> bool:
    """Whether merged embeddings leave the graph as they are."""
    return _place(module, merged) is not None


def _place(module: GraphModule, merged: Node) -> int | None:
    results = output_node(module.graph).args[0]
    return next((i for i, result in enumerate(results) if isinstance(result, Node) and result.name == merged.name), None)


def hand_on(
    module: GraphModule, merged: Node, visual: Callable[..., torch.Tensor], lower: Callable[[GraphModule], Callable]
) -> Callable[..., Any]:
    """Lower a graph that ends between the merge and the decoder, such that the decoder's graph finds the merge.

    Args:
        merged: the merge's result, by name in ``module``.
        visual: of the graph's inputs: [batch, seq] bool.
    """
    position = _place(module, merged)
    lowered = lower(module)

    def announcing(*inputs: object) -> Any:
        outputs = lowered(*inputs)
        watched = is_watched()  # then a caller notices if no graph takes it
        hand_over(outputs[position], visual(*inputs), None if watched else _tell_unreceived)
        return outputs

    return announcing


def _tell_unreceived() -> None:
    warnings.warn(
        "parvts_fx: this multimodal prefill runs unrewritten: the graph breaks behind the merge of visual features, "
        "and no later graph with attention took the merged embeddings as they were", ParvtsWarning, stacklevel=2)
