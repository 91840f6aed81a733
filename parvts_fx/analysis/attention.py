"""Finds attention calls among a decoder's tokens: fused ones, and those written out with a softmax."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from torch.fx import GraphModule, Node

from parvts_fx.analysis.calls import asks_tokens, fused_arguments, is_fused_attention, is_softmax, joins_with_cached
from parvts_fx.analysis.choices import find_choice, refuse_positions
from parvts_fx.analysis.last_rows import is_state, takes_last_rows
from parvts_fx.analysis.pairs import keeps_pairs_apart
from parvts_fx.analysis.probe import Probe
from parvts_fx.analysis.records import Attention, Operand
from parvts_fx.analysis.tokens import AxisLabels, TokenMap
from parvts_fx.analysis.values import hint, leaves, symbols, value
from parvts_fx.errors import REMEDY, Refusal

QUERY, KEY = "query", "key"


def find_attentions(module: GraphModule, nodes: Sequence[Node], tokens: TokenMap) -> list[Attention]:
    """The attention calls whose queries and keys are both prompt tokens, in graph order.

    Args:
        nodes: the decoder's nodes, in graph order.
        tokens: their token axes.

    Raises:
        Refusal: a call mixes tokens in a way that is not understood (a filled or preallocated cache, say).
    """
    found: list[Attention] = []
    taken: set[Node] = set()
    paired: set[Node] = set()
    """What is computed from pairs of tokens within an attention: masks, biases, choices of keys."""
    decoder = set(nodes)
    for node in nodes:
        if node in taken:
            continue
        attention = None
        if len(tokens.axes.get(node, {})) == 2 or not paired.isdisjoint(node.all_input_nodes):
            paired.add(node)
        if is_fused_attention(node):
            paired.discard(node)
            attention = _fused(module, node, nodes, tokens, decoder, paired)
        elif is_softmax(node) and len(tokens.axes.get(node, {})) == 2:
            attention = _written_out(module, node, nodes, tokens)
        if attention is not None:
            found.append(attention)
            taken.update(attention.nodes)
    return found


def copies_of_joins(nodes: Iterable[Node], attentions: Iterable[Attention], tokens: TokenMap) -> set[Node]:
    """What puts the prompt's rows behind cached ones for a cache, just as some attention call does for its keys; and what takes
    the last of these rows."""
    joins = {node for attention in attentions for node in attention.joins}
    known = {(node.target, str(node.args), str(node.kwargs)) for node in joins}
    copies = {node for node in nodes if node not in joins and (node.target, str(node.args), str(node.kwargs)) in known}
    return copies | {user for node in copies for user in node.users if takes_last_rows(user, tokens)}


def is_value_operand(operand: Node, call: Node, attention: Attention) -> bool:
    """Whether an attention call's node reads an operand as its values alone."""
    if call in attention.joins:
        return all(is_value_operand(call, user, attention) for user in call.users if user in attention.nodes)
    if not is_fused_attention(call):
        return call is attention.output
    named = fused_arguments(call)
    return operand is named["value"] and operand not in (named["query"], named["key"])


def _operand(node: Node, tokens: TokenMap, call: Node) -> Operand:
    axis = tokens.plain_axis(node)
    if axis is None:
        kinds = tokens.axes.get(node, {})
        if any(kind.has_rows_in_front for kind in kinds.values()):
            raise Refusal("the cache already holds tokens, and how they enter this attention is not understood", call)
        if not kinds:
            raise Refusal("keys are read from a preallocated cache, whose length the graph cannot change", call)
        raise Refusal(f"an operand's tokens lie along {kinds}, which is not understood", call)
    return Operand(node, axis)


