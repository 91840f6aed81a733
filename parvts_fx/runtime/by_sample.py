"""Runs a batch sample by sample: one whose samples have other numbers of visual tokens, or padding behind them.

Each sample's rows, without those that no row sees, are a prompt of their own for one compiled form of the decoder
(:mod:`parvts_fx.passes.single_sample`), so that a sample's result cannot depend on the others. What comes of them is put side by
side: the rows of each stand at the end, and in front of shorter ones are zeros that later calls must not see
(:mod:`parvts_fx.runtime.cached_rows`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from parvts_fx.errors import Refusal
from parvts_fx.passes.parted import Parted, Result
from parvts_fx.runtime.call import begin_call
from parvts_fx.runtime.record import CallRecord
from parvts_fx.torch_private import may_vary

Compiled = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Ran:
    """What has become of a batch."""

    outputs: Any
    """As the graph returns them."""

    rows: torch.Tensor
    """[batch, rows] bool: which of the rows that caches hold are a sample's own."""

    record: CallRecord

    of_decoder: frozenset[int]
    """Which outputs the decoder has computed: others, such as visual features, are as they were."""


class BySample:
    """The two parts of a graph, compiled.

    Args:
        lower: compiles a graph as it is.
        prune: compiles one sample's decoder as a prompt, which is rewritten.
        whole: the same as it is.
        sizes_vary: whether that is for prompts of any size from the first one on.
        copies: whether a compiled form overwrites what it has returned before.
    """

    def __init__(self, parted: Parted, lower: Callable[[GraphModule], Compiled], prune: Callable[[GraphModule], Compiled],
                 whole: Callable[[GraphModule], Compiled], sizes_vary: bool = True, copies: bool = False):
        self._parted, self._sizes_vary, self._copies = parted, sizes_vary, copies
        self._front = lower(parted.front)
        self._pruned, self._whole = prune(parted.decoder), whole(parted.decoder)

    def __call__(self, inputs: Sequence[Any], visual: torch.Tensor) -> Ran:
        """
        Args:
            visual: [batch, seq] bool.
        """
        parted, batch = self._parted, visual.shape[0]
        made = self._kept(self._front(*inputs))
        merged, sides = made[0], made[1:1 + len(parted.sides)]
        samples = [self._run(merged, sides, visual, sample) for sample in range(batch)]
        left = [sample.rows for sample in samples]
        rows = torch.arange(max(left), device=visual.device) >= max(left) - torch.tensor(left, device=visual.device)[:, None]
        outputs = [
            _joined(samples, held)
            if isinstance(held, Result) and held.is_decoders else made[held.place] if isinstance(held, Result) else held
            for held in parted.results]
        pruned = any(sample.record.pruned for sample in samples)
        reason = "" if pruned else next((sample.record.reason for sample in samples if sample.record.reason), "")
        kept = tuple(sample.kept for sample in samples) if pruned else None
        record = CallRecord(pruned, reason, visual.shape[1], kept, visual, _kept(samples, visual))
        of_decoder = frozenset(
            place for place, held in enumerate(parted.results) if isinstance(held, Result) and held.is_decoders)
        for place in reversed(parted.states):
            inputs[place].copy_(outputs.pop())
        return Ran(outputs[0] if parted.returns_one else outputs, rows, record, of_decoder)

    def _run(
        self, merged: torch.Tensor, sides: Sequence[torch.Tensor], visual: torch.Tensor, sample: int
    ) -> _Sample:
        given, places, count = self._given(merged, sides, visual, sample)
        with begin_call() as told:
            outputs = self._kept((self._pruned if count else self._whole)(*given))
            record, told.record = told.record or CallRecord(False), None
        dropped = told.dropped[-1] if told.dropped else 0
        return _Sample(outputs, len(places) - dropped, count - dropped, places, record)

    def _seen(self, sides: Sequence[torch.Tensor], visual: torch.Tensor) -> torch.Tensor:
        """[seq] bool: which of a sample's rows any other row sees in some layer; and the last one, behind which there is none.

        Raises:
            Refusal: padding behind the text sees itself.
        """
        if not self._parted.masks:
            return torch.ones_like(visual)
        told = [mask.seen(_last(sides[place], mask.key_axis, len(visual))) for place, mask in self._parted.masks]
        own, others = (torch.stack([held.reshape(-1, held.shape[-1]).any(0) for held in each]) for each in zip(*told))
        own, others = own.all(0), others.any(0)  # the last row of a chunk is seen by none in layers that attend by chunks
        in_front = others.cumsum(0) == 0  # what sees itself alone there is padding
        if (own & ~others & ~in_front)[:-1].any():
            raise Refusal("padding sees itself, so that it cannot be told from text that nothing follows")
        last = torch.arange(len(own), device=own.device) == len(own) - 1
        return own & (others | last)

    def _kept(self, results: Sequence[Any]) -> Sequence[Any]:
        return [held.clone() if isinstance(held, torch.Tensor) else held for held in results] if self._copies else results

    def _given(
        self, merged: torch.Tensor, sides: Sequence[torch.Tensor], visual: torch.Tensor, sample: int
    ) -> tuple[list[Any], torch.Tensor, int]:
        """What the decoder is given for one sample, where its rows stand in the prompt, and how many of them are visual."""
        mine = [held if side.samples is None else held.narrow(side.samples, sample, 1)
                for side, held in zip(self._parted.sides, sides)]
        seen = self._seen(mine, visual[sample])
        if self._parted.picks_rows and not seen[-1]:
            raise Refusal("padding stands behind a sample's text, and the model takes single positions out of the prompt (its "
                          "last one, say: pad on the left)")
        rows = seen.nonzero()[:, 0]
        own, embeddings = visual[sample:sample + 1, rows], merged[sample:sample + 1, rows]
        given: list[Any] = [embeddings, own, embeddings[own]]
        varying: list[tuple[int, ...]] = [(1,), (1,), (0,), *(side.axes for side in self._parted.sides)]
        for side, held in zip(self._parted.sides, mine):
            for axis in side.axes:
                held = _chosen(held, axis, rows, len(seen))
            given.append(held.item() if side.is_number else held)
        for held, axes in zip(given, varying):
            for axis in axes if self._sizes_vary else ():
                may_vary(held, axis)
        return given, rows, int(own.sum())


