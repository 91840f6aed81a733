"""One copy of the decoder, or of some of its layers, on rows of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from parvts_fx.analysis.samples import Samples, samples_of, samples_of_side
from parvts_fx.analysis.tokens import AtMost, AxisLabels, Count, Filling
from parvts_fx.analysis.values import (
    changed_in_place,
    hint,
    is_symbolic_int,
    is_tensor,
    leaves,
    storage_of,
    symbols,
    value,
    with_leaves,
)
from parvts_fx.errors import Refusal
from parvts_fx.passes.rows import LAST, live
from parvts_fx.passes.token_counts import counted

if TYPE_CHECKING:
    from parvts_fx.passes.emit import Emitter


class Path:
    """Writes nodes of the decoder on the rows that a plan gives them, and finds what they read.

    Tensors from outside the decoder are cut along their token axes; integers that count tokens become the number of rows;
    what the path holds on more rows than a reader needs is cut for it; everything else stays.

    Args:
        nodes: of which nodes this path has its own copies.
        rows: the name of the rows on which a node runs.
        rows_left: the name of those that are left there, all of which attention sees.
        outer: the path that holds all others.
    """

    def __init__(
        self, emitter: Emitter, nodes: Collection[Node], rows: Callable[[Node], str], rows_left: Callable[[Node], str],
        outer: Path | None = None,
    ):
        self.emitter, self.nodes, self.rows, self.rows_left, self.outer = emitter, nodes, rows, rows_left, outer
        self.held: dict[Node, dict[str, Node]] = {}
        """By node of the decoder: what holds it, by the name of its rows."""

        self.numbers: dict[tuple[Node, str], Any] = {}

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, node: Node, name: str) -> Any:
        """A node of the decoder, on some rows.

        Raises:
            Refusal: it does not have these rows, or they cannot be told apart in it.
        """
        if node not in self.nodes and self.outer is not None:
            return self.outer.read(node, name)
        if is_symbolic_int(node):
            return self.resized(node, name)
        held = self.held.setdefault(node, {})
        if name in held:
            return held[name]
        axes = self.emitter.decoder.tokens.axes.get(node) or {}
        if node in self.emitter.fresh and (axes or not held):  # one for each kind of rows, if it has rows
            held[name] = self._copy(node, name)
            return held[name]
        if not is_tensor(node):
            raise Refusal("a value that is no tensor crosses the point of pruning", node)
        if not held:
            raise Refusal("an operation needs what has not been computed yet", node)
        if not axes:
            return next(iter(held.values()))
        return self._cut(node, name, axes)

    def _cut(self, node: Node, name: str, axes: dict) -> Node:
        sets, held = self.emitter.sets, self.held[node]
        other = sets.narrowest(name, held)
        if other is None:
            raise Refusal(f"the rows \"{name}\" are needed where only \"{', '.join(held)}\" are left", node)
        taken = held[other]
        for axis, kind in axes.items():
            if not kind.is_plain:
                raise Refusal(f"a tensor that crosses the point of pruning counts its tokens as {kind}", node)
            taken = sets.take(taken, axis, name, other, samples_of(self.emitter.decoder, node))
        return taken

    def resized(self, number: Node, name: str) -> Any:
        """A number that may depend on the prompt's length, for so many rows in its place."""
        emitter = self.emitter
        if number in emitter.outside:
            given = emitter.outside[number]
            size = emitter.decoder.tokens.size
            if name == live(0) or not isinstance(value(number), (torch.SymInt, torch.SymFloat)) or not (
                    symbols(size) & symbols(value(number))):
                return given
        return emitter.resize(number, name, self)

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, node: Node) -> None:
        """The node's copy on the rows that the plan gives it."""
        if is_symbolic_int(node) or node in self.emitter.fresh:
            return  # made where it is read, for as many rows
        name = self.rows(node)
        self.held[node] = {name: self._copy(node, name)}
        target = changed_in_place(node)
        if target is not None:
            self._forget_copies(target)

    def _forget_copies(self, target: Node) -> None:
        shared = storage_of(target)
        self.emitter.sets.forget(
            copy for node, held in self.held.items() if is_tensor(node) and storage_of(node) == shared
            for copy in held.values())

    def _copy(self, node: Node, name: str) -> Node:
        emitter = self.emitter
        if name == live(0) and self.outer is None and node is not emitter.plan.take:  # nothing about it changes
            def same(leaf: Node) -> Any:
                return self.read(leaf, name) if leaf in emitter.inside else emitter.outside[leaf]

            return emitter.copy_as_it_is(node, *map_aggregate(
                (node.args, node.kwargs), lambda leaf: same(leaf) if isinstance(leaf, Node) else leaf))
        name = LAST if node is emitter.plan.take else name
        like = next((s for s in node.all_input_nodes if emitter.decoder.tokens.axes.get(s)), None)
        fresh = [self._leaf(node, index, leaf, name, like) for index, leaf in enumerate(leaves(node))]
        if any(node in merging.asking for merging in emitter.plan.mergings.values()):
            return emitter.editor.copy(node, *counted(emitter, node, node, fresh, None, self.rows_left(node)))
        return emitter.editor.copy(node, *with_leaves(node, fresh))

    def _leaf(self, node: Node, index: int, leaf: Any, name: str, like: Node | None) -> Any:
        """What a copy of a node reads in place of one of its leaves."""
        emitter = self.emitter
        editor, rows = emitter.editor, emitter.sets[name]
        binding = emitter.decoder.tokens.bindings.get(node, {}).get(index)
        if isinstance(leaf, Node) and leaf in emitter.inside:
            return self.read(leaf, name)
        if isinstance(binding, Count):
            return self.recounted(leaf, binding, name)
        if isinstance(binding, AtMost):
            return editor.least(emitter.mapped(leaf), rows.count)
        if isinstance(binding, Filling):
            return editor.plus(emitter.mapped(leaf), editor.plus(emitter.sets[live(0)].count, rows.count, -1))
        if isinstance(binding, AxisLabels):
            samples = samples_of_side(emitter.decoder, leaf, node, index, like)
            return self.cut_side(leaf, [(axis, name) for axis, _ in binding.axes], samples, self.rows_left(node))
        if isinstance(leaf, Node) and isinstance(value(leaf), torch.SymFloat):
            return self.resized(leaf, name)
        return emitter.mapped(leaf)

    def cut_side(self, side: Node, axes: list[tuple[int, str]], samples: Samples | None, left: str) -> Node:
        """A tensor from outside the decoder, with the given rows along its axes.

        Args:
            left: the rows that are left where it is read.
        """
        sets, size = self.emitter.sets, hint(self.emitter.decoder.tokens.size)
        numbered = side in self.emitter.decoder.numbered
        rank, taken = value(side).dim(), self.emitter.outside[side]
        if numbered:
            taken = sets.first_rows(taken, [axis for axis, _ in axes], left)
        for axis, name in axes:
            new_in_front = value(taken).dim() - rank  # of axes, one of which holds the samples
            held = dataclasses.replace(samples, axis=0) if samples is not None and new_in_front else samples
            if hint(value(side).shape[axis]) == size:
                taken = sets.take(taken, axis + new_in_front, name, left if numbered else live(0), held)
            else:
                taken = sets.take_behind_cached(taken, axis + new_in_front, name, held)
        return taken

    def recounted(self, leaf: Any, binding: Count, name: str) -> Any:
        """An integer leaf that counts tokens, for so many rows in their place."""
        editor, sets = self.emitter.editor, self.emitter.sets
        if binding.offset <= 0 or not isinstance(leaf, Node):
            return editor.counted(sets[name].count, binding)
        return editor.plus(self.emitter.mapped(leaf), editor.plus(sets[live(0)].count, sets[name].count, -1), -1)

    def keys(self, node: Node, axis: int, name: str) -> Node:
        """An attention call's keys or values, on all rows that it is to see."""
        return self.read(node, name)


class CachePath(Path):
    """What stands between a layer's keys and values and a cache, on the rows that are left in the end."""

    def read(self, node: Node, name: str) -> Any:
        return super().read(node, name) if node in self.nodes else self.emitter.cached(node)
