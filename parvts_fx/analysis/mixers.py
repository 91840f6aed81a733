"""Finds every place where a decoder's tokens meet: attention calls, and token mixers that are no attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from parvts_fx.analysis.records import Attention, Mixer
from parvts_fx.analysis.tokens import Filling, TokenMap
from parvts_fx.analysis.values import ancestors, descendants, has_target, is_tensor, value

_CONVOLUTIONS = (
    F.conv1d, F.conv2d, torch.conv1d, torch.conv2d, torch.ops.aten.conv1d.default, torch.ops.aten.convolution.default,
)
_ALONG_AN_AXIS = (torch.cumsum, torch.cumprod, torch.logcumsumexp, torch.roll, torch.flip)
_ALONG_AN_AXIS_METHODS = ("cumsum", "cumprod", "logcumsumexp", "roll", "flip")


def find_mixers(graph: Graph, nodes: Sequence[Node], attentions: Sequence[Attention], tokens: TokenMap) -> list[Mixer]:
    """The decoder's token mixers in graph order.

    A mixer that is no attention shows by an axis that has more or fewer entries than tokens (the padding of a
    convolution), by a padding up to a fixed size (a scan in blocks), or by an operation along the token axis.
    """
    candidates = [node for node in nodes if _mixes(node, tokens)]
    within_attention: set[Node] = set()
    for attention in attentions if candidates else ():
        before = ancestors([attention.output])
        queries = [operand.node for operand in attention.queries]
        within_attention |= {node for node in descendants(graph, queries) if node in before}
    mixers = [
        Mixer(tuple(operand.node for operand in attention.queries), attention.output, attention)
        for attention in attentions
    ]
    mixers += [
        Mixer(tuple(node.all_input_nodes), node, None)
        for node in candidates if node not in within_attention
    ]
    return sorted(mixers, key=lambda mixer: mixer.output)


def _mixes(node: Node, tokens: TokenMap) -> bool:
    axes = tokens.axes.get(node, {})
    if any(kind.offset for kind in axes.values()):
        return True
    if any(isinstance(binding, Filling) for binding in tokens.bindings.get(node, {}).values()):
        return True
    if not axes or not node.args or not is_tensor(node.args[0]):
        return False
    if has_target(node, _CONVOLUTIONS):
        return any(axis >= 2 for axis in axes)
    if has_target(node, _ALONG_AN_AXIS, _ALONG_AN_AXIS_METHODS):
        along = node.kwargs.get("dim", node.kwargs.get("dims", node.args[-1] if len(node.args) > 1 else None))
        along = along if isinstance(along, (list, tuple)) else [along]
        return any(isinstance(axis, int) and axis % value(node).dim() in axes for axis in along) and value(node).dim() > 2
    return False
