"""In-place compilation and explanation of a model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule

from parvts_fx.backends.parvts import parvts
from parvts_fx.capture import capture
from parvts_fx.cost import CPU, NAMES, compare, count, named
from parvts_fx.errors import ParvtsWarning
from parvts_fx.options import SHORT_FORM, Options, parse_options
from parvts_fx.report import GraphReport, Report
from parvts_fx.rewritten import Rewriting
from parvts_fx.runtime.cached_rows import MASKS, MasksOfGenerate
from parvts_fx.runtime.compiled_call import watched_call
from parvts_fx.runtime.overrides import Forms, overriding
from parvts_fx.runtime.placement_hooks import close_hooks, hooks_opened, open_hooks
from parvts_fx.runtime.record import OnCall
from parvts_fx.runtime.watched_generate import WatchedGenerate, calls_forward
from parvts_fx.torch_private import surround_compiled_call, uncompiled_call

Model = TypeVar("Model", bound=torch.nn.Module)

_COPIER = "__deepcopy__"
"""Where copy.deepcopy looks, on the model itself."""

_COMPILE_ARGUMENTS = ("fullgraph", "dynamic", "disable")


def compile(model: Model, *, on_call: OnCall | None = None, **options: Any) -> Model:
    """Compile a model in place and return it, so that ``generate`` cannot run uncompiled by mistake.

    Unlike the plain backend, it has a say in how Dynamo captures the model, for the duration of each call and nowhere
    else: data-dependent checks stay in the graph, so that more models reach the backend in one piece, and many models
    may be compiled side by side. And it keeps the cache's count of seen tokens right (:mod:`parvts_fx.runtime.caches`), so that
    a conversation may go on from a pruned prompt.

    Args:
        model: any module whose forward merges visual features into a decoder's embeddings.
        on_call: called with a :class:`parvts_fx.CallRecord` behind every call of the model with a prompt: whether it was
            pruned, and why not.
        options: the fields of :class:`parvts_fx.Options`, what Inductor knows, and torch.compile's own ``fullgraph``,
            ``dynamic``, ``mode`` and ``disable``.

    Raises:
        TypeError: what is given is no module, or what torch.compile returns; or ``on_call`` cannot be called.
        ValueError: bad options, before anything is compiled.
    """
    _check_module(model, "compile")
    if isinstance(getattr(model, "_orig_mod", None), torch.nn.Module):
        raise TypeError("parvts_fx.compile: expected a model, got what torch.compile has made of one, whose generate is that of "
                        "the original and runs uncompiled. Give the model itself: parvts_fx.compile(model._orig_mod).")
    if on_call is not None and not callable(on_call):
        raise TypeError(f"parvts_fx.compile: on_call={on_call!r}: expected a callable that takes a parvts_fx.CallRecord")
    again = functools.partial(compile, on_call=on_call, **options)
    arguments = {name: options.pop(name) for name in _COMPILE_ARGUMENTS if name in options}
    mode = options.pop("mode", None)
    parsed = parse_options(options, mode)
    open_hooks(model)
    modules: list[Any] = [model, *_generating_parts(model)]
    for module in modules:
        own = on_call if module is model else None
        backend = _backend(parsed)
        module.compile(backend=backend, **arguments)
        surround_compiled_call(module, functools.partial(_with_forms, model, module, parsed, own, arguments, backend))
        if callable(getattr(type(module), "generate", None)):
            vars(module)[MASKS] = MasksOfGenerate(module)
            if _generating_parts(module) or not calls_forward(module):
                module.generate = WatchedGenerate(module, parsed, own)
    vars(model)[_COPIER] = _Copier(model, again)
    return model


def _backend(options: Options) -> Callable[..., Any]:
    return functools.partial(parvts, options=options, window_caches_follow=True)


def _with_forms(
    model: torch.nn.Module, module: torch.nn.Module, options: Options, on_call: OnCall | None, arguments: Mapping[str, Any],
    backend: Callable[..., Any], call: Callable[..., Any],
) -> Callable[..., Any]:
    """A module's compiled call, which follows what is overridden for the model."""
    watched = watched_call(call, options, module, on_call, disabled=bool(arguments.get("disable")),
                           anew=functools.partial(_compiled, module, backend, arguments))
    part = None if module is model else uncompiled_call(module)
    return Forms(model, part, watched, functools.partial(_form, module, on_call, arguments))


