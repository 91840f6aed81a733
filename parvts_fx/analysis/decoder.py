"""Puts the decoder's anatomy together: merge, token axes, attention calls, and the layers between them."""

from __future__ import annotations

import networkx as nx
import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.attention import attention_nodes, find_attentions, reads_tokens
from parvts_fx.analysis.merge import find_merge
from parvts_fx.analysis.records import Attention, Decoder, Layer
from parvts_fx.analysis.tokens import Probe, TokenMap
from parvts_fx.analysis.values import ancestors, changed_in_place, descendants, hint, is_index, is_tensor, output_node, value
from parvts_fx.errors import Refusal

TOKEN = "token"
_SINK = "sink"


def find_decoder(module: GraphModule, window_caches_follow: bool = False) -> Decoder | None:
    """Find the multimodal decoder in a captured graph.

    Args:
        window_caches_follow: the caller corrects the token counts of sliding-window caches after each prefill.

    Returns:
        The anatomy, or None where no visual features are merged into embeddings (a text prompt, a decode step, a
        vision tower, a head): there is nothing to prune in such a graph.

    Raises:
        Refusal: there is a merge, but what follows it is not understood.
    """
    merge = find_merge(module.graph, attention_nodes(module.graph))
    if merge is None:
        return None
    batch, size, _ = value(merge.output).shape
    if hint(size) is None or hint(batch) is None:
        raise Refusal("the prompt's length depends on data", merge.output)
    nodes = descendants(module.graph, [merge.output])
    if not any(node in attention_nodes(module.graph) for node in nodes):
        raise Refusal(
            "visual features are merged in this graph, but no attention follows: the graph breaks between the merge and "
            "the decoder (parvts_fx.compile(model) captures both in one graph where Dynamo can)", merge.output)
    tokens = _token_axes(module, nodes, size)
    attentions = find_attentions(module, nodes, tokens)
    if not attentions:
        raise Refusal("no attention call reads the merged tokens as both queries and keys (a preallocated cache, say, "
                      "whose length the graph cannot change)", merge.output)
    layers, final, output = _layers(module, nodes, attentions, merge.output)
    decoder = Decoder(merge, tuple(nodes), tuple(layers), final, output, tokens, window_caches_follow)
    _check(module, decoder)
    return decoder


def _token_axes(module: GraphModule, nodes: list[Node], size: int | torch.SymInt) -> TokenMap:
    probe = Probe(module, size, Probe.lengths_for(module, hint(size), [TOKEN]))
    probe.seed(nodes[0], {1: TOKEN})
    for node in nodes[1:]:
        probe.run(node)
    return probe.found


def _layers(
    module: GraphModule, nodes: list[Node], attentions: list[Attention], start: Node
) -> tuple[list[Layer], Node, Node | None]:
    """Cut the decoder into layers along the chain of dominators from its first attention call to its result.

    Keys and values are left out of the flow (layers may share them), and so is what no attention has touched
    (per-layer inputs computed from the embeddings): neither is the residual stream.
    """
    first, last = attentions[0], attentions[-1]
    touched = set(descendants(module.graph, [first.output]))
    skipped = {
        (key.node, own)
        for attention in attentions for key in attention.keys for own in attention.nodes
        if key.node not in {query.node for query in attention.queries}
    }
    flow = nx.DiGraph()
    flow.add_node(first.output)
    for node in nodes:
        if node in touched and node is not first.output:
            flow.add_edges_from(
                (source, node) for source in node.all_input_nodes if source in touched and (source, node) not in skipped
            )
    after_last = set(descendants(module.graph, [last.output]))
    results = [node for node in output_node(module.graph).all_input_nodes if node in after_last and node in flow]
    if not results:
        raise Refusal("nothing that the last attention call computes leaves the graph", last.output)
    flow.add_edges_from((node, _SINK) for node in results)
    dominator = nx.immediate_dominators(flow, first.output)
    chain: list[Node] = []
    link = dominator.get(_SINK)
    while link is not None and link is not first.output:
        chain.append(link)
        link = dominator[link] if dominator[link] is not link else None
    chain.reverse()
    groups: list[tuple[Node, list[Attention]]] = [(start, [])]
    for attention in attentions:
        before = ancestors(query.node for query in attention.queries)
        links = [link for link in chain if link in before]
        if links and links[-1] is not groups[-1][0]:
            groups.append((links[-1], []))
        groups[-1][1].append(attention)
    before_last = ancestors(query.node for query in last.queries)
    final = next((link for link in chain if link not in before_last), None)
    if final is None:
        raise Refusal("no link of the residual stream follows the last attention call", last.output)
    layers = [Layer(index, link, tuple(own)) for index, (link, own) in enumerate(groups)]
    return layers, final, _output_of_last_layer(chain, layers)


