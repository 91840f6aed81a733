"""Numbers and tables that may or may not mean the prompt's length, where a wrong reading would be a wrong answer.

Where a number is a size, only one reading works at another prompt length (:mod:`parvts_fx.analysis.probe`). Where it is a
value, several do: ``x / 640`` may divide by the number of rows or by a constant, and in a graph with static sizes nothing
tells. The same for tables made from sizes alone: ``arange(640)`` holds positions, which dropped rows take with them, or it
numbers the rows that are there. Such graphs are refused, unless both readings come to the same.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from parvts_fx.analysis.attention import is_value_operand
from parvts_fx.analysis.blocks import matrices_of
from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.small_runs import SmallRuns, Unproven, local_argument, really
from parvts_fx.analysis.tokens import TokenMap
from parvts_fx.analysis.values import (
    call,
    changed_in_place,
    hint_shape,
    is_index,
    is_indexing,
    is_tensor,
    leaves,
    symbols,
    value,
    with_leaves,
)
from parvts_fx.errors import REMEDY, Refusal

_FUNCTIONS: tuple[Callable[[int], float], ...] = (
    float, lambda length: 1 / length, lambda length: length ** 0.5, lambda length: length ** -0.5, math.log, math.log2,
)
"""What a graph with static sizes may hold in place of the prompt's length as a fraction."""

_NEAR = 3


def check_numbers(
    runs: SmallRuns, nodes: Iterable[Node], kind: type = int,
    constant: Callable[[Node, Any], bool] = lambda node, leaf: False, scales: Callable[[Node], bool] = lambda node: False,
) -> None:
    """Refuse numbers in a static graph that equal the prompt's length, or one over it, and enter values; and positions in an
    index that may be counted from the prompt's end, which Dynamo writes as plain numbers in any graph.

    Args:
        kind: int or float, of the numbers to look at.
        constant: whether one is known to be none that follows the prompt.
        scales: whether a node scales attention's scores, by the head's size as a rule, which may equal the prompt's length.

    Raises:
        Refusal: names the number.
    """
    static = not symbols(runs.tokens.size)
    for node in nodes:
        if changed_in_place(node) is None and not is_tensor(node) or not any(
                source in runs.tokens.probed for source in node.all_input_nodes):
            continue
        bindings = runs.tokens.bindings.get(node, {})
        for index, leaf in enumerate(leaves(node)):
            if index in bindings or isinstance(leaf, bool) or _picks_no_token(runs, node, leaf):
                continue
            if kind is int and _is_computed(runs, leaf) and _is_a_value(runs, node, index):
                raise Refusal("a number that is computed from the prompt's length enters values", node)
            if not isinstance(leaf, kind):
                continue
            counts = static and _length_of(runs, leaf) is not None and not (
                scales(node) and _is_explained(runs, node, leaf) or constant(node, leaf))
            if counts and _is_a_value(runs, node, index):
                raise Refusal(
                    f"the number {leaf} may be the prompt's length or a constant ({REMEDY})", node, names_tell=True)
            near_end = is_index(node) and isinstance(leaf, int) and any(
                2 < length - 3 <= leaf < length for length in _lengths(runs))
            if near_end and _is_a_value(runs, node, index):
                raise Refusal(f"the position {leaf} may be counted from the prompt's end or from its beginning (a negative "
                              "index tells)", node)


def _picks_no_token(runs: SmallRuns, node: Node, leaf: object) -> bool:
    """Whether a number stands in an index for an axis that does not run along the prompt (ids of a vocabulary, say)."""
    if not is_indexing(node) or not is_tensor(node.args[0]):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    axes, rank = runs.tokens.axes.get(node.args[0], {}), value(node.args[0]).dim()
    places = [place for place, part in enumerate(index) if _holds(part, leaf)]
    if not places or node.target is operator.setitem and _holds(node.args[2], leaf):
        return False
    return not any(_axis_of_index(index, place, rank) in axes for place in places)


def _axis_of_index(index: tuple, place: int, rank: int) -> int:
    """Which axis an entry of an index is for."""
    behind = any(part is Ellipsis for part in index[:place])
    entries = index[place + 1:] if behind else index[:place]
    taken = sum(part is not None for part in entries)
    return rank - 1 - taken if behind else taken


def _holds(part: object, leaf: object) -> bool:
    found: list[object] = []
    map_aggregate((part,), found.append)
    return any(one is leaf for one in found)


