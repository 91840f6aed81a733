"""What processors can do at best, and what kernels reach of it.

Peaks are those of NVIDIA's data sheets, for dense matrices (the larger figures there are for sparse ones); A100 (80 GB), H100 and
H200 as SXM boards:

- https://www.nvidia.com/en-us/data-center/h100/: 989 TFLOP/s in bfloat16 and float16, 67 in float32, 3.35 TB/s
- https://www.nvidia.com/en-us/data-center/h200/: the same, 4.8 TB/s
- https://www.nvidia.com/en-us/data-center/a100/: 312 TFLOP/s, 19.5 in float32, 2.039 TB/s
- https://www.nvidia.com/en-us/data-center/l4/: 121 TFLOP/s, 30.3 in float32, 300 GB/s

float32 is without TF32, as torch multiplies unless it is told otherwise. The shares of the peaks were measured on one H200, or
fitted to what was measured there (``bench/results/gpu.json``). They are taken for the others' as well, which nobody has measured.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Literal, Protocol

import torch

from parvts_fx.cost.fusing import Operation

Bound = Literal["arithmetic", "weights", "memory", "starting"]
"""What a kernel's time goes into: products, reading the model's parameters, moving other data, or what any kernel costs."""

HALF = (torch.bfloat16, torch.float16)


class Processor(Protocol):
    """What a graph's operations can be timed on."""

    @property
    def name(self) -> str: ...

    @property
    def launch(self) -> float:
        """Seconds for which the host is busy with starting one kernel, while others run; 0 where nothing runs meanwhile."""

    def kernel(self, operation: Operation) -> tuple[float, Bound]:
        """Seconds that an operation takes, and what they go into."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A roofline: a kernel takes the longer of its arithmetic and its memory traffic, each at a share of the peak."""

    name: str
    flops: float
    """FLOP/s in bfloat16 and float16."""

    flops_float32: float
    bandwidth: float
    """Bytes/s."""

    products: float = 0.716
    """Share of the peak that a product of 8192 x 8192 matrices reached: 708 TFLOP/s, measured."""

    copies: float = 0.88
    """Share of the bandwidth that a copy of 2 GiB reached: 4.2 TB/s, measured."""

    attention: float = 0.26
    """Share of the peak that fused attention reaches, over all pairs. Fitted to LLaVA-1.5-7B's whole prefill of eight prompts."""

    fused: float = 0.5
    """Share of the bandwidth that kernels between products reach. Fitted to the same."""

    least: float = 4e-6
    """Seconds that no kernel is quicker than. Fitted to Qwen2.5-VL-7B's pruned prefill of one prompt, of many small kernels."""

    tile: int = 128
    """Rows of a product are computed in so many at a time: 206 take as long as 256."""

    launch: float = 40e-6
    """Seconds a kernel, launched by Inductor's Python beside a Xeon. Fitted to a prefill whose kernels took half of its time
    (18.9 ms for 474). CUDA graphs do without it."""

    def kernel(self, operation: Operation) -> tuple[float, Bound]:
        if operation.kind not in ("product", "attention"):
            return at_least(self.least, operation.moved / (self.bandwidth * self.fused), "memory")
        moving = operation.moved / (self.bandwidth * self.copies)
        if operation.kind == "attention":
            computing = operation.flops / (self._peak(operation.dtype) * self.attention)
        else:
            rows = max(1, operation.rows)
            filled = rows / (math.ceil(rows / self.tile) * self.tile) if rows > self.tile else 1
            computing = operation.flops / (self._peak(operation.dtype) * self.products * filled)
        return at_least(self.least, max(computing, moving), bound_by(operation, computing, moving))

    def _peak(self, dtype: torch.dtype) -> float:
        return self.flops if dtype in HALF else self.flops_float32


def at_least(least: float, seconds: float, bound: Bound) -> tuple[float, Bound]:
    """The time of a kernel, if none is quicker than ``least``."""
    return (least, "starting") if seconds < least else (seconds, bound)


def bound_by(operation: Operation, computing: float, moving: float) -> Bound:
    """What the time of a product or an attention call goes into, from the seconds of either."""
    if computing >= moving:
        return "arithmetic"
    return "weights" if 2 * operation.weights > operation.moved else "memory"


GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in (
    Gpu("NVIDIA H100", 989e12, 67e12, 3.35e12),
    Gpu("NVIDIA H200", 989e12, 67e12, 4.8e12),
    Gpu("NVIDIA A100", 312e12, 19.5e12, 2.039e12),
    Gpu("NVIDIA L4", 121e12, 30.3e12, 0.3e12),
)}
CPU = "cpu"
NAMES = (CPU, *GPUS)


def named(name: str) -> str:
    """A processor's name in full, from any part of it that no other has ("h100").

    Raises:
        ValueError: no processor, or several are called so.
    """
    found = [known for known in NAMES if str(name).lower() == known.lower()] or [
        known for known in NAMES if str(name) and str(name).lower() in known.lower()]
    if len(found) == 1:
        return found[0]
    close = difflib.get_close_matches(str(name).upper(), [known.rpartition(" ")[2].upper() for known in NAMES], n=1)
    hint = f" (did you mean {named(close[0])!r}?)" if close and not found else ""
    raise ValueError(f"parvts_fx: processors: {name!r} is not one of {', '.join(NAMES)}{hint}")
