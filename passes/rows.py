"""Sets of rows, and taking the rows of one out of a tensor that holds those of another."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence

import torch
from torch.fx import Node

from parvts_fx.analysis.samples import Samples
from parvts_fx.analysis.values import value
from parvts_fx.capture.editing import Editor, Size
from parvts_fx.errors import Refusal

TEXT, LAST = "text", "last"


def live(level: int) -> str:
    """The rows that are left when so many stages have dropped theirs; on level 0 the whole prompt."""
    return f"live {level}"


def non_subject(stage: int) -> str:
    """Path B of a stage: the text and its non-subject tokens."""
    return f"non-subject {stage}"


def behind(name: str) -> str:
    """Those of a set's rows behind the text that both paths of a stage share."""
    return f"{name} behind the shared text"


@dataclasses.dataclass(frozen=True)
class RowSet:
    """A choice of the prompt's positions per sample, in prompt order."""

    name: str
    index: Node | None
    """[batch, count] int64, ascending; None for all positions."""

    count: Size


class RowSets:
    """The sets of rows that a graph runs on, and where the rows of one stand among those of another.

    Args:
        prompt: [batch, seq, ...].
    """

    def __init__(self, editor: Editor, prompt: Node):
        self._editor, self._prompt = editor, prompt
        everything = RowSet(live(0), None, editor.size(prompt, 1))
        self.by_name: dict[str, RowSet] = {everything.name: everything}
        self._within: dict[str, set[str]] = {everything.name: set()}
        self._places: dict[tuple[str, str], Node] = {}
        self._gathered: dict[tuple, Node] = {}
        self._masks: dict[tuple, Node] = {}
        self._tables: dict[tuple, Node] = {}

    def __getitem__(self, name: str) -> RowSet:
        if name not in self.by_name:
            raise Refusal(f"an operation needs the rows \"{name}\" in front of where they are chosen")
        return self.by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def add(self, rows: RowSet, within: Iterable[str]) -> None:
        """A set of rows, all of which are among those of the sets ``within``."""
        self.by_name[rows.name] = rows
        self._within.setdefault(rows.name, set()).update(within)

    def is_within(self, name: str, other: str) -> bool:
        return name == other or other in self._within[name]

    def note_places(self, name: str, other: str, places: Node) -> None:
        """``places`` [batch, count]: where the rows of a set stand among those of another one."""
        self._places[name, other] = places

    def places(self, name: str, other: str) -> Node:
        """[batch, count] int64: where the rows of a set stand among those of another one."""
        if self[other].index is None:
            return self[name].index
        if (name, other) not in self._places:

            def places(rows: torch.Tensor, among: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
                members = torch.zeros(prompt.shape[:2], dtype=torch.int64, device=prompt.device).scatter(1, among, 1)
                return (members.cumsum(1) - 1).gather(1, rows)

            self._places[name, other] = self._editor.inline(places, self[name].index, self[other].index, self._prompt)
        return self._places[name, other]

    def narrowest(self, name: str, held: Iterable[str]) -> str | None:
        """The smallest set among those held that contains a set."""
        able = [other for other in held if self.is_within(name, other)]
        return next((other for other in able if not any(self.is_within(more, other) for more in able if more != other)), None)

    def causal_mask(self, queries: str, keys: str, rank: int, samples: Samples | None) -> Node:
        """Bool, broadcast with scores of some rank whose last axes are queries and keys: the query's position is not
        before the key's. ``samples``: where they lie among the scores' axes."""
        key = (queries, keys, rank, samples)
        if key not in self._masks:
            place, everything = samples or Samples(0), self[keys].index is None

            def mask(query: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
                if everything:
                    other = torch.arange(other.shape[1], device=query.device)[None]
                    allowed = place.spread(query)[:, :, None] >= other[:, None, :]
                else:
                    allowed = place.spread(query)[:, :, None] >= place.spread(other)[:, None, :]
                allowed = allowed[0] if samples is None else allowed
                wanted = (rank - 2, rank - 1) if samples is None else (place.axis, rank - 2, rank - 1)
                return allowed[tuple(slice(None) if i in wanted else None for i in range(rank))]

            with self._editor.choosing():
                self._masks[key] = self._editor.inline(
                    mask, self[queries].index, self._prompt if everything else self[keys].index)
        return self._masks[key]

    def added(self, mask: Node, dtype: torch.dtype) -> Node:
        """What is added to scores in the place of a bool mask: a CPU's kernel would make that of it for each call."""
        if value(mask).device.type != "cpu":
            return mask
        key = ("added", mask, dtype)
        if key not in self._masks:
            with self._editor.choosing():
                self._masks[key] = self._editor.inline(
                    lambda held: torch.zeros(held.shape, dtype=dtype, device=held.device).masked_fill(~held, -torch.inf), mask)
        return self._masks[key]

    def first_rows(self, table: Node, axes: Sequence[int], name: str) -> Node:
        """As many of a table's first rows, along some axes, as a set has."""
        if name == live(0):
            return table
        key = (table, tuple(axes), name)
        if key not in self._tables:
            first = table
            for axis in axes:
                first = self._editor.call(torch.narrow, first, axis, 0, self[name].count)
            self._tables[key] = first
        return self._tables[key]

    # -- taking rows --------------------------------------------------------------------------------------------------

    def take(self, node: Node, axis: int, name: str, other: str, samples: Samples | None) -> Node:
        """The rows of a set out of a tensor that holds those of another one along an axis.

        Args:
            samples: where they lie in this tensor; None for a batch of one.
        """
        if name == other:
            return node
        key = (node, axis, name, other, samples)
        if key not in self._gathered:
            last = name == LAST and isinstance(self[name].count, int) and self._is_end_of(other)
            self._gathered[key] = self._last(node, axis) if last else gather(
                self._editor, node, axis, self.places(name, other), self[name].count, samples)
        return self._gathered[key]

    def take_behind_cached(self, node: Node, axis: int, name: str, samples: Samples | None) -> Node:
        """Along an axis with other rows in front of the prompt's: those, and the rows of a set."""
        prompt = self[live(0)].count
        if name == live(0):
            return node
        key = (node, axis, name, "behind cached", samples)
        if key not in self._gathered:
            editor = self._editor
            in_front = editor.plus(editor.size(node, axis), prompt, -1)
            parts = [editor.call(operator.getitem, node, (slice(None),) * axis + (part,))
                     for part in (slice(None, in_front), slice(in_front, None))]
            chosen = self.take(parts[1], axis, name, live(0), samples)
            self._gathered[key] = editor.call(torch.cat, [parts[0], chosen], dim=axis)
        return self._gathered[key]

    def forget(self, sources: Iterable[Node]) -> None:
        """What was taken out of tensors that have been written into since."""
        changed = set(sources)
        for key in [key for key in self._gathered if key[0] in changed]:
            del self._gathered[key]

    def _is_end_of(self, other: str) -> bool:
        """Whether the last rows are the last ones of a set."""
        return self._within[LAST] == {other, *self._within[other]}

    def _last(self, node: Node, axis: int) -> Node:
        return self._editor.call(
            operator.getitem, node, (slice(None),) * axis + (slice(-self[LAST].count, None),))


def gather(editor: Editor, node: Node, axis: int, index: Node, count: Size, samples: Samples | None) -> Node:
    """Rows of a tensor along one axis, per sample: ``index`` [batch, count]."""
    if samples is None:
        return editor.call(torch.index_select, node, axis, editor.call(operator.getitem, index, 0))
    place = samples.axis
    while place < 0:  # a tensor that all samples share and that lacks the axis
        node, place, axis = editor.method("unsqueeze", node, 0), place + 1, axis + 1
    rank = value(node).dim()
    if samples.each > 1:
        index = editor.call(torch.repeat_interleave, index, samples.inner, 0)
        index = editor.method("repeat", index, samples.each // samples.inner, 1)
    entries = editor.size(index, 0)
    shape: list[Size] = [editor.size(node, i) for i in range(rank)]
    if shape[place] == 1:
        shape[place] = entries
        node = editor.method("expand", node, *(-1 if i != place else entries for i in range(rank)))
    if place > axis:
        index = editor.method("t", index)
    index = editor.call(operator.getitem, index, tuple(slice(None) if i in (place, axis) else None for i in range(rank)))
    index = editor.method("expand", index, *(count if i == axis else shape[i] for i in range(rank)))
    return editor.call(torch.gather, node, axis, index)
