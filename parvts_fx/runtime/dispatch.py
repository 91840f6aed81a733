"""Decides at each call whether the rewritten graph may run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from parvts_fx.analysis.values import fake_mode_of
from parvts_fx.capture import copy_graph_module
from parvts_fx.errors import NotRewritten, Refusal, does_not_compile, tell_unrewritten
from parvts_fx.options import Options
from parvts_fx.rewriting import FEWER
from parvts_fx.rewritten import Rewriting
from parvts_fx.runtime.by_sample import BySample
from parvts_fx.runtime.caches import cache_outputs, note_short_caches
from parvts_fx.runtime.call import current_call
from parvts_fx.runtime.forms import Compiled, Form, Lower, Making
from parvts_fx.runtime.guards import PADDING, Prompt, same_count, sizes_fit, uneven
from parvts_fx.runtime.merged_embeddings import MergedInput, visual_rows
from parvts_fx.runtime.record import KEPT_ALL, CallRecord
from parvts_fx.runtime.varying_sizes import compile_varying
from parvts_fx.torch_private import BackendCompilerFailed, assumed

_MOST_COUNTS = 8
"""For how many different numbers of visual tokens one graph is compiled, where no size tells the number."""

_TOO_MANY = (f"the number of visual tokens depends on data here, and {_MOST_COUNTS} different numbers have been compiled already "
             "(generate and sizes that the graph knows have no such limit)")
OTHER_SIZES = "what was written for an earlier batch does not fit this one's sizes"

_REMEDY = "parvts_fx.compile(model) prunes such batches, sample by sample"
_FAILS = "its samples cannot run one by one"
_OTHER_CACHE = "it would run sample by sample with a growing cache of transformers' Cache class, or with none"


class Dispatch:
    """Runs the rewritten graph where it may be used for the prompt at hand, and the unrewritten one elsewhere.

    A batch for which it may not be used because its samples differ, or have padding behind visual tokens, runs sample by sample,
    where somebody tells later calls which of the cached rows are a sample's own: parvts_fx.compile does.

    Args:
        done: the rewriting for the example inputs; without a module where they were a batch of samples that differ.
        lowered: its compiled form; None to compile it when it is first called.
        original: the graph as it came.
        position: which input holds embeddings that an earlier graph merged, if any does.
        guarded: how much of what is taken for granted of sizes Dynamo guards; None for all that there is when the graph is first
            called.
    """

    def __init__(
        self, done: Rewriting, lowered: Compiled | None, original: GraphModule, options: Options, position: int | None,
        making: Making, guarded: int | None = None,
    ):
        if done.merge is None or done.visual_mask is None:
            raise ValueError("parvts_fx: there is nothing to dispatch to: the graph has not been rewritten")
        self._done, self._merge, self._visual_mask = done, done.merge, done.visual_mask
        self._original = copy_graph_module(original)
        self._options = options
        self._position = position
        self._caches = cache_outputs(original, done.module)  # all that may be one, as long as there is no other form
        self._making = making
        self._by_sample: BySample | str | None = None
        """None until a batch needs it; the reason where there is none."""

        self._further: Compiled | None = None
        self._unrewritten: Compiled | None = None
        self._by_count: dict[int | None, Form | None] = {}
        """Compiled forms by the number of visual tokens; its key is None for the one that reads it off the sizes, and its
        value None for a number that could not be rewritten."""

        self._refused: dict[int | None, str] = {}
        """Why, for each of those; it was told when it was found out."""

        self._mode, self._guarded = fake_mode_of(original.graph), guarded
        if done.module is not None:
            self._hold(done, lowered)

    def _hold(self, done: Rewriting, lowered: Compiled | None = None) -> None:
        """Have a compiled form of the rewriting."""
        assert done.module is not None and done.merge is not None, "it has been rewritten"
        late = [] if self._guarded is None else assumed(self._mode, self._guarded)
        self._by_count[None if done.precondition else done.merge.count] = Form(
            lowered or self._compile(done.module), done.tells_rows, sizes_fit(self._original, late) if late else None)

    def _compile(self, graph: GraphModule) -> Compiled:
        """As it is, when it is first called."""
        return compile_varying(graph, _LowerOnly(self._making.lower))

    def _handed(self, mask: torch.Tensor) -> MergedInput | None:
        """Args: ``mask``, the last of the rewritten graph's inputs."""
        return None if self._position is None else MergedInput(self._position, mask)

    def __call__(self, *inputs: Any) -> Any:
        if self._guarded is None:
            self._guarded = len(assumed(self._mode))
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
        if compiled is None and self._may_part(reason, visual, inputs):
            outputs, reason = self._run_by_sample(reason, inputs, given, visual)
            if not reason:
                return outputs
        ran = None
        if compiled is not None and count is not None:
            ran, reason = self._run_form(compiled, count, given, visual)
        if ran is None or count is None:
            current_call().tell_record(CallRecord(False, reason, size, visual=visual, kept=visual))
            if reason != KEPT_ALL and (count is None or reason in (FEWER, OTHER_SIZES) or reason not in self._refused.values()):
                tell_unrewritten(reason, self._options.strict)
            return self._run_unrewritten(inputs)
        outputs, kept = ran
        current_call().tell_record(CallRecord(True, "", size, self._options.subject_count(count), visual, kept))
        current_call().tell_pruning(self._dropped(count))
        note_short_caches(outputs, self._caches)
        return outputs

    def _choose(
        self, inputs: Sequence[object], given: Sequence[Any], visual: torch.Tensor, count: int | None
    ) -> tuple[Form | None, str]:
        """The compiled form for the prompt at hand, or None and why there is none."""
        if count is not None and not any(map(self._dropped, visual.sum(1).tolist())):
            return None, KEPT_ALL
        if self._done.module is None:
            even = same_count(visual)
            if even is None:
                return None, uneven(visual)
            if not self._by_count:
                self._begin(even, inputs, given[-1])
        prompt = Prompt(given, visual, count)
        reason = next((reason for guard in self._done.guards if (reason := guard(prompt)) is not None), None)
        if reason is not None or count is None:
            return None, reason or uneven(visual)
        number = self._number(count)
        if number not in self._by_count:
            self._compile_for(count, inputs, given[-1])
        form = self._by_count.get(number)
        if form is not None and form.fits is not None and not form.fits(inputs):
            return None, OTHER_SIZES
        return form, "" if form is not None else self._refused.get(number, _TOO_MANY)

    def _run_form(
        self, form: Form, count: int, given: Sequence[Any], visual: torch.Tensor
    ) -> tuple[tuple[Any, torch.Tensor | None] | None, str]:
        """What the form returns, or why there is nothing: it is compiled when it first runs, and the compiler may fail on it.

        Raises:
            BackendCompilerFailed: with ``strict``.
        """
        try:
            return form.run(given, visual), ""
        except BackendCompilerFailed as error:
            if self._options.strict:
                raise
            reason = does_not_compile(error)
            self._refuse(count, reason)
            tell_unrewritten(reason)
            return None, reason

    def _may_part(self, reason: str, visual: torch.Tensor, inputs: Sequence[object]) -> bool:
        """Whether a prompt does not fit because its samples differ, for their padding, or because the graph was captured, or
        written, for another kind of batch. Not where it has another number of features than of places for them: that is
        for the model to say."""
        counts, precondition = visual.sum(1).tolist(), self._done.precondition
        return reason in (PADDING, FEWER, OTHER_SIZES, uneven(visual)) and any(map(self._dropped, counts)) and (
            precondition is None or precondition.features(inputs) == sum(counts))

    def _run_by_sample(
        self, reason: str, inputs: tuple[Any, ...], given: tuple[Any, ...], visual: torch.Tensor
    ) -> tuple[Any, str]:
        """What the graph returns, or why it cannot be had."""
        call = current_call()
        if not call.by_sample:
            return None, f"{reason} ({_OTHER_CACHE if call.is_watched else _REMEDY})"
        if call.mask_rows is not None and visual.shape[1] not in call.mask_rows:
            return None, (f"{reason}; and {_FAILS}: attention_mask has {max(call.mask_rows)} columns for {visual.shape[1]} rows,"
                          " so that later calls' cannot be put in place")
        try:
            if self._by_sample is None:
                parted = self._making.part(self._original, inputs, self._handed(given[-1]))
                self._by_sample = BySample(
                    parted, self._compile, self._making.prune, self._making.whole, self._making.sizes_vary,
                    self._options.overwrites)
            ran = self._by_sample(given, visual) if isinstance(self._by_sample, BySample) else None
        except NotRewritten:
            raise
        except Exception as error:  # whatever it is, the batch can run as it came
            why = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
            if isinstance(error, Refusal) and isinstance(self._by_sample, BySample):  # because of this prompt
                return None, f"{reason}; and {_FAILS}: {why}"
            self._by_sample, ran = f"{_FAILS}: {why}", None
        if ran is None:
            return None, f"{reason}; and {self._by_sample}"
        call.tell_record(ran.record)
        call.tell_pruning(visual.shape[1] - ran.rows.shape[1])
        call.rows = ran.rows
        note_short_caches(ran.outputs, self._caches & ran.of_decoder)
        return ran.outputs, ""

    def _for_handed(self, inputs: tuple[Any, ...]) -> Compiled | None:
        """For a graph that was compiled for a prompt into which nothing had been merged before, and now something has."""
        if self._position is not None or self._done.stream is None:
            return None
        visual = visual_rows(inputs[self._done.stream], receive=False)
        if visual is None:
            return None
        visual_rows(inputs[self._done.stream])  # taken, whatever becomes of it
        if self._further is None:
            done = self._making.rewrite(self._original, inputs, MergedInput(self._done.stream, visual))
            self._further = functools.partial(self._run_alone, done.report.reason) if done.module is None else Dispatch(
                done, None, self._original, self._options, self._done.stream, self._making, self._guarded)
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

    def _compile_for(self, count: int, inputs: Sequence[object], handed_mask: torch.Tensor) -> None:
        """Have a form for another number of visual tokens, or a reason why there is none, unless there are many already."""
        if len(self._by_count) >= _MOST_COUNTS:
            return
        done = self._rewrite(inputs, handed_mask)
        if done.module is None:
            self._refuse(count, done.report.reason)
        else:
            self._hold(done)

    def _number(self, count: int) -> int | None:
        """What forms are known by."""
        return None if self._done.precondition else count

    def _refuse(self, count: int, reason: str) -> None:
        number = self._number(count)
        self._by_count[number], self._refused[number] = None, reason

    def _begin(self, count: int, inputs: Sequence[object], handed_mask: torch.Tensor) -> None:
        """The first prompt of equal samples for a graph that was compiled for others."""
        done = self._rewrite(inputs, handed_mask)
        if done.module is None:
            self._refuse(count, done.report.reason)
        else:
            self._done, self._caches = done, cache_outputs(self._original, done.module)
            self._hold(done)

    def _rewrite(self, inputs: Sequence[object], handed_mask: torch.Tensor) -> Rewriting:
        return self._making.rewrite(self._original, inputs, self._handed(handed_mask))

    def _run_unrewritten(self, inputs: Sequence[object]) -> Any:
        """Compiled when first needed; Dynamo guards its sizes, which need not be those of the rewritten graph."""
        if self._unrewritten is None:
            self._unrewritten = self._compile(self._original)
        return self._unrewritten(*inputs)


class _LowerOnly:
    """A Dynamo backend that applies a lowering and nothing else."""

    __name__ = "parvts_lowering"

    def __init__(self, lower: Lower):
        self._lower = lower

    def __call__(self, module: GraphModule, example_inputs: Sequence[object]) -> Compiled:
        return self._lower(module, example_inputs)
