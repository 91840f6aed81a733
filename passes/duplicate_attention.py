"""Give each path its own attention call in the migration layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.fx import Node

from parvts_fx.analysis.attention import KEY, QUERY
from parvts_fx.analysis.calls import fused_arguments
from parvts_fx.analysis.records import Attention, Operand
from parvts_fx.analysis.tokens import AtMost, AxisLabels, Count
from parvts_fx.analysis.values import leaves, value, with_leaves
from parvts_fx.passes.base import PassResult, State
from parvts_fx.passes.editing import Rows, Samples


@dataclasses.dataclass(frozen=True)
class DuplicateAttention:
    """In every migration layer, replace the attention call by one per group of queries.

    ``attend(Q, K, V)``  ==>  ``attend(Q[A], K[A], V[A])``, ``attend(Q[B], K[B], V[B])`` and ``attend(Q[T], K, V)``,
    each visual position taking its row from its own path, each text position from the third.

    The same as attending over both paths and merging by softmax mass, keys of the text counted once. Everything else
    in the layer runs once, over all rows in prompt order. Refuses when an operand's samples cannot be told apart.
    """

    name: ClassVar[str] = "duplicate_attention"
    leave_last: bool = False
    """Leave the last call to :class:`SkipDeadRows`, which needs no output for the non-subject rows."""

    def run(self, state: State) -> PassResult:
        attentions = state.migration_attentions[:-1] if self.leave_last else state.migration_attentions
        for attention in attentions:
            duplicate(state, attention)
        return PassResult(len(attentions))


def duplicate(state: State, attention: Attention) -> None:
    """Replace one attention call by three, and let all that read its output read theirs."""
    parts, axis = state.partition, attention.output_axis
    with state.editor.graph.inserting_before(attention.output.next):
        outputs = [
            attend(state, attention, queries, keys) for queries, keys in (
                (parts.subject, parts.subject), (parts.non_subject, parts.non_subject), (parts.text, parts.everything))
        ]
        joined = state.editor.call(torch.cat, outputs, dim=axis)
        slots = Rows("slots", parts.slots, parts.everything.count)
        result = state.editor.gather(joined, axis, slots, state.samples_of(attention.output))
    state.alike(result, attention.output)
    attention.output.replace_all_uses_with(result)


def attend(
    state: State, attention: Attention, queries: Rows, keys: Rows, ready: Mapping[Node, Node] | None = None
) -> Node:
    """Write an attention call again for some queries and some keys; returns its output.

    Args:
        ready: for operands that need not be gathered, what holds their chosen rows.
    """
    ready = ready or {}
    if len(attention.nodes) == 1:
        return _attend_fused(state, attention, queries, keys, ready)
    editor = state.editor
    new: dict[Node, Any] = {}
    for operands, rows in ((attention.queries, queries), (attention.keys, keys)):
        for operand in operands:
            new[operand.node] = _rows_of(state, operand, rows, ready, attention.nodes[0])
    choice = {QUERY: queries, KEY: keys}
    for node in attention.nodes:
        bindings = attention.bindings[node]
        fresh = []
        for index, leaf in enumerate(leaves(node)):
            binding = bindings.get(index)
            if isinstance(leaf, Node) and leaf in new:
                leaf = new[leaf]
            elif isinstance(binding, Count):
                leaf = editor.counted(choice[binding.label].count, binding)
            elif isinstance(binding, AtMost):
                leaf = editor.least(leaf, choice[binding.label].count)
            elif isinstance(binding, AxisLabels):
                leaf = _side_rows(state, leaf, binding, choice, state.samples_of_side(leaf, node, index, node), node)
            fresh.append(leaf)
        new[node] = state.alike(editor.copy(node, *with_leaves(node, fresh)), node)
    return new[attention.output]


def _attend_fused(
    state: State, attention: Attention, queries: Rows, keys: Rows, ready: Mapping[Node, Node]
) -> Node:
    (node,) = attention.nodes
    named = fused_arguments(node)
    (query,), (key, val) = attention.queries, attention.keys
    if named["is_causal"] and queries is not keys:
        mask = state.editor.causal_mask(
            queries, keys, state.decoder.merge.output, value(query.node).dim(), state.samples_of(query.node))
        named.update(is_causal=False, attn_mask=mask)
    elif named["attn_mask"] is not None:
        ((index, binding),) = attention.bindings[node].items()
        samples = state.samples_of_side(named["attn_mask"], node, index, query.node)
        named["attn_mask"] = _side_rows(
            state, named["attn_mask"], binding, {QUERY: queries, KEY: keys}, samples, node)
    for name, operand, rows in (("query", query, queries), ("key", key, keys), ("value", val, keys)):
        named[name] = _rows_of(state, operand, rows, ready, attention.nodes[0])
    operands = [named.pop(name) for name in ("query", "key", "value")]
    return state.alike(state.editor.call(F.scaled_dot_product_attention, *operands, **named), attention.output)


def _rows_of(state: State, operand: Operand, rows: Rows, ready: Mapping[Node, Node], reader: Node) -> Node:
    if operand.node in ready:
        return ready[operand.node]
    gathered = state.editor.gather(operand.node, operand.axis, rows, state.samples_of(operand.node), reader)
    return state.alike(gathered, operand.node)


def _side_rows(
    state: State, side: Node, binding: AxisLabels, choice: dict[str, Rows], samples: Samples | None, reader: Node
) -> Node:
    rank = value(side).dim()
    for axis, label in binding.axes:
        new_in_front = value(side).dim() - rank  # of axes, one of which holds the samples
        held = dataclasses.replace(samples, axis=0) if new_in_front else samples
        side = state.editor.gather(side, axis + new_in_front, choice[label], held, reader)
    return side
