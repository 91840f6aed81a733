"""The model of cost: what is counted, and what is predicted from it. Times that are measured have no place here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import parvts_fx
from bench import compare, figures
from bench.cost import COMPARED, Layout, on_cpu
from bench.flops import CONFIGURATIONS, capture_prefill, rewrite
from parvts_fx.capture import capture
from parvts_fx.cost import GPUS, NAMES, Tally, count, cpu, named, predict, telling
from parvts_fx.options import parse_options
from tests import llava
from tests.plain import Plain, Specification, prompt

H100 = "NVIDIA H100"
ROWS, WIDTH, INNER = 24, 16, 40
FLOAT = 4


def traced(module: nn.Module | Any, *inputs: Tensor) -> Tally:
    return count(capture(torch.fx.symbolic_trace(module), inputs))


class Block(nn.Module):
    """A norm, a gated feed-forward, and the residual: three products with two fused kernels around them, and the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(INNER, WIDTH)) for _ in range(2))
        self.down = nn.Parameter(torch.randn(WIDTH, INNER))
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return x + F.linear(F.silu(F.linear(normed, self.gate)) * F.linear(normed, self.up), self.down)


# -- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.supports("Command", "a model of cost: FLOPs (torch's count), bytes and kernels of a graph, before and after")
def test_flops_are_torchs_count_and_kernels_what_a_compiler_makes() -> None:
    found = traced(Block(), torch.randn(ROWS, WIDTH))
    with FlopCounterMode(display=False) as counter:
        Block()(torch.randn(ROWS, WIDTH))
    assert found.flops == counter.get_total_flops() == 3 * 2 * ROWS * WIDTH * INNER
    assert [one.kind for one in sorted(found.operations, key=lambda one: one.kind)] == 3 * ["fused"] + 3 * ["product"]
    assert found.launches == 6


def test_every_tensor_is_moved_once() -> None:
    norm, *products, activation, last, total = _in_order(traced(Block(), torch.randn(ROWS, WIDTH)))
    rows, weights = ROWS * WIDTH * FLOAT, WIDTH * INNER * FLOAT
    assert (norm.read, norm.written, norm.weights) == (rows + WIDTH * FLOAT, rows, WIDTH * FLOAT)
    for product in products:
        assert (product.read, product.weights, product.written, product.rows) == (
            rows + weights, weights, ROWS * INNER * FLOAT, ROWS)
        assert product.columns == INNER
    assert (activation.read, activation.written) == (2 * ROWS * INNER * FLOAT, ROWS * INNER * FLOAT)
    assert (total.read, total.written) == (2 * rows, rows) and last.weights == weights


def _in_order(tally: Tally) -> list[Any]:
    norm, total = (one for one in tally.operations if one.kind == "fused" and one.name != "aten.silu")
    activation = next(one for one in tally.operations if one.name == "aten.silu")
    first, second, last = (one for one in tally.operations if one.kind == "product")
    return [norm, first, second, activation, last, total]


def test_attention_is_one_kernel_whatever_it_is_made_of() -> None:
    query = torch.randn(1, 2, 9, 8)

    def attend(query: Tensor) -> Tensor:
        causal = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        return causal.transpose(1, 2).contiguous().view(9, 16)

    found, = traced(attend, query).operations
    assert (found.kind, found.flops, found.causal, found.rows) == ("attention", 2 * 2 * 2 * 9 * 9 * 8, True, 9)
    assert (found.read, found.written) == (query.nbytes, query.nbytes)  # one tensor for all three


def test_views_and_repeated_work_cost_nothing_and_writes_do() -> None:
    def write(x: Tensor) -> Tensor:
        held = x.view(4, 6).t().relu()
        again = x.view(4, 6).t().relu()
        return held[0:2].mul_(2.0) + again[2:4]

    found = traced(write, torch.randn(24))
    assert found.flops == 0 and found.launches == 1
    assert (found.operations[0].read, found.operations[0].written) == (24 * FLOAT, 8 * FLOAT)


def test_what_compilers_do_not_copy_is_not_moved() -> None:
    empty, new = torch.empty(0, 4), torch.randn(3, 4)
    assert traced(lambda cached, new: torch.cat([cached, new]), empty, new).launches == 0
    twice, = traced(lambda new: torch.cat([new, new]), new).operations
    assert (twice.read, twice.written) == (new.nbytes, 2 * new.nbytes)


def test_rows_that_are_picked_are_all_that_is_read() -> None:
    table, index = torch.randn(1000, 8), torch.arange(5)
    found, = traced(lambda table, index: table[index] * 2, table, index).operations
    assert (found.read, found.written) == (5 * 8 * FLOAT + index.nbytes, 5 * 8 * FLOAT)


