"""How axes follow tokens and samples, and how many of these a run on small tensors has."""

from __future__ import annotations

import dataclasses

import torch

TOKENS, SAMPLES = "tokens", "samples"
_HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Extent:
    """How the entries of an axis follow tokens and samples."""

    size: int
    """In the graph."""

    tokens: int = 0
    """Entries per token (and sample, where ``samples`` is given too); 0 for an axis that tokens do not change."""

    samples: int = 0
    rest: int = 0
    """Entries that belong to no token."""

    def at(self, tokens: int, samples: int) -> int:
        if self.tokens and self.samples:
            return self.tokens * tokens * samples
        return self.tokens * tokens + self.samples * samples + (self.rest if self.tokens or self.samples else self.size)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How many tokens and samples a run has, and in which numbers it counts."""

    tokens: int
    samples: int
    precision: str = "double"
    """"double": all floating-point numbers in float64. "single": half precision in float32. "own": as in the graph."""

    def of(self, label: str) -> int:
        return self.tokens if label == TOKENS else self.samples

    def with_count(self, label: str, count: int) -> Scale:
        return dataclasses.replace(self, tokens=count) if label == TOKENS else dataclasses.replace(self, samples=count)

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        if self.precision == "double" and dtype.is_floating_point and dtype.itemsize in (2, 4, 8):
            return torch.float64
        return torch.float32 if self.precision == "single" and dtype in _HALVES else dtype

    @property
    def tolerance(self) -> float:
        """Of a difference, as a share of the largest number."""
        return {"double": 1e-9, "single": 1e-4, "own": 2e-2}[self.precision]
