"""Float32 matrix products on CPU: oneDNN's kernel in place of the BLAS library's, where it is measured to be quicker.

PyTorch hands float32 products to the BLAS that it was built with. MKL takes its AVX2 kernels on AMD processors, oneDNN
takes AVX-512 ones where the processor has them: twice as fast there, equal elsewhere. Which of the two is quicker is
measured when a graph is compiled, for the sizes in the graph.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from parvts_fx.analysis.values import hint, is_tensor, value
from parvts_fx.capture import copy_graph_module
from parvts_fx.torch_private import (
    FakeTensor,
    disable_current_modes,
    inductor_cache_folder,
    native_linear,
    onednn_linear,
    travels_with_caches,
)

LEAST_FLOPS = 1 << 24
"""Products smaller than this stay as they are: calls cost more than kernels there."""

_LEAST_GAIN = 1.15
"""Clearly quicker, so that the choice does not change from run to run (and compile caches hit)."""

_LEAST_TURNS, _MOST_TURNS, _ENOUGH = 4, 12, 0.15
"""Turns of a measurement, and the seconds behind which the least number will do."""

_ROWS, _MULTIPLICATIONS = 128, 1 << 30
"""Of more rows than the first only so many are measured as make up the second: the choice does not hang on the others."""

_LIBRARY = torch.library.Library("parvts_fx", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _like(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("linear", onednn_linear, "CPU")
torch.library.register_fake("parvts_fx::linear", _like, lib=_LIBRARY)


def pick_kernels(module: GraphModule) -> GraphModule:
    """Let the linear layers of a graph that runs on CPU use the quicker kernel.

    Returns:
        the module itself where nothing is to be gained, else a changed copy. Results differ by rounding.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        return module
    if any("autocast" in str(node.target) for node in module.graph.nodes):
        return module
    chosen = {node.name for node in module.graph.nodes if (sizes := _sizes(node)) is not None and prefers_onednn(*sizes)}
    if not chosen:
        return module
    copy = copy_graph_module(module)
    for node in list(copy.graph.nodes):
        if node.name in chosen:
            with copy.graph.inserting_before(node):
                new = copy.graph.call_function(torch.ops.parvts_fx.linear.default, _operands(node))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            copy.graph.erase_node(node)
    copy.recompile()
    return copy


def _operands(node: Node) -> tuple[Node, Node, Node | None]:
    named = dict(zip(("input", "weight", "bias"), node.args)) | node.kwargs
    return named["input"], named["weight"], named.get("bias")


def _sizes(node: Node) -> tuple[int, int, int, bool, int] | None:
    """(rows, columns, inner size, bias, threads) of a linear layer that may be changed; None for anything else."""
    if node.op != "call_function" or node.target not in (F.linear, native_linear):
        return None
    operands = [operand for operand in _operands(node) if operand is not None]
    if not all(is_tensor(operand) for operand in operands):
        return None
    tensors = [value(operand) for operand in operands]
    plain = (torch.Tensor, torch.nn.Parameter, FakeTensor)
    if any(type(t) not in plain or t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return None
    x, weight = tensors[:2]
    if x.dim() < 2 or weight.dim() != 2:
        return None
    rows, columns, inner = hint(x.numel() // x.shape[-1]), hint(weight.shape[0]), hint(weight.shape[1])
    if None in (rows, columns, inner) or 2 * rows * columns * inner < LEAST_FLOPS:
        return None
    return rows, columns, inner, len(operands) == 3, torch.get_num_threads()


def prefers_onednn(rows: int, columns: int, inner: int, bias: bool, threads: int) -> bool:
    """Whether oneDNN is clearly quicker for [rows, inner] times [columns, inner] transposed.

    Measured once and kept beside what Inductor has compiled: a choice that came out otherwise in the next process, where the two
    are about as quick, would have everything compiled again. It is also among what ``torch.compiler.save_cache_artifacts`` saves.
    """
    sizes = min(rows, max(_ROWS, _MULTIPLICATIONS // (columns * inner))), columns, inner, bias, threads
    name = _file(sizes)
    kept = Path(inductor_cache_folder()) / name
    try:
        found = bool(int(kept.read_text()))
    except (OSError, ValueError):  # not there, or another process is writing it
        found = _is_quicker(*sizes)
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(str(int(found)))
    travels_with_caches(name, int(found))
    return found


def _file(sizes: tuple[int, int, int, bool, int]) -> str:
    """In Inductor's cache folder: what was found for these sizes with this torch on this kind of processor."""
    machine = torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.machine(), os.cpu_count()
    return f"parvts_fx/linear/{hashlib.sha256(repr((machine, sizes)).encode()).hexdigest()}"


@functools.cache
def _is_quicker(rows: int, columns: int, inner: int, bias: bool, threads: int) -> bool:
    kernels = (F.linear, onednn_linear)
    taken: list[tuple[float, ...]] = []
    with torch.no_grad(), disable_current_modes():
        given = (torch.ones(rows, inner), torch.ones(columns, inner), torch.ones(columns) if bias else None)
        for kernel in kernels:
            kernel(*given)
        while len(taken) < _LEAST_TURNS or len(taken) < _MOST_TURNS and sum(map(sum, taken)) < _ENOUGH:
            taken.append(tuple(_seconds(kernel, *given) for kernel in kernels))  # in turns: others may use the processor
    usual, other = map(min, zip(*taken))
    return usual > _LEAST_GAIN * other


def _seconds(kernel: Callable[..., torch.Tensor], *given: torch.Tensor | None) -> float:
    start = time.perf_counter()
    kernel(*given)
    return time.perf_counter() - start