def test_sorts_stand_alone() -> None:
    found = traced(lambda x: (x * 2).sort(-1).values + 1, torch.randn(3, 7))
    assert [one.kind for one in found.operations] == ["fused", "alone", "fused"]


def test_flops_of_a_whole_model() -> None:
    spec = Specification()
    model, given, graphs = Plain(spec), prompt(spec).arguments, []

    def keep(module: Any, inputs: Any) -> Any:
        graphs.append(count(capture(module, inputs)))
        return module.forward

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*given)
    with torch.no_grad():
        torch._dynamo.reset()
        torch.compile(model, backend=keep)(*given)
    assert sum(graph.flops for graph in graphs) == counter.get_total_flops() > 0
    assert all(sum(one.flops for one in graph.operations) == graph.flops for graph in graphs)


# -- predicting -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefills() -> dict[int, tuple[Tally, Tally]]:
    """A decoder of LLaVA-1.5-7B's width and four layers, by batch size: all tokens, and 64 of 576."""
    found, config = {}, dataclasses.replace(CONFIGURATIONS[0], layers=4)
    for batch in (1, 8):
        graph, inputs = capture_prefill(config, batch, torch.bfloat16)
        done, _ = rewrite(graph, inputs, parse_options(dict(keep_tokens=64, migration_depth=1, merge=None)))
        assert done.module is not None
        found[batch] = count(graph), count(done.module)
    return found


@pytest.mark.slow
def test_few_rows_wait_for_weights_and_many_for_arithmetic(prefills: dict[int, tuple[Tally, Tally]]) -> None:
    alone, eight = (tuple(predict(one, H100) for one in prefills[batch]) for batch in (1, 8))
    assert (alone[0].bound, alone[1].bound) == ("arithmetic", "weights")
    assert (eight[0].bound, eight[1].bound) == ("arithmetic", "arithmetic")
    gains = [whole.kernels / few.kernels for whole, few in (alone, eight)]
    allowed = prefills[8][0].flops / prefills[8][1].flops
    assert 1 < gains[0] < gains[1] < allowed
    assert alone[1].kernels > prefills[1][1].moved / GPUS[H100].bandwidth
    assert eight[1].seconds < eight[0].seconds


@pytest.mark.slow
def test_launches_may_take_longer_than_kernels(prefills: dict[int, tuple[Tally, Tally]]) -> None:
    few = predict(prefills[1][1], "h200")
    assert few.launches == prefills[1][1].launches == len(prefills[1][1].operations)
    assert few.launching == pytest.approx(few.launches * GPUS["NVIDIA H200"].launch)
    assert few.seconds == few.launching > few.kernels
    graphs = predict(prefills[1][1], dataclasses.replace(GPUS["NVIDIA H200"], launch=0.0))
    assert graphs.seconds == graphs.kernels == few.kernels


def test_a_model_in_single_precision_is_predicted_in_half_of_it() -> None:
    graph = capture(torch.fx.symbolic_trace(Block()), (torch.randn(ROWS, WIDTH),))
    tally = count(graph)
    assert predict(tally, H100).dtype == torch.bfloat16
    assert predict(tally, H100, torch.float32).dtype == tally.dtype == torch.float32
    huge = dataclasses.replace(tally.operations[1], kind="product", flops=10**15, rows=4096)
    big = dataclasses.replace(tally, operations=(huge,))
    assert predict(big, H100, torch.float32).kernels / predict(big, H100).kernels == pytest.approx(989 / 67)


def test_a_product_of_few_rows_takes_a_whole_tile() -> None:
    product = next(one for one in traced(Block(), torch.randn(ROWS, WIDTH)).operations if one.kind == "product")
    product = dataclasses.replace(product, dtype=torch.bfloat16)
    times = [GPUS[H100].kernel(dataclasses.replace(product, rows=rows, flops=rows * 10**10))[0] for rows in (206, 256)]
    assert times[0] == pytest.approx(times[1])


