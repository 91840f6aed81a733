"""Graphs lowered for a GPU on a machine that has none: by Inductor, for an H100, down to what the GPU would load.

What a model's own graphs, captured and rewritten on CPU, become is asked of the compilers themselves: inputs are fake tensors on
"cuda", the device's properties and Triton's driver are an H100's, scaled_dot_product_attention is lowered to the kernel that
torch would choose there, Inductor stops where it would load its module, and every Triton kernel is compiled by Triton's own
compiler. Numbers are not computed. It needs a build of torch for CUDA; nothing of it stays changed behind :func:`lowering`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map

from parvts_fx.backends import lowering as lowerings
from parvts_fx.capture import copy_graph_module

H100 = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, warp_size=32, max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536, total_memory=80 << 30, max_threads_per_block=1024, gcnArchName="", L2_cache_size=50 << 20,
    shared_memory_per_block_optin=232448, shared_memory_per_block=49152, shared_memory_per_multiprocessor=233472)
_CALLS = {
    "products": ("extern_kernels.mm(", "extern_kernels.addmm(", "extern_kernels.bmm(", "extern_kernels.baddbmm("),
    "cudnn": ("_scaled_dot_product_cudnn_attention.default(",),
    "efficient": ("_scaled_dot_product_efficient_attention.default(",),
}

_GPU = torch.device("cuda", 0)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Triton kernel as it would be loaded."""

    name: str
    registers: int
    """Of each thread."""

    stack: int
    """Bytes of each thread that lie in memory: arrays, and what there is no register for."""

    shared: int
    """Bytes of each block."""


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What became of one graph."""

    kernels: tuple[Kernel, ...]
    launches: int
    """Of Triton's kernels."""

    attention: int
    """Attention calls in the graph."""

    products: int
    """Calls of cuBLAS."""

    cudnn: int
    """Attention calls by cuDNN's kernel."""

    efficient: int
    """Attention calls by the memory-efficient kernel."""

    no_graph_because: str | None
    """What keeps CUDA graphs from being used."""


class _Stopped(Exception):
    """Inductor has written its code."""


class _Driver:
    """Triton's view of the GPU."""

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
    get_device_interface = staticmethod(lambda: torch.cuda)
    set_current_device = staticmethod(lambda device: None)
    is_active = staticmethod(lambda: True)

    @staticmethod
    def get_current_target() -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def lowering(seen: list[Lowered]) -> Iterator[Callable[..., Any]]:
    """While active, the lowering "inductor" of parvts_fx notes what a graph becomes on an H100 and runs it as it is.

    Yields:
        a backend of torch.compile's that does the same with graphs as they come.
    """
    def note(module: GraphModule, inputs: Sequence[Any], mode: str | None, settings: dict[str, Any]) -> Callable[..., Any]:
        seen.extend(_lower(module, inputs, settings))
        return module.forward

    with mock.patch.multiple(lowerings, run_inductor=note, _on_cpu=lambda _: False):
        yield lambda module, inputs: note(module, inputs, None, {})


def _lower(module: GraphModule, inputs: Sequence[Any], settings: dict[str, Any]) -> list[Lowered]:
    """None for a graph that Inductor has nothing to write for."""
    from torch._inductor.compile_fx import compile_fx

    written: list[tuple[str, str | None]] = []
    with _an_h100(written), contextlib.suppress(_Stopped), torch.no_grad():
        try:
            given = [held if isinstance(held, torch.Tensor) and held.dtype == torch.float64 and not held.dim() else _moved(held)
                     for held in inputs]  # a number that varies is held by a tensor on CPU, whatever the model is on
            compile_fx(_on_cuda(module), given, config_patches=settings)
        except Exception as error:
            if not written:
                raise
            if not isinstance(error.__cause__ or error, _Stopped) and "_Stopped" not in repr(error):
                raise
    calls = sum(node.target is torch.nn.functional.scaled_dot_product_attention for node in module.graph.nodes)
    return [_counted(source, reason, calls) for source, reason in written]


def _counted(source: str, reason: str | None, attention: int) -> Lowered:
    names = re.findall(r"async_compile\.triton\('(\w+)'", source)
    counts = {kind: sum(source.count(call) for call in calls) for kind, calls in _CALLS.items()}
    return Lowered(tuple(_kernels(source)), sum(source.count(f"{name}.run(") for name in names), attention,
                   **counts, no_graph_because=reason)


def _moved(held: Any) -> Any:
    """The same tensor on the GPU, without data; and devices."""
    if isinstance(held, torch.Tensor):
        mode = held.fake_mode if isinstance(held, FakeTensor) else torch._guards.detect_fake_mode()
        with mode or contextlib.nullcontext():
            return torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="cuda")
    return _GPU if isinstance(held, torch.device) or isinstance(held, str) and held == "cpu" else held


