"""The backend as torch.compile sees it: registration, lowerings, isolation, state, and what importing changes."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import pytest
import torch
from torch._inductor import cpu_vec_isa

import parvts_fx
from parvts_fx.backends import lowering
from parvts_fx.backends.parvts import parvts
from parvts_fx.capture.editing import Editor
from parvts_fx.cost import count_flops
from parvts_fx.options import Options
from parvts_fx.passes import PassResult, Plan, Work
from tests import llava
from tests.comparing import TOLERANCE, assert_equal_prefill, check, compile_with_parvts, expected, rule, uncompile
from tests.plain import Plain, Row, Specification
from tests.plain import prompt as plain_prompt
from tests.plain_reference import largest_error
from tests.plain_reference import reference as plain_reference


@pytest.fixture(scope="module")
def model():
    return llava.build(layers=2)


@pytest.fixture(scope="module")
def prompt(model):
    return llava.prompt(model, [[3, "image", 6], [2, "image", 3]])


def in_a_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True,
                          env={**os.environ, **environment}, timeout=300)


@pytest.mark.slow
@pytest.mark.versions
def test_listed_without_an_import():
    done = in_a_fresh_process("""
        import sys, torch
        assert "parvts" in torch.compiler.list_backends()
        assert not any(name.startswith("parvts_fx") for name in sys.modules), "listing imports nothing of ours"
        print("fine")
    """)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.versions
def test_importing_changes_nothing():
    done = in_a_fresh_process("""
        import json, logging, sys, torch, torch._dynamo, torch._inductor.config, torch._functorch.config
        modules = (torch._dynamo.config, torch._inductor.config, torch._functorch.config)
        def state():
            return ([m.get_config_copy() for m in modules], torch.is_grad_enabled(), torch.get_num_threads(),
                    torch.get_default_dtype(), logging.getLogger().level, len(logging.getLogger().handlers),
                    sorted(torch._dynamo.list_backends(exclude_tags=())), torch.backends.cuda.math_sdp_enabled())
        before = state()
        import parvts_fx
        assert state() == before
        assert "torch_tensorrt" not in sys.modules and "transformers" not in sys.modules
        print("fine")
    """)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.slow
@pytest.mark.captures_once
@pytest.mark.versions
@pytest.mark.supports("Lowerings", "eager, aot_eager and other registered backends")
@pytest.mark.parametrize("lowering", ["eager", "aot_eager", "aot_eager_decomp_partition"])
def test_lowerings_by_name(model, prompt, lowering):
    check(model, prompt, lowering=lowering, migration_depth=1)


def test_inductor_probes_the_processor_beside_us(monkeypatch):
    where, died = [], []

    def fail():
        where.append(threading.current_thread())
        raise OSError("no compiler")

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", fail)
    monkeypatch.setattr(threading, "excepthook", died.append)
    lowering.probe_processor.__wrapped__().join(10)
    assert len(where) == 1 and where[0] is not threading.current_thread() and not died


def test_the_processor_is_probed_for_inductor_alone(model, prompt, monkeypatch):
    probed = []
    waited = []
    probe = types.SimpleNamespace(join=lambda: waited.append(1))
    monkeypatch.setattr(lowering, "probe_processor", lambda: probed.append(1) or probe)
    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", lambda *settings: lambda module, inputs: module.forward)
    check(model, prompt, lowering="eager", migration_depth=1)
    assert not probed
    uncompile(model)
    check(model, prompt, lowering="inductor", migration_depth=1)
    assert len(probed) > len(waited) > 0, "begun with each graph, and waited for in front of Inductor"


@pytest.mark.parametrize("listed, wanted", [
    (["realize_reads_threshold", "other"], {"realize_reads_threshold": 1}), (["other"], {}),
], ids=["an old torch", "none"])
def test_settings_that_inductor_lacks_are_left_out(monkeypatch, listed, wanted):
    """torch 2.11 and 2.12 have no ``aot_inductor.enable_line_tables``; an unknown name is an error to Inductor."""
    received = []

    def wrapper(mode, settings, dynamic):
        received.append(settings)
        return lambda module, inputs: module.forward

    monkeypatch.setattr(torch._inductor, "list_options", lambda: listed)
    monkeypatch.setattr(torch, "_TorchCompileInductorWrapper", wrapper)
    lowering.lower(torch.fx.symbolic_trace(torch.nn.ReLU()), [torch.ones(2)], Options())
    assert received == [wanted]


@pytest.mark.supports("Lowerings", "any callable")
def test_a_callable_as_lowering(model, prompt):
    seen = []

    def own(module, example_inputs, **options):
        seen.append((len(module.graph.nodes), options))
        return module.forward

    parvts_fx.compile(model, lowering=own, migration_depth=1, own_option=3)
    wanted = expected_of(model, prompt)
    parvts_fx.compile(model, lowering=own, migration_depth=1, own_option=3)
    with torch.no_grad():
        assert_equal_prefill(model(**prompt.inputs), wanted)
    uncompile(model)
    assert seen and all(options == {"options": {"own_option": 3}} for _, options in seen)


def expected_of(model, prompt, **options):
    uncompile(model)
    return expected(model, prompt, **{"migration_depth": 1, **options})


def test_compile_is_in_place(model, prompt):
    wanted = expected_of(model, prompt, keep_ratio=0.25)
    assert parvts_fx.compile(model, keep_ratio=0.25, migration_depth=1, lowering="eager") is model
    with torch.no_grad():
        assert_equal_prefill(model(**prompt.inputs), wanted)
        assert model.generate(**prompt.inputs, max_new_tokens=2).shape[1] == prompt.visual.shape[1] + 2
    uncompile(model)


def test_tensorrt_without_the_package(model, prompt):
    if "torch_tensorrt" in sys.modules:
        pytest.fail("torch-tensorrt is imported although nothing asked for it")
    parvts_fx.compile(model, lowering="tensorrt", migration_depth=1)
    with torch.no_grad(), pytest.raises(ValueError, match=r"parvts_fx\[tensorrt\]"):
        model(**prompt.inputs)
    uncompile(model)


@pytest.mark.supports("Lowerings", "tensorrt, against a stand-in: the real package has not been run")
def test_tensorrt_stand_in(model, prompt, monkeypatch):
    """The rewritten graph and the settings reach torch_tensorrt's Dynamo backend."""
    received = []

    def stand_in(module, example_inputs, options=None):
        received.append((module, options))
        return module.forward

    stand_in._tags = ()  # as register_backend leaves it
    from torch._dynamo.backends import registry

    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))
    monkeypatch.setitem(registry._BACKENDS, "torch_tensorrt", None)
    monkeypatch.setitem(registry._COMPILER_FNS, "torch_tensorrt", stand_in)
    wanted = expected_of(model, prompt)
    parvts_fx.compile(model, lowering="tensorrt", migration_depth=1, enabled_precisions={torch.float16})
    with torch.no_grad():
        assert_equal_prefill(model(**prompt.inputs), wanted)
    uncompile(model)
    assert all(options == {"enabled_precisions": {torch.float16}} for _, options in received)
    sorts = [sum(node.target is torch.ops.aten.sort.stable for node in module.graph.nodes) for module, _ in received]
    assert sum(count > 0 for count in sorts) == 1, "exactly one of the graphs holds the partition"


