"""Recognises the operations that attention is made of."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from parvts_fx.analysis.tokens import TokenMap
from parvts_fx.analysis.values import has_target, is_tensor, value
from parvts_fx.torch_private import aten_softmax, encoder_layer

_FUSED = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_FUSED_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_COMPOSED = (F.multi_head_attention_forward, encoder_layer)
_SOFTMAX = (torch.softmax, F.softmax, torch.ops.aten.softmax.int, aten_softmax)


def is_fused_attention(node: Node) -> bool:
    return has_target(node, _FUSED)


def fused_arguments(node: Node) -> dict[str, Any]:
    """The arguments of a fused attention call by name, whichever way they were passed; defaults filled in."""
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return {**defaults, **dict(zip(_FUSED_ARGUMENTS, node.args)), **node.kwargs}


def asks_tokens(node: Node, tokens: TokenMap) -> bool:
    """Whether the keys of a fused call are tokens of the prompt, or its values: not where it asks something else for each token
    by itself, along another axis."""
    read = [source for name, source in fused_arguments(node).items() if name in ("key", "value") and is_tensor(source)]
    return any(value(source).dim() - 2 in tokens.axes.get(source, {}) for source in read)


def is_softmax(node: Node) -> bool:
    return has_target(node, _SOFTMAX, ("softmax",))


def composed(graph: Graph) -> list[Node]:
    """Calls of attention together with its projections, or of a whole layer; of several results each is read by itself."""
    return [node for node in graph.nodes if has_target(node, _COMPOSED)
            and (is_tensor(node) or all(user.target is operator.getitem for user in node.users))]


def attention_nodes(graph: Graph) -> set[Node]:
    """Every node that may be the heart of an attention call, in any part of the model."""
    return {node for node in graph.nodes if is_fused_attention(node) or is_softmax(node)} | set(composed(graph))