def _on_cuda(module: GraphModule) -> GraphModule:
    """A copy of a graph that makes on the GPU what it makes."""
    copy = copy_graph_module(module)
    for node in copy.graph.nodes:
        node.args, node.kwargs = tree_map(_moved, (node.args, node.kwargs))
        if node.target is torch.tensor:  # makes real numbers first, and moves them
            node.target, held = torch.full, torch.tensor(node.args[0])
            node.args, node.kwargs = (tuple(held.shape), 0), {"dtype": held.dtype, "device": _GPU, **node.kwargs}
        if node.op == "get_attr" and isinstance(held := getattr(module, node.target, None), torch.Tensor):
            delattr(copy, node.target)
            setattr(copy, node.target, _moved(held))
    copy.recompile()
    return copy


@contextlib.contextmanager
def _an_h100(written: list[tuple[str, str | None]]) -> Iterator[None]:
    """Let torch and Triton believe that there is one, and Inductor write down its code, with what keeps CUDA graphs away."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.cudagraph_utils import check_multiple_devices_or_any_cpu_nodes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.utils import get_first_incompatible_cudagraph_node
    from torch.utils._triton import has_triton
    from triton.runtime import driver

    def stop(graph: Any) -> None:
        source = graph.codegen()[0].value
        node = get_first_incompatible_cudagraph_node(graph.orig_gm)
        reason = check_multiple_devices_or_any_cpu_nodes(graph.device_node_mapping) or (node and str(node)) or \
            graph.disable_cudagraphs_reason
        written.append((source, reason))
        raise _Stopped

    fixed = {
        torch.cuda: dict(get_device_properties=lambda device=None: H100, get_device_capability=lambda device=None: (9, 0),
                         current_device=lambda: 0, device_count=lambda: 1, synchronize=lambda *_: None,
                         _lazy_init=lambda *_: None),
        CudaInterface: dict(
            get_device_properties=staticmethod(lambda device=None: H100), current_device=staticmethod(lambda: 0),
            is_bf16_supported=staticmethod(lambda *_, **__: True), is_available=staticmethod(lambda: True),
            get_compute_capability=staticmethod(lambda device=None: 90)),
        CudaInterface.Worker: dict(get_device_properties=staticmethod(lambda device=None: H100),
                                   current_device=staticmethod(lambda: 0)),
        GraphLowering: dict(compile_to_module=stop),
    }
    quick = dict(joint_graph_constant_folding=False, fx_graph_cache=False, compile_threads=1, shape_padding=False,
                 use_static_cuda_launcher=False)
    attention = torch.ops.aten.scaled_dot_product_attention.default
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    before, had = attention.py_kernels.get(key), driver._active
    with contextlib.ExitStack() as stack:
        for holder, names in fixed.items():
            stack.enter_context(mock.patch.multiple(holder, **names))
        stack.enter_context(config.patch(**quick))
        has_triton.cache_clear()  # asked before, it would know better
        stack.callback(has_triton.cache_clear)
        driver.set_active(_Driver())
        stack.callback(setattr, driver, "_active", had)
        attention.py_kernels[key] = _attention
        attention._dispatch_cache.clear()
        stack.callback(attention._dispatch_cache.clear)
        stack.callback(lambda: attention.py_kernels.pop(key) if before is None else attention.py_kernels.update({key: before}))
        yield


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
               enable_gqa: bool = False) -> torch.Tensor:
    """As torch chooses on Hopper (seen with 2.11 on an H200): cuDNN's kernel for half precision, with masks and without; the
    memory-efficient one for float32; products and a softmax where an axis of the heads is not aligned."""
    if enable_gqa and key.shape[1] != query.shape[1]:
        key, value = (held.repeat_interleave(query.shape[1] // held.shape[1], 1) for held in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~attn_mask, float("-inf"))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    sizes, half = {query.shape[-1], value.shape[-1]}, query.dtype in (torch.bfloat16, torch.float16)
    if half and all(size % 8 == 0 and size <= 128 for size in sizes):
        return torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, attn_mask, False, dropout_p, is_causal, False, scale=scale)[0]
    if all(size * query.element_size() % 16 == 0 for size in sizes):
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]


def _kernels(source: str) -> Iterator[Kernel]:
    """Every Triton kernel of Inductor's output, its first configuration compiled.

    Raises:
        Exception: what Triton's compiler says.
    """
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._inductor.runtime.triton_heuristics as heuristics
    from torch._inductor.codecache import PyCodeCache

    with _an_h100([]), mock.patch.object(helpers, "set_driver_to_gpu", lambda: None), \
            mock.patch.object(heuristics, "set_driver_to_gpu", lambda: None, create=True):
        for name, code in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", source, re.S):
            kernel = getattr(PyCodeCache.load(code), name)
            binary = kernel._precompile_config(kernel.configs[0]).kernel
            registers, stack = _resources(binary.asm["cubin"])
            yield Kernel(name, registers, stack, binary.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of the stack, of a kernel's threads."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, = re.findall(r"REG:(\d+)", told.stdout)
    stack, = re.findall(r"STACK:(\d+)", told.stdout)
    return int(registers), int(stack)