@pytest.mark.slow
@pytest.mark.supports("torch.compile", "several compiled models with different options in one process")
def test_three_models_side_by_side(prompt):
    models = [llava.build(layers=2, seed=seed) for seed in range(3)]
    options = [dict(keep_ratio=0.25, migration_depth=1), dict(keep_tokens=2, migration_depth=0, fusion=0.5),
               dict(keep_ratio=0.5, migration_depth=2, score="norm")]
    wanted = [expected(model, prompt, **own) for model, own in zip(models, options)]
    for model, own in zip(models, options):
        compile_with_parvts(model, **own)
    with torch.no_grad():
        for _ in range(2):
            for model, one in zip(models, wanted):
                assert_equal_prefill(model(**prompt.inputs), one)


@pytest.mark.slow
def test_reset_leaves_no_state(model, prompt):
    wanted = [expected_of(model, prompt, keep_tokens=count) for count in (2, 5)]
    for one, count in zip(wanted, (2, 5)):
        compile_with_parvts(model, keep_tokens=count, migration_depth=1)
        with torch.no_grad():
            assert_equal_prefill(model(**prompt.inputs), one)
        torch._dynamo.reset()
        uncompile(model)


def test_graphs_without_a_decoder_are_handed_on_as_they_are():
    received = []

    def own(module, example_inputs):
        received.append(module)
        return module.forward

    graphs = []

    def spy(module, example_inputs):
        graphs.append(module)
        return parvts(module, example_inputs, options={"lowering": own})

    torch.compile(lambda x: x.sin() @ x.T, backend=spy)(torch.ones(3, 3))
    assert received == graphs and len(graphs) == 1


CACHED = """
    import json, sys
    sys.path.insert(0, {root!r})
    import torch
    from torch._dynamo.utils import counters
    from parvts_fx import Stage
    from parvts_fx.backends import linear
    from tests.plain import Plain, Specification, prompt
    if {kernels}:  # of any size, whatever the processor
        linear.LEAST_FLOPS, linear.prefers_onednn = 0, lambda *sizes: True
    specification = Specification(layers=2, attention="masked", numbering="mask")
    given, ratio = prompt(specification), {ratio}
    fast = torch.compile(Plain(specification), backend="parvts", dynamic={dynamic}, options=dict(strict=True, {options}))
    with torch.no_grad():
        logits = fast(given.ids, given.features, given.mask)[0]
    print(json.dumps([logits.shape[1], dict(counters["inductor"]), dict(counters["aot_autograd"])]))
"""


