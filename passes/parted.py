"""A captured batch's graph in two parts: what runs for all samples at once, and the decoder for one sample at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch.fx import GraphModule, Node

from parvts_fx.analysis.masks import Mask


@dataclasses.dataclass(frozen=True)
class Side:
    """A tensor that the decoder reads, and where one sample's rows lie in it."""

    node: Node
    samples: int | None
    """The axis of the samples; None for what all samples share."""

    axes: tuple[int, ...]
    """Those along which the prompt's rows lie, behind cached ones or none."""

    is_number: bool = False
    """Whether the decoder reads the number that is all there is in the tensor."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One of the graph's results."""

    place: int
    """Among those of the part that makes it."""

    samples: int | None = None
    """For a result of the decoder's: the axis of its samples; None for a batch of one."""

    is_decoders: bool = False

    behind_cached: int | None = None
    """The axis along which the prompt's rows stand behind cached ones, if any does."""


@dataclasses.dataclass(frozen=True)
class Parted:
    """A captured graph in two parts."""

    front: GraphModule
    """Of the graph's inputs: merged embeddings [batch, seq, hidden], the tensors of ``sides``, and results."""

    decoder: GraphModule
    """Of merged embeddings [1, rows, hidden], visual [1, rows] bool, features [visual tokens, hidden] and one sample's ``sides``:
    its results."""

    sides: tuple[Side, ...]
    masks: tuple[tuple[int, Mask], ...]
    """Which sides are masks of attention, and how they are read."""

    results: tuple[Any, ...]
    """Of the graph, in order: a :class:`Result`, or what is no node. What is to be written into ``states`` stands at the end."""

    states: tuple[int, ...]
    """Inputs of the graph that its decoder overwrites."""

    picks_rows: bool
    """Whether what stands in front of the decoder may take single rows of the prompt out of what the decoder reads: its last
    ones, say, which are padding in some samples."""

    returns_one: bool
    """Whether the graph returned its only result by itself."""
