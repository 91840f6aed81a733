"""The blocks of the residual stream: what lies between two of its links, and which matrices it multiplies by."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch.fx import Node

from parvts_fx.analysis.records import Mixer
from parvts_fx.analysis.tokens import AxisLabels, TokenMap
from parvts_fx.analysis.values import SUMS, has_target, hint_shape, is_tensor, leaves, value

_CONVOLUTIONS = (torch.conv1d, F.conv1d, torch.conv2d, F.conv2d, torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default,
                 torch.ops.aten.convolution.default)
"""Their weights are [out, in of one group, ...]."""


@dataclasses.dataclass(frozen=True)
class Block:
    """What lies between two links of the residual stream."""

    group: int | None
    """Which group of mixers stands in it; None where tokens do not meet."""

    weights: frozenset
    """(operation, shape) of its matrices."""

    operations: frozenset
    adds: bool = True
    """Whether it ends with a sum, as what stands within layers does."""

    beside: frozenset = frozenset()
    """Those of the matrices that neither lead to where tokens meet nor follow from it: of a feed-forward beside attention."""

    matrices: int = 0
    """How many, those of one shape counted each."""

    attends: bool = False
    """Whether tokens meet in it by softmax attention."""

    @property
    def mixes(self) -> bool:
        return self.group is not None

    @property
    def is_bare(self) -> bool:
        """Whether tokens meet in it, and it has no matrix of its own: a norm over tokens, say."""
        return self.mixes and not self.weights


def blocks_of(
    chain: Sequence[Node], groups: Sequence[tuple[Node, Sequence[Mixer]]], nodes: Sequence[Node], tokens: TokenMap,
    touched: Collection[Node],
) -> list[Block]:
    """The blocks of the stream in order, those left out that have no matrix and in which tokens do not meet (norms).

    Args:
        chain: the links.
        groups: for each link from which mixers read, these mixers; the first link may be in front of the chain.
        touched: what depends on the first mixer. A link of the first layer that another branch joins is no block's end in
            any other layer: a feed-forward beside the attention.
    """
    inside, seen = set(nodes), {groups[0][0]}
    reading = {link: index for index, (link, _) in enumerate(groups)}
    blocks: list[Block] = []
    group: int | None = 0
    for link in chain:
        own = _newly_reached(link, inside, seen)
        if link is not groups[0][0]:
            mixers = [] if group is None else groups[group][1]
            block = _block(link, group, own, mixers, tokens)
            beside = len(reading) > 1 and group is None and max(b.group or 0 for b in blocks) == 0 and any(
                source in inside and source not in touched for source in link.all_input_nodes)
            if beside:
                before = blocks.pop()
                blocks.append(dataclasses.replace(
                    before, weights=before.weights | block.weights, operations=before.operations | block.operations,
                    beside=before.beside | block.beside, matrices=before.matrices + block.matrices))
            elif block.mixes or block.weights:
                blocks.append(block)
        group = reading.get(link)
    while not blocks[-1].mixes and not blocks[-1].adds:  # the head
        blocks.pop()
    return blocks


def _block(link: Node, group: int | None, own: Collection[Node], mixers: Sequence[Mixer], tokens: TokenMap) -> Block:
    found = {node: [(str(node.target), hint_shape(value(side))) for side in matrices_of(node, tokens)] for node in own}
    behind, stack = set(), [user for mixer in mixers for user in mixer.output.users]
    while stack:
        node = stack.pop()
        if node in found and node not in behind:
            behind.add(node)
            stack.extend(node.users)
    in_front, stack = set(), [source for mixer in mixers for source in _operands(mixer)]
    while stack:
        node = stack.pop()
        if node in found and node not in in_front:
            in_front.add(node)
            stack.extend(node.all_input_nodes)
    return Block(
        group, frozenset(weight for weights in found.values() for weight in weights),
        frozenset(str(node.target) for node in own), has_target(link, SUMS, ("add", "add_")),
        frozenset(weight for node, weights in found.items() if node not in behind | in_front for weight in weights),
        sum(map(len, found.values())), any(mixer.attention is not None for mixer in mixers))


def _operands(mixer: Mixer) -> list[Node]:
    if mixer.attention is None:
        return [*mixer.reads]
    return [operand.node for operand in (*mixer.attention.queries, *mixer.attention.keys)]


def _newly_reached(link: Node, inside: set[Node], seen: set[Node]) -> list[Node]:
    """The decoder's nodes that a link is computed from, and no link in front of it."""
    own: list[Node] = []
    stack = [link]
    while stack:
        node = stack.pop()
        if node in inside and node not in seen:
            seen.add(node)
            own.append(node)
            stack.extend(node.all_input_nodes)
    return own


def matrices_of(node: Node, tokens: TokenMap) -> Iterable[Node]:
    """The matrices by which a node multiplies what runs along the prompt; a kernel for each channel by itself is none."""
    bindings = tokens.bindings.get(node, {})
    for index, leaf in enumerate(leaves(node)):
        if is_tensor(leaf) and leaf not in tokens.probed and not isinstance(bindings.get(index), AxisLabels):
            shape = hint_shape(value(leaf))
            if sum(size != 1 for size in (shape[:2] if has_target(node, _CONVOLUTIONS) else shape)) > 1:
                yield leaf
