"""Results that have no row for every token: the prompt's last rows, or a state that sums the prompt up."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.fx import Node

from parvts_fx.analysis.calls import fused_arguments, is_fused_attention
from parvts_fx.analysis.records import Decoder
from parvts_fx.analysis.tokens import TokenMap
from parvts_fx.analysis.values import changed_in_place, hint, is_index, is_tensor, storage_of, value


def reads_tokens(node: Node, tokens: TokenMap) -> bool:
    """Whether any tensor that the node reads has a token axis."""
    return any(is_tensor(source) and tokens.axes.get(source) for source in node.all_input_nodes)


def nodes_without_tokens(nodes: Collection[Node], result: Node, tokens: TokenMap) -> list[Node]:
    """The decoder's tensors without a token axis that lead to a result without one, in graph order: itself and what is
    written into it included.

    Empty for a result that has a token axis.
    """
    inside = set(nodes)
    writes: dict[int, list[Node]] = {}
    for node in nodes:
        target = changed_in_place(node)
        if target is not None:
            writes.setdefault(storage_of(target), []).append(node)
    found: set[Node] = set()
    stack = [result]
    while stack:
        node = stack.pop()
        if node in inside and node not in found and not tokens.axes.get(node):
            found.add(node)
            stack.extend(node.all_input_nodes)
            if is_tensor(node):
                stack.extend(writes.get(storage_of(node), ()))
    return [node for node in nodes if node in found]


def last_rows_of(decoder: Decoder, result: Node) -> list[Node]:
    """Those nodes for a result that holds the prompt's last rows; empty for any other, such as the state of a scan."""
    if is_state(result, decoder.nodes, decoder.tokens):
        return []
    return nodes_without_tokens(decoder.nodes, result, decoder.tokens)


def is_state(result: Node, nodes: Collection[Node], tokens: TokenMap) -> bool:
    """Whether a result sums up the prompt, with no row of its own for any token."""
    return any(
        reads_tokens(source, tokens) and not keeps_rows_apart(source, tokens)
        for source in nodes_without_tokens(nodes, result, tokens)
    )


def keeps_rows_apart(node: Node, tokens: TokenMap) -> bool:
    """Whether what the node makes of the tokens is right for any subset of them that holds the last ones.

    It takes the last rows, or a last row asks all others by attention.
    """
    if takes_last_rows(node, tokens):
        return True
    if not is_fused_attention(node):
        return False
    query = fused_arguments(node)["query"]
    return query in tokens.probed and not tokens.axes.get(query)


def takes_last_rows(node: Node, tokens: TokenMap) -> bool:
    """``x[..., -n:, ...]`` or ``x[..., -1, ...]`` along the token axis: those rows are the last of any subset too, whatever
    cached ones stand in front of it."""
    if not is_index(node) or not is_tensor(node.args[0]):
        return False
    axis = tokens.axis_of_rows(node.args[0])
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if axis is None or any(part is None or part is Ellipsis for part in index) or axis >= len(index):
        return False

    def number(part: Any) -> Any:
        if is_tensor(part):
            return None
        return hint(value(part)) if isinstance(part, Node) else part

    part = index[axis]
    if isinstance(part, slice):
        start = number(part.start)
        return isinstance(start, int) and start < 0 and part.stop is None and part.step in (None, 1)
    return isinstance(number(part), int) and number(part) < 0
