"""The torch.compile backend "parvts"."""

from __future__ import annotations

import dataclasses
import functools
import traceback
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from parvts_fx.analysis.calls import attention_nodes
from parvts_fx.backends.lowering import Compiled, lower, prepare
from parvts_fx.capture import copy_graph_module
from parvts_fx.errors import BeginAgain, NamesAreNeeded, NotRewritten, Refusal, does_not_compile, tell_unrewritten
from parvts_fx.options import Options, parse_options
from parvts_fx.passes.parted import Parted
from parvts_fx.report import GraphReport
from parvts_fx.rewriting import part_graph, rewrite_graph
from parvts_fx.rewritten import Rewriting
from parvts_fx.runtime.caches import cache_outputs, watch_short_caches
from parvts_fx.runtime.call import current_call
from parvts_fx.runtime.dispatch import Dispatch
from parvts_fx.runtime.forms import Making
from parvts_fx.runtime.input_origins import noting_origins
from parvts_fx.runtime.merged_embeddings import MergedInput, hand_on
from parvts_fx.runtime.record import CallRecord
from parvts_fx.torch_private import (
    OF_TORCH,
    BackendCompilerFailed,
    TorchDynamoException,
    graph_breaks,
)


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
        prepare(example_inputs, parsed)
        handed = MergedInput.find(module, example_inputs)

        def attempt(module: GraphModule, inputs: Sequence[object], handed: MergedInput | None) -> Rewriting:
            return _attempt(module, inputs, parsed, window_caches_follow, handed).telling_rows()

        def divide(module: GraphModule, inputs: Sequence[object], handed: MergedInput | None) -> Parted:
            return part_graph(module, inputs, parsed, window_caches_follow, handed)

        def lower_as_asked(module: GraphModule, inputs: Sequence[object]) -> Compiled:
            return lower(module, inputs, parsed)

        done, caches = attempt(module, example_inputs, handed), cache_outputs(module)
        if on_rewriting is not None:
            on_rewriting(module, example_inputs, done)
        lowered = None
        if done.module is not None and handed is None and done.reason_against(example_inputs) is None:
            try:
                lowered = lower_as_asked(done.module, example_inputs)
            except Exception as error:
                done = _not_lowered(error, module, parsed)
        if done.may_fit_others:
            prune = functools.partial(_compile_sample, parsed, window_caches_follow, on_rewriting)
            whole = functools.partial(_lower_sample, parsed)
            vary = on_rewriting is None  # reports are of numbers
            making = Making(attempt, divide, lower_as_asked, prune, whole, sizes_vary=vary)
            dispatch = Dispatch(done, lowered, module, parsed, None if handed is None else handed.position, making)
            return watch_short_caches(dispatch, caches, counts_kept=window_caches_follow)
        if done.merge is not None:
            return hand_on(module, done, lambda copy: lower_as_asked(copy, example_inputs), handed, example_inputs)
        lowered = noting_origins(module, example_inputs, lower_as_asked(module, example_inputs))
        if done.report.status == "unrewritten" or done.report.visual_tokens or done.report.merges or handed:
            return _telling_merge(lowered, done.report.reason)
        if attention_nodes(module.graph):  # it may go on from a shortened cache whose count nobody corrects
            return watch_short_caches(lowered, caches, counts_kept=window_caches_follow)
        return lowered
    except BeginAgain:
        return _Again(module, functools.partial(parvts, options=options, mode=mode, window_caches_follow=window_caches_follow,
                                                on_rewriting=on_rewriting))
    except (ValueError, NotRewritten) as error:
        return _raise_at_call(error)


class _Again:
    """A graph for a call that may be captured better: where that has come to nothing, it is compiled as it is.

    Args:
        backend: this one, as it was called.
    """

    def __init__(self, module: GraphModule, backend: Callable[..., Compiled]):
        self._module, self._backend = copy_graph_module(module), backend
        self._compiled: Compiled | None = None

    def __call__(self, *inputs: Any) -> Any:
        if self._compiled is None:
            if current_call().can_begin_again():
                raise BeginAgain
            self._compiled = torch.compile(self._module, backend=self._backend)
        return self._compiled(*inputs)


_ADVICE = " (parvts_fx.compile(model) captures more in one graph)"

_SAMPLES: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()
"""Compiled decoders of one sample, by what is done with them and what the graph says."""


def _compile_sample(
    options: Options, window_caches_follow: bool, on_rewriting: Callable[..., None] | None, module: GraphModule
) -> Compiled:
    """One sample's decoder: all that is merged into its embeddings is to be pruned, whatever it was."""
    def backend(graph: GraphModule, example_inputs: Sequence[object]) -> Compiled:
        return parvts(graph, example_inputs, options=dataclasses.replace(options, prune="all"),  # keeps the options' id, too
                      window_caches_follow=window_caches_follow, on_rewriting=on_rewriting)

    return _shared(module, ("pruned", id(options)), backend, dynamic=None if on_rewriting is None else False)


