"""Recognises the operations that attention is made of."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from parvts_fx.analysis.tokens import TokenMap
from parvts_fx.analysis.values import changed_in_place, has_target, is_tensor, storage_of, value
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


def joins_with_cached(nodes: Sequence[Node], reads: Iterable[Node], tokens: TokenMap) -> list[Node]:
    """What puts cached rows in front of the prompt's, up to what attention reads, in graph order; what is written into tensors
    on the way included."""
    has_cached = tokens.is_behind_cached
    inside, found, stack = set(nodes), set[Node](), list(reads)
    if not any(map(has_cached, stack)):
        return []
    writes: dict[int, list[Node]] = {}
    for node in nodes:
        if (target := changed_in_place(node)) is not None:
            writes.setdefault(storage_of(target), []).append(node)
    while stack:
        node = stack.pop()
        if node not in inside or node in found:
            continue
        target = changed_in_place(node)
        parts = isinstance(value(node), (tuple, list)) and any(map(has_cached, node.all_input_nodes))
        if has_cached(node) or parts or target is not None and has_cached(target):
            found.add(node)
            stack.extend(node.all_input_nodes)
            stack.extend(writes.get(storage_of(node), ()) if is_tensor(node) else ())
    return [node for node in nodes if node in found]
