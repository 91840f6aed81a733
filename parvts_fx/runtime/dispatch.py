"""Decides at each call whether the rewritten graph may run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from parvts_fx.capture import copy_graph_module
from parvts_fx.errors import tell_unrewritten
from parvts_fx.options import Options
from parvts_fx.rewriting import Rewriting
from parvts_fx.runtime.caches import cache_outputs, note_short_caches
from parvts_fx.runtime.call import current_call
from parvts_fx.runtime.guards import Prompt, same_count, uneven
from parvts_fx.runtime.merged_embeddings import MergedInput, visual_rows
from parvts_fx.runtime.record import KEPT_ALL, CallRecord

Compiled = Callable[..., Any]
Lower = Callable[[GraphModule, Sequence[object]], Compiled]

_MOST_COUNTS = 8
"""For how many different numbers of visual tokens one graph is compiled, where no size tells the number."""


class Dispatch:
    """Runs the rewritten graph where it may be used for the prompt at hand, and the unrewritten one elsewhere.

    Args:
        done: the rewriting for the example inputs.
        lowered: its compiled form; None to compile it when it is first called.
        original: the graph as it came.
        position: which input holds embeddings that an earlier graph merged, if any does.
        again: rewrites the original for other inputs, with another number of visual tokens.
        lower: compiles a graph as it is.
    """

    def __init__(
        self, done: Rewriting, lowered: Compiled | None, original: GraphModule, options: Options, position: int | None,
        again: Callable[[GraphModule, Sequence[object], MergedInput | None], Rewriting], lower: Lower,
    ):
        if done.module is None or done.merge is None or done.visual_mask is None:
            raise ValueError("parvts_fx: there is nothing to dispatch to: the graph has not been rewritten")
        self._done, self._merge, self._visual_mask = done, done.merge, done.visual_mask
        self._original = copy_graph_module(original)
        self._options = options
        self._position = position
        self._caches = cache_outputs(original, done.module)
        self._again = again
        self._lower = lower
        self._further: Compiled | None = None
        self._unrewritten: Compiled | None = None
        self._by_count: dict[int | None, Compiled | None] = {}
        """Compiled forms by the number of visual tokens; its key is None for the one that reads it off the sizes, and its
        value None for a number that could not be rewritten."""

        self._refused: dict[int, str] = {}
        """Why, for each of those; it was told when it was found out."""
        if lowered is None:
            lowered = torch.compile(done.module, backend=_LowerOnly(lower))
        self._by_count[None if done.precondition else done.merge.count] = lowered

    def __call__(self, *inputs: Any) -> Any:
        if (more := self._for_handed(inputs)) is not None:
            return more(*inputs)
        given = self._with_handed_mask(inputs)
        if given is None:
            return self._run_unrewritten(inputs)  # text alone
        current_call().tell_merge()
        visual, precondition = self._visual_mask(*given), self._done.precondition
        count = same_count(visual) if precondition is None else precondition.visual_tokens(inputs)
        compiled, reason = self._choose(inputs, given, visual, count)
        size = visual.shape[1]
        if compiled is None or count is None:
            current_call().tell_record(CallRecord(False, reason, size, visual=visual))
            if reason != KEPT_ALL and (count is None or reason != self._refused.get(count)):
                tell_unrewritten(reason, self._options.strict, stacklevel=2)
            return self._run_unrewritten(inputs)
        outputs = compiled(*given)
        current_call().tell_record(CallRecord(True, "", size, self._options.subject_count(count), visual))
        current_call().tell_pruning(self._dropped(count))
        note_short_caches(outputs, self._caches)
        return outputs

    def _choose(
        self, inputs: Sequence[object], given: Sequence[Any], visual: torch.Tensor, count: int | None
    ) -> tuple[Compiled | None, str]:
        """The compiled form for the prompt at hand, or None and why there is none."""
        if count is not None and self._dropped(count) == 0:
            return None, KEPT_ALL
        prompt = Prompt(given, visual, count)
        reason = next((reason for guard in self._done.guards if (reason := guard(prompt)) is not None), None)
        if reason is not None or count is None:
            return None, reason or uneven(visual)
        number = None if self._done.precondition else count
        if number not in self._by_count:
            return self._compile_for(count, inputs, given[-1])
        return self._by_count[number], self._refused.get(count, "")

    def _for_handed(self, inputs: tuple[Any, ...]) -> Compiled | None:
        """For a graph that was compiled for a prompt into which nothing had been merged before, and now something has."""
        if self._position is not None or self._done.stream is None:
            return None
        visual = visual_rows(inputs[self._done.stream], receive=False)
        if visual is None:
            return None
        visual_rows(inputs[self._done.stream])  # taken, whatever becomes of it
        if self._further is None:
            done = self._again(self._original, inputs, MergedInput(self._done.stream, visual))
            self._further = functools.partial(self._run_alone, done.report.reason) if done.module is None else Dispatch(
                done, None, self._original, self._options, self._done.stream, self._again, self._lower)
        return self._further

    def _run_alone(self, reason: str, *inputs: object) -> Any:
        current_call().tell_merge()
        current_call().tell_record(CallRecord(False, reason))
        return self._run_unrewritten(inputs)

    def _with_handed_mask(self, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The inputs, and the mask of what earlier graphs have merged if one was handed over; None where nothing is merged."""
        if self._position is None:
            return inputs
        visual = visual_rows(inputs[self._position])
        if visual is None:
            if len(self._merge.merges) == 1:
                return None
            visual = torch.zeros(inputs[self._position].shape[:2], dtype=torch.bool, device=inputs[self._position].device)
        return *inputs, visual

    def _dropped(self, count: int) -> int:
        return count - self._options.subject_count(count) if count else 0

    def _compile_for(
        self, count: int, inputs: Sequence[object], handed_mask: torch.Tensor
    ) -> tuple[Compiled | None, str]:
        """The compiled form for another number of visual tokens, or None and the reason."""
        if len(self._by_count) >= _MOST_COUNTS:
            return None, (f"the number of visual tokens depends on data here, and {_MOST_COUNTS} different numbers have "
                          "been compiled already (generate and sizes that the graph knows have no such limit)")
        handed = None if self._position is None else MergedInput(self._position, handed_mask)
        done = self._again(self._original, inputs, handed)
        self._by_count[count] = done.module and torch.compile(done.module, backend=_LowerOnly(self._lower))
        if done.module is None:
            self._refused[count] = done.report.reason
        return self._by_count[count], done.report.reason

    def _run_unrewritten(self, inputs: Sequence[object]) -> Any:
        """Compiled when first needed; Dynamo guards its sizes, which need not be those of the rewritten graph."""
        if self._unrewritten is None:
            self._unrewritten = torch.compile(self._original, backend=_LowerOnly(self._lower))
        return self._unrewritten(*inputs)


class _LowerOnly:
    """A Dynamo backend that applies a lowering and nothing else."""

    __name__ = "parvts_lowering"

    def __init__(self, lower: Lower):
        self._lower = lower

    def __call__(self, module: GraphModule, example_inputs: Sequence[object]) -> Compiled:
        return self._lower(module, example_inputs)
