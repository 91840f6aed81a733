"""Cuts a decoder into layers, along the chain of dominators that is its residual stream."""

from __future__ import annotations

import dataclasses
import itertools

from torch.fx import GraphModule, Node

from parvts_fx.analysis.blocks import blocks_of
from parvts_fx.analysis.period import Period, find_period
from parvts_fx.analysis.records import Layer, Mixer
from parvts_fx.analysis.stream import find_stream, kept_states, links_in_front
from parvts_fx.analysis.tokens import TokenMap
from parvts_fx.analysis.values import ancestors, descendants, output_node
from parvts_fx.errors import Refusal


def find_layers(
    module: GraphModule, nodes: list[Node], mixers: list[Mixer], tokens: TokenMap, start: Node
) -> tuple[list[Layer], Node, Node | None, Period, frozenset[Node]]:
    """Cut the decoder into layers along the chain of dominators from its first token mixer to its result.

    Returns:
        the layers; the first link behind the last mixer; the last layer's output, where that can be told; by what the layers
        were told apart; and states of the stream that are kept beside later ones.
    """
    main = [mixer for mixer in mixers if mixer.attention is not None or _bypasses(mixer, mixers, module)]
    last = main[-1]
    stacks = kept_states(nodes, tokens)
    kept = frozenset(state for parts in stacks.values() for states in parts.values() for state in states)
    chain = find_stream(module, nodes, main, tokens, start, stacks)
    touched = set(descendants(module.graph, [main[0].output]))
    groups: list[tuple[Node, list[Mixer]]] = [(start, [])]
    waiting: list[Mixer] = []
    passed: list[Node] = [start]
    for mixer in mixers:
        if mixer not in main:
            waiting.append(mixer)  # it belongs to the attention that follows
            continue
        before = ancestors(mixer.reads)
        links = [link for link in chain if link in before]
        if links and links[-1] is not passed[-1]:
            new = [link for link in links if link not in passed]
            begin = max((place for place, link in enumerate(new) if link in kept), default=len(new) - 1)
            chain = [link for link in chain if link not in new[begin + 1:]]  # a layer begins with what is kept of it
            groups.append((new[begin] if new else links[-1], []))
            passed = links
        groups[-1][1].extend([*waiting, mixer])
        waiting.clear()
    before_last = ancestors(last.reads)
    final = next((link for link in chain if link not in before_last), None)
    if final is None:
        raise Refusal("no link of the residual stream follows the last token mixer", last.output)
    period = find_period(blocks_of(chain, groups, nodes, tokens, touched), len(groups))
    starts, ends = period.starts, [*period.starts[1:], len(groups)]
    layers = [
        Layer(index, groups[begin][0], tuple(mixer for _, own in groups[begin:end] for mixer in own))
        for index, (begin, end) in enumerate(zip(starts, ends))
    ]
    output = None
    if len({end - begin for begin, end in zip(starts, ends)}) == 1:  # else what follows their last mixers is not alike
        layers, output = _without_entries(chain, layers, _output_of_last_layer(chain, layers))
    return layers, final, output, period, kept


def find_entry(nodes: list[Node], layers: list[Layer], start: Node) -> Node:
    """The link of the residual stream that the first layer takes in, behind what models do to the merged embeddings at first.

    What the second layer does alike before its first mixer is the layer's own. With fewer than three layers nothing tells how
    much that is: then all links in front count, and with a single layer none.
    """
    if len(layers) < 2:
        return start
    first, second = layers[0], layers[1]
    front = links_in_front(nodes, first.mixers, start, second.input)
    own = links_in_front(nodes, second.mixers, second.input, layers[2].input) if len(layers) > 2 else [second.input]
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(
        reversed(_operations(front[1:])), reversed(_operations(own[1:]))))
    return front[len(front) - 1 - len(list(alike))]


def _bypasses(mixer: Mixer, mixers: list[Mixer], module: GraphModule) -> bool:
    """Whether what a mixer computes reaches the result other than as an operand of an attention call."""
    attentions = [other.attention for other in mixers if other.attention is not None]
    if not attentions:
        return True
    calls = {own for attention in attentions for own in attention.nodes}
    final = set(descendants(module.graph, [attentions[-1].output]))
    results = final.intersection(output_node(module.graph).all_input_nodes)
    seen: set[Node] = set()
    stack = [mixer.output]
    while stack:
        node = stack.pop()
        if node in seen or node in calls:
            continue
        seen.add(node)
        if node in results:
            return True
        stack.extend(node.users)
    return False


def _links_behind(chain: list[Node], layer: Layer, stop: Node | None) -> list[Node]:
    """The links from a layer's last mixer to the next layer's input, or to the end."""
    before = ancestors(layer.mixers[-1].reads)
    behind = [link for link in chain if link not in before]
    return behind if stop is None else behind[:behind.index(stop) + 1]


def _operations(links: list[Node]) -> list[tuple[str, object]]:
    return [(link.op, link.target) for link in links]


def _without_entries(chain: list[Node], layers: list[Layer], output: Node | None) -> tuple[list[Layer], Node | None]:
    """Move every layer's input in front of what each layer does to the whole stream at first.

    Such an entry shows by comparison: it stands between any two layers, the same each time, and not behind the last.
    """
    last = _links_behind(chain, layers[-1], None)
    behind = [_links_behind(chain, layer, following.input) for layer, following in zip(layers, layers[1:])]
    if len(behind) < 2:
        return layers, output
    shared = [
        len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(_operations(links), _operations(last)))))
        for links in behind[1:]
    ]
    entries = {tuple(_operations(links[length:])) for links, length in zip(behind[1:], shared)}
    (entry, *others) = entries
    whole = _operations(behind[1])
    if others or not entry or not all(shared) or _operations(behind[0])[-len(whole):] != whole:
        return layers, output  # the first layer's chain has further links inside its mixer: the root's own
    moved = [
        dataclasses.replace(layer, input=links[-len(entry) - 1]) for layer, links in zip(layers[1:], behind)
    ]
    return [layers[0], *moved], last[shared[-1] - 1]


def _output_of_last_layer(chain: list[Node], layers: list[Layer]) -> Node | None:
    """Where the layer before has its output: as many links behind its attention, made by the same operations.

    With two layers the one before is the first, whose chain has further links inside the attention: the root's own.
    """
    if len(layers) < 2:
        return None

    pattern, links = _links_behind(chain, layers[-2], layers[-1].input), _links_behind(chain, layers[-1], None)
    shortest = 1 if len(layers) == 2 else len(pattern)
    for length in range(len(pattern), shortest - 1, -1):
        if length and _operations(pattern[-length:]) == _operations(links[:length]):
            return links[length - 1]
    return None
