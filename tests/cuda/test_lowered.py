"""What models become on an H100, compiled without one (``make check-cuda``)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import parvts_fx
from bench.cuda_kernels import build_model
from bench.models import Prefill, build_scene
from tests import llava
from tests.cuda.lowered import Lowered, lowering
from tests.models.generating import run_generate
from tests.models.installed import build
from tests.models.prompts import batch, mixed

ARCHITECTURES = ("llava", "llava_next", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "idefics3",
                 "mistral3", "qwen3_5", "kimi_k25", "qwen3_vl_moe")
OPTIONS = dict(keep_ratio=0.25, migration_depth=1, strict=True)


def lowered(model: Any, call: Callable[[Any], Any], **options: Any) -> tuple[list[Lowered], list[Lowered]]:
    """What Inductor alone makes of the graphs of a call, and what it makes of them through parvts, which prunes them."""
    plain, ours = [], []
    with lowering(plain) as backend, torch.no_grad():
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        twin.compile(backend=backend)
        call(twin)
    with lowering(ours), torch.no_grad():
        torch._dynamo.reset()
        call(parvts_fx.compile(model, **{**OPTIONS, **options}))
    assert parvts_fx.last_call(model).pruned
    return plain, ours


def all_fused(graphs: list[Lowered]) -> bool:
    return all(graph.cudnn + graph.efficient == graph.attention for graph in graphs)


def assert_as_good(plain: list[Lowered], ours: list[Lowered], is_decoder: bool = True) -> None:
    """Every attention call has a fused kernel where all of Inductor's have (heads of some widths have none), nothing keeps CUDA
    graphs away, and every kernel can be loaded.

    Args:
        is_decoder: whether nothing but the decoder is in the graphs. Towers that read sizes off tensors are left out of CUDA
            graphs by Inductor, which is no matter of the rewriting.
    """
    assert all_fused(ours) or not all_fused(plain)
    assert sum(graph.attention for graph in ours)
    assert not is_decoder or all(graph.no_graph_because is None for graph in ours)
    kernels = [kernel for graph in ours for kernel in graph.kernels]
    assert kernels and max(kernel.registers for kernel in kernels) <= 255
    assert max(kernel.shared for kernel in kernels) <= 227 * 1024


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    built = build(name)
    assert_as_good(*lowered(built.model, lambda model: run_generate(model, built.inputs, 2)), is_decoder=False)


@pytest.mark.parametrize("options", [dict(merge=None), dict(fusion=0.3), dict(paths="joint"), dict(dynamic=True)],
                         ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options(options: Mapping[str, Any], dtype: torch.dtype) -> None:
    model = llava.build(layers=3, head_dim=16).to(dtype)
    prompt = llava.prompt(model, [[3, "image", 5], [2, "image", 2]])
    features = torch.randn(int(prompt.visual.sum()), 48, dtype=dtype)
    found = lowered(Prefill(model), lambda prefill: prefill(prompt.inputs["input_ids"], features), **options)
    assert_as_good(*found, is_decoder="dynamic" not in options)  # there, numbers of the module are inputs that stay on CPU


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("samples", ["alike", "that differ"])
def test_batches(name: str, samples: str) -> None:
    built = build(name)
    given = batch(built.inputs) if samples == "alike" else mixed(built.inputs)[0]
    assert_as_good(*lowered(built.model, lambda model: run_generate(model, given, 2)), is_decoder=False)


@pytest.mark.parametrize("samples", [1, 2])
def test_real_sizes(samples: int) -> None:
    """576 visual tokens of width 4096, in bfloat16: sums over so many are split, and Inductor treats them in other ways."""
    model = build_model(layers=4, width=4096)
    scene = build_scene(model, 576, samples, tower=False)
    plain, ours = lowered(Prefill(model), lambda prefill: prefill(*scene.inputs), keep_ratio=1 / 9, migration_depth=3)
    assert_as_good(plain, ours)
    assert sum(graph.cudnn for graph in ours) >= sum(graph.cudnn for graph in plain) >= 4
