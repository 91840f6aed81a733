"""Runs operations on all rows and on choices of them, and compares."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from parvts_fx.analysis.extents import SAMPLES, TOKENS, Extent, Scale
from parvts_fx.analysis.small_runs import NOISES, SmallRuns, Unproven, is_large, is_part_of_tuple, local_argument, shrunk
from parvts_fx.analysis.values import call, changed_in_place, is_tensor, leaves, value, with_leaves

_SAMPLES = 3
_CHOICES = {TOKENS: ((1, 2, 4), (0, 3, 5, 7, 11), (2, 3, 6, 9, -2, -1)), SAMPLES: ((0,), (2,), (0, 2))}
"""Rows that runs are given, in order; negative ones count from the end."""

Layout = dict[int, int]
"""By axis, how many entries of one token (or sample) follow one another, where an axis has several of each. Where an axis
holds samples and tokens, and all of the other kind lie within, the negative of how many there are for each of those."""


def outputs_of(node: Node) -> dict[int | None, Node]:
    """A node's results by place in its tuple, as far as they are read; None for a node that is a tensor itself."""
    if isinstance(value(node), (tuple, list)):
        return {user.args[1]: user for user in node.users if is_part_of_tuple(user) and isinstance(user.args[1], int)}
    written = changed_in_place(node)
    return {None: written if written is not None and not is_tensor(node) else node}


