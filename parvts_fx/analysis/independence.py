"""Proves which operations of a decoder work row by row, by running them on some of the rows and on all.

An operation is *row by row* if f(x[rows]) = f(x)[rows] for every choice of rows. That is shown on small real tensors for
several choices; no operation is known by name. Where one by itself does not commute with a choice (a sort by expert, say),
the operations behind it are run together with it, until one does: experts hand every token back its own row. What never
does is a place where tokens meet. The same for the samples of a batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from parvts_fx.analysis.small_runs import (
    SAMPLES, TOKENS, Extent, Scale, SmallRuns, Unproven, is_large, is_part_of_tuple, local_argument, really, shrunk,
)
from parvts_fx.analysis.values import call, changed_in_place, is_index, is_tensor, leaves, value, with_leaves

_TOGETHER = 96
"""Most operations that are run together."""

_ROWS, _FEW_ROWS, _MOST_ROWS, _SAMPLES = 19, 7, 131, 3
_CHOICES = {TOKENS: ((1, 2, 4), (0, 3, 5, 7, 11), (2, 3, 6, 9, -2, -1)), SAMPLES: ((0,), (2,), (0, 2))}
"""Rows that runs are given, in order; negative ones count from the end."""

Layout = dict[int, int]
"""By axis, how many entries of one token (or sample) follow one another, where an axis has several of each. Where an axis
holds samples and tokens, and all of the other kind lie within, the negative of how many there are for each of those."""


@dataclasses.dataclass
class Findings:
    """What the decoder's nodes do with the rows that they are given."""

    meeting: list[Node]
    """Where rows meet, in graph order."""

    layouts: dict[Node, Layout]


def find_meetings(
    runs: SmallRuns, label: str, nodes: Sequence[Node], known: Collection[Node] = (), memo: dict | None = None,
    harmless: Callable[[Node], bool] = lambda node: False,
) -> Findings:
    """Where the rows of ``label`` (tokens or samples) meet.

    Args:
        nodes: the decoder's nodes, in graph order.
        known: places where they meet that are understood (attention): what is computed there counts as new rows.
        memo: what other calls have proven.
        harmless: a place where they meet, but which is right for any choice that is made.
    """
    return _Search(runs, label, known, {} if memo is None else memo, harmless).run(nodes)


