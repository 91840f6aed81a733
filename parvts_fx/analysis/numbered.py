"""Tables that number the rows that an attention call is given: the distances by which it chooses a learned bias, say.

A table with an entry for every pair of rows that a layer makes for itself, out of their number alone, is made by decode steps out
of the number of cached rows. So it counts the rows that are there and not the prompt's positions, and does so in the prefill too:
for n rows it is the table's first n, whichever these are. The same goes for all else that a layer makes of the same numbers. What
is made for several layers is given to them, as masks are: it belongs to the prompt's positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch.fx import Node

from parvts_fx.analysis.attention import KEY, QUERY
from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.tables import Tables
from parvts_fx.analysis.tokens import AxisLabels
from parvts_fx.analysis.values import ancestors, is_tensor, leaves, value
from parvts_fx.errors import Refusal


def find_numbered(
    tables: Tables, nodes: Sequence[Node], attentions: Iterable[Attention], stops: Collection[Node]
) -> frozenset[Node]:
    """The tensors from outside the decoder that number the rows which attention calls are given.

    Args:
        nodes: the decoder's nodes, in graph order.
        stops: links of the residual stream.

    Raises:
        Refusal: a call chooses by distances that are made otherwise.
    """
    found = set[Node]()
    for attention in attentions:
        distances = [side for node in attention.nodes for side, binding in _sides(node, attention.bindings.get(node, {}))
                     if {label for _, label in binding.axes} == {QUERY, KEY}
                     and value(side).dtype in (torch.int32, torch.int64)]
        if not distances:
            continue
        numbers = {node for node in ancestors(distances) if is_tensor(node)}
        for node in nodes:
            for side, binding in _sides(node, tables.runs.tokens.bindings.get(node, {})):
                if numbers.isdisjoint(ancestors([side])):
                    continue
                axes = tuple(axis for axis, _ in binding.axes)
                own = node in attention.nodes or tables.ends_in(node, attention.nodes, stops)
                if not own or not tables.is_first_of_longer(side, axes) or _differs_by_sample(tables, node, side):
                    raise Refusal("the attention's bias is chosen by distances that its layer does not count by itself, in the "
                                  "rows that it is given: decode steps would count them in the pruned cache", node)
                found.add(side)
    return frozenset(found)


def _differs_by_sample(tables: Tables, node: Node, side: Node) -> bool:
    if tables.runs.samples is None:
        return False
    table = tables.runs.constant(side)
    axes = [axis for given, binding in _sides(node, tables.runs.samples.bindings.get(node, {})) if given is side
            for axis, _ in binding.axes]
    return table is None or any(not torch.equal(table, table.narrow(axis, 0, 1).expand_as(table)) for axis in axes)


def _sides(node: Node, bindings: Mapping[int, object]) -> Iterator[tuple[Node, AxisLabels]]:
    """The tensors from outside the decoder that a node reads along tokens."""
    given = leaves(node)
    return ((given[index], binding) for index, binding in bindings.items()
            if isinstance(binding, AxisLabels) and is_tensor(given[index]))
