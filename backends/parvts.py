"""The torch.compile backend "parvts"."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from parvts_fx.backends.lowering import Compiled, lower
from parvts_fx.analysis.attention import attention_nodes
from parvts_fx.caches import note_short_caches, tell_pruning, watch_short_caches
from parvts_fx.capture import copy_graph_module
from parvts_fx.errors import NotRewritten, ParvtsWarning, Refusal
from parvts_fx.options import Options, parse_options
from parvts_fx.precondition import Precondition
from parvts_fx.report import GraphReport
from parvts_fx.rewriting import Rewriting, rewrite_graph


def parvts(
    module: GraphModule,
    example_inputs: Sequence[object],
    *,
    options: Options | Mapping[str, Any] | None = None,
    mode: str | None = None,
    window_caches_follow: bool = False,
    on_rewriting: Callable[[GraphModule, Sequence[object], Rewriting], None] | None = None,
) -> Compiled:
    """Rewrite a multimodal prefill with ParVTS and lower it; lower every other graph as it is.

    Registered with torch.compile as "parvts" through the package's entry point. Args as torch.compile passes them:
    ``options`` as in :class:`parvts_fx.Options`, ``mode`` for Inductor. ``window_caches_follow``: the caller corrects
    the token counts of sliding-window caches (as :func:`parvts_fx.compile` does). ``on_rewriting`` is told of every graph, its
    example inputs and what became of it.

    Errors in the options surface as a plain ValueError at the first call of the compiled model: raised in here, Dynamo
    would wrap them into its own error type and frames.
    """
    try:
        parsed = parse_options(options, mode)
        done = _attempt(module, example_inputs, parsed, window_caches_follow)
        if on_rewriting is not None:
            on_rewriting(module, example_inputs, done)
        if done.module is None:
            lowered = lower(module, example_inputs, parsed)
            return watch_short_caches(lowered) if _may_decode(module, window_caches_follow) else lowered
        return Dispatch(lower(done.module, example_inputs, parsed), done.precondition, module, parsed)
    except (ValueError, NotRewritten) as error:
        return _raise_at_call(error)


def _may_decode(module: GraphModule, window_caches_follow: bool) -> bool:
    """Whether a graph may go on from a shortened cache that nobody corrects: it has attention, and reads past keys."""
    return not window_caches_follow and bool(attention_nodes(module.graph))


def _attempt(
    module: GraphModule, example_inputs: Sequence[object], options: Options, window_caches_follow: bool
) -> Rewriting:
    """Rewrite, or say why not. The only place that catches everything: users keep their model, whatever breaks."""
    try:
        return rewrite_graph(module, example_inputs, options, window_caches_follow=window_caches_follow)
    except Refusal as refusal:
        reason = str(refusal)
        if options.strict:
            raise NotRewritten(f"parvts_fx: this multimodal prefill cannot be rewritten: {reason}") from refusal
    except ValueError as error:
        if str(error).startswith("parvts_fx: option"):
            raise
        reason = _failure(error, options)
    except Exception as error:
        reason = _failure(error, options)
    warnings.warn(f"parvts_fx: this multimodal prefill runs unrewritten: {reason}", ParvtsWarning, stacklevel=2)
    return Rewriting(GraphReport("unrewritten", reason, len(module.graph.nodes)))


def _failure(error: Exception, options: Options) -> str:
    """An error inside the rewriting itself: a defect of ours or of a third party's pass."""
    if options.strict:
        raise NotRewritten(f"parvts_fx: rewriting this multimodal prefill failed: {error}") from error
    return "the rewriting failed\n" + "".join(traceback.format_exception(error))


class Dispatch:
    """Runs the rewritten graph where it may be used for the prompt at hand, and the unrewritten one elsewhere."""

    def __init__(self, rewritten: Compiled, precondition: Precondition, original: GraphModule, options: Options):
        self._rewritten = rewritten
        self._precondition = precondition
        self._original = copy_graph_module(original)
        self._options = options
        self._unrewritten: Compiled | None = None

    def __call__(self, *inputs: object) -> object:
        visual = self._precondition.visual_tokens(inputs)
        dropped = visual - self._options.subject_count(visual)
        if dropped == 0:
            return self._run_unrewritten(inputs)
        reason = None
        if not self._precondition(*inputs):
            reason = "the samples of this batch have different numbers of visual tokens"
        elif _has_labels():
            reason = "labels are given, and a loss needs the logits of every position"
        if reason is None:
            outputs = self._rewritten(*inputs)
            tell_pruning(dropped)
            note_short_caches(outputs)
            return outputs
        if self._options.strict:
            raise NotRewritten(f"parvts_fx: this multimodal prefill cannot be rewritten: {reason}")
        warnings.warn(f"parvts_fx: this multimodal prefill runs unrewritten: {reason}", ParvtsWarning, stacklevel=2)
        return self._run_unrewritten(inputs)

    def _run_unrewritten(self, inputs: Sequence[object]) -> object:
        """Compiled when first needed; Dynamo guards its sizes, which need not be those of the rewritten graph."""
        if self._unrewritten is None:
            self._unrewritten = torch.compile(self._original, backend=_LowerOnly(self._options))
        return self._unrewritten(*inputs)


def _has_labels() -> bool:
    """Whether a forward() that is running was called with labels.

    Where the graph breaks behind the decoder, the loss is not in the graph, and no guard of it sees the labels: the
    callers' frames are all that tells.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if "forward" in frame.f_code.co_name and "labels" in frame.f_code.co_varnames:
            held = frame.f_locals
            if isinstance(held.get("self"), torch.nn.Module) and isinstance(held.get("labels"), torch.Tensor):
                return True
        frame = frame.f_back
    return False


class _LowerOnly:
    """A Dynamo backend that applies a lowering and nothing else."""

    __name__ = "parvts_lowering"

    def __init__(self, options: Options):
        self._options = options

    def __call__(self, module: GraphModule, example_inputs: Sequence[object]) -> Compiled:
        return lower(module, example_inputs, self._options)


def _raise_at_call(error: Exception) -> Compiled:
    def fail(*_: object) -> None:
        raise error.with_traceback(None)

    return fail
