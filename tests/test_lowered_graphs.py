"""What becomes of a rewritten graph on its way to Inductor: sizes get names, and what chooses stays uncompiled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from parvts_fx.analysis.values import value
from parvts_fx.backends import uncompiled
from parvts_fx.backends.sizes import compile_with_names
from parvts_fx.backends.uncompiled import leave_choices_uncompiled
from parvts_fx.capture.editing import CHOOSES, Editor
from parvts_fx.stages import Stage, counts_left
from tests.plain import Plain, Specification, prompt
from tests.plain_reference import largest_error, reference

SPECIFICATION = Specification(layers=3, attention="masked", numbering="mask", visual=8, length=19)
STAGES = (Stage(keep=0.6, migrate=1, rule="norm", merge="clusters"), Stage(at=1, keep=0.3, rule="last_row", migrate=1))
TOLERANCE = 2e-5


class Lowering:
    """One that keeps what it was given, and runs it operation by operation."""

    def __init__(self, change: Callable[..., Any]):
        self._change = change
        self.graphs: list[GraphModule] = []
        self.inputs: list[Sequence[Any]] = []

    def __call__(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return self._change(module, example_inputs, self._keep)

    def _keep(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs.append(module)
        self.inputs.append(example_inputs)
        return module.forward


def names_in(held: Any) -> set[str]:
    sizes = held.shape if isinstance(held, torch.Tensor) else [held]
    return {str(symbol) for size in sizes if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.supports("torch.compile", "prompts of any length, numbers of rows as sums of positive ones")
@pytest.mark.parametrize("stages", [STAGES, (Stage(keep=3, migrate=1, rule="norm"),)], ids=["two shares", "one count"])
def test_numbers_of_rows_are_sums_of_names(stages: tuple[Stage, ...]) -> None:
    """One form for prompts of other lengths and numbers of visual tokens, right for each; none of it is assumed unguarded."""
    model, lowering = Plain(SPECIFICATION), Lowering(compile_with_names)
    options = {"stages": stages, "lowering": lowering, "strict": True}
    fast = torch.compile(model, backend="parvts", options=options, dynamic=True)
    for number, (length, visual) in enumerate([(19, 8), (25, 11), (40, 20), (23, 12)]):
        given = prompt(dataclasses.replace(SPECIFICATION, length=length, visual=visual))
        with torch.no_grad():
            assert largest_error(fast(*given.arguments), reference(model, given, stages=stages)) < TOLERANCE
        assert len(lowering.graphs) == 1, f"prompt {number} has compiled again"
    (inputs,) = lowering.inputs
    named = [held for held in inputs if isinstance(held, torch.SymInt) and held.node.expr.is_Symbol]
    assert len(named) == len(stages) + 2, "text, kept ones, those that each stage drops"
    own = {name for held in named for name in names_in(held)}
    rows = [held.shape[1] for held in inputs if isinstance(held, torch.Tensor) and held.dtype == torch.int64 and held.dim() == 2]
    assert rows and all(set(map(str, size.node.expr.free_symbols)) == own for size in rows)
    assert all(str(factor) == "1" for size in rows for factor in size.node.expr.as_coefficients_dict().values())


@pytest.mark.slow
def test_a_prompt_that_a_name_cannot_stand_for_compiles_again() -> None:
    """A name stands for at least 2, which is guarded: two visual tokens of which one stays run another form."""
    model, lowering, stages = Plain(SPECIFICATION), Lowering(compile_with_names), (dataclasses.replace(STAGES[0], keep=0.3),)
    options = {"stages": stages, "lowering": lowering, "strict": True}
    fast = torch.compile(model, backend="parvts", options=options, dynamic=True)
    for length, visual in ((19, 8), (25, 2), (24, 9)):
        given = prompt(dataclasses.replace(SPECIFICATION, length=length, visual=visual))
        with torch.no_grad():
            assert largest_error(fast(*given.arguments), reference(model, given, stages=stages)) < TOLERANCE
    assert len(lowering.graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_chooses_is_one_operation(dynamic: bool) -> None:
    model = Plain(SPECIFICATION)

    def change(module: GraphModule, inputs: Sequence[Any], keep: Callable[..., Any]) -> Callable[..., Any]:
        before.append(len(module.graph.nodes))
        return compile_with_names(module, inputs, lambda graph, given: keep(leave_choices_uncompiled(graph), given))

    before: list[int] = []
    lowering = Lowering(change)
    fast = torch.compile(model, backend="parvts", options={"stages": STAGES, "lowering": lowering}, dynamic=dynamic)
    given = prompt(SPECIFICATION)
    with torch.no_grad():
        assert largest_error(fast(*given.arguments), reference(model, given, stages=STAGES)) < TOLERANCE
    (graph,) = lowering.graphs
    calls = [node for node in graph.graph.nodes if node.target is torch.ops.parvts_fx.uncompiled.default]
    left = [node for node in graph.graph.nodes if CHOOSES in node.meta and node.op == "call_function" and isinstance(
        value(node), torch.Tensor) and not any(source in calls for source in node.all_input_nodes)]
    assert 2 <= len(calls) <= 10 and len(graph.graph.nodes) < 0.8 * before[0] and len(left) < 20
    assert all(node.args[0] in uncompiled._regions for node in calls)


def test_results_share_no_memory() -> None:
    """A region may give a view of what it reads, or one tensor twice; an operation may not."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(2, 3)
    last = x
    for _ in range(3):
        last = graph.call_function(torch.ops.aten.t.default, (last,))
        last.meta |= {"example_value": value(last.args[0]).t(), CHOOSES: True}
    graph.output((last, last))
    module = leave_choices_uncompiled(GraphModule(torch.nn.Module(), graph))
    given = torch.randn(2, 3)
    first, second = module(given)
    assert torch.equal(first, given.t()) and torch.equal(second, given.t())
    first.zero_()
    assert given.abs().min() > 0


