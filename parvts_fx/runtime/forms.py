"""What makes compiled forms of a graph, and such a form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from parvts_fx.passes.parted import Parted
from parvts_fx.rewritten import Rewriting
from parvts_fx.runtime.merged_embeddings import MergedInput

Compiled = Callable[..., Any]
Lower = Callable[[GraphModule, Sequence[object]], Compiled]


@dataclasses.dataclass(frozen=True)
class Making:
    """What makes compiled forms of a graph, for whatever prompts come."""

    rewrite: Callable[[GraphModule, Sequence[object], MergedInput | None], Rewriting]
    part: Callable[[GraphModule, Sequence[object], MergedInput | None], Parted]
    """Into what stands in front of the decoder, and the decoder for one sample."""

    lower: Lower
    """Compiles a graph as it is."""

    prune: Callable[[GraphModule], Compiled]
    """Compiles one sample's decoder as a prompt of its own."""

    whole: Callable[[GraphModule], Compiled]
    """The same as it is, for a sample without visual tokens."""

    sizes_vary: bool = True
    """Whether that is meant for prompts of any size from the first one on."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A compiled form of the rewritten graph."""

    compiled: Compiled
    tells_rows: bool
    """Whether the rows that are left stand behind the graph's own results."""

    fits: Callable[[Sequence[object]], bool] | None = None
    """Whether what its graph takes for granted of sizes holds for given inputs; None where Dynamo guards all of that."""

    def run(self, given: Sequence[Any], visual: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        """What the graph returned as it came; [batch, seq] bool, the visual tokens that are left, where the graph tells."""
        outputs = self.compiled(*given)
        if not self.tells_rows:
            return outputs, None
        *results, rows = outputs
        return type(outputs)(results), torch.zeros_like(visual).scatter(1, rows, True) & visual
