"""Where the samples of a batch lie in the decoder's tensors."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

from parvts_fx.analysis.records import Decoder
from parvts_fx.analysis.tokens import AxisLabels
from parvts_fx.analysis.values import hint, value
from parvts_fx.errors import Refusal


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


def samples_of(decoder: Decoder, node: Node) -> Samples | None:
    """Where the samples lie in one of the decoder's tensors; None for a batch of one.

    Raises:
        Refusal: they cannot be told apart there.
    """
    found = decoder.samples
    if found is None:
        return None
    axes = found.axes.get(node, {})
    if len(axes) != 1:
        raise Refusal("no axis of a tensor holds the samples", node)
    ((axis, kind),) = axes.items()
    if kind.is_plain:
        return Samples(axis)
    inner = decoder.sample_layouts.get(node, {}).get(axis)
    if kind.offset or inner is None or kind.multiple % inner:
        raise Refusal(f"a tensor holds its samples as {kind}, which is not understood", node)
    return Samples(axis, kind.multiple, inner)


def stream_axis(decoder: Decoder, link: Node) -> int:
    """The axis of a link of the residual stream along which its rows lie.

    Raises:
        Refusal: there is no such axis.
    """
    axis = decoder.tokens.plain_axis(link)
    if axis is None:
        raise Refusal("the residual stream has no plain token axis here", link)
    return axis


def samples_of_side(decoder: Decoder, side: Node, reader: Node, index: int, like: Node | None) -> Samples | None:
    """The same for a tensor from outside the decoder, as leaf number ``index`` of one of its nodes.

    Args:
        like: the prompt's tensor that it is combined with; their axes are aligned from the right, as broadcasting does.
    """
    found = decoder.samples
    if found is None:
        return None
    binding = found.bindings.get(reader, {}).get(index)
    if isinstance(binding, AxisLabels):
        ((axis, _),) = binding.axes
        return Samples(axis)
    if like is None:
        raise Refusal("a side input's samples cannot be told apart", side)
    there = samples_of(decoder, like)
    assert there is not None, "a batch of one has returned above"
    axis = there.axis - (value(like).dim() - value(side).dim())
    if axis >= 0 and hint(value(side).shape[axis]) != 1:
        raise Refusal("a side input's samples cannot be told apart", side)
    return dataclasses.replace(there, axis=axis)
