"""Finds the residual stream: the chain of dominators that all passes through on its way to the decoder's result."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

import networkx as nx
from torch.fx import GraphModule, Node

from parvts_fx.analysis.blocks import matrices_of
from parvts_fx.analysis.calls import asks_tokens, fused_arguments, is_fused_attention
from parvts_fx.analysis.last_rows import is_state
from parvts_fx.analysis.records import Mixer
from parvts_fx.analysis.tokens import CATS, TokenMap
from parvts_fx.analysis.values import ancestors, descendants, has_target, is_symbolic_int, is_tensor, output_node, value
from parvts_fx.errors import Refusal

_SINK = "sink"
_Edges = set[tuple[Node, Node]]


def find_stream(
    module: GraphModule, nodes: Sequence[Node], mixers: Sequence[Mixer], tokens: TokenMap, start: Node,
    kept: Mapping[Node, Mapping[Node, Collection[Node]]] = MappingProxyType({}),
) -> list[Node]:
    """The links behind the first mixer, in order.

    Keys and values are left out of the flow: layers may share them. What leads around the first mixers alone shows which
    links lie within the first layer: no residual has joined them yet. Earlier states that are kept beside the newest one, for
    layers to choose among, are left out too. Where something leads from the embeddings around whole
    layers as well (inputs of each layer computed from them), all that no mixer has touched is left out instead.

    Args:
        mixers: those through which the stream passes, in graph order.
        kept: see :func:`kept_states`.
    """
    first, last = mixers[0].output, mixers[-1].output
    attentions = [mixer.attention for mixer in mixers if mixer.attention is not None]
    shared: _Edges = {
        (key.node, own)
        for attention in attentions for key in attention.keys for own in attention.nodes
        if key.node not in {query.node for query in attention.queries}
    }
    sides: _Edges = {
        (source, own) for attention in attentions for own in attention.nodes for source in own.all_input_nodes
        if source not in attention.nodes and source not in {query.node for query in attention.queries}
    }
    for node in nodes:  # calls of the last rows alone among them
        if not is_fused_attention(node) or not asks_tokens(node, tokens):
            continue
        named = fused_arguments(node)
        shared |= {(named[name], node) for name in ("key", "value") if named[name] is not named["query"]}
        sides |= {(named[name], node) for name in ("key", "value", "attn_mask") if named[name] is not named["query"]}
    shared |= {(part, node) for node, parts in kept.items() for part in parts}
    touched = set(descendants(module.graph, [first]))
    after_last = set(descendants(module.graph, [last]))
    results = [
        node for node in output_node(module.graph).all_input_nodes
        if node in after_last and node in touched and not is_state(node, nodes, tokens)
    ]
    if not results:
        raise Refusal("nothing that the last token mixer computes leaves the graph", last)
    behind_first = _flow(first, [node for node in nodes if node in touched], results, lambda *edge: edge not in shared)
    chain = _dominators(behind_first, first)
    sides |= shared
    whole = _flow(start, nodes, results, lambda source, node: (source, node) not in sides and not is_symbolic_int(source))
    passed = set(_dominators(whole, start))
    inside = len(list(itertools.takewhile(lambda link: link not in passed, chain)))
    if all(link in passed for link in chain[inside:]) and inside < len(chain) and not any(
            _leads_around(behind_first, one, other, mixers, tokens)
            for one, other in itertools.pairwise([first, *chain[:inside + 1]])):
        return chain[inside:]
    decoder = set(nodes)
    bypassed = next((index for index, link in enumerate(chain) if any(
        source in decoder and source not in touched for source in link.all_input_nodes)), 0)
    return chain[bypassed:]  # what is in front is inside the first mixer: no residual has bypassed it yet


def kept_states(nodes: Sequence[Node], tokens: TokenMap) -> dict[Node, dict[Node, set[Node]]]:
    """Where earlier states of the stream are laid beside the newest one, on an axis of their own: the operands that hold earlier
    ones, and these. The newest is computed from all others.
    """
    inside, found = set(nodes), dict[Node, dict[Node, set[Node]]]()
    for node in nodes:
        axis = _stacks(node, tokens)
        if axis is None:
            continue
        states = {part: _states(part, inside) for part in node.args[0] if part in inside}
        for newest, own in states.items():
            before = ancestors(own) - own
            if len(own) == 1 and all(others <= before for part, others in states.items() if part is not newest):
                found[node] = {part: others for part, others in states.items() if part is not newest}
    return found


def _stacks(node: Node, tokens: TokenMap) -> int | None:
    """The axis along which a node lays tensors side by side, where it is neither the tokens' nor the last one."""
    if not has_target(node, CATS) or not node.args or not isinstance(node.args[0], (list, tuple)):
        return None
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    rank, rows = value(node).dim(), tokens.plain_axis(node)
    return axis % rank if isinstance(axis, int) and rows is not None and axis % rank not in (rows, rank - 1) else None


def _states(part: Node, inside: Collection[Node]) -> set[Node]:
    """What has one axis less and lies in a tensor that is laid beside others."""
    rank, found, stack = value(part).dim(), set[Node](), [part]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in inside and is_tensor(source):
                (stack.append if value(source).dim() == rank else found.add)(source)
    return found


def links_in_front(nodes: Sequence[Node], mixers: Sequence[Mixer], start: Node, end: Node) -> list[Node]:
    """A link of the residual stream, and those behind it that none of a layer's mixers has touched, in order.

    Args:
        mixers: the layer's. The first of them may make a state that leaves the graph, and nothing else.
        end: a link behind the layer.
    """
    touched = set(descendants(start.graph, [mixer.output for mixer in mixers]))
    before = ancestors([end]) | {end}
    flow = _flow(start, [node for node in nodes if node in before], [end], lambda source, node: not is_symbolic_int(source))
    return [start, *(link for link in _dominators(flow, start) if link not in touched)]


def _flow(
    root: Node, nodes: Collection[Node], results: Collection[Node], follows: Callable[[Node, Node], bool]
) -> nx.DiGraph:
    """What flows from the root to the results along edges between these nodes."""
    flow, inside = nx.DiGraph(), {root, *nodes}
    flow.add_node(root)
    for node in nodes:
        if node is not root:
            flow.add_edges_from((source, node) for source in node.all_input_nodes if source in inside and follows(source, node))
    flow.add_edges_from((node, _SINK) for node in results if node in flow)
    return flow


def _dominators(flow: nx.DiGraph, root: Node) -> list[Node]:
    """What lies on every path from the root, itself left out, to the sink."""
    dominator = nx.immediate_dominators(flow, root)
    chain: list[Node] = []
    link = dominator.get(_SINK)
    while link is not None and link is not root:
        chain.append(link)
        link = dominator[link] if dominator[link] is not link else None
    return chain[::-1]


def _leads_around(flow: nx.DiGraph, one: Node, other: Node, mixers: Sequence[Mixer], tokens: TokenMap) -> bool:
    """Whether something leads from one link to the next around mixers and matrices, as a residual does around a layer."""
    between = (ancestors([other]) & nx.descendants(flow, one)) - {other}
    own = {mixer.output for mixer in mixers if mixer.output in between}
    weighed = {node for node in (*between, other) if any(True for _ in matrices_of(node, tokens))}
    rest = flow.subgraph({one, other, *between} - own - (weighed - {other}))
    return bool(own) and bool(weighed) and nx.has_path(rest, one, other)
