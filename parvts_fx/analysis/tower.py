"""The attention that visual tokens receive inside the vision tower, where the tower is in the same graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from parvts_fx.analysis.calls import fused_arguments, is_fused_attention
from parvts_fx.analysis.records import VisualMerge
from parvts_fx.analysis.values import ancestors, hint, hint_shape, value

if TYPE_CHECKING:
    from torch.fx import Node

    from parvts_fx.capture.editing import Editor


def trace_attended(editor: Editor, merge: VisualMerge, mapped: Callable[[Node], Node], visual: Node) -> Node:
    """Write the scores into the graph: how much the rows of the tower's last attention look at each visual token.

    Averaged over heads and rows, a row in front of the patches (a class token) included. The tower's patches must be the
    decoder's visual tokens, one for one and in order.

    Args:
        mapped: for a node of the captured graph, what holds it in the one that is written.
        visual: [batch, seq] bool.

    Raises:
        ValueError: there is no such attention.
    """
    call, extra = _tower_attention(merge)
    arguments = fused_arguments(call)
    scale = arguments["scale"]

    def attended(query: torch.Tensor, key: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        weights = torch.softmax((query.float() * factor) @ key.float().transpose(-1, -2), dim=-1)
        received = weights.mean((1, 2))[:, extra:]
        return torch.zeros(visual.shape, device=visual.device).masked_scatter(visual, received)

    return editor.inline(attended, mapped(arguments["query"]), mapped(arguments["key"]), visual)


def _tower_attention(merge: VisualMerge) -> tuple[Node, int]:
    """The last attention in front of the features with a row for every visual token, and how many rows more it has."""
    batch = hint(value(merge.output).shape[0])
    count = hint(merge.visual_tokens) if merge.visual_tokens is not None else None
    behind = ancestors(merge.features)
    for node in reversed(merge.output.graph.nodes):
        if node not in behind or not is_fused_attention(node) or count is None:
            continue
        arguments = fused_arguments(node)
        query, key = (hint_shape(value(arguments[name])) for name in ("query", "key"))
        if len(query) != 4 or query != key or arguments["attn_mask"] is not None or arguments["is_causal"]:
            continue
        per_image, rest = divmod(batch * count, query[0])
        if rest == 0 and query[2] - per_image in (0, 1):
            return node, query[2] - per_image
    raise ValueError('parvts_fx: option score="attended": expected a vision tower in the same graph as the decoder, whose '
                     "last attention has one row for every visual token; this graph has none. parvts_fx.compile(model) captures "
                     "both in one graph where Dynamo can; else use another rule.")
