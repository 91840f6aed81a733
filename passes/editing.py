"""Rows of the prompt in a graph: which there are, tensors with some of them, masks between them."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.values import storage_of, value
from parvts_fx.capture.editing import Editor, Size
from parvts_fx.errors import Refusal


@dataclasses.dataclass(frozen=True)
class Rows:
    """A choice of prompt positions per sample, in prompt order."""

    name: str
    index: Node | None
    """[batch, count] int64, ascending; None for all positions."""

    count: Size

    @property
    def ready(self) -> Node:
        """The node behind which both index and count exist."""
        return max(node for node in (self.index, self.count) if isinstance(node, Node))


@dataclasses.dataclass(frozen=True)
class Samples:
    """Where the samples of a batch lie in a tensor."""

    axis: int
    """-1 or less for "in front of the tensor", which all samples share; so they do where its axis has one entry."""

    each: int = 1
    """Entries per sample."""

    inner: int = 1
    """How many of these follow one another, before the next sample's."""

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """[batch, n] to [entries of the axis, n]."""
        if self.each == 1:
            return rows
        return rows.repeat_interleave(self.inner, 0).repeat(self.each // self.inner, 1)


def along(rows: torch.Tensor, samples: Samples | None, axis: int, rank: int) -> torch.Tensor:
    """[batch, n] as a tensor of some rank, for broadcasting with one that has its rows along ``axis``."""
    if samples is None:
        return rows[0][tuple(slice(None) if i == axis else None for i in range(rank))]
    rows = samples.spread(rows)
    rows = rows if samples.axis < axis else rows.t()
    return rows[tuple(slice(None) if i in (samples.axis, axis) else None for i in range(rank))]


class RowEditor(Editor):
    """Adds nodes to one graph, and knows rows. What it has gathered once, it does not gather again."""

    def __init__(self, module: GraphModule):
        super().__init__(module)
        self._gathered: dict[tuple, Node] = {}
        self._masks: dict[tuple, Node] = {}

    def gather(
        self, node: Node, axis: int, rows: Rows, samples: Samples | None, reader: Node | None = None
    ) -> Node:
        """The rows of a tensor along one axis, per sample.

        Args:
            reader: who reads them, for a tensor that may be written into in between; None if it is not.
            samples: where they lie in this tensor; None for a batch of one.
        """
        if rows.index is None:
            return node
        writes = self._writes.get(storage_of(node), ())
        if reader is None and any(write > node for write in writes):
            raise Refusal("a tensor whose rows are needed is changed in place later on", node)
        place = max([node, rows.ready, *(write for write in writes if write < reader)] if writes else [node, rows.ready])
        key = (node, axis, rows.name, samples, place)
        if key not in self._gathered:
            with self.graph.inserting_before(place.next):
                self._gathered[key] = self._gather(node, axis, rows, samples)
        return self._gathered[key]

    def _gather(self, node: Node, axis: int, rows: Rows, samples: Samples | None) -> Node:
        if samples is None:
            flat = self.call(operator.getitem, rows.index, 0)
            return self.call(torch.index_select, node, axis, flat)
        place = samples.axis
        while place < 0:  # a tensor that all samples share and that lacks the axis
            node, place, axis = self.method("unsqueeze", node, 0), place + 1, axis + 1
        rank = value(node).dim()
        index = rows.index
        if samples.each > 1:
            index = self.call(torch.repeat_interleave, index, samples.inner, 0)
            index = self.method("repeat", index, samples.each // samples.inner, 1)
        entries = self.size(index, 0)
        shape: list[Size] = [self.size(node, i) for i in range(rank)]
        if shape[place] == 1:
            shape[place] = entries
            node = self.method("expand", node, *(-1 if i != place else entries for i in range(rank)))
        if place > axis:
            index = self.method("t", index)
        view = tuple(slice(None) if i in (place, axis) else None for i in range(rank))
        index = self.call(operator.getitem, index, view)
        index = self.method("expand", index, *(rows.count if i == axis else shape[i] for i in range(rank)))
        return self.call(torch.gather, node, axis, index)

    def causal_mask(self, queries: Rows, keys: Rows, prompt: Node, rank: int, samples: Samples | None) -> Node:
        """Bool, broadcast with scores of some rank whose last axes are queries and keys: the query's position is not
        before the key's.

        Args:
            prompt: [batch, seq, ...].
            samples: where they lie among the scores' axes.
        """
        key = (queries.name, keys.name, rank, samples)
        if key not in self._masks:
            place = samples or Samples(0)

            def mask(query: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
                if keys.index is None:
                    other = torch.arange(other.shape[1], device=query.device)[None]
                    allowed = place.spread(query)[:, :, None] >= other[:, None, :]
                else:
                    allowed = place.spread(query)[:, :, None] >= place.spread(other)[:, None, :]
                allowed = allowed[0] if samples is None else allowed
                wanted = (rank - 2, rank - 1) if samples is None else (place.axis, rank - 2, rank - 1)
                return allowed[tuple(slice(None) if i in wanted else None for i in range(rank))]

            self._masks[key] = self.inline(mask, queries.index, prompt if keys.index is None else keys.index)
        return self._masks[key]
