"""Run part of the decoder on a choice of rows: the one primitive behind pruning and path duplication."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node

from parvts_fx.analysis.tokens import AtMost, AxisLabels, Count, Filling
from parvts_fx.analysis.values import (
    changed_in_place, descendants, is_symbolic_int, is_tensor, leaves, symbols, value, with_leaves,
)
from parvts_fx.errors import Refusal
from parvts_fx.passes.base import State
from parvts_fx.passes.editing import Rows


def restrict(
    state: State,
    region: Iterable[Node],
    start: Mapping[Node, Node],
    rows: Rows,
    replaced: Callable[[Node, Node], Node] | None = None,
) -> dict[Node, Node]:
    """Write a region of the decoder again, on some rows of the prompt.

    Tensors that come from outside the region are gathered along their token axes; integers that count tokens become
    the number of rows; everything else stays.

    Args:
        region: nodes of the decoder in graph order, closed under "depends on ``start``" as far as it goes.
        start: for nodes in front of the region, what holds their chosen rows.
        rows: the rows.
        replaced: called with (original node, its copy) right after each copy; returns what later copies read.

    Returns:
        the copy of each node.
    """
    editor, tokens = state.editor, state.decoder.tokens
    inside = set(state.decoder.nodes)
    new: dict[Node, Node] = dict(start)
    for node in with_their_tuples(state, region, new):
        if node in new:
            continue
        written = changed_in_place(node)
        if written is not None and (written not in new or written in start):
            raise Refusal("a tensor in front of the rows' restriction is changed in place behind it", node)
        bindings = tokens.bindings.get(node, {})
        with editor.graph.inserting_before(node):
            like = next((s for s in node.all_input_nodes if s in tokens.axes and tokens.axes[s]), None)
            fresh: list[Any] = []
            for index, leaf in enumerate(leaves(node)):
                binding = bindings.get(index)
                if isinstance(leaf, Node) and leaf in new:
                    leaf = new[leaf]
                elif isinstance(binding, Count):
                    leaf = editor.counted(rows.count, binding)
                elif isinstance(binding, AtMost):
                    leaf = editor.least(leaf, rows.count)
                elif isinstance(binding, Filling):
                    leaf = editor.plus(leaf, editor.plus(editor.size(state.decoder.merge.output, 1), rows.count, -1))
                elif isinstance(binding, AxisLabels):
                    rank = value(leaf).dim()
                    samples = state.samples_of_side(leaf, node, index, like)
                    for axis, _ in binding.axes:
                        new_in_front = value(leaf).dim() - rank  # of axes, one of which holds the samples
                        held = dataclasses.replace(samples, axis=0) if new_in_front else samples
                        leaf = editor.gather(leaf, axis + new_in_front, rows, held, node)
                elif isinstance(leaf, Node) and isinstance(value(leaf), torch.SymFloat) and leaf not in inside:
                    leaf = editor.rescaled(leaf, tokens.size, rows.count)
                elif isinstance(leaf, Node) and (leaf in tokens.axes or leaf in inside):
                    leaf = gather_rows(state, leaf, rows, node)
                fresh.append(leaf)
            copy = state.alike(editor.copy(node, *with_leaves(node, fresh)), node)
            new[node] = copy if replaced is None else replaced(node, copy)
    return new


def with_their_tuples(state: State, region: Iterable[Node], start: Mapping[Node, Node]) -> list[Node]:
    """The region in graph order, and what it needs of the nodes in front: fresh tensors, and tuples (only tensors can be gathered)."""
    inside = set(state.decoder.nodes)
    fresh = inside - set(descendants(state.module.graph, [state.decoder.merge.output]))
    found: set[Node] = set()
    stack = list(region)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(
                source for source in node.all_input_nodes
                if source in fresh or source in inside and source not in start and isinstance(value(source), (tuple, list)))
    return [node for node in state.decoder.nodes if node in found]


def gather_rows(state: State, node: Node, rows: Rows, reader: Node | None = None) -> Node:
    """The chosen rows of one of the decoder's own tensors, along each of its token axes."""
    axes = state.decoder.tokens.axes.get(node, {})
    if not is_tensor(node):
        if is_symbolic_int(node) and not symbols(value(node)) & symbols(state.decoder.tokens.size):
            return node
        raise Refusal("a value that is no tensor crosses the point of pruning", reader or node)
    for axis, kind in axes.items():
        if not kind.is_plain:
            raise Refusal(f"a tensor that crosses the point of pruning counts its tokens as {kind}", node)
        node = state.alike(state.editor.gather(node, axis, rows, state.samples_of(node), reader), node)
    return node