def _output_of_last_layer(chain: list[Node], layers: list[Layer]) -> Node | None:
    """Where the layer before has its output: as many links behind its attention, made by the same operations.

    With two layers the one before is the first, whose chain has further links inside the attention: the root's own.
    """
    if len(layers) < 2:
        return None

    def links_behind(layer: Layer, stop: Node | None) -> list[Node]:
        before = ancestors(query.node for query in layer.attentions[-1].queries)
        behind = [link for link in chain if link not in before]
        return behind if stop is None else behind[:behind.index(stop) + 1]

    def operations(links: list[Node]) -> list[tuple[str, object]]:
        return [(link.op, link.target) for link in links]

    pattern, links = links_behind(layers[-2], layers[-1].input), links_behind(layers[-1], None)
    shortest = 1 if len(layers) == 2 else len(pattern)
    for length in range(len(pattern), shortest - 1, -1):
        if length and operations(pattern[-length:]) == operations(links[:length]):
            return links[length - 1]
    return None


def _check(module: GraphModule, decoder: Decoder) -> None:
    """What would make dropping rows wrong, wherever it stands in the decoder."""
    tokens = decoder.tokens
    after_last = set(descendants(module.graph, [decoder.final]))
    inside = set(decoder.nodes)
    for node in decoder.nodes:
        target = changed_in_place(node)
        if target is not None and target not in inside:
            raise Refusal("the decoder writes into one of its inputs (a preallocated cache, say)", node)
    for node in output_node(module.graph).all_input_nodes:
        if node not in tokens.axes:
            continue
        odd = [kind for kind in tokens.axes[node].values() if not kind.is_plain]
        if odd:
            raise Refusal(f"an output counts its tokens as {odd}", node)
        for source in nodes_without_tokens(decoder, node):
            if not reads_tokens(source, tokens):
                continue
            if not _takes_last_rows(source, tokens):
                raise Refusal("an output reduces over the prompt's tokens (a loss or a pooling, say)", source)
            if source not in after_last and not decoder.window_caches_follow:
                raise Refusal("a layer caches its last tokens only, and counts them where a graph cannot reach (use "
                              "parvts_fx.compile(model), which corrects the count)", source)
    for link in [*(layer.input for layer in decoder.layers), decoder.final]:
        if tokens.plain_axis(link) is None:
            raise Refusal("the residual stream has no plain token axis here", link)


def nodes_without_tokens(decoder: Decoder, result: Node) -> list[Node]:
    """The decoder's tensors without a token axis that lead to a result without one (itself included), in graph order.

    Empty for a result that has a token axis.
    """
    inside, axes = set(decoder.nodes), decoder.tokens.axes
    found: set[Node] = set()
    stack = [result]
    while stack:
        node = stack.pop()
        if node in inside and node not in found and not axes.get(node):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return [node for node in decoder.nodes if node in found]


def _takes_last_rows(node: Node, tokens: TokenMap) -> bool:
    """``x[..., -n:, ...]`` or ``x[..., -1, ...]`` along the token axis: those rows are the last of any subset too."""
    if not is_index(node) or not is_tensor(node.args[0]):
        return False
    axis = tokens.plain_axis(node.args[0])
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if axis is None or any(part is None or part is Ellipsis for part in index) or axis >= len(index):
        return False

    def number(part: object) -> object:
        return hint(value(part)) if isinstance(part, Node) else part

    part = index[axis]
    if isinstance(part, slice):
        start = number(part.start)
        return isinstance(start, int) and start < 0 and part.stop is None and part.step in (None, 1)
    return isinstance(number(part), int) and number(part) < 0
