"""Finds where visual features enter the text embeddings."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from parvts_fx.analysis.records import VisualMerge
from parvts_fx.analysis.values import ancestors, has_target, is_tensor, value

_FUNCTIONS = (torch.masked_scatter, torch.ops.aten.masked_scatter.default)
_METHODS = ("masked_scatter",)
CHOICES = (torch.where, torch.ops.aten.where.self)


def is_text(node: Node, attentions: set[Node]) -> bool:
    """Embeddings looked up by integers, which no attention and no input of other numbers has touched."""
    before = ancestors([node])
    return not before & attentions and not any(map(_is_signal, before)) and any(
        is_tensor(source) and not value(source).is_floating_point() for source in before if source.op == "placeholder")


def _is_signal(node: Node) -> bool:
    """An input of floating-point numbers that is no weight: pixels, or features."""
    return node.op == "placeholder" and is_tensor(node) and value(node).is_floating_point() and not isinstance(
        value(node), torch.nn.Parameter) and value(node).dim() > 1


def is_visual(node: Node) -> bool:
    return any(map(_is_signal, ancestors([node])))


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
        return _find_choice(graph, attentions)
    output = candidates[-1]
    stream = ancestors([_operands(output)[0]]) | {output}
    chain = [node for node in candidates if node in stream]
    return VisualMerge(output, tuple(_operands(n)[1] for n in chain), tuple(_operands(n)[2] for n in chain))


def _find_choice(graph: Graph, attentions: set[Node]) -> VisualMerge | None:
    """The last ``where(mask, features, text)`` of whole rows, whose number of features no size tells."""
    for node in reversed(graph.nodes):
        if not has_target(node, CHOICES) or len(node.args) != 3 or not all(map(is_tensor, node.args)):
            continue
        mask, features, text = node.args
        shape = value(node).shape
        if len(shape) == 3 and value(mask).dim() in (2, 3) and value(mask).shape[-1] == 1 and value(
                features).shape == value(text).shape == shape and is_visual(features) and is_text(text, attentions):
            return VisualMerge(node, (mask,), ())
    return None
