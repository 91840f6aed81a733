"""Kernels for a CPU share files: fewer files, the same numbers, and each by itself where anything stands in the way."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_cache

from parvts_fx import torch_private
from parvts_fx.backends import kernel_files
from parvts_fx.backends.lowering import lower
from parvts_fx.options import parse_options

GONE = "the bindings are gone"
BROKEN = ["the class is gone", GONE, "sources are not understood", "a file does not compile"]


def kernels(count: int) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """A kernel or two for each result: all sizes are different."""
    return lambda x: [(x[:, :size].sin() @ x[:size]).softmax(-1) for size in range(3, 3 + count)]


def drawn() -> torch.Tensor:
    return torch.randn(16, 16, generator=torch.Generator().manual_seed(0))


def compiled(count: int, lowering: Callable[..., Any]) -> tuple[list[torch.Tensor], list[int]]:
    """Results, and how many kernels each file in an empty cache holds."""
    torch.compiler.reset()
    with fresh_cache(), torch.no_grad():
        found = torch.compile(kernels(count), backend=lowering)(drawn())
        texts = [path.read_text() for path in Path(torch_private.inductor_cache_folder()).rglob("*.main.cpp")]
    return found, sorted(len(re.findall(r"^PyMODINIT_FUNC PyInit_", text, re.MULTILINE)) for text in texts)


def ours(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
    return lower(graph, inputs, parse_options({}))


def test_fewer_files_and_the_same_numbers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_files, "kernel_threads", lambda: 2)
    alone, files = compiled(8, "inductor")
    assert len(files) >= 8 and set(files) == {1}
    together, fewer = compiled(8, ours)
    assert len(fewer) == 2 and sum(fewer) == len(files)
    assert len(together) == len(alone) and all(torch.equal(one, other) for one, other in zip(together, alone))


@pytest.mark.parametrize("broken", [GONE, *(pytest.param(name, marks=pytest.mark.slow) for name in BROKEN if name != GONE)])
def test_each_by_itself_where_something_is_in_the_way(broken: str, monkeypatch: pytest.MonkeyPatch):
    def gone(*_: object) -> object:
        raise torch_private.TorchMoved("gone")

    if broken == "the class is gone":
        monkeypatch.setattr(torch_private, "kernel_compiler", lambda: None)
    elif broken == GONE:
        monkeypatch.setattr(kernel_files, "kernel_bindings", gone)
    elif broken == "sources are not understood":
        monkeypatch.setattr(kernel_files, "_parts", lambda source: None)
    else:
        monkeypatch.setattr(kernel_files, "_file", lambda part: "#error not a program")
    found, files = compiled(2, ours)
    torch.testing.assert_close(found, kernels(2)(drawn()))
    assert files.count(1) >= 3 and max(files) == 1


def test_sources_that_are_taken_together():
    kernel = '\n#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C"  void  kernel(float* out_ptr0)\n{\n}\n'
    assert kernel_files._parts(kernel) is not None
    assert kernel_files._parts("#include <ATen/record_function.h>\n" + kernel) is None
    assert kernel_files._parts(kernel + kernel.replace("#include", "//")) is None
    assert kernel_files._parts(kernel.replace('extern "C"', "")) is None


def test_inductors_class_is_left_as_it_was():
    module = sys.modules["torch._inductor.async_compile"]
    own = module.AsyncCompile
    with pytest.raises(ZeroDivisionError), kernel_files.kernels_share_files():
        assert module.AsyncCompile is not own and issubclass(module.AsyncCompile, own)
        raise ZeroDivisionError
    assert module.AsyncCompile is own
