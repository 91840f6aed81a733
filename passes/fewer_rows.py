"""The last attention call that a result needs, asked for fewer rows than it has keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch.fx import Node

from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.values import ancestors, changed_in_place, is_tensor, needed_for
from parvts_fx.passes.base import State
from parvts_fx.passes.editing import Rows
from parvts_fx.passes.restrict import restrict, with_their_tuples


def find_tail(
    state: State, last: Attention, region: Sequence[Node], copies: Mapping[Node, Node] | None = None,
    others: Sequence[Node] = (),
) -> list[Node] | None:
    """What stands in a region of the decoder for an attention call's queries and its output, and for no key or value.

    Args:
        last: the last call in the region.
        region: what a result needs, in graph order.
        copies: the region's nodes on the rows of a path; None where they are still to be written.
        others: results that need all rows.

    Returns:
        the nodes, tuples that rows are read from included; None where they cannot be told apart, or where tokens meet
        among them.
    """
    read_in_full = needed_for(state.module.graph, [*others, *(operand.node for operand in last.keys)])
    if last.output in read_in_full or last.output not in region:
        return None
    tail = [node for node in region if node not in read_in_full and node not in last.nodes]
    meeting = {mixer.output for layer in state.decoder.layers for mixer in layer.mixers if mixer.attention is not last}
    if any(node in meeting or changed_in_place(node) for node in tail):
        return None
    if copies is not None and any(node not in copies for node in tail):
        return None
    tail = with_their_tuples(state, tail, {})
    axis = state.decoder.tokens.plain_axis
    inside = set(region) if copies is None else copies
    read = _read(tail, last)
    return tail if all(node not in inside or is_tensor(node) and axis(node) is not None for node in read) else None


def _read(tail: Sequence[Node], last: Attention) -> list[Node]:
    inside = {*tail, *last.nodes}
    return list(dict.fromkeys(source for node in tail for source in node.all_input_nodes if source not in inside))


def write_tail(
    state: State, last: Attention, tail: Sequence[Node], copies: Mapping[Node, Node], rows: Rows,
    take: Callable[[Node, int], Node], ask: Callable[[Mapping[Node, Node]], Node],
) -> dict[Node, Node]:
    """The tail again, on some rows of a path.

    Args:
        copies: what stands in front of the tail, on the path's rows; what is missing there has all rows of the prompt.
        rows: the rows that are asked for, as positions of the prompt.
        take: of a tensor on the path's rows and its token axis, the rows that are asked for.
        ask: writes the attention call; given its operands as far as they need not be gathered.

    Returns:
        what each node of the tail, and the call's output, became.
    """
    start: dict[Node, Node] = {}
    for source in _read(tail, last):
        if source in copies:
            with state.editor.graph.inserting_before(copies[source].next):
                start[source] = take(copies[source], state.decoder.tokens.plain_axis(source))
    in_front = ancestors(operand.node for operand in last.queries)
    front = [node for node in tail if node in in_front]
    queries = restrict(state, front, start, rows)
    ready = {operand.node: copies[operand.node] for operand in last.keys if operand.node in copies}
    ready |= {operand.node: queries[operand.node] for operand in last.queries}
    with state.editor.graph.inserting_before(last.output.next):
        result = ask(ready)
    behind = [node for node in tail if node not in in_front]
    return restrict(state, behind, {**queries, last.output: result}, rows)