@pytest.mark.slow
@pytest.mark.supports("Lowerings", "AOTAutograd's and Inductor's caches hit in a second process")
@pytest.mark.inductor
@pytest.mark.parametrize("dynamic, kernels, options", [
    (True, False, "stages=(Stage(keep=0.8, migrate=1, merge='clusters'), Stage(at=1, keep=ratio, rule='last_row'))"),
    (False, True, "migration_depth=1, keep_ratio=ratio"),
], ids=["dynamic, two stages", "own linear kernels"])
def test_both_compile_caches_hit_in_a_second_process(tmp_path, dynamic, kernels, options):
    """Nothing of ours in the graph keeps AOTAutograd's or Inductor's cache from hitting; other options miss."""
    root = str(Path(__file__).resolve().parents[1])

    def run(ratio: float):
        done = in_a_fresh_process(CACHED.format(root=root, dynamic=dynamic, ratio=ratio, kernels=kernels, options=options),
                                  TORCHINDUCTOR_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    length, inductor, aot = run(0.4)
    assert length == 8 and aot["autograd_cache_saved"] == 1 and aot.get("autograd_cache_bypass", 0) == 0
    length, inductor, aot = run(0.4)
    assert length == 8 and aot["autograd_cache_hit"] == 1 and aot.get("autograd_cache_saved", 0) == 0
    assert inductor.get("fxgraph_cache_hit", 0) == 1 and inductor.get("fxgraph_cache_miss", 0) == 0
    if dynamic:  # what misses is shown once
        return
    length, inductor, aot = run(0.6)
    assert length == 9 and aot["autograd_cache_miss"] >= 1 and inductor["fxgraph_cache_miss"] == 1


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("fusion, dynamic", [("attention", None), (0.3, True)])
def test_inductor(fusion, dynamic):
    specification = Specification(layers=2, attention="masked", numbering="mask", rows=(Row(), Row(2, 3)))
    given = plain_prompt(specification)
    plain = Plain(specification)
    wanted = plain_reference(plain, given, rule(), migration_depth=1, keep_tokens=2, fusion=fusion)
    fast = torch.compile(plain, backend="parvts", dynamic=dynamic,
                         options=dict(migration_depth=1, keep_tokens=2, fusion=fusion, strict=True))
    with torch.no_grad():
        assert largest_error(fast(given.ids, given.features, given.mask), wanted) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.captures_once
@pytest.mark.supports("Lowerings", "inductor (CPU)")
@pytest.mark.inductor
def test_llava_through_inductor(model, prompt):
    check(model, prompt, lowering="inductor", migration_depth=1, steps=2)


@dataclasses.dataclass(frozen=True)
class TwiceTheLogits:
    """A third party's pass: doubles the first output."""

    name = "twice_the_logits"

    def run(self, work: Work) -> PassResult:
        output = next(iter(reversed(work.module.graph.nodes)))
        logits = output.args[0][0]
        with work.module.graph.inserting_before(output):
            output.args = ((Editor(work.module).call(torch.mul, logits, 2), *output.args[0][1:]),)
        return PassResult(1)


@pytest.mark.supports("Options", "passes of your own")
def test_a_pass_of_ones_own():
    specification = Specification()
    given, plain = plain_prompt(specification), Plain(specification)
    options = dict(migration_depth=1, lowering="eager", strict=True)
    with torch.no_grad():
        once = torch.compile(plain, backend="parvts", options=options)(*given.arguments)
        torch._dynamo.reset()
        twice = torch.compile(plain, backend="parvts", options={**options, "extra_passes": [TwiceTheLogits()]})(*given.arguments)
    torch.testing.assert_close(twice[0], 2 * once[0])
    torch.testing.assert_close(twice[1], once[1])


@dataclasses.dataclass(frozen=True)
class KeepDeadRows:
    """A third party's pass that refines the plan: takes back what drop_dead_rows has decided."""

    name = "keep_dead_rows"

    def plan(self, plan: Plan) -> tuple[Plan, PassResult]:
        return dataclasses.replace(plan, levels=plan.live, take=None, take_count=0), PassResult(1)


@pytest.mark.supports("Options", "passes of your own that refine the plan")
def test_a_plan_of_ones_own():
    specification = Specification(last_only=True)
    given, plain = plain_prompt(specification), Plain(specification)
    wanted = plain_reference(plain, given, rule(), migration_depth=1, keep_tokens=2)
    graphs = []

    def own(module, example_inputs):
        graphs.append(module)
        return module.forward

    for passes in ([], [KeepDeadRows()]):
        torch._dynamo.reset()
        options = dict(migration_depth=1, keep_tokens=2, lowering=own, strict=True, extra_passes=passes)
        with torch.no_grad():
            result = torch.compile(plain, backend="parvts", options=options)(*given.arguments)
        assert largest_error(result, wanted) <= TOLERANCE
    lean, full = map(count_flops, graphs)
    assert lean < full


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_reach_the_lowering(mode):
    specification = Specification()
    given = plain_prompt(specification)
    received = []

    def own(module, example_inputs, **settings):
        received.append(settings)
        return module.forward

    with torch.no_grad():
        torch.compile(Plain(specification), backend=functools.partial(
            parvts, options={"lowering": own, "migration_depth": 1}, mode=mode))(given.ids, given.features, given.mask)
    assert received == [{} if mode is None else {"mode": mode}]