@pytest.mark.parametrize("writes", [False, True])
def test_what_is_traced_works_on_any_layout(writes: bool) -> None:
    """But for what writes into a view: it is to be seen in what is viewed."""
    def function(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        rows = x.view(8, 3)
        if writes:
            rows.mul_(3.0)
        return x + rows.sum()

    given, graph, same = torch.randn(4, 2, 3).transpose(0, 1), torch.fx.Graph(), torch.fx.Graph()
    x, other = graph.placeholder("x"), same.placeholder("x")
    x.meta["example_value"] = other.meta["example_value"] = FakeTensorMode().from_tensor(torch.ones(2, 4, 3))
    same.output(other)
    graph.output(Editor(GraphModule(torch.nn.Module(), same), graph).inline(function, x))
    module = GraphModule(torch.nn.Module(), graph)
    if writes:
        given = given.contiguous()
    torch.testing.assert_close(module(given), function(given.contiguous()))
    assert any(node.target is torch.ops.aten.view.default for node in graph.nodes) == writes


@pytest.mark.slow
def test_whole_numbers_round_as_floating_point_ones_do() -> None:
    """Where they do not, as for 0.29 of 50, the graph computes in floating-point numbers."""
    shares = [times / parts for parts in (3, 7, 9, 10, 50, 100) for times in range(1, parts + 1)]
    environment = torch.fx.experimental.symbolic_shapes.ShapeEnv()
    for share in shares:
        for count in (1, 2, 5, 50, 576):
            size = environment.create_unspecified_symint_and_symbol(
                count, torch._dynamo.source.ConstantSource(f"size_{share}_{count}"), torch.fx.experimental.symbolic_shapes.
                DimDynamic.DYNAMIC)
            kept = counts_left((Stage(keep=share),), size)[-1]
            assert kept.node.hint == max(1, math.floor(share * count + 0.5)), (share, count)
