"""Time, memory and FLOPs of one method on one scene, where its time goes, and the machine they were measured on."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._inductor.utils import fresh_cache
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.methods import LOWERINGS, Backend, Method, Recorder
from bench.models import Decode, Prefill, Scene, Tower, shallow_copy, step_positions
from parvts_fx.cost import count_flops


@dataclasses.dataclass
class Built:
    """A method, ready to run on a scene."""

    method: Method
    kept: int
    scene: Scene
    prefill: Callable[..., Any]
    tower: Callable[[torch.Tensor], torch.Tensor] | None = None
    decode: Callable[..., torch.Tensor] | None = None
    graph: torch.fx.GraphModule | None = None
    """What Inductor was given; None for what is not compiled."""

    compile_seconds: float | None = None
    """The first prefill, compilation included."""

    @property
    def flops(self) -> int | None:
        return None if self.graph is None else count_flops(self.graph, self.scene.first_visual)

    def run_prefill(self) -> tuple[torch.Tensor, Any]:
        """Logits and cache, from the scene's own features."""
        torch.compiler.cudagraph_mark_step_begin()  # the results of the call before may be overwritten
        return self.prefill(*self.scene.inputs)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one answer."""

    prefill: float
    first_token: float
    """Vision tower, prefill and the choice of the token."""

    step: float | None
    """One decode step, the average of all."""

    whole: float
    """From the pictures to the last token."""


def build(method: Method, scene: Scene, kept: int, *, backend: Backend = LOWERINGS["inductor"], fresh: bool = False) -> Built:
    """Compile a method's prefill for a scene, by calling it once.

    Args:
        fresh: start from empty Inductor caches, so that ``compile_seconds`` owes nothing to earlier compilations.
    """
    given = method.scene(scene, kept)
    recorder = Recorder(method.lowering(backend))
    call = method.compile(Prefill(given.model), recorder, kept, dynamic=False)
    built = Built(method, scene.visual if method.keeps_all else kept, given, call)
    with fresh_cache() if fresh else contextlib.nullcontext():
        first = seconds(built.run_prefill, given.ids.device)
    built.compile_seconds = first if method.compiled else None
    built.graph = recorder.graphs[0] if recorder.graphs else None
    return built


class Company:
    """What stands around the prefill, compiled once for all who share it: vision tower and decode step."""

    def __init__(self, backend: Backend = LOWERINGS["inductor"]):
        self._backend = backend
        self._towers: dict[tuple[bool, bool, torch.Size], Callable[..., Any]] = {}
        self._decodes: dict[tuple[bool, bool, bool], Callable[..., Any]] = {}

    def join(self, built: Built) -> Built:
        """Give a built method its tower and its decode step; what goes through parvts decodes through parvts."""
        method, scene = built.method, built.scene
        if scene.pixels is not None:
            key = (method.compiled, method.quicker_products, scene.pixels.shape)
            if key not in self._towers:
                tower = Tower(scene.model)
                if method.compiled:
                    tower = torch.compile(tower, backend=method.lowering(self._backend), dynamic=False)
                self._towers[key] = tower
            built.tower = self._towers[key]
        kind = (method.compiled, method.stages is not None, method.quicker_products)
        if kind not in self._decodes:
            self._decodes[kind] = method.compile(Decode(scene.model), method.lowering(self._backend), dynamic=True)
        built.decode = self._decodes[kind]
        return built


def answer(built: Built, tokens: int) -> tuple[Times, torch.Tensor]:
    """Answer the scene's prompts greedily with ``tokens`` new tokens each; returns them as [batch, tokens]."""
    scene, device = built.scene, built.scene.ids.device
    torch.compiler.cudagraph_mark_step_begin()
    synchronize(device)
    start = time.perf_counter()
    inputs = scene.inputs if built.tower is None else (scene.ids, built.tower(scene.pixels), *scene.inputs[2:])
    synchronize(device)
    seen = time.perf_counter()
    logits, cache = built.prefill(*inputs)
    synchronize(device)
    prefilled = time.perf_counter()
    chosen = [logits.argmax(-1, keepdim=True)]
    synchronize(device)
    first = time.perf_counter()
    cache = shallow_copy(cache)
    for step in range(tokens - 1):
        logits = built.decode(chosen[-1], step_positions(scene, step), cache)
        chosen.append(logits.argmax(-1, keepdim=True))
    synchronize(device)
    end = time.perf_counter()
    per_step = (end - first) / (tokens - 1) if tokens > 1 else None
    return Times(prefilled - seen, first - start, per_step, end - start), torch.cat(chosen, 1)