def _fused(
    module: GraphModule, node: Node, nodes: Sequence[Node], tokens: TokenMap, decoder: set[Node], paired: set[Node]
) -> Attention | None:
    arguments = fused_arguments(node)
    query, key, val, mask = (arguments[name] for name in ("query", "key", "value", "attn_mask"))
    if key not in decoder and val not in decoder:
        return None  # attends to something that is not the prompt: each row by itself
    if tokens.axes.get(key) and tokens.axes.get(val) and not asks_tokens(node, tokens):
        return None  # the tokens' rows lie side by side: that they do not meet is still to be shown
    if query not in decoder:
        raise Refusal("rows that are not the prompt's ask its keys (those of a second decoder, which reads what this one "
                      "computes, say)", node)
    if arguments["dropout_p"] not in (0, 0.0):
        raise Refusal("attention dropout is active", node)
    if query in decoder and not tokens.axes.get(query) and not is_state(query, tokens.probed, tokens):
        return None  # the prompt's last rows ask by themselves
    if mask is not None and mask in decoder and tokens.axes.get(mask):
        if tokens.axes.get(query):
            return _with_computed_mask(module, node, mask, nodes, tokens, paired)
        raise Refusal("the attention mask of the prompt's last rows is computed from the merged embeddings", node)
    if (joins := joins_with_cached(nodes, (key, val), tokens)):
        return _on_filled_cache(module, node, joins, tokens)
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
    rows = tokens.plain_axis(node)
    if rows is None:
        raise Refusal("the rows of an attention's result cannot be told", node)
    return Attention((node,), queries, keys, node, rows, kind, {node: bindings})


def _on_filled_cache(module: GraphModule, call: Node, joins: Sequence[Node], tokens: TokenMap) -> Attention:
    """A fused call together with what puts cached rows in front of its keys and values."""
    arguments = fused_arguments(call)
    if arguments["is_causal"]:
        raise Refusal("attention is causal by its rows' numbers, and the cache already holds tokens", call)
    ordered = (*joins, call)
    known = {source: KEY for node in joins for source in node.all_input_nodes if tokens.axes.get(source)}
    known |= {arguments["query"]: QUERY}

    def explains(found: TokenMap) -> bool:
        return [kind.label for kind in found.axes.get(call, {}).values()] == [QUERY]

    kind = "fused" if arguments["attn_mask"] is None else "fused masked"
    return _labelled(module, ordered, call, tokens, explains, kind, known)


def _with_computed_mask(
    module: GraphModule, call: Node, mask: Node, nodes: Sequence[Node], tokens: TokenMap, paired: set[Node]
) -> Attention:
    """A fused call together with all that its mask is computed from pair by pair: a learned bias, an index's choice of keys."""
    arguments = fused_arguments(call)
    known: dict[Node, str] = {}
    region, stack = {call}, [mask]
    while stack:
        node = stack.pop()
        if node in paired and node not in region:
            region.add(node)
            stack.extend(node.all_input_nodes)
    choice = find_choice(module.graph, call, mask, nodes, tokens)
    if choice is not None:
        if not symbols(tokens.size):
            raise Refusal(
                f"which blocks of keys are chosen may follow from the prompt's length ({REMEDY})", call, names_tell=True)
        region |= choice.nodes
        known = dict.fromkeys(choice.pooled, KEY)
    ordered = tuple(node for node in module.graph.nodes if node in region)
    known |= {arguments["query"]: QUERY, arguments["key"]: KEY, arguments["value"]: KEY}

    def explains(found: TokenMap) -> bool:
        if [kind.label for kind in found.axes.get(call, {}).values()] != [QUERY]:
            return False
        if labels(found, mask) != {value(mask).dim() - 2: QUERY, value(mask).dim() - 1: KEY}:
            return False
        return all(sorted(labels(found, node).values()) == sorted((QUERY, KEY))
                   for node in ordered if len(tokens.axes.get(node, {})) == 2)

    def labels(found: TokenMap, node: Node) -> dict[int, str]:
        return {axis: kind.label for axis, kind in found.axes.get(node, {}).items()}

    attention = _labelled(module, ordered, call, tokens, explains, "written out", known, chooses=choice is not None)
    if choice is not None:
        refuse_positions(ordered, attention.bindings, call)
    return attention


