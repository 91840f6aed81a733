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

from parvts_fx.analysis.commuting import Layout, Together, outputs_of
from parvts_fx.analysis.extents import SAMPLES, TOKENS, Extent
from parvts_fx.analysis.small_runs import NOISES, SmallRuns, Unproven, is_part_of_tuple, is_plain, really
from parvts_fx.analysis.values import changed_in_place, is_index, is_tensor, leaves, value

_TOGETHER = 96
"""Most operations that are run together."""

_ROWS, _FEW_ROWS, _MOST_ROWS = 19, 7, 131


@dataclasses.dataclass
class Findings:
    """What the decoder's nodes do with the rows that they are given."""

    meeting: list[Node]
    """Where rows meet, in graph order."""

    layouts: dict[Node, Layout]
    unordered: frozenset[Node]
    """Nodes whose rows are not in order, or not tokens' own, where what follows them puts that right again."""


def find_meetings(
    runs: SmallRuns, label: str, nodes: Sequence[Node], known: Collection[Node] = (),
    harmless: Callable[[Node], bool] = lambda node: False,
) -> Findings:
    """Where the rows of ``label`` (tokens or samples) meet.

    Args:
        nodes: the decoder's nodes, in graph order.
        known: places where they meet that are understood (attention): what is computed there counts as new rows.
        harmless: a place where they meet, but which is right for any choice that is made.
    """
    return _Search(runs, label, known, harmless).run(nodes)


class _Search:
    def __init__(
        self, runs: SmallRuns, label: str, known: Collection[Node], harmless: Callable[[Node], bool],
    ):
        self.runs, self.label, self.known, self.harmless = runs, label, set(known), harmless
        self.memo: dict[Hashable, Any] = {}
        self.layouts: dict[Node, Layout] = {}
        self.parts: dict[Node, dict[int, Layout]] = {}
        self.meeting: set[Node] = set()
        self.open: dict[Node, None] = {}
        """Nodes whose rows are not their own, in order."""

        self.together: Together | None = None

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
        return Findings([node for node in nodes if node in self.meeting], self.layouts, frozenset(self.open))

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
        # no noise can stand for a tensor that is spread over processes: it is run together with what reads it
        stands = not isinstance(example, torch.Tensor) or is_plain(example)
        if stands and (self._closes(node) if reads_open else self._alone(node)):
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

    def _accept(self, node: Node, found: dict[Any, Layout]) -> None:
        if None in found:
            self.layouts[node] = found[None]
        else:
            self.parts[node] = found

    def _key(self, node: Node) -> Hashable:
        """Equal for operations on operands of equal sizes that follow the rows alike."""
        described: list[Hashable] = []
        for index, leaf in enumerate(leaves(node)):
            if is_tensor(leaf) and leaf in self.runs.tokens.probed:
                layout = tuple(self.layouts.get(leaf, {}).items())
                described.append((self.runs.extents(leaf), value(leaf).dtype, layout))
            elif is_tensor(leaf):
                described.append((self.runs.side_extents(node, index, leaf), value(leaf).dtype, self.runs.identity(leaf)))
            elif isinstance(leaf, Node) and isinstance(value(leaf), (tuple, list)):
                described.append(tuple)  # what is in it stands in the key of the node that made it
            elif isinstance(leaf, (Node, int, torch.SymInt)) and not isinstance(leaf, bool):
                described.append(self.runs.numbers(node, index, leaf))
            else:
                hash(leaf)
                described.append((type(leaf), leaf))
        outputs = tuple(
            self.runs.extents(output) for output in outputs_of(node).values() if is_tensor(output))
        return self.label, node.op, node.target, tuple(described), outputs, tuple(map(str, node.kwargs))

    def _prove(self, node: Node) -> dict[int | None, Layout] | None:
        for precision, smaller, noise in itertools.product(("double", "single", "own"), (True, False), NOISES):
            try:
                return Together(
                    self.runs, self.label, self.layouts, (), precision, self._rows(node), smaller, noise).compare(node)
            except Exception:  # this way of running it does not work, or tells nothing; another may
                continue
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
                self.together = self._run_together(precision)
            try:
                return self.together.compare(node)
            except Unproven:
                return None
            except Exception:
                continue
        return None

    def _run_together(self, precision: str) -> Together:
        """With no more rows than the prompt has, for tables that are as long as it is."""
        rows = min(_ROWS if self.label == TOKENS else _FEW_ROWS, self.runs.length)
        return Together(self.runs, self.label, self.layouts, self.open, precision, rows)

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
