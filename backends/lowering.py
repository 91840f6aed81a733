"""Who compiles a graph: a small registry of lowerings, and every backend that torch knows."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from parvts_fx.backends.kernel_files import kernels_share_files
from parvts_fx.backends.linear import pick_kernels
from parvts_fx.backends.sizes import compile_with_names
from parvts_fx.backends.uncompiled import leave_choices_uncompiled
from parvts_fx.options import Options
from parvts_fx.torch_private import inductor_settings, name_sources, registered_backend, run_inductor, vector_instructions_probe

Compiled = Callable[..., Any]
Lowering = Callable[[GraphModule, Sequence[object], Options], Compiled]


_ON_CPU = {"realize_reads_threshold": 1, "aot_inductor.enable_line_tables": False}
"""Inductor's settings for graphs on CPU, where it has them; both for shorter compiling. A value that several kernels read
is written down, once, instead of computed again in each: then all layers share their kernels (residual sums, rotary
tables), a third less time. And the compiler writes no line tables for debuggers (the setting's name tells who asked for it
first), a fifth less of its time."""

_ON_GPU = {"triton.mix_order_reduction": False}
"""Sums over the width and over the tokens of one tensor as one kernel (for the gradients of norms): where one of them is read
twice, deciding about it fails an assertion inside Inductor, as with the distances of tokens from their mean at batch 1."""

_ON_GPU_VARYING = {"triton.coalesce_tiling_analysis": False}
"""How to tile kernels by their reads, which Inductor finds out for constant sizes alone: of sizes that are sums it asserts that a
product of them is written in one way."""


def inductor(module: GraphModule, example_inputs: Sequence[object], options: Options) -> Compiled:
    """Inductor's kernels, with torch.compile's modes and Inductor's own options."""
    if options.linear_kernels == "auto":
        module = pick_kernels(module)
    on_cpu = _on_cpu(example_inputs)
    ours = _ON_CPU if on_cpu else _ON_GPU | (_ON_GPU_VARYING if _vary(example_inputs) else {})
    settings = {**_known(ours), **options.lowering_options}

    def compile(graph: GraphModule, inputs: Sequence[object]) -> Compiled:
        if on_cpu:
            probe_processor().join()  # a check changes flags that all threads share: of two at once, wrong ones may be left
            with kernels_share_files():
                return run_inductor(leave_choices_uncompiled(graph), inputs, options.mode, settings)
        return run_inductor(graph, inputs, options.mode, settings)

    return compile_with_names(module, example_inputs, compile)


def prepare(example_inputs: Sequence[object], options: Options) -> None:
    """What may begin while a graph is still being rewritten."""
    if options.lowering == "inductor" and _on_cpu(example_inputs):
        probe_processor()


def _on_cpu(example_inputs: Sequence[object]) -> bool:
    return all(given.device.type == "cpu" for given in example_inputs if isinstance(given, torch.Tensor))


def _vary(example_inputs: Sequence[object]) -> bool:
    """Whether the sizes of inputs have names."""
    return any(isinstance(size, torch.SymInt) for given in example_inputs
               for size in (given.shape if isinstance(given, torch.Tensor) else [given]))


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the installed Inductor has: any other is an error to it."""
    listed = inductor_settings() or ()
    return {name: value for name, value in settings.items() if name in listed}


@functools.cache
def probe_processor() -> threading.Thread:
    """Let Inductor find out beside us which vector instructions its kernels may use; once a process.

    Where its cache is empty it compiles and loads a test program for each kind, about ten seconds in which nothing else
    happens. What is found stays in Inductor's cache.
    """
    find_out = vector_instructions_probe()

    def probe() -> None:
        with contextlib.suppress(Exception):  # Inductor meets it again, and tells
            find_out()

    thread = threading.Thread(target=probe, name="parvts_fx probe", daemon=True)
    thread.start()
    return thread


def eager(module: GraphModule, example_inputs: Sequence[object], options: Options) -> Compiled:
    """The graph as it is, node by node."""
    return module.forward


def tensorrt(module: GraphModule, example_inputs: Sequence[object], options: Options) -> Compiled:
    """torch-tensorrt's Dynamo backend; the package is imported only here."""
    try:
        importlib.import_module("torch_tensorrt")
    except ImportError as error:
        raise ValueError('parvts_fx: option lowering="tensorrt": torch-tensorrt is not installed. '
                         'Install the extra: pip install "parvts_fx[tensorrt]".') from error
    known = torch.compiler.list_backends(exclude_tags=())  # importing the package registers its backend, under both names of late
    name = next((name for name in ("torch_tensorrt", "tensorrt") if name in known), None)
    if name is None:
        raise ValueError('parvts_fx: option lowering="tensorrt": the installed torch_tensorrt registers no backend for '
                         "torch.compile. Install a version with the Dynamo frontend (2.1 or newer).")
    return registered_backend(name)(module, list(example_inputs), **_keywords(options))


_LOWERINGS: dict[str, Lowering] = {"inductor": inductor, "eager": eager, "tensorrt": tensorrt}


def known_lowerings() -> tuple[str, ...]:
    """Our own lowerings and every backend registered with torch.compile, parvts itself left out."""
    listed = torch.compiler.list_backends(exclude_tags=())
    return tuple(dict.fromkeys([*_LOWERINGS, *(name for name in listed if name != "parvts")]))


def lower(module: GraphModule, example_inputs: Sequence[object], options: Options) -> Compiled:
    """Compile a graph with the lowering that the options name."""
    name_sources(module)
    if callable(options.lowering):
        return options.lowering(module, list(example_inputs), **_keywords(options))
    if options.lowering in _LOWERINGS:
        return _LOWERINGS[options.lowering](module, example_inputs, options)
    return registered_backend(options.lowering)(module, list(example_inputs), **_keywords(options))


def _keywords(options: Options) -> dict[str, Any]:
    """What torch.compile would pass to a backend: mode and options where there are any."""
    keywords: dict[str, Any] = {}
    if options.mode not in (None, "default"):
        keywords["mode"] = options.mode
    if options.lowering_options:
        keywords["options"] = dict(options.lowering_options)
    return keywords
