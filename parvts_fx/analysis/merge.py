"""Finds where visual features enter the text embeddings."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from parvts_fx.analysis.records import VisualMerge
from parvts_fx.analysis.values import ancestors, has_target, is_tensor, value

_FUNCTIONS = (torch.masked_scatter, torch.ops.aten.masked_scatter.default)
_METHODS = ("masked_scatter",)


def _operands(node: Node) -> tuple[Node, Node, Node]:
    named = {**dict(zip(("self", "mask", "source"), node.args)), **node.kwargs}
    return named.get("self", named.get("input")), named["mask"], named["source"]


def is_merge(node: Node) -> bool:
    if not has_target(node, _FUNCTIONS, _METHODS) or not is_tensor(node):
        return False
    into, mask, source = _operands(node)
    return (
        all(is_tensor(operand) for operand in (into, mask, source))
        and value(node).dim() == 3
        and value(node).is_floating_point()
        and value(mask).dtype == torch.bool
        and value(mask).dim() in (2, 3)
    )


def enters_a_layer(node: Node, attentions: set[Node]) -> bool:
    """Whether a merge writes into something that attention has touched, leaving aside where merged features come from."""
    seen: set[Node] = set()
    stack = [_operands(node)[0]]
    while stack:
        source = stack.pop()
        if source in attentions:
            return True
        if source not in seen:
            seen.add(source)
            stack.extend([_operands(source)[0]] if is_merge(source) else filter(is_tensor, source.all_input_nodes))
    return False


def find_merge(graph: Graph, attentions: set[Node]) -> VisualMerge | None:
    """The last merge into embeddings that no attention has touched, with the merges before it in the same stream.

    Args:
        attentions: nodes of all attention calls; a merge into their results belongs to a layer, not to the prompt.
    """
    candidates = [node for node in graph.nodes if is_merge(node) and not enters_a_layer(node, attentions)]
    if not candidates:
        return None
    output = candidates[-1]
    stream = ancestors([_operands(output)[0]]) | {output}
    chain = [node for node in candidates if node in stream]
    return VisualMerge(output, tuple(_operands(n)[1] for n in chain), tuple(_operands(n)[2] for n in chain))