def test_a_cpus_rates_lie_between_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = cpu.Cpu({1: 1e-9, 100: 10e-9}, {1: 1e-9, 100: 5e-9}, {True: 2e9, False: 1e9}, {1000: 1e-6}, 1e-8)
    monkeypatch.setattr(cpu, "_measured", lambda dtype, threads: rates)
    product = next(one for one in traced(Block(), torch.randn(ROWS, WIDTH)).operations if one.weights and one.flops)
    monkeypatch.setattr(cpu, "prefers_onednn", lambda rows, columns, inner, bias, threads: columns == 8)
    for quicker, columns, last in ((False, 8, 10e-9), (True, 8, 5e-9), (True, 4, 10e-9)):
        found = cpu.measured(torch.float32, quicker)
        for rows, each in ((1, 1e-9), (100, last), (34, (2e-9 + last) / 3), (300, 3 * last)):
            held = dataclasses.replace(product, rows=rows, columns=columns, flops=2 * rows * 10**8)
            assert found.kernel(held) == (pytest.approx(10**8 * each), "arithmetic")
    attend = dataclasses.replace(product, kind="attention", flops=10**9, causal=True)
    assert math.isclose(rates.kernel(attend)[0], 0.5) and rates.kernel(dataclasses.replace(attend, causal=False))[0] == 1
    assert rates.kernel(dataclasses.replace(product, kind="fused", read=500, written=0)) == (pytest.approx(5e-7), "memory")
    assert rates.kernel(dataclasses.replace(product, kind="fused", read=0, written=0)) == (1e-8, "starting")


def test_names_of_processors() -> None:
    assert [named(name) for name in ("cpu", "h200", "A100", "NVIDIA L4")] == ["cpu", "NVIDIA H200", "NVIDIA A100", "NVIDIA L4"]
    for name in ("H300", "", "nvidia"):
        with pytest.raises(ValueError, match=r"^parvts_fx: processors: .* is not one of cpu, NVIDIA H100, "):
            named(name)
    with pytest.raises(ValueError, match="did you mean 'NVIDIA H100'"):
        named("H1000")


# -- told -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.supports("Command", "explain predicts the prefill's time on H100, H200, A100, L4 and the CPU at hand")
def test_explain_predicts() -> None:
    model = llava.build(layers=3)
    given = llava.prompt(model, [[3, "image", 6]])
    options = {"keep_tokens": 4, "migration_depth": 1}
    with torch.no_grad():
        model(**given.inputs)
    report = parvts_fx.explain(model, **given.inputs, options=options, processors=["h100", "L4"])
    costs = report.prefill.costs
    assert [cost.few.processor for cost in costs] == ["NVIDIA H100", "NVIDIA L4"]
    for cost in costs:
        assert cost.whole.dtype == torch.bfloat16 and cost.whole.kernels > 0
        assert cost.few.launching == pytest.approx(GPUS[cost.few.processor].launch * cost.few.launches)
    text = str(report)
    assert telling.TITLE in text and "H100, bfloat16" in text and "cpu" not in text
    assert telling.TITLE not in str(parvts_fx.explain(model, **given.inputs, options=options, processors=()))


def test_all_processors_are_predicted_for_unless_some_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = cpu.Cpu({1: 1e-9}, {1: 1e-9}, {True: 1e9, False: 1e9}, {1000: 1e-6}, 1e-8)
    monkeypatch.setattr(cpu, "_measured", lambda dtype, threads: rates)
    model = llava.build(layers=2)
    given = llava.prompt(model, [[3, "image", 6]])
    with torch.no_grad():
        model(**given.inputs)
    prefill = parvts_fx.explain(model, **given.inputs, options={"migration_depth": 1}).prefill
    assert [cost.few.processor for cost in prefill.costs] == list(NAMES)
    assert prefill.costs[0].few.dtype == torch.float32 and prefill.costs[0].few.launching == 0


def test_an_unknown_processor_is_told_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="processors: 'B300' is not one of"):
        parvts_fx.explain(nn.Identity(), torch.ones(1), processors=["B300"])


@pytest.mark.slow
def test_the_benchmark_holds_predictions_against_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows and table on a small model that runs eagerly; what the times are is no matter here."""
    rates = cpu.Cpu({1: 1e-9}, {1: 1e-9}, {True: 1e9, False: 1e9}, {1000: 1e-6}, 1e-8)
    monkeypatch.setattr(cpu, "_measured", lambda dtype, threads: rates)
    monkeypatch.setattr(cpu, "forget", lambda: None)
    settings = compare.Settings(layers=3, width=128, visual=36, kept=9, depth=2, sweep=(9,), lengths=(36,))
    with torch.no_grad():
        rows = list(on_cpu(Layout("small", settings, 2), "eager", 1))
    assert [row["method"] for row in rows] == list(COMPARED)
    assert rows[0]["flops"] > rows[1]["flops"] and rows[0]["predicted"]["median"] > rows[1]["predicted"]["median"]
    for row in rows:
        assert row["apart"] == pytest.approx(row["predicted"]["median"] / row["measured"]["median"] - 1)
    sheet, = figures.cost_on_cpu({"cpu, 2 threads": {"rows": rows}})
    assert [line[:2] for line in sheet.rows][0] == ["3 layers of 128, batch 2", "Inductor"] and len(sheet.rows) == 4
