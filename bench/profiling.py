"""Where a prefill's time goes: matrix products, attention, everything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bench.measuring import quiet_stderr, seconds
from bench.tables import open_table

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

    def table_beside(self, plain: Breakdown, share: float) -> Table:
        """What is missing to the bound: each part beside ``share`` (of the FLOPs) of the same part of ``plain``."""
        table = open_table("Profile of the prefill", "ms", "inductor", "bound", "parvts", "missing")
        for field in dataclasses.fields(self):
            whole, ours = 1e3 * getattr(plain, field.name), 1e3 * getattr(self, field.name)
            table.add_row(field.name, *(f"{held:.2f}" for held in (whole, share * whole, ours, ours - share * whole)))
        return table


def profile_call(call: Callable[[], Any], device: torch.device) -> Breakdown:
    """Profile one call, after one to warm up; its whole time is taken without the profiler."""
    call()
    whole = seconds(call, device)
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_device else [ProfilerActivity.CPU]
    with quiet_stderr(), profile(activities=activities) as record:
        seconds(call, device)
    parts = {"products": 0.0, "attention": 0.0, "rest": 0.0}
    for event in record.key_averages():
        spent = 1e-6 * (event.self_device_time_total if on_device else event.self_cpu_time_total)
        parts[kind(event.key)] += spent
    if on_device:
        return Breakdown(**parts, idle=max(0.0, whole - sum(parts.values())))
    parts["rest"] = max(0.0, whole - parts["products"] - parts["attention"])
    return Breakdown(**parts, idle=0.0)


def kind(name: str) -> str:
    """Which part a kernel or operator belongs to, by its name."""
    lowered = name.lower()
    if any(word in lowered for word in _ATTENTION):
        return "attention"
    return "products" if any(word in lowered for word in _PRODUCTS) and "triton" not in lowered else "rest"
