"""What the mask of an attention call is computed from: pairs of tokens, and blocks of keys that are scored and chosen.

An index that chooses blocks scores keys that it has pooled first. A pool belongs to no token, and which tokens it is made of
follows from the rows that are there: it is part of the call, computed again for the rows that the call is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch.fx import Graph, Node

from parvts_fx.analysis.tokens import AxisLabels, TokenMap
from parvts_fx.analysis.values import (
    ancestors,
    changed_in_place,
    concrete,
    is_symbolic_int,
    is_tensor,
    leaves,
    needed_for,
    symbols,
    value,
)
from parvts_fx.errors import Refusal


@dataclasses.dataclass(frozen=True)
class Choice:
    """What chooses a call's keys by blocks."""

    nodes: frozenset[Node]
    """Pairs of tokens, blocks, and what is made of either; tables made from the prompt's length alone."""

    pooled: frozenset[Node]
    """Tensors of tokens that blocks are made of: rows of keys."""


def find_choice(graph: Graph, call: Node, mask: Node, nodes: Sequence[Node], tokens: TokenMap) -> Choice | None:
    """What stands between a call's mask and the last tensor of tokens that all of the call is computed from; None where no blocks
    do, and where there is no such tensor."""
    behind = _behind_common(graph, call, nodes, tokens)
    inner = needed_for(graph, [mask]).intersection(behind)
    found: set[Node] = set()
    blocks = False
    for node in behind:
        if node not in inner:
            continue
        without_tokens = is_tensor(node) and not tokens.axes.get(node)
        written = changed_in_place(node)
        is_pair = len(tokens.axes.get(node, {})) == 2
        if without_tokens or is_pair or written in found or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
            blocks |= without_tokens
    if not blocks:
        return None
    pooled = {source for node in found if is_tensor(node) and not tokens.axes.get(node) for source in node.all_input_nodes
              if source not in found and tokens.plain_axis(source) is not None}
    return Choice(frozenset(found | _tables(found, set(nodes), tokens)), frozenset(pooled))


def _behind_common(graph: Graph, call: Node, nodes: Sequence[Node], tokens: TokenMap) -> list[Node]:
    """What a call is computed from behind the last tensor of tokens that all of it is computed from, in graph order."""
    needed = needed_for(graph, [call])
    cone = [node for node in nodes if node in needed]
    places = {node: place for place, node in enumerate(cone)}
    begin, reach = len(cone), 0
    for place, node in enumerate(cone):
        if reach <= place and tokens.plain_axis(node) is not None and node is not call:
            begin = place + 1
        if not is_symbolic_int(node):
            reach = max([reach, *(places[user] for user in node.users if user in places)])
    return cone[begin:]


def _tables(found: Iterable[Node], decoder: Collection[Node], tokens: TokenMap) -> set[Node]:
    """The tensors from outside the decoder that have no row for each token and follow the prompt's length all the same: an axis
    of theirs is as long as there are blocks, or they hold a number that is computed from it."""
    made: set[Node] = set()
    of_prompt = symbols(tokens.size)
    stack = [leaf for node in found for leaf in leaves(node)]
    while stack:
        side = stack.pop()
        if not is_tensor(side) or side in decoder or side in made or not side.op.startswith("call"):
            continue
        axes = [size for size in map(concrete, value(side).shape) if of_prompt & symbols(size)]
        if any(of_prompt & symbols(size - tokens.size) for size in axes) or not axes and _holds_sizes(side, of_prompt):
            made.add(side)
            stack.extend(leaves(side))
    return made


def _holds_sizes(side: Node, of_prompt: frozenset) -> bool:
    """Whether a tensor is made of nothing but sizes, of which some follow the prompt."""
    before = ancestors([side])
    return all(source.op.startswith("call") or not is_tensor(source) for source in before) and any(
        is_symbolic_int(source) and of_prompt & symbols(value(source)) for source in before)


def refuse_positions(nodes: Iterable[Node], bindings: Mapping[Node, Mapping[int, object]], call: Node) -> None:
    """Refuse numbers of single positions, of which it cannot be told whether they count the rows that are there.

    Raises:
        Refusal: there are such.
    """
    for node in nodes:
        for index, binding in bindings.get(node, {}).items():
            if isinstance(binding, AxisLabels) and value(leaves(node)[index]).dtype in (torch.int32, torch.int64):
                raise Refusal("positions choose among blocks of the rows that are there: those of generated tokens, which follow "
                              "the full prompt, would choose behind the pruned ones", call)
