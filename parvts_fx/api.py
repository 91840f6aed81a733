"""In-place compilation and explanation of a model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from parvts_fx.options import Options, parse_options
from parvts_fx.report import GraphReport, Report

Model = TypeVar("Model", bound=torch.nn.Module)

_COMPILE_ARGUMENTS = ("fullgraph", "dynamic", "disable")


def compile(model: Model, **options: Any) -> Model:
    """Compile a model in place and return it, so that ``generate`` cannot run uncompiled by mistake.

    Args:
        model: any module whose forward merges visual features into a decoder's embeddings.
        options: the fields of :class:`parvts_fx.Options`, what Inductor knows, and torch.compile's own ``fullgraph``,
            ``dynamic``, ``mode`` and ``disable``.

    Raises:
        ValueError: bad options, before anything is compiled.
    """
    arguments = {name: options.pop(name) for name in _COMPILE_ARGUMENTS if name in options}
    mode = options.pop("mode", None)
    parsed = parse_options(options, mode)
    backend = functools.partial(_backend(), options=parsed)
    model.compile(backend=backend, **arguments)
    return model


def _backend() -> Any:
    from parvts_fx.backends.parvts import parvts

    return parvts


def explain(model: torch.nn.Module, /, *args: Any, options: Mapping[str, Any] | None = None, **inputs: Any) -> Report:
    """Trace one call of a model, and tell what the backend finds and does.

    Args:
        model: as for :func:`compile`; whatever it is compiled with stays in place.
        args, inputs: what to call it with, as in ``model(*args, **inputs)``.
        options: the backend's options.

    Returns:
        A record of every graph, with FLOPs before and after; ``print`` it for tables.

    Raises:
        ValueError: bad options.
    """
    parsed = parse_options(options)
    reports: list[GraphReport] = []
    counted = dataclasses.replace(parsed, lowering=_CountFlops(reports), mode=None, lowering_options={})
    backend = functools.partial(_backend(), options=counted, on_report=reports.append)
    with torch.no_grad():
        torch.compile(model._call_impl, backend=backend)(*args, **inputs)
    return Report(tuple(reports))


class _CountFlops:
    """A lowering that runs eagerly and adds the graph's FLOPs to the newest report of a rewritten prefill."""

    __name__ = "count_flops"

    def __init__(self, reports: list[GraphReport]):
        self._reports = reports

    def __call__(self, module: GraphModule, example_inputs: list[object], **_: Any) -> Any:
        return module.forward


def count_flops(module: GraphModule) -> int:
    """Floating-point operations of a captured graph, by torch's FlopCounterMode on its fake example values."""
    from parvts_fx.analysis.values import fake_mode_of, value

    inputs = [value(node) for node in module.graph.nodes if node.op == "placeholder"]
    with fake_mode_of(module.graph), torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.fx.Interpreter(module).run(*inputs)
    return counter.get_total_flops()


__all__ = ["Options", "compile", "explain"]