def _lower_sample(options: Options, module: GraphModule) -> Compiled:
    """The same decoder as it is, for text alone."""
    def backend(graph: GraphModule, example_inputs: Sequence[object]) -> Compiled:
        return lower(graph, example_inputs, options)

    return _shared(module, ("whole", id(options)), backend)


def _shared(module: GraphModule, what: Hashable, backend: Callable[..., Compiled], dynamic: bool | None = None) -> Compiled:
    """A sample's decoder, compiled once for all graphs that were captured for batches of different sizes: they have the same
    one, as a rule."""
    if any(node.op in ("get_attr", "call_module") for node in module.graph.nodes):
        return torch.compile(module, backend=backend, dynamic=dynamic)
    key = what, dynamic, _written(module.graph)
    compiled = _SAMPLES.get(key)
    if compiled is None:
        compiled = _SAMPLES[key] = torch.compile(module, backend=backend, dynamic=dynamic)
    return compiled


def _written(graph: Graph) -> tuple[Any, ...]:
    """What a graph says, whatever its nodes are called."""
    places = {node: f"%{place}" for place, node in enumerate(graph.nodes)}

    def said(leaf: Any) -> str:
        return places[leaf] if isinstance(leaf, Node) else repr(leaf)

    return tuple((node.op, "" if node.op == "placeholder" else node.target, str(map_aggregate((node.args, node.kwargs), said)))
                 for node in graph.nodes)


def _telling_merge(lowered: Compiled, reason: str) -> Compiled:
    def telling(*inputs: object) -> object:
        current_call().tell_merge()
        current_call().tell_record(CallRecord(False, reason))
        return lowered(*inputs)

    return telling


def _attempt(
    module: GraphModule, example_inputs: Sequence[object], options: Options, window_caches_follow: bool,
    handed: MergedInput | None,
) -> Rewriting:
    """Rewrite, or say why not. The only place that catches everything: users keep their model, whatever breaks.

    Raises:
        NamesAreNeeded: whoever has made the call is to have it captured again.
    """
    try:
        return rewrite_graph(
            module, example_inputs, options, window_caches_follow=window_caches_follow, handed=handed, may_wait=True)
    except Refusal as refusal:
        if current_call().can_begin_again():
            raise BeginAgain from refusal
        reason = str(refusal) + (_what_has_broken_it() if refusal.broken_off else "")
        if refusal.names_tell and current_call().names_sizes:
            raise NamesAreNeeded(reason) from refusal
        if options.strict:
            raise NotRewritten.because(reason) from refusal
    except ValueError as error:
        if str(error).startswith("parvts_fx: option"):
            raise
        reason = _failure(error, options)
    except Exception as error:
        reason = _failure(error, options)
    tell_unrewritten(reason)
    return Rewriting(GraphReport("unrewritten", reason, len(module.graph.nodes)))


def _what_has_broken_it() -> str:
    """What Dynamo says it has ended the graph for that it has just handed over, and what may keep it from that."""
    call = current_call()
    found = [cause for cause in graph_breaks(call.breaks_before) if cause.where != OF_TORCH]
    said = f"; {found[-1].what}, in {found[-1].where}" if found else ""
    return said + ("" if call.is_watched else _ADVICE)


def _failure(error: Exception, options: Options) -> str:
    """An error inside the rewriting itself: a defect of ours or of a third party's pass."""
    if options.strict:
        raise NotRewritten(f"parvts_fx: rewriting this multimodal prefill failed: {error}") from error
    return "the rewriting failed\n" + "".join(traceback.format_exception(error))


def _not_lowered(error: Exception, module: GraphModule, options: Options) -> Rewriting:
    """The compiler behind us fails on the rewritten graph: the graph as it came may be one that it can compile.

    Raises:
        Exception: with ``strict``, what it says; and what it is not to be kept from (Dynamo begins anew by raising).
    """
    of_dynamo = isinstance(error, TorchDynamoException) and not isinstance(error, BackendCompilerFailed)
    if options.strict or of_dynamo or str(error).startswith("parvts_fx: option"):
        raise error
    reason = does_not_compile(error)
    tell_unrewritten(reason)
    return Rewriting(GraphReport("unrewritten", reason, len(module.graph.nodes)))


def _raise_at_call(error: Exception) -> Compiled:
    def fail(*_: object) -> None:
        raise error.with_traceback(None)

    return fail