class Together:
    """Runs of some operations, on all rows and on choices of them, from the same operands.

    Args:
        layouts: how rows lie in what the operations read.
        members: operations that are run together with the one that is looked at; all others' results are noise.
        rows: how many tokens there are.
        smaller: whether large sizes that tokens do not change are made small.
        noise: a kind of numbers.
    """

    def __init__(
        self, runs: SmallRuns, label: str, layouts: Mapping[Node, Layout], members: Collection[Node], precision: str,
        rows: int, smaller: bool = False, noise: str = NOISES[0],
    ):
        self.runs, self.label, self.layouts, self.members, self.precision = runs, label, layouts, members, precision
        samples = 1 if self.runs.batch == 1 else _SAMPLES if self.label == SAMPLES else 2
        self.scale = Scale(rows, samples, precision)
        self.others = samples if self.label == TOKENS else rows
        self.smaller, self.noise = smaller, noise
        self.sizes: dict[int, int] = {}
        self.drawn: dict[Node, torch.Tensor] = {}
        self.results: dict[tuple[Node, tuple[int, ...] | None], Any] = {}

    def compare(self, node: Node) -> dict[int | None, Layout] | None:
        """The layouts of a node's results, if they commute with every choice; else None.

        Raises:
            Unproven: nothing follows from the runs.
        """
        if self.smaller:
            self._make_smaller(node)
        whole = self.result(node, None)
        outputs = outputs_of(node)
        layouts: dict[int | None, Layout] = {}
        for place, output in outputs.items():
            if not is_tensor(output):
                continue
            full = whole if place is None else whole[place]
            extents = self.runs.extents(output)
            if tuple(full.shape) != tuple(self._sized(extent, self.scale) for extent in extents):
                raise Unproven("sizes do not fit")
            if _is_mostly_undefined(full):
                raise Unproven("undefined numbers")
            some = {
                rows: (part if place is None else part[place])
                for rows in self.choices() for part in (self.result(node, rows),)
            }
            layout = self._layout(full, some, extents, self._operands_layout(node, extents))
            if layout is None:
                return None
            layouts[place] = layout
        return layouts

    def choices(self) -> list[tuple[int, ...]]:
        count = self.scale.of(self.label)
        placed = [sorted({row % count for row in rows if -count <= row < count}) for rows in _CHOICES[self.label]]
        return [tuple(rows) for rows in placed if rows and len(rows) < count]

    def _operands_layout(self, node: Node, extents: Sequence[Extent]) -> Layout:
        """How the entries lie in an operand with axes like the result's."""
        for source in node.all_input_nodes:
            if source in self.layouts and is_tensor(source) and self.runs.extents(source) == tuple(extents):
                return self.layouts[source]
        return {}

    def _layout(
        self, full: torch.Tensor, some: dict, extents: Sequence[Extent], likely: Layout
    ) -> Layout | None:
        """How the entries of each token lie in a result; None if the runs on choices have other numbers.

        Args:
            likely: what is tried first: where all numbers are alike, many would do.
        """
        followed = [axis for axis, extent in enumerate(extents) if _count(extent, self.label)]
        if any(extents[axis].rest for axis in followed):
            return None
        ways = [_divisors(full.shape[axis] // self.scale.of(self.label)) for axis in followed]
        layouts = [{axis: self._relative(extents[axis], count) for axis, count in zip(followed, inner)}
                   for inner in itertools.product(*ways)]
        usual = {axis: self._usual(extents[axis]) for axis in followed}  # where all numbers are alike, any would do
        for layout in sorted(layouts, key=lambda layout: (layout != likely, layout != usual)):
            if all(self._equal(self._choose(full, layout, rows), part) for rows, part in some.items()):
                return layout
        return None

    def _usual(self, extent: Extent) -> int:
        """Sample behind sample, and in each token behind token."""
        each = _count(extent, self.label)
        return -each if self.label == SAMPLES and extent.tokens and extent.samples else each

    def _relative(self, extent: Extent, inner: int) -> int:
        each, rest = divmod(inner, self.others)
        return -each if extent.tokens and extent.samples and not rest else inner

    def _equal(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.is_floating_point() and not one.is_complex():
            return torch.equal(one, other)
        if torch.equal(one, other):
            return True
        finite = one.isfinite()
        if not torch.equal(finite, other.isfinite()) or not torch.equal(one[~finite].nan_to_num(7), other[~finite].nan_to_num(7)):
            return False
        one, other = one[finite], other[finite]
        return not len(one) or bool((one - other).abs().max() <= self.scale.tolerance * one.abs().max())

    def _choose(self, full: torch.Tensor, layout: Layout, rows: tuple[int, ...]) -> torch.Tensor:
        for axis, inner in layout.items():
            count = self.scale.of(self.label)
            inner = inner if inner > 0 else -inner * self.others
            outer = full.shape[axis] // (count * inner)
            index = torch.arange(full.shape[axis]).view(outer, count, inner)[:, list(rows)].flatten()
            full = full.index_select(axis, index)
        return full

    # -- runs -----------------------------------------------------------------------------------------------------------

    def result(self, node: Node, rows: tuple[int, ...] | None) -> Any:
        """What a node comes to on all rows (None) or on some."""
        if (node, rows) not in self.results:
            scale = self.scale if rows is None else self.scale.with_count(self.label, len(rows))
            given = [self._operand(node, index, leaf, rows, scale) for index, leaf in enumerate(leaves(node))]
            args, kwargs = with_leaves(node, given)
            if changed_in_place(node) is not None:
                args = (args[0].clone(), *args[1:])
            made = call(self.runs.module, node.op, node.target, args, kwargs)
            if isinstance(made, torch.Tensor) and "empty" in str(getattr(node.target, "__name__", node.target)):
                made.zero_()  # memory that is yet to be written
            self.results[node, rows] = args[0] if made is None else made
        return self.results[node, rows]

    def _operand(self, node: Node, index: int, leaf: Any, rows: tuple[int, ...] | None, scale: Scale) -> Any:
        if isinstance(leaf, Node) and leaf in self.members:
            return self.result(leaf, rows)
        if is_tensor(leaf):
            return self._tensor(node, index, leaf, rows, scale)
        if isinstance(leaf, Node) and isinstance(value(leaf), (tuple, list)):
            raise Unproven("an operand is a tuple")
        if isinstance(leaf, (Node, int, torch.SymInt)) and not isinstance(leaf, bool):
            number = self.runs.number(node, index, leaf, scale)
            fixed = self.sizes and len(set(self.runs.numbers(node, index, leaf))) == 1
            return self.sizes.get(number, number) if fixed else number
        return local_argument(leaf, scale)

    def _tensor(self, node: Node, index: int, leaf: Node, rows: tuple[int, ...] | None, scale: Scale) -> torch.Tensor:
        own = leaf in self.runs.tokens.probed
        extents = self.runs.extents(leaf) if own else self.runs.side_extents(node, index, leaf)
        layout = self.layouts.get(leaf, {}) if own else {
            axis: 1 for axis, extent in enumerate(extents) if _count(extent, self.label)}
        if leaf not in self.drawn:
            self.drawn[leaf] = self._draw(leaf, extents, own)
        full = self.drawn[leaf]
        if rows is None:
            return full
        if any(_count(extent, self.label) and axis not in layout for axis, extent in enumerate(extents)):
            raise Unproven("the rows of an operand lie in no known order")
        return self._choose(full, layout, rows)

    def _draw(self, leaf: Node, extents: Sequence[Extent], own: bool) -> torch.Tensor:
        shape = tuple(self._sized(extent, self.scale) for extent in extents)
        if not own:
            constant = self.runs.constant(leaf)
            if constant is not None and not self.sizes:
                for axis, size in enumerate(shape):
                    constant = constant.narrow(axis, 0, min(size, constant.shape[axis]))
                if tuple(constant.shape) == shape:
                    return constant.to(self.scale.dtype(constant.dtype))
            real = self.runs.given(leaf)
            if real is not None:
                return real
        return self.runs.draw(value(leaf).dtype, shape, self.scale, len(self.drawn) + 1, self.noise)

    def _sized(self, extent: Extent, scale: Scale) -> int:
        size = extent.at(scale.tokens, scale.samples)
        return size if extent.tokens or extent.samples else self.sizes.get(size, size)

    def _make_smaller(self, node: Node) -> None:
        shapes, numbers = [], []
        for index, leaf in enumerate(leaves(node)):
            if is_tensor(leaf):
                own = leaf in self.runs.tokens.probed
                extents = self.runs.extents(leaf) if own else self.runs.side_extents(node, index, leaf)
                shapes.append(tuple(extent.at(self.scale.tokens, self.scale.samples) for extent in extents))
            elif isinstance(leaf, int):
                numbers.append(leaf)
        if not is_large(shapes):
            raise Unproven("small enough as it is")
        self.sizes = shrunk(shapes, numbers)


def _count(extent: Extent, label: str) -> int:
    return extent.tokens if label == TOKENS else extent.samples


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _is_mostly_undefined(numbers: torch.Tensor) -> bool:
    if not numbers.is_floating_point() or not bool(numbers.sum().isnan()):
        return False
    return 2 * int(numbers.isnan().sum()) > numbers.numel()
