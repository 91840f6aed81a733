"""Graphs that are compiled when a call first needs them: for all sizes that have names in them, at once, where these fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.fx import GraphModule

from parvts_fx.analysis.values import value
from parvts_fx.runtime.guards import sizes_fit
from parvts_fx.runtime.varying_sizes import compile_varying


def captured(function: Callable[..., Any], *given: Any) -> GraphModule:
    """The graph that Dynamo hands over for sizes and numbers that may be any."""
    graphs: list[GraphModule] = []

    def keep(module: GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch.compile(function, backend=keep, dynamic=True)(*given)
    return graphs[0]


def reshaped(x: Tensor, columns: int) -> Tensor:
    """A number that is also the size of an axis, as Dynamo sees it."""
    return (x * 2).reshape(-1, columns).cumsum(0)


def shifted(x: Tensor, offset: int) -> Tensor:
    """A number that no size tells, and that may be negative."""
    return x + torch.arange(x.shape[0])[:, None] * offset


def padded(x: Tensor, rows: int) -> Tensor:
    """A number that no size tells, and that is one."""
    return torch.cat([x, x.new_zeros(rows, x.shape[1])])


def inputs_of(graph: GraphModule, number: int = 0, **tensors: Tensor) -> list[Any]:
    """In the order in which the graph takes them."""
    held = {node.name.lower(): node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"}
    given = {f"l_{name}_": tensor for name, tensor in tensors.items()}
    sizes = {str(size): real for name, tensor in given.items() for size, real in zip(held[name].shape, tensor.shape)}
    return [given[name] if name in given else sizes.get(str(size), number) for name, size in held.items()]


@pytest.mark.parametrize("function, forms", [(reshaped, 1), (padded, 1), (shifted, 2)], ids=["size", "number", "any number"])
def test_any_sizes_from_the_first_call_on(function: Callable[..., Any], forms: int) -> None:
    """Numbers that may be negative take torch.compile's way: a constant at first."""
    graph, backend = captured(function, torch.randn(4, 6), 6), CompileCounter()
    compiled = compile_varying(graph, backend)
    for rows, columns, number in ((4, 6, 6), (8, 5, 5), (3, 9, 9), (7, 2, 2)):
        x = torch.randn(rows, columns)
        assert torch.equal(compiled(*inputs_of(graph, number, x=x))[0], function(x, number))
        assert not hasattr(x, "_dynamo_weak_dynamic_indices"), "the caller's tensors stay as they are"
    assert backend.frame_count == forms


def test_sizes_that_do_not_vary() -> None:
    graph = captured(lambda x: x + 1, torch.randn(1, 1))
    assert torch.equal(compile_varying(graph, CompileCounter())(torch.zeros(1, 1))[0], torch.ones(1, 1))


def test_what_is_written_into_an_input_is_seen() -> None:
    def write(x: Tensor, y: Tensor) -> Tensor:
        x.copy_(y)
        return x.sum()

    graph = captured(write, torch.zeros(3, 4), torch.ones(3, 4))
    compiled = compile_varying(graph, CompileCounter())
    for rows in (3, 5):
        x = torch.zeros(rows, 4)
        compiled(*inputs_of(graph, x=x, y=torch.ones(rows, 4)))
        assert bool((x == 1).all())


def test_sizes_that_fit() -> None:
    """Conditions on the names of sizes, for actual inputs; one that no input tells is not taken for granted."""
    graph = captured(lambda x, y: (x.sum(), y.sum()), torch.zeros(5, 3), torch.zeros(7))
    (rows, _), (size,) = (
        held.shape for node in graph.graph.nodes if node.op == "placeholder" and isinstance(held := value(node), Tensor))
    conditions = [(rows + 2 <= size).node.expr, (size // 2 > 1).node.expr]

    def given(x: Tensor, y: Tensor) -> list[Any]:
        return inputs_of(graph, x=x, y=y)

    fit = sizes_fit(graph, conditions)
    assert fit(given(torch.zeros(5, 3), torch.zeros(7))) and fit(given(torch.zeros(2, 3), torch.zeros(40)))
    assert not fit(given(torch.zeros(6, 3), torch.zeros(7))) and not fit(given(torch.zeros(0, 3), torch.zeros(3)))
    assert not sizes_fit(graph, [sympy.Symbol("u0") > 1])(given(torch.zeros(5, 3), torch.zeros(7)))
