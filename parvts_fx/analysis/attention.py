"""Finds attention calls among a decoder's tokens: fused ones, and those written out with a softmax."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection

from torch.fx import GraphModule, Node

from parvts_fx.analysis.calls import fused_arguments, is_fused_attention, is_softmax
from parvts_fx.analysis.last_rows import is_state
from parvts_fx.analysis.probe import Probe
from parvts_fx.analysis.records import Attention, Operand
from parvts_fx.analysis.tokens import AxisLabels, TokenMap
from parvts_fx.analysis.values import hint, leaves, value
from parvts_fx.errors import Refusal

QUERY, KEY = "query", "key"

def find_attentions(module: GraphModule, nodes: Collection[Node], tokens: TokenMap) -> list[Attention]:
    """The attention calls whose queries and keys are both prompt tokens, in graph order.

    Args:
        nodes: the decoder's nodes, in graph order.
        tokens: their token axes.

    Raises:
        Refusal: a call mixes tokens in a way that is not understood (a filled or preallocated cache, say).
    """
    found: list[Attention] = []
    taken: set[Node] = set()
    decoder = set(nodes)
    for node in nodes:
        if node in taken:
            continue
        attention = None
        if is_fused_attention(node):
            attention = _fused(node, tokens, decoder)
        elif is_softmax(node) and len(tokens.axes.get(node, {})) == 2:
            attention = _written_out(module, node, nodes, tokens)
        if attention is not None:
            found.append(attention)
            taken.update(attention.nodes)
    return found


def _operand(node: Node, tokens: TokenMap, call: Node) -> Operand:
    axis = tokens.plain_axis(node)
    if axis is None:
        kinds = tokens.axes.get(node, {})
        if any(kind.offset > 0 for kind in kinds.values()):
            raise Refusal("the cache already holds tokens when the image arrives", call)
        if not kinds:
            raise Refusal("keys are read from a preallocated cache, whose length the graph cannot change", call)
        raise Refusal(f"an operand's tokens lie along {kinds}, which is not understood", call)
    return Operand(node, axis)


def _fused(node: Node, tokens: TokenMap, decoder: set[Node]) -> Attention | None:
    arguments = fused_arguments(node)
    query, key, val, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    if key not in decoder and val not in decoder:
        return None  # attends to something that is not the prompt: each row by itself
    if arguments["dropout_p"] not in (0, 0.0):
        raise Refusal("attention dropout is active", node)
    if query in decoder and not tokens.axes.get(query) and not is_state(query, tokens.probed, tokens):
        return None  # the prompt's last rows ask by themselves
    if mask is not None and mask in decoder and tokens.axes.get(mask):
        raise Refusal("the attention mask is computed from the merged embeddings", node)
    queries, keys = (_operand(query, tokens, node),), (_operand(key, tokens, node), _operand(val, tokens, node))
    bindings: dict[int, object] = {}
    kind = "fused causal" if arguments["is_causal"] else "fused"
    if mask is not None:
        kind = "fused masked"
        index = next(i for i, leaf in enumerate(leaves(node)) if leaf is mask)
        size = hint(tokens.size)
        shape = value(mask).shape
        axes = []
        for axis, label in ((len(shape) - 2, QUERY), (len(shape) - 1, KEY)):
            if hint(shape[axis]) == size:
                axes.append((axis, label))
            elif hint(shape[axis]) != 1:
                raise Refusal(f"the attention mask has {shape[axis]} entries for {tokens.size} tokens", node)
        bindings[index] = AxisLabels(tuple(axes))
    return Attention((node,), queries, keys, node, tokens.plain_axis(node), kind, {node: bindings})


def _written_out(module: GraphModule, softmax: Node, nodes: Collection[Node], tokens: TokenMap) -> Attention:
    """Grow the region of pairwise scores around a softmax, and label its axes by a probe with two lengths."""

    def is_pairwise(node: Node) -> bool:
        return len(tokens.axes.get(node, {})) == 2

    region, stack = {softmax}, [softmax]
    ends: set[Node] = set()
    while stack:
        node = stack.pop()
        for near in [*node.all_input_nodes, *node.users]:
            if near in region or near not in tokens.axes:
                continue
            if is_pairwise(near):
                region.add(near)
                stack.append(near)
            elif near in node.users:
                ends.add(near)
    if any(user.op == "output" for node in region for user in node.users):
        raise Refusal("attention weights are an output of the graph", softmax)
    if len(ends) != 1:
        raise Refusal(f"attention weights are read by {len(ends)} operations, expected one product with values", softmax)
    output = ends.pop()
    ordered = tuple(node for node in nodes if node in region or node is output)

    def explains(found: TokenMap) -> bool:
        axes = found.axes.get(output, {})
        normalised = {kind.label for axis, kind in found.axes[softmax].items() if axis == _softmax_axis(softmax)}
        return [kind.label for kind in axes.values()] == [QUERY] and normalised == {KEY}

    return _labelled(module, ordered, output, tokens, explains, "written out")


def _labelled(
    module: GraphModule, ordered: tuple[Node, ...], output: Node, tokens: TokenMap, explains: Callable[[TokenMap], bool],
    kind: str,
) -> Attention:
    """Find out which operands of a region hold queries and which hold keys, by probes with two lengths."""
    inputs = [
        source for source in dict.fromkeys(s for node in ordered for s in node.all_input_nodes)
        if tokens.axes.get(source) and source not in ordered
    ]
    operands = [_operand(source, tokens, output) for source in inputs]
    lengths = Probe.lengths_for(module, hint(tokens.size), (QUERY, KEY))
    for labels in itertools.product((QUERY, KEY), repeat=len(operands)):
        if len(set(labels)) < 2:
            continue
        probe = Probe(module, tokens.size, lengths)
        for operand, label in zip(operands, labels):
            probe.seed(operand.node, {operand.axis: label})
        try:
            probe.run(ordered)
        except Refusal:
            continue
        if explains(probe.found):
            split = {label: tuple(o for o, own in zip(operands, labels) if own == label) for label in (QUERY, KEY)}
            bindings = {node: dict(probe.found.bindings.get(node, {})) for node in ordered}
            axis = next(iter(probe.found.axes[output]))
            return Attention(ordered, split[QUERY], split[KEY], output, axis, kind, bindings)
    raise Refusal("no reading of its operands as queries and keys explains this attention", output)


def _softmax_axis(node: Node) -> int:
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(axis, int):
        raise Refusal("a softmax without an explicit axis", node)
    return axis % value(node).dim()