def _is_computed(runs: SmallRuns, leaf: object) -> bool:
    """Whether an integer is another one than the prompt's length, computed from it outside of the decoder."""
    held = value(leaf) if isinstance(leaf, Node) and leaf not in runs.tokens.probed else None
    return isinstance(held, torch.SymInt) and bool(symbols(held) & symbols(runs.tokens.size))


def _lengths(runs: SmallRuns) -> list[int]:
    """The prompt's length, and those of what has cached rows in front of it."""
    return [runs.length, *(runs.length + cached for cached in sorted(runs.tokens.cached))]


def _length_of(runs: SmallRuns, leaf: object) -> int | None:
    """The length that a number may mean; None for any other number."""
    return next((length for length in _lengths(runs) if may_count(leaf, length)), None)


def may_count(leaf: object, length: int) -> bool:
    """Whether a number in a graph with static sizes may follow the prompt's length."""
    if isinstance(leaf, bool) or not isinstance(leaf, (int, float)) or length < 3:
        return False
    if isinstance(leaf, float):
        return any(leaf == function(length) for function in _FUNCTIONS)
    return leaf != 0 and leaf % length == 0


def scales_scores(node: Node, attentions: Iterable[Attention], tokens: TokenMap) -> bool:
    """Whether what a node computes goes into attention calls as queries or keys, and nowhere else but to the caches.

    It stands behind their projections: what is in front of a matrix, or is a value, is scaled for another reason.
    """
    own = {call: attention for attention in attentions for call in attention.nodes}
    seen, stack = {node}, [node]
    while stack:
        found = stack.pop()
        if found in own:
            continue
        for user in found.users:
            if user in own and is_value_operand(found, user, own[user]):
                return False
            if user not in own and any(True for _ in matrices_of(user, tokens)):
                return False
            if user.op != "output" and user not in seen:
                seen.add(user)
                stack.append(user)
    return any(reached in own for reached in seen)


def _is_explained(runs: SmallRuns, node: Node, leaf: object) -> bool:
    """Whether a fraction belongs to another size that happens to equal the prompt's length: a scale by the head's size."""
    if not isinstance(leaf, float) or leaf == runs.length:
        return False
    near, known = {node}, set()
    for _ in range(_NEAR):
        known |= near
        near = {source for found in near for source in found.all_input_nodes if is_tensor(source)} - known
        for source in near:
            axes = runs.tokens.axes.get(source, {})
            if any(size == runs.length and axis not in axes for axis, size in enumerate(hint_shape(value(source)))):
                return True
    return False


def _is_a_value(runs: SmallRuns, node: Node, place: int) -> bool:
    """Whether another number there leaves the result's sizes as they are, and changes what it holds."""
    try:
        leaf = leaves(node)[place]
        other = 2 if isinstance(leaf, Node) or _length_of(runs, leaf) is not None else -1
        results = [_run_with(runs, node, place, more) for more in (0, other)]
    except Exception:  # no other number does: it is a size
        return False
    one, changed = results
    return one.shape == changed.shape and not torch.equal(one.nan_to_num(), changed.nan_to_num())


def _run_with(runs: SmallRuns, node: Node, place: int, more: int) -> torch.Tensor:
    """The node's result on noise of the graph's own sizes, with a number that fits a prompt of so many tokens more."""
    given = []
    for index, leaf in enumerate(leaves(node)):
        if is_tensor(leaf):
            leaf = torch.rand(hint_shape(value(leaf)), generator=torch.Generator().manual_seed(index)) if (
                value(leaf).is_floating_point()) else torch.zeros(hint_shape(value(leaf)), dtype=value(leaf).dtype)
        elif isinstance(leaf, Node):
            leaf = runs.scalar(leaf, runs.length + (more if index == place else 0))
        elif index == place:
            leaf = for_more(leaf, _length_of(runs, leaf) or runs.length, more)
        given.append(local_argument(leaf, None))
    args, kwargs = with_leaves(node, given)
    with really():
        made = call(runs.module, node.op, node.target, args, kwargs)
    made = args[0] if made is None else made
    if not isinstance(made, torch.Tensor):
        raise Unproven("no tensor")
    return made


def for_more(number: int | float, length: int, more: int) -> int | float:
    """The same number for a prompt that is longer."""
    if isinstance(number, float):
        return next(function(length + more) for function in _FUNCTIONS if function(length) == number)
    return number + more if number % length else number // length * (length + more)