def _written_out(module: GraphModule, softmax: Node, nodes: Sequence[Node], tokens: TokenMap) -> Attention:
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
    paired = [node for node in nodes if node in region or node is output]
    joins = joins_with_cached(nodes, [source for node in paired for source in node.all_input_nodes], tokens)
    ordered = tuple(node for node in nodes if node in {*paired, *joins})

    def explains(found: TokenMap) -> bool:
        axes = found.axes.get(output, {})
        normalised = {kind.label for axis, kind in found.axes[softmax].items() if axis == _softmax_axis(softmax)}
        return [kind.label for kind in axes.values()] == [QUERY] and normalised == {KEY}

    return _labelled(module, ordered, output, tokens, explains, "written out", softmax=softmax)


def _labelled(
    module: GraphModule, ordered: tuple[Node, ...], output: Node, tokens: TokenMap, explains: Callable[[TokenMap], bool],
    kind: str, known: Mapping[Node, str] = MappingProxyType({}), softmax: Node | None = None, chooses: bool = False,
) -> Attention:
    """Find out which operands of a region hold queries and which hold keys, by probes with two lengths.

    Args:
        known: what is known of some of them.
        softmax: the one whose scores are to be shown to belong to single pairs of a query and a key.
        chooses: whether blocks of keys are chosen: numbers are computed again for as many keys as there are, or for as many
            queries where the sizes ask for it.
    """
    inputs = [
        source for source in dict.fromkeys(s for node in ordered for s in node.all_input_nodes)
        if tokens.axes.get(source) and source not in ordered
    ]
    operands = [_operand(source, tokens, output) for source in inputs]
    lengths = Probe.lengths_for(module, tokens.size, (QUERY, KEY))  # more keys: an index that is too small fails nowhere
    if chooses:
        lengths = {label: lengths[label] for label in (KEY, QUERY)}
    for labels in itertools.product((QUERY, KEY), repeat=len(operands)):
        if len(set(labels)) < 2 or any(known.get(operand.node, own) != own for operand, own in zip(operands, labels)):
            continue
        probe = Probe(module, tokens.size, lengths, computes=chooses)
        for operand, label in zip(operands, labels):
            probe.seed(operand.node, {operand.axis: label})
        try:
            probe.run(ordered)
        except Refusal:
            continue
        if explains(probe.found):
            split = {label: tuple(o for o, own in zip(operands, labels) if own == label) for label in (QUERY, KEY)}
            joins = frozenset(joins_with_cached(ordered, ordered, tokens))
            behind = False
            if softmax is not None or joins or chooses:
                behind = _shows_pairs(module, ordered, softmax, output, probe.found, split, bool(joins), chooses)
            bindings = {node: dict(probe.found.bindings.get(node, {})) for node in ordered}
            axis = next(iter(probe.found.axes[output]))
            return Attention(ordered, split[QUERY], split[KEY], output, axis, kind, bindings, joins, behind)
    raise Refusal("no reading of its operands as queries and keys explains this attention", output)


def _shows_pairs(
    module: GraphModule, region: tuple[Node, ...], softmax: Node | None, output: Node, labelled: TokenMap,
    operands: Mapping[str, Sequence[Operand]], has_cached: bool, chooses: bool,
) -> bool:
    """Whether what scores have beside the prompt's keys stands behind them.

    Raises:
        Refusal: scores do not belong to single pairs of a query and a key.
    """
    for behind in (False,) if has_cached or chooses else (False, True):
        if keeps_pairs_apart(module, region, softmax, output, labelled, operands, behind):
            return behind
    what = ("does not ask for each query by itself" if chooses else
            "does not have the prompt's keys behind the cached ones" if has_cached else
            "scores are not computed pair by pair")
    raise Refusal(f"attention {what}, or that cannot be shown", output if softmax is None else softmax)


def _softmax_axis(node: Node) -> int:
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(axis, int):
        raise Refusal("a softmax without an explicit axis", node)
    return axis % value(node).dim()