def _form(module: torch.nn.Module, on_call: OnCall | None, arguments: Mapping[str, Any], options: Options) -> Callable[..., Any]:
    """A compiled call of a module beside the one that it holds."""
    anew = functools.partial(_compiled, module, _backend(options), arguments)
    return watched_call(anew(), options, module, on_call, disabled=bool(arguments.get("disable")), anew=anew)


def _compiled(module: torch.nn.Module, backend: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """Another compiled call of a module each time: torch.compile tells them apart by their backends."""
    return torch.compile(uncompiled_call(module), backend=functools.partial(backend), **arguments)


@contextlib.contextmanager
def override(model: Model, **options: Any) -> Iterator[Model]:
    """Other options for the calls of a compiled model inside of a ``with`` statement: of one request, say.

    What was compiled for each choice is kept side by side, so that coming back to one compiles nothing. Contexts may be nested,
    and other threads see nothing of them. Options that say how much is kept, and by what, take the place of those that do in the
    options that the model was compiled with (``keep_tokens`` that of ``keep_ratio``, ``stages`` that of all of its short form).

    Args:
        model: compiled with :func:`compile`.
        options: the fields of :class:`parvts_fx.Options`.

    Raises:
        TypeError: what is given is no module.
        ValueError: it has not been compiled, or bad options.
    """
    _check_module(model, "override")
    copier = vars(model).get(_COPIER)
    if not isinstance(copier, _Copier):
        raise ValueError("parvts_fx.override: the model has not been compiled with parvts_fx.compile(model). Compile it first.")
    fixed = [name for name in options if name in (*_COMPILE_ARGUMENTS, "on_call")]
    if fixed:
        raise ValueError(f"parvts_fx.override: {fixed[0]} belongs to the whole model: give it to parvts_fx.compile.")
    with overriding(model, parse_options(copier.merged(options))):
        yield model


def uncompile(model: Model) -> Model:
    """Undo :func:`compile`: the model runs as it is again, from the next call on. Returns the model.

    For other options compile again; what was compiled before is not needed for that.

    Raises:
        TypeError: what is given is no module.
    """
    _check_module(model, "uncompile")
    close_hooks(model)
    parts: list[Any] = [model, *_generating_parts(model)]
    for module in parts:
        vars(module).pop("_compiled_call_impl", None)  # the class has None there
        vars(module).pop(_COPIER, None)
        if isinstance(vars(module).get("generate"), WatchedGenerate):
            del module.generate
        if isinstance(vars(module).get(MASKS), MasksOfGenerate):
            del vars(module)[MASKS]
    return model


class _Copier:
    """Makes copies of a compiled model that are compiled as it is; torch's own would run uncompiled, without a word.

    A model that is pickled comes back uncompiled, as from torch.compile: options may hold what no file can.
    """

    def __init__(self, model: torch.nn.Module, again: functools.partial[Any]):
        self._model, self._again = model, again

    def __call__(self, memo: dict[int, Any]) -> torch.nn.Module:
        vars(self._model).pop(_COPIER, None)
        try:
            made = copy.deepcopy(self._model, memo)
        finally:
            vars(self._model)[_COPIER] = self
        return self._again(made)

    def __reduce__(self) -> tuple[Any, ...]:
        return _without_copier, ()

    def merged(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that the model was compiled with, and others that take their place."""
        gone = {"stages"} if any(name in options for name in SHORT_FORM) else set()
        gone |= set(SHORT_FORM) if "stages" in options else {"keep_ratio", "keep_tokens"} if (
            {"keep_ratio", "keep_tokens"} & options.keys()) else set()
        own = {name: held for name, held in self._again.keywords.items() if name not in (*_COMPILE_ARGUMENTS, "on_call", *gone)}
        return {**own, **options}


def _without_copier() -> None:
    return None


def _check_module(model: object, name: str) -> None:
    if isinstance(model, torch.nn.Module):
        return
    what = "the class " + model.__name__ if isinstance(model, type) else "None" if model is None else repr(model)
    remedy = (f"Build the model first: parvts_fx.{name}({model.__name__}(...))." if isinstance(model, type) else
              'For a function use torch.compile(function, backend="parvts").' if callable(model) else
              "Give the model that is called, such as what from_pretrained returns.")
    raise TypeError(f"parvts_fx.{name}: expected a torch.nn.Module, got {what}. {remedy}")


def _generating_parts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules inside the model that can generate by themselves: the model's own ``generate`` may call theirs.

    The adapted model in a wrapper of PEFT's kind, the text model of some multimodal ones. Where the model's forward calls
    one, Dynamo traces through it as if it were not compiled.
    """
    return [part for part in model.modules() if part is not model and callable(getattr(type(part), "generate", None))]


def explain(
    model: torch.nn.Module, /, *args: Any, options: Mapping[str, Any] | None = None, processors: Sequence[str] | None = None,
    **inputs: Any,
) -> Report:
    """Trace one call of a model, and tell what the backend finds and does.

    Args:
        model: as for :func:`compile`; whatever it is compiled with stays in place.
        *args: what to call it with, as in ``model(*args, **inputs)``.
        **inputs: the same, by name.
        options: the backend's options; None for those that the model was compiled with by :func:`compile`, or else the defaults.
        processors: names of those for which the prefill's time is predicted (:func:`parvts_fx.cost.predict`); None for all that
            are known, and for the CPU where the prompt is on one, which is measured for some seconds, once a process.

    Returns:
        A record of every graph, with FLOPs before and after and what is predicted of them, and of everything that is merged into
        the prompt: its modality, what tells that, and whether its tokens may be pruned. ``print`` it for tables.

    Raises:
        ValueError: bad options, or an unknown processor.
    """
    names = _processors((*args, *inputs.values())) if processors is None else [named(name) for name in processors]
    copier = vars(model).get(_COPIER) if isinstance(model, torch.nn.Module) else None
    parsed = parse_options(copier.merged({}) if options is None and isinstance(copier, _Copier) else options)
    parsed = dataclasses.replace(parsed, strict=False)  # a refusal is told as well
    reports: list[GraphReport] = []

    def collect(module: GraphModule, example_inputs: Sequence[object], done: Rewriting) -> None:
        report = done.report
        if done.module is not None:
            before, after = count(capture(module, example_inputs)), count(done.module)
            report = dataclasses.replace(report, flops_before=before.flops, flops_after=after.flops,
                                         costs=compare(before, after, names, parsed.linear_kernels))
            if (reason := done.reason_against(example_inputs)) is not None:  # its samples are reported one by one
                report = GraphReport("unrewritten", reason, report.nodes, merges=report.merges)
        reports.append(report)

    traced = dataclasses.replace(parsed, lowering="eager", mode=None, lowering_options={})
    backend = functools.partial(parvts, options=traced, window_caches_follow=True, on_rewriting=collect)

    def compiled() -> Callable[..., Any]:
        reports.clear()
        return _compiled(model, backend, dict(dynamic=False))  # static sizes, so that every count is a number

    with torch.no_grad(), warnings.catch_warnings(), hooks_opened(model):
        warnings.simplefilter("ignore", ParvtsWarning)  # the report has the reason
        watched_call(compiled(), parsed, model, once=True, anew=compiled)(*args, **inputs)
    return Report(tuple(reports))


def _processors(given: Sequence[object]) -> Sequence[str]:
    """Those for which a call is predicted: all that are known, but for the CPU only where the call is on it."""
    elsewhere = any(isinstance(held, torch.Tensor) and held.device.type != "cpu" for held in given)
    return [name for name in NAMES if not (elsewhere and name == CPU)]
