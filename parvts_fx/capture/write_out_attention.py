"""Write attention that torch keeps in one function, projections and all, as the operations that it is made of."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.fx import Node
from torch.fx.node import map_arg

from parvts_fx.analysis.calls import composed
from parvts_fx.analysis.values import is_tensor
from parvts_fx.capture.editing import Editor
from parvts_fx.pipeline import PassResult, Work
from parvts_fx.torch_private import encoder_layer


@dataclasses.dataclass(frozen=True)
class WriteOutAttention:
    """``multi_head_attention_forward(x, x, x, ...)``  ==>  ``linear(scaled_dot_product_attention(*linear(x), ...))``

    What ``nn.MultiheadAttention`` calls, and so the layers of ``nn.Transformer``; without gradients an encoder's layer calls
    one function for all of itself. Dynamo looks into none of them. Attention weights that nobody reads are not computed. The
    values computed stay the same.
    """

    name: ClassVar[str] = "write_out_attention"

    def run(self, work: Work) -> PassResult:
        graph, editor = work.module.graph, Editor(work.module)
        found = composed(graph)
        for node in found:
            before, sources = node.prev, list(node.all_input_nodes)
            with graph.inserting_before(node):
                results = editor.inline(_of_tensors(node, sources), *sources, whole=True)
            if is_tensor(node):
                node.replace_all_uses_with(results)
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
            _erase_unread(node, before)
        return PassResult(len(found))


def _of_tensors(node: Node, sources: Sequence[Node]) -> Callable[..., Any]:
    """What a node calls, as a function of its inputs alone."""
    if node.target is encoder_layer:
        function, args, kwargs = _layer, node.args, node.kwargs
    else:
        function, args = node.target, ()
        kwargs = inspect.signature(function).bind(*node.args, **node.kwargs).arguments
        if all(user.args[1] == 0 for user in node.users) and kwargs.get("need_weights", True):
            # a hint that a mask is causal, which is not read beside weights, may be wrong
            kwargs = {**kwargs, "need_weights": False, "is_causal": False}

    def called(*tensors: torch.Tensor) -> Any:
        given = dict(zip(sources, tensors))
        return function(*map_arg(args, given.get), **map_arg(kwargs, given.get))

    return called


def _layer(
    x: torch.Tensor, width: int, heads: int, qkv_weight: torch.Tensor, qkv_bias: torch.Tensor, out_weight: torch.Tensor,
    out_bias: torch.Tensor, use_gelu: bool, norm_first: bool, epsilon: float, *others: Any,
) -> torch.Tensor:
    """An encoder's layer. ``others``: weight and bias of both norms and of both linear layers; a mask that is not zero where a
    row does not see a key, and of what shape. A row that sees none comes to numbers here, and there to NaN."""
    first, second, up, down = (others[place:place + 2] for place in (0, 2, 4, 6))
    mask, shape = (*others[8:], None, None)[:2]

    def normed(x: torch.Tensor, norm: Sequence[torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, (width,), norm[0], norm[1], epsilon)

    inner = normed(x, first) if norm_first else x
    parts = F.linear(inner, qkv_weight, qkv_bias).chunk(3, -1)
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    if mask is not None:
        mask = (mask[:, None, None] if shape == _OF_KEYS else mask) == 0
    seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    x = x + F.linear(seen.transpose(1, 2).flatten(2), out_weight, out_bias)
    x = x if norm_first else normed(x, first)
    inner = normed(x, second) if norm_first else x
    x = x + F.linear((F.gelu if use_gelu else F.relu)(F.linear(inner, *up)), *down)
    return x if norm_first else normed(x, second)


_OF_KEYS = 1
"""What the function of a whole layer calls a mask [batch, keys]; others are broadcast with [batch, heads, rows, keys]."""


def _erase_unread(node: Node, before: Node) -> None:
    """Erase a node that nobody reads, and what stands behind ``before`` for it alone."""
    while node is not before:
        previous = node.prev
        if not node.users:
            node.graph.erase_node(node)
        node = previous
