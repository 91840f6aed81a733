"""What counts as row by row, and what as a place where tokens (or samples) meet."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parvts_fx.analysis.extents import SAMPLES, TOKENS
from parvts_fx.analysis.independence import find_meetings
from parvts_fx.analysis.probe import Probe
from parvts_fx.analysis.small_runs import SmallRuns
from parvts_fx.analysis.values import descendants, value
from parvts_fx.capture import capture as captured_copy
from tests.plain_graphs import capture

LIBRARY = torch.library.Library("independence_tests", "DEF")
LIBRARY.define("nowhere(Tensor x) -> Tensor")
torch.library.register_fake("independence_tests::nowhere", torch.empty_like, lib=LIBRARY)


def _for_some_sizes(x: Tensor) -> Tensor:
    if len(x) * x.shape[1] % 23:
        raise NotImplementedError("this kernel is made for the user's sizes")
    return x.clone()


LIBRARY.impl("nowhere", _for_some_sizes, "CPU")


def meetings(function, *inputs: Tensor, label: str = TOKENS) -> list[str]:
    """The targets at which the rows of the first input [batch, rows, ...] meet."""
    module, examples = capture(function, *inputs)
    work = captured_copy(module, examples)
    start = next(node for node in work.graph.nodes if node.op == "placeholder" and value(node).shape == inputs[0].shape)
    nodes = descendants(work.graph, [start])
    batch, size = inputs[0].shape[:2]

    def probed(length: int, axis: int):
        probe = Probe(work, length, Probe.lengths_for(work, length, ["row"]))
        probe.seed(start, {axis: "row"})
        probe.run([node for node in nodes if node is not start])
        return probe.found

    runs = SmallRuns(work, probed(size, 1), probed(batch, 0) if batch > 1 else None)
    return [str(getattr(node.target, "__name__", node.target)) for node in find_meetings(runs, label, nodes, {start}).meeting]


def experts(x: Tensor, weights: Tensor) -> tuple[Tensor]:
    """Rows sorted by expert, multiplied in one product, and put back."""
    rows = x.reshape(-1, x.shape[-1])
    chosen = (rows @ weights[:, 0].T).argmax(-1)
    order = chosen.argsort()
    done = torch.bmm(rows[order][:, None], weights[chosen[order]])[:, 0]
    return (done[order.argsort()].view(x.shape),)


def unsorted_experts(x: Tensor, weights: Tensor) -> tuple[Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    order = (rows @ weights[:, 0].T).argmax(-1).argsort()
    return (rows[order].view(x.shape),)


ALONE = {
    "linear": lambda x: (F.linear(x, torch.ones(5, 6)),),
    "norm": lambda x: (F.rms_norm(x, (6,)),),
    "heads": lambda x: (x.view(x.shape[0], -1, 2, 3).transpose(1, 2).softmax(-1),),
    "split": lambda x: (x.split(2, -1)[1] * 2,),
    "in place": lambda x: (x.clone().mul_(2),),
    "last entries": lambda x: (x[..., 3:].cumsum(-1),),
    "undefined for half of all numbers": lambda x: (x.log(),),
}
TOGETHER = {
    "mean": (lambda x: (x - x.mean(1, keepdim=True),), ["mean"]),
    "softmax": (lambda x: (x.softmax(1),), ["softmax"]),
    "far shift": (lambda x: (x + F.pad(x, (0, 0, 9, -9)),), ["pad"]),
    "running sum": (lambda x: (x.cumsum(1),), ["cumsum"]),
    "write": (lambda x: (x.clone().index_fill_(1, torch.tensor([0]), 0.0),), ["index_fill_"]),
    "noise": (lambda x: (x + torch.rand_like(x),), ["rand_like"]),
    "no implementation for small tensors": (lambda x: (torch.ops.independence_tests.nowhere(x),), ["nowhere"]),
    "sorted": (lambda x: (x.sort(1)[0],), ["sort"]),
    "square": (lambda x: (x @ x.transpose(1, 2) @ x,), ["matmul"]),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("function", ALONE.values(), ids=ALONE.keys())
def test_row_by_row(function, batch):
    x = torch.randn(batch, 23, 6)
    assert meetings(function, x) == []
    if batch > 1:
        assert meetings(function, x, label=SAMPLES) == []


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("function, wanted", TOGETHER.values(), ids=TOGETHER.keys())
def test_tokens_meet(function, wanted, batch):
    assert meetings(function, torch.randn(batch, 23, 6)) == wanted


@pytest.mark.parametrize("function, wanted", [
    (lambda x: (x - x.mean(0),), ["mean"]), (lambda x: (x.flip(0),), ["flip"]),
    (lambda x: (F.batch_norm(x.transpose(1, 2), None, None, training=True),), ["batch_norm"]),
])
def test_samples_meet(function, wanted):
    assert meetings(function, torch.randn(3, 23, 6), label=SAMPLES) == wanted


@pytest.mark.parametrize("label", [TOKENS, SAMPLES])
def test_experts_hand_every_row_back(label):
    """No operation in between commutes with a choice of rows; all of them together do."""
    weights = torch.randn(4, 6, 6)
    assert meetings(experts, torch.randn(2, 23, 6), weights, label=label) == []
    assert meetings(unsorted_experts, torch.randn(2, 23, 6), weights, label=label)


def test_large_weights_take_no_time_and_random_state_stays():
    state = torch.random.get_rng_state()
    module, examples = capture(lambda x, w: (F.linear(x, w),), torch.randn(1, 23, 64), torch.zeros(1, 64).expand(400_000, 64))
    work = captured_copy(module, examples)
    start = next(node for node in work.graph.nodes if node.op == "placeholder" and value(node).dim() == 3)
    probe = Probe(work, 23, Probe.lengths_for(work, 23, ["row"]))
    probe.seed(start, {1: "row"})
    nodes = descendants(work.graph, [start])
    probe.run([node for node in nodes if node is not start])
    torch.random.set_rng_state(state)
    begin = time.perf_counter()
    assert find_meetings(SmallRuns(work, probe.found, None), TOKENS, nodes, {start}).meeting == []
    assert time.perf_counter() - begin < 5  # not the product itself, which has 600 million multiplications a run
    assert torch.equal(torch.random.get_rng_state(), state)