class _Search:
    def __init__(
        self, runs: SmallRuns, label: str, known: Collection[Node], memo: dict[Hashable, Any],
        harmless: Callable[[Node], bool],
    ):
        self.runs, self.label, self.known, self.memo, self.harmless = runs, label, set(known), memo, harmless
        self.layouts: dict[Node, Layout] = {}
        self.parts: dict[Node, dict[int, Layout]] = {}
        self.meeting: set[Node] = set()
        self.open: dict[Node, Node | None] = {}
        """Nodes whose rows are not their own, in order."""

        self.together: _Together | None = None

    def run(self, nodes: Sequence[Node]) -> Findings:
        place, places = 0, {node: place for place, node in enumerate(nodes)}
        with really():
            while place < len(nodes):
                if self._visit(nodes[place]):
                    starts = self._starts(nodes[place])
                    self.meeting |= starts
                    back = min(places[start] for start in starts)
                    self._forget(nodes[back:place + 1])
                    place = back
                else:
                    place += 1
        return Findings([node for node in nodes if node in self.meeting], self.layouts)

    def _forget(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            for held in (self.layouts, self.parts, self.open):
                held.pop(node, None)
        self.together = None

    def _starts(self, trigger: Node) -> set[Node]:
        """The open nodes with no open node in front, among those that a node depends on."""
        reached: set[Node] = set()
        stack = [trigger]
        while stack:
            node = stack.pop()
            for source in (node, *node.all_input_nodes):
                if source in self.open and source not in reached:
                    reached.add(source)
                    stack.append(source)
        return {node for node in reached if not any(source in self.open for source in node.all_input_nodes)}

    def _visit(self, node: Node) -> bool:
        """Look at one node; True where the rows of something that it reads must have been closed in front of it."""
        reads_open = any(source in self.open for source in node.all_input_nodes)
        if node in self.known or node in self.meeting or not reads_open and self.harmless(node):
            self._take_as_new(node)
            return reads_open
        example, written = value(node), changed_in_place(node)
        if not isinstance(example, (torch.Tensor, tuple, list)) and written is None:
            return False
        if not reads_open and is_part_of_tuple(node):
            self.layouts[node] = self.parts.get(node.args[0], {}).get(node.args[1], {})
            return False
        if self._closes(node) if reads_open else self._alone(node):
            return False
        if written is not None and reads_open:
            return True
        self.open[node] = None
        self.together = None if not reads_open else self.together
        # what leaves the graph must stand for itself, and so must what is written: others read it by another name
        leaves_graph = any(user.op == "output" for user in node.users)
        return leaves_graph or written is not None or len(self._region(node)) > _TOGETHER

    def _take_as_new(self, node: Node) -> None:
        """Rows that are taken as they are: in a plain axis, one for each token."""
        if is_tensor(node):
            try:
                self.layouts[node] = {
                    axis: 1 for axis, extent in enumerate(self.runs.extents(node)) if _plain(extent, self.label)}
            except Unproven:
                self.layouts[node] = {}

    # -- one operation by itself -------------------------------------------------------------------------------------

    def _alone(self, node: Node) -> bool:
        try:
            key = self._key(node)
        except (Unproven, TypeError):
            return False
        if key not in self.memo:
            self.memo[key] = self._prove(node)
        found = self.memo[key]
        if found is None:
            return False
        self._accept(node, found)
        return True

    def _accept(self, node: Node, found: dict[int | None, Layout]) -> None:
        if None in found:
            self.layouts[node] = found[None]
        else:
            self.parts[node] = found

    def _key(self, node: Node) -> Hashable:
        """Equal for operations on operands of equal sizes that follow the rows alike."""
        described = []
        for index, leaf in enumerate(leaves(node)):
            if is_tensor(leaf) and leaf in self.runs.tokens.probed:
                layout = tuple(self.layouts.get(leaf, {}).items())
                described.append((self.runs.extents(leaf), value(leaf).dtype, layout))
            elif is_tensor(leaf):
                described.append((self.runs.side_extents(node, index, leaf), value(leaf).dtype, self.runs.identity(leaf)))
            elif isinstance(leaf, Node) and isinstance(value(leaf), (tuple, list)):
                described.append(tuple)  # what is in it stands in the key of the node that made it
            elif isinstance(leaf, (Node, int, torch.SymInt)) and not isinstance(leaf, bool):
                described.append(self._numbers(node, index, leaf))
            else:
                hash(leaf)
                described.append((type(leaf), leaf))
        outputs = tuple(
            self.runs.extents(output) for output in _outputs(node).values() if is_tensor(output))
        return self.label, node.op, node.target, tuple(described), outputs, tuple(map(str, node.kwargs))

    def _numbers(self, node: Node, index: int, leaf: Any) -> tuple[Any, ...]:
        """What an integer leaf is with two numbers of tokens and samples."""
        return tuple(self.runs.number(node, index, leaf, scale) for scale in (Scale(7, 2), Scale(11, 3)))

    def _prove(self, node: Node) -> dict[int | None, Layout] | None:
        for precision, smaller in itertools.product(("double", "single", "own"), (True, False)):
            for positive in (False, True):
                attempt = _Together(self, precision, self._rows(node), smaller, positive)
                try:
                    found = attempt.compare(node)
                except Unproven:
                    continue
                except Exception:  # this way of running it does not work; another may
                    break
                return found
        return None

    def _rows(self, node: Node) -> int:
        """More than any distance that the operation may look across; with fewer samples only where no index needs them."""
        if self.label == SAMPLES and not is_index(node):
            return _FEW_ROWS
        numbers = [abs(leaf) for leaf in leaves(node) if isinstance(leaf, int) and not isinstance(leaf, bool)]
        return min(_MOST_ROWS, max([_ROWS, *(2 * number + 3 for number in numbers if number <= _MOST_ROWS // 2)]))

    # -- several together ---------------------------------------------------------------------------------------------

    def _closes(self, node: Node) -> bool:
        """Whether a node behind open ones, run together with them, has its rows in order."""
        try:
            region = self._region(node)
            if self.together is None:
                self.together = _Together(self, "double", self._few(), False, False)
            key = ("together", self.label, tuple(self._key_in(region, member) for member in region))
            if key not in self.memo:
                self.memo[key] = self._compare_together(node)
            found = self.memo[key]
        except (Unproven, TypeError):
            return False
        if found is None:
            return False
        self._accept(node, found)
        return True

    def _compare_together(self, node: Node) -> dict[int | None, Layout] | None:
        for precision in ("double", "single", "own"):
            if self.together is None or self.together.precision != precision:
                self.together = _Together(self, precision, self._few(), False, False)
            try:
                return self.together.compare(node)
            except Unproven:
                return None
            except Exception:
                continue
        return None

    def _few(self) -> int:
        """Rows of a run of several operations: no more than the prompt has, for tables as long as it is."""
        return min(_ROWS if self.label == TOKENS else _FEW_ROWS, self.runs.length)

    def _region(self, node: Node) -> list[Node]:
        """The node and the open ones in front of it, in graph order."""
        found, stack = {node}, [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in self.open and source not in found:
                    found.add(source)
                    stack.append(source)
        return sorted(found)

    def _key_in(self, region: list[Node], node: Node) -> Hashable:
        inside = {member: place for place, member in enumerate(region)}
        sources = tuple((inside.get(source), None if source in inside else source.name) for source in node.all_input_nodes)
        numbered = tuple(place for place, _ in sources)
        return self._key(node), numbered, _pattern(name for _, name in sources)


def _pattern(names: Iterable[str | None]) -> tuple[int, ...]:
    seen: dict[str | None, int] = {}
    return tuple(seen.setdefault(name, len(seen)) for name in names)


def _plain(extent: Extent, label: str) -> bool:
    mine, others = (extent.tokens, extent.samples) if label == TOKENS else (extent.samples, extent.tokens)
    return mine == 1 and not others and not extent.rest


def _outputs(node: Node) -> dict[int | None, Node]:
    """A node's results by place in its tuple, as far as they are read; None for a node that is a tensor itself."""
    if isinstance(value(node), (tuple, list)):
        return {user.args[1]: user for user in node.users if is_part_of_tuple(user) and isinstance(user.args[1], int)}
    written = changed_in_place(node)
    return {None: written if written is not None and not is_tensor(node) else node}


class _Together:
    """Runs of some operations, on all rows and on choices of them, from the same operands."""

    def __init__(self, search: _Search, precision: str, rows: int, smaller: bool, positive: bool):
        self.search, self.runs, self.label, self.precision = search, search.runs, search.label, precision
        samples = 1 if self.runs.batch == 1 else _SAMPLES if self.label == SAMPLES else 2
        self.scale = Scale(rows, samples, precision)
        self.others = samples if self.label == TOKENS else rows
        self.smaller, self.positive = smaller, positive
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
        outputs = _outputs(node)
        layouts: dict[int | None, Layout] = {}
        for place, output in outputs.items():
            if not is_tensor(output):
                continue
            full = whole if place is None else whole[place]
            extents = self.runs.extents(output)
            if tuple(full.shape) != tuple(self._sized(extent, self.scale) for extent in extents):
                raise Unproven("sizes do not fit")
            if full.is_floating_point() and full.numel() and bool(full.sum().isnan()) and 2 * int(full.isnan().sum()) > full.numel():
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
            if source in self.search.layouts and is_tensor(source) and self.runs.extents(source) == tuple(extents):
                return self.search.layouts[source]
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
        if isinstance(leaf, Node) and leaf in self.search.open:
            return self.result(leaf, rows)
        if is_tensor(leaf):
            return self._tensor(node, index, leaf, rows, scale)
        if isinstance(leaf, Node) and isinstance(value(leaf), (tuple, list)):
            raise Unproven("an operand is a tuple")
        if isinstance(leaf, (Node, int, torch.SymInt)) and not isinstance(leaf, bool):
            number = self.runs.number(node, index, leaf, scale)
            fixed = self.sizes and len(set(self.search._numbers(node, index, leaf))) == 1
            return self.sizes.get(number, number) if fixed else number
        return local_argument(leaf, scale)

    def _tensor(self, node: Node, index: int, leaf: Node, rows: tuple[int, ...] | None, scale: Scale) -> torch.Tensor:
        own = leaf in self.runs.tokens.probed
        extents = self.runs.extents(leaf) if own else self.runs.side_extents(node, index, leaf)
        layout = self.search.layouts.get(leaf, {}) if own else {
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
        return self.runs.draw(value(leaf).dtype, shape, self.scale, len(self.drawn) + 1, self.positive)

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
