"""What became of a graph: its rewritten form, and what must hold of a prompt for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis import VisualMerge
from parvts_fx.analysis.values import hint, output_node
from parvts_fx.report import GraphReport
from parvts_fx.runtime.guards import Guard, Precondition, Prompt, same_count


@dataclasses.dataclass(frozen=True)
class Rewriting:
    """A graph's rewritten form, what must hold of its inputs, and what was done. ``module`` is None if untouched.

    It is None as well, with ``visual_mask`` and without ``merged_mask``, for a batch whose samples differ, or whose samples have
    no more visual tokens in the mean than are kept: other prompts of the graph may still be rewritten.
    """

    report: GraphReport
    module: GraphModule | None = None
    precondition: Precondition | None = None
    """None where the graph is rewritten for one number of visual tokens."""

    merge: VisualMerge | None = None
    visual_mask: Callable[..., torch.Tensor] | None = None
    """Of the rewritten graph's inputs: [batch, seq] bool, true where a visual token stands."""

    merged_mask: Callable[..., torch.Tensor] | None = None
    """The same, true where a feature of any modality stands; for a graph whose decoder is in another one."""

    stream: int | None = None
    """Which input holds the embeddings that all is merged into; None where the graph looks them up itself."""

    guards: tuple[Guard, ...] = ()
    """Asked in order at each call; the first reason is why the prefill runs unrewritten."""

    handed: bool = False
    """Whether the rewritten graph takes the mask of visual tokens as one input more."""

    @property
    def may_fit_others(self) -> bool:
        """Whether some prompts of the graph run rewritten, if not this one."""
        return self.module is not None or self.visual_mask is not None and self.merged_mask is None

    rows: Node | None = None
    """In the rewritten graph, [batch, rows] int64: the positions of the prompt that are left in the end. None where the graph
    has no such node any more, because a pass of somebody's own took it out."""

    tells_rows: bool = False
    """Whether the graph returns them behind its own results."""

    def telling_rows(self) -> Rewriting:
        """The same, its graph changed to return ``rows`` as well where it can."""
        if self.module is None or self.rows is None or self.tells_rows:
            return self
        output = output_node(self.module.graph)
        if not isinstance(output.args[0], (tuple, list)):
            return self
        output.args = ((*output.args[0], self.rows),)
        self.module.recompile()
        return dataclasses.replace(self, tells_rows=True)

    def reason_against(self, inputs: Sequence[Any]) -> str | None:
        """Why the rewritten graph may not run for a prompt; None where it may."""
        if self.visual_mask is None or self.merge is None or self.handed:
            return None
        inputs = as_traced(inputs)
        visual = self.visual_mask(*inputs)
        prompt = Prompt(inputs, visual, same_count(visual))
        return next((reason for guard in self.guards if (reason := guard(prompt)) is not None), None)


def as_traced(inputs: Sequence[Any]) -> list[Any]:
    """Inputs with numbers as they were when the graph was captured, so that nothing is guarded."""
    return [hint(held) if isinstance(held, torch.SymInt) else held for held in inputs]
