"""Which kernel computes a large float32 matrix product on CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import parvts_fx
from parvts_fx.backends import linear
from parvts_fx.backends.lowering import inductor
from parvts_fx.capture import capture
from parvts_fx.options import Options

LARGE = 256  # 2 * 256**3 FLOPs are enough to matter


class Two(nn.Module):
    def __init__(self, inner: int = LARGE):
        super().__init__()
        self.first, self.second = nn.Linear(inner, LARGE), nn.Linear(LARGE, LARGE, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def graph_of(model: nn.Module, *inputs: torch.Tensor) -> torch.fx.GraphModule:
    found = []
    torch._dynamo.reset()

    def keep(module, example_inputs):
        found.append(capture(module, example_inputs))
        return module.forward

    torch.compile(model, backend=keep)(*inputs)
    return found[0]


def changed(module: torch.fx.GraphModule) -> int:
    return sum(node.target is torch.ops.parvts_fx.linear.default for node in module.graph.nodes)


@pytest.fixture
def quicker(monkeypatch):
    monkeypatch.setattr(linear, "prefers_onednn", lambda *sizes: True)


@pytest.mark.versions
@pytest.mark.parametrize("shape", [(LARGE, LARGE), (2, LARGE // 2, LARGE)])
@torch.no_grad()
def test_same_results(quicker, shape):
    model, x = Two(), torch.randn(shape)
    graph = graph_of(model, x)
    picked = linear.pick_kernels(graph)
    assert (changed(picked), changed(graph)) == (2, 0)
    inputs = [node.meta["example_value"] for node in picked.graph.nodes if node.op == "placeholder"]
    assert len(inputs) == 4  # x, two weights, one bias
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda module, given: inductor(module, given, Options()))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "caches"))


@torch.no_grad()
def test_follows_the_measurement(monkeypatch):
    graph = graph_of(Two(), torch.randn(LARGE, LARGE))
    seen = []
    monkeypatch.setattr(linear, "prefers_onednn", lambda *sizes: bool(seen.append(sizes)))
    assert linear.pick_kernels(graph) is graph
    assert [sizes[:4] for sizes in seen] == [(LARGE, LARGE, LARGE, True), (LARGE, LARGE, LARGE, False)]


def test_takes_what_is_clearly_quicker(monkeypatch):
    seconds = {torch.nn.functional.linear: 1.0, linear.onednn_linear: 0.5}
    monkeypatch.setattr(linear, "_seconds", lambda kernel, *given: seconds[kernel])
    sizes = (64, 64, 64, False, 1)
    assert linear._is_quicker.__wrapped__(*sizes)
    seconds[linear.onednn_linear] = 0.95
    assert not linear._is_quicker.__wrapped__(*sizes)


@pytest.mark.parametrize("quick", [torch.nn.functional.linear, linear.onednn_linear])
def test_a_disturbance_does_not_choose(monkeypatch, quick):
    disturbed = iter([True, True, False])

    def seconds(kernel, *given):
        return (9.0 if next(disturbed, False) else 1.0) if kernel is quick else 2.0

    monkeypatch.setattr(linear, "_seconds", seconds)
    assert linear._is_quicker.__wrapped__(64, 64, 64, False, 1) == (quick is linear.onednn_linear)


def test_what_was_found_holds_in_the_next_process(monkeypatch, tmp_path):
    """Or compiled graphs would not be found again where the kernels are about as quick. What cannot be read is measured anew."""
    sizes, found = (64, 64, 64, False, 1), iter([True, False, False])
    monkeypatch.setattr(linear, "_is_quicker", lambda *given: next(found))
    assert [linear.prefers_onednn(*sizes) for _ in range(3)] == [True] * 3
    (kept,) = (path for path in (tmp_path / "caches").rglob("*") if path.is_file())
    kept.write_text("")
    assert not linear.prefers_onednn(*sizes) and kept.read_text() == "0"
    monkeypatch.setattr(linear, "travels_with_caches", lambda *held: None)
    monkeypatch.setattr(linear, "_file", lambda sizes: "")  # a folder, which nothing can be written to
    assert not linear.prefers_onednn(*sizes)


def test_what_was_found_travels_with_the_caches(monkeypatch, tmp_path):
    sizes, found = (64, 64, 64, True, 1), iter([True, False])
    monkeypatch.setattr(linear, "_is_quicker", lambda *given: next(found))
    manager = torch.compiler._cache.CacheArtifactManager
    with manager.with_fresh_cache():
        assert linear.prefers_onednn(*sizes)
        saved, _ = torch.compiler.save_cache_artifacts()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "elsewhere"))
    torch.compiler.load_cache_artifacts(saved)
    assert linear.prefers_onednn(*sizes), "measured again"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "a third place"))
    assert not linear.prefers_onednn(*sizes)


def test_of_many_rows_some_are_measured(monkeypatch):
    rows = []
    linear._is_quicker.cache_clear()
    monkeypatch.setattr(linear, "_seconds", lambda kernel, x, *others: rows.append(len(x)) or 1.0)
    for given in (64, 4096):
        linear.prefers_onednn(given, 1 << 10, 1 << 10, False, 1)
    assert set(rows) == {64, 1 << 10}
    measured = len(rows)
    assert not linear.prefers_onednn(2048, 1 << 10, 1 << 10, False, 1)
    assert len(rows) == measured, "as many rows are measured as of 4096: once is enough"
    linear._is_quicker.cache_clear()


@pytest.mark.parametrize("why", ["small", "half precision", "gradients", "autocast"])
def test_leaves_alone(quicker, why):
    size = 8 if why == "small" else LARGE
    model, x = Two(size), torch.randn(size, size)
    if why == "half precision":
        model, x = model.bfloat16(), x.bfloat16()
    with torch.set_grad_enabled(why == "gradients"), torch.autocast("cpu", enabled=why == "autocast"):
        graph = graph_of(model, x)
        assert linear.pick_kernels(graph) is graph


@torch.no_grad()
def test_option(quicker, monkeypatch):
    seen = []
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__",
                        lambda self, module, inputs: seen.append(changed(module)) or module.forward)
    for choice in ("auto", "inductor"):
        torch._dynamo.reset()
        torch.compile(Two(), backend="parvts", options={"linear_kernels": choice})(torch.randn(LARGE, LARGE))
    assert seen == [2, 0]
    with pytest.raises(ValueError, match="linear_kernels='mkl'"):
        parvts_fx.Options(linear_kernels="mkl")


@torch.no_grad()
def test_inductors_settings_on_cpu_give_way_to_the_users(monkeypatch):
    seen = []
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__",
                        lambda self, module, inputs: seen.append(dict(self.config)) or module.forward)
    for given in ({}, {"realize_reads_threshold": 4}, {"epilogue_fusion": False}):
        torch._dynamo.reset()
        torch.compile(Two(), backend="parvts", options={"linear_kernels": "inductor", **given})(torch.randn(2, LARGE))
    assert [settings["realize_reads_threshold"] for settings in seen] == [1, 4, 1]
    assert seen[2]["epilogue_fusion"] is False
    assert not any(settings["aot_inductor.enable_line_tables"] for settings in seen)
