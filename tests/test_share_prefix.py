"""The text in front of every image, computed once for both paths (constant fusion weights)."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule, Interpreter, Node

import parvts_fx
from parvts_fx.cost import count_flops
from tests import llava
from tests.comparing import assert_equal_prefill, expected, uncompile
from tests.test_dumps import attention_flops, linear_flops

OPTIONS = {"migration_depth": 2, "fusion": 0.3, "keep_tokens": 4}


@pytest.fixture(scope="module")
def model():
    return llava.build(layers=3)


class Recorder:
    """A lowering that runs prefills eagerly, and keeps them and the lengths of the prefixes that they share."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.shared: list[int] = []

    def __call__(self, module: GraphModule, example_inputs: list[object]):
        shared = self.shared

        class Reading(Interpreter):
            def run_node(self, node: Node) -> object:
                result = super().run_node(node)
                if node.target == "item" and type(result) is int:  # Dynamo captures a check of the inputs, too
                    shared.append(result)
                return result

        self.graphs.append(module)
        return lambda *inputs: Reading(module).run(*inputs)


def prefill(model: torch.nn.Module, prompt: llava.Prompt, **more: object) -> Recorder:
    """One prefill through parvts_fx.compile, held against the reference."""
    recorder, wanted = Recorder(), expected(model, prompt, **OPTIONS)
    torch._dynamo.reset()
    parvts_fx.compile(model, lowering=recorder, strict=True, **OPTIONS, **more)
    try:
        with torch.no_grad():
            assert_equal_prefill(model(**prompt.inputs), wanted)
    finally:
        uncompile(model)
    return recorder


@pytest.mark.slow
@pytest.mark.supports(
    "Options", "with constant weights, text in front of the images computed once; none where padding stands there")
@pytest.mark.parametrize("rows, shared", [
    ([[5, "image", 4]], 5), ([[5, "image", 4], [3, "image", 6]], 3), ([["image", 4]], 0), ([[5, "image"]], 4),
    ([[2, "image", 3, "image", 1]], 2), ([[3, "image", 6], [2, "image", 3]], 0),
], ids=["one image", "the shortest of a batch", "image first", "image last", "two images", "padding in front"])
def test_length_of_the_prefix(model, rows, shared):
    assert prefill(model, llava.prompt(model, rows)).shared == [shared]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_switched_off_the_same(attention):
    model = llava.build(layers=3, attention=attention)
    prompt = llava.prompt(model, [[5, "image", 4], [3, "image", 6]])
    assert prefill(model, prompt).shared == [3]
    assert prefill(model, prompt, share_prefix=False).shared == []


@pytest.mark.slow
def test_flops_against_a_closed_formula(model):
    """Every migration layer has as many rows less of path B as are shared, and no calls for them."""
    graph = prefill(model, llava.prompt(model, [[5, "image", 4]])).graphs[0]
    plain = prefill(model, llava.prompt(model, [[5, "image", 4]]), share_prefix=False).graphs[0]
    row = linear_flops(1, hidden=48, heads=4, groups=2, head_dim=12, width=56) + attention_flops(1, 21, 4, 12)
    assert count_flops(graph) == count_flops(plain)
    assert count_flops(plain) - count_flops(graph, shared_prefix=5) == 2 * 5 * row


def test_string_backend_shares_nothing_by_default(model):
    recorder, prompt = Recorder(), llava.prompt(model, [[5, "image", 4]])
    wanted = expected(model, prompt, **OPTIONS)
    torch._dynamo.reset()
    model.compile(backend="parvts", options={**OPTIONS, "lowering": recorder, "strict": True})
    try:
        with torch.no_grad():
            assert_equal_prefill(model(**prompt.inputs), wanted)
        assert recorder.shared == []
    finally:
        uncompile(model)
