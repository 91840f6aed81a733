"""How long a graph's operations take on a processor, by a model of it: what cannot be measured here."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from parvts_fx.cost.cpu import measured
from parvts_fx.cost.fusing import Operation
from parvts_fx.cost.operations import Tally
from parvts_fx.cost.processors import CPU, GPUS, HALF, Bound, Processor, named


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a graph is predicted to take on a processor."""

    processor: str
    dtype: torch.dtype
    """What most is multiplied in."""

    kernels: float
    """Seconds of all kernels, one after the other: what a call takes with CUDA graphs (``mode="reduce-overhead"``)."""

    launching: float
    """Seconds for which the host is busy with launching them one by one; 0 on a CPU."""

    launches: int
    parts: Mapping[Bound, float]
    """Seconds of kernels, by what they go into."""

    @property
    def seconds(self) -> float:
        """What a call takes whose kernels are launched one by one: the host works ahead of the GPU, or the GPU waits for it."""
        return max(self.kernels, self.launching)

    @property
    def bound(self) -> Bound:
        """What most of the kernels' time goes into."""
        return max(self.parts, key=lambda bound: self.parts[bound], default="arithmetic")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A prefill with all tokens and with few, on one processor."""

    whole: Prediction
    few: Prediction

    @property
    def kernels_ratio(self) -> float:
        """How many times quicker the kernels of the pruned prefill are."""
        return self.whole.kernels / self.few.kernels

    @property
    def ratio(self) -> float:
        """The same of calls whose kernels are launched one by one."""
        return self.whole.seconds / self.few.seconds


def predict(
    work: Tally, processor: str | Processor, dtype: torch.dtype | None = None, linear_kernels: str = "inductor"
) -> Prediction:
    """Predict how long a graph takes.

    Args:
        work: what it does, from :func:`parvts_fx.cost.count`.
        processor: "NVIDIA H100", "NVIDIA H200", "NVIDIA A100", "NVIDIA L4" or a part of such a name; "cpu" for the one at hand,
            which is measured for some seconds at the first call; or one's own (:class:`parvts_fx.cost.Gpu`).
        dtype: in place of the one that most is multiplied in: on a GPU models run in half the precision that they may have here.
            None for bfloat16 on a GPU, if the graph has neither that nor float16, and elsewhere for what the graph has.
        linear_kernels: of a CPU, as the option of that name: "auto" for the quicker of two libraries.

    Raises:
        ValueError: an unknown processor.
    """
    name = named(processor) if isinstance(processor, str) else processor.name
    own = work.dtype
    wanted = dtype or (own if name == CPU or own in HALF else torch.bfloat16)
    found: Processor = processor if not isinstance(processor, str) else GPUS[name] if name in GPUS else measured(
        wanted, linear_kernels == "auto")
    parts: dict[Bound, float] = defaultdict(float)
    for operation in work.operations if wanted == own else _in_other(work.operations, own, wanted):
        seconds, bound = found.kernel(operation)
        parts[bound] += seconds
    return Prediction(name, wanted, sum(parts.values()), found.launch * work.launches, work.launches, dict(parts))


def compare(whole: Tally, few: Tally, processors: Iterable[str | Processor], linear_kernels: str) -> tuple[Comparison, ...]:
    """A prefill as it came and as it was rewritten, on several processors; see :func:`predict`."""
    return tuple(Comparison(*(predict(work, processor, linear_kernels=linear_kernels) for work in (whole, few)))
                 for processor in processors)


def _in_other(operations: Iterable[Operation], own: torch.dtype, other: torch.dtype) -> Iterable[Operation]:
    """The same with other floating-point numbers. (Whole numbers are few beside them, and scaled alike.)"""
    for operation in operations:
        if operation.dtype != own:
            yield operation
            continue
        read, weights, written = (size * other.itemsize // own.itemsize for size in (
            operation.read, operation.weights, operation.written))
        yield dataclasses.replace(operation, dtype=other, read=read, weights=weights, written=written)