def _last(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """The prompt's rows, in front of which those of a cache may stand."""
    return tensor.narrow(axis, tensor.shape[axis] - size, size)


def _chosen(tensor: torch.Tensor, axis: int, rows: torch.Tensor, size: int) -> torch.Tensor:
    """Of the prompt's rows some, and all that stand in front of them."""
    cached, rows = tensor.shape[axis] - size, rows.to(tensor.device)
    if cached:
        rows = torch.cat([torch.arange(cached, device=rows.device), rows + cached])
    return tensor.index_select(axis, rows)


@dataclasses.dataclass(frozen=True)
class _Sample:
    outputs: Sequence[torch.Tensor]
    rows: int
    """That its caches hold."""

    kept: int
    """Visual ones among them."""

    places: torch.Tensor
    """[rows] int64: where those that it was given stand in the prompt."""

    record: CallRecord


def _kept(samples: Sequence[_Sample], visual: torch.Tensor) -> torch.Tensor | None:
    """[batch, seq] bool: visual tokens that are left; None where a sample's graph does not tell. ``visual`` alike."""
    kept = visual.clone()
    for row, sample in zip(kept, samples):
        if sample.record.kept is not None:
            row.zero_()[sample.places] = sample.record.kept[0]
        elif sample.record.pruned:
            return None
    return kept


def _joined(samples: Sequence[_Sample], result: Result) -> torch.Tensor:
    """One result of all samples. Where their sizes differ, zeros stand in front of the shorter ones, behind what was cached."""
    parts, axis = [sample.outputs[result.place] for sample in samples], result.behind_cached
    if axis is None:
        return _side_by_side(parts, result.samples)
    cached = parts[0].shape[axis] - samples[0].rows
    old, new = zip(*(part.tensor_split([cached], axis) for part in parts))
    return torch.cat([_side_by_side(old, result.samples), _side_by_side(new, result.samples)], axis)


def _side_by_side(parts: Sequence[torch.Tensor], axis: int | None) -> torch.Tensor:
    if axis is None:
        (part,) = parts
        return part
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts))]
    return torch.cat([
        part if list(part.shape) == shape else F.pad(part, tuple(_filling(part.shape, shape))) for part in parts], axis)


def _filling(sizes: Sequence[int], shape: Sequence[int]) -> Iterator[int]:
    """How much is put in front of and behind each axis, from the last one on."""
    for own, wanted in zip(reversed(sizes), reversed(shape)):
        yield from (wanted - own, 0)