def in_turns(calls: Sequence[Callable[[], Any]], repeats: int, warm_up: int = 1,
             advance: Callable[[], None] = lambda: None) -> list[list[Any]]:
    """``repeats`` results of every call. They take turns, so that disturbances of the machine hit all alike."""
    results: list[list[Any]] = [[] for _ in calls]
    for turn in range(warm_up + repeats):
        for call, held in zip(calls, results):
            result = call()
            if turn >= warm_up:
                held.append(result)
        advance()
    return results


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median, least and greatest of repeated measurements; None where nothing was measured."""
    if not values or values[0] is None:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, with what it has started on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that a call holds at one time, beyond what is held before it; its result included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    del result
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


_ATTENTION = ("flash", "fmha", "attention", "sdpa", "cudnn_generated")
_PRODUCTS = ("gemm", "gemv", "cutlass", "nvjet", "splitk", "cublas", "::mm", "::addmm", "::bmm", "::linear", "_mm_")


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """Seconds of one call, by what ran."""

    products: float
    attention: float
    rest: float
    """On a GPU all other kernels; on a CPU all other time, for Inductor's own kernels are no events there."""

    idle: float
    """On a GPU the time in which no kernel ran (launches, synchronisation); 0 on a CPU."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All runs of one kernel, or on a CPU of one operator, in a call."""

    name: str
    runs: int
    seconds: float


def profile_call(call: Callable[[], Any], device: torch.device) -> tuple[Breakdown, list[Kernel]]:
    """Profile one call, after one to warm up; its whole time is taken without the profiler. The longest kernels come first."""
    call()
    whole = seconds(call, device)
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_device else [ProfilerActivity.CPU]
    with quiet_stderr(), profile(activities=activities) as record:
        seconds(call, device)
    parts = {"products": 0.0, "attention": 0.0, "rest": 0.0}
    kernels = [Kernel(event.key, event.count, 1e-6 * (event.self_device_time_total if on_device else event.self_cpu_time_total))
               for event in record.key_averages() if not on_device or event.device_type is DeviceType.CUDA]
    for kernel in kernels:
        parts[_kind(kernel.name)] += kernel.seconds
    kernels.sort(key=lambda kernel: -kernel.seconds)
    if on_device:
        return Breakdown(**parts, idle=max(0.0, whole - sum(parts.values()))), kernels
    parts["rest"] = max(0.0, whole - parts["products"] - parts["attention"])
    return Breakdown(**parts, idle=0.0), kernels


def _kind(name: str) -> str:
    """Which part a kernel or operator belongs to, by its name."""
    lowered = name.lower()
    if any(word in lowered for word in _ATTENTION):
        return "attention"
    return "products" if any(word in lowered for word in _PRODUCTS) and "triton" not in lowered else "rest"


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Kineto of late announces its start and stop on the process's standard error."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def many_compiles() -> Iterator[None]:
    """Let Dynamo compile one code object for as many methods and sizes as are compared."""
    with torch._dynamo.config.patch(recompile_limit=200, accumulated_recompile_limit=1000):
        yield


def in_own_process(module: str, *arguments: str, caches: str | None = None) -> str:
    """The last line that ``python -m module`` prints, in a fresh process with empty compile caches, or those of a folder.

    Raises:
        RuntimeError: it fails; with what it has said.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True,
                              env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches or folder})
    if done.returncode:
        raise RuntimeError(f"python -m {module} {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def ceilings(device: torch.device) -> dict[str, float]:
    """What a GPU does at best: FLOP/s of a product of large bfloat16 matrices, bytes/s of a large copy (read and written)."""
    left, right = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    held, other = torch.empty(2, 1 << 31, device=device, dtype=torch.uint8)
    product, copy = ([seconds(call, device) for _ in range(7)] for call in (
        lambda: [left @ right for _ in range(10)], lambda: [other.copy_(held) for _ in range(10)]))
    return {"products": 10 * 2 * 8192**3 / statistics.median(product), "copies": 10 * 2 * 2**31 / statistics.median(copy)}


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    listed = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.partition(":")[2].strip() for line in listed if line.startswith("model name")]
    found = {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found
