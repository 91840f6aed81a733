"""Models whose layers accelerate has put on devices: its hooks are captured, and what is rewritten runs where the layers are."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

import parvts_fx
from parvts_fx.capture import capture
from parvts_fx.runtime.placement_hooks import open_hooks
from tests import llava
from tests.comparing import TOLERANCE, expected, pruned
from tests.reference import relative_error

LAYERS = 4
ROWS = [[3, "image", 6], [2, "image", 5]]


@pytest.fixture
def model() -> Any:
    return llava.build(layers=LAYERS)


def spread(model: Any, first: str = "cpu", second: str = "cpu", on_first: int = 2) -> Any:
    """The model, as ``from_pretrained(..., device_map=...)`` leaves it: so many layers on one device, the others on another."""
    text = "model.language_model"
    placed = {f"{text}.layers.{index}": first if index < on_first else second for index in range(LAYERS)}
    for name in ("model.vision_tower", "model.multi_modal_projector", f"{text}.embed_tokens", f"{text}.rotary_emb"):
        placed[name] = first
    placed |= {f"{text}.norm": second, "lm_head": second}
    accelerate.dispatch_model(model, placed, main_device="cpu", force_hooks=True)
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    assert len(hooks) > 3 * LAYERS and not any(hook.offload for hook in hooks if isinstance(hook, AlignDevicesHook))
    return model


@pytest.mark.slow
@pytest.mark.supports("Calls", "models that accelerate has spread over devices: hooks that fetch no weights are captured")
@pytest.mark.parametrize("rows", [ROWS, [[3, "image", 6], [5]]], ids=["a picture each", "one with none"])
def test_hooks_are_captured(model: Any, rows: list) -> None:
    prompt = llava.prompt(model, rows)
    alone = [prompt.row(index) for index in range(len(rows))]
    wanted = [expected(model, row, row.with_positions, migration_depth=1)[0] for row in alone if row.visual.any()]
    parvts_fx.compile(spread(model), lowering="eager", migration_depth=1, strict=True)
    with torch.no_grad():
        output = model(**prompt.inputs)
    for sample, one in enumerate(wanted):
        assert relative_error(output.logits[sample, -len(one.logits):], one.logits) < TOLERANCE
    assert parvts_fx.last_call(model).pruned


@pytest.mark.slow
def test_generate_and_copies(model: Any) -> None:
    """The hooks of a copy are its own; behind uncompile all are as accelerate has made them."""
    prompt = llava.prompt(model, ROWS)
    generating = dict(max_new_tokens=4, do_sample=False)
    with pruned(copy.deepcopy(model), migration_depth=1) as reference:
        wanted = reference.generate(**prompt.inputs, **generating)
    spread(model)
    before = [dict(vars(module._hf_hook)) for module in model.modules() if hasattr(module, "_hf_hook")]
    parvts_fx.compile(model, lowering="eager", migration_depth=1, strict=True)
    assert torch.equal(model.generate(**prompt.inputs, **generating), wanted)
    made = copy.deepcopy(model)
    hooks = [module._hf_hook for module in made.modules() if hasattr(module, "_hf_hook")]
    assert len(hooks) == len(before) and all(hook.pre_forward.__self__ is hook for hook in hooks)
    parvts_fx.uncompile(model)
    after = [dict(vars(module._hf_hook)) for module in model.modules() if hasattr(module, "_hf_hook")]
    assert [held.keys() for held in after] == [held.keys() for held in before]
    assert torch.equal(made.generate(**prompt.inputs, **generating), wanted)


@pytest.mark.slow
def test_explain_leaves_hooks_as_they_were(model: Any) -> None:
    spread(model)
    with torch.no_grad():
        report = parvts_fx.explain(model, **llava.prompt(model, ROWS).inputs)
    assert [graph.reason for graph in report.graphs if graph.status != "untouched"] == [""]
    assert not any("pre_forward" in vars(module._hf_hook) for module in model.modules() if hasattr(module, "_hf_hook"))


def test_chains_of_hooks(model: Any) -> None:
    """One that casts weights changes the module, and stays excluded, with the chain that it is in."""
    spread(model)
    layer = llava.text_model(model).layers[1]
    accelerate.hooks.add_hook_to_module(layer, AlignDevicesHook(torch.device("cpu")), append=True)
    other = llava.text_model(model).layers[2]
    casting = accelerate.hooks.LayerwiseCastingHook(torch.float32, torch.float32, non_blocking=False)
    accelerate.hooks.add_hook_to_module(other, casting, append=True)
    parvts_fx.compile(model, lowering="eager")
    opened = {module: "pre_forward" in vars(module._hf_hook) for module in model.modules() if hasattr(module, "_hf_hook")}
    assert opened[layer] and not opened[other]
    assert all("pre_forward" not in vars(hook) for hook in other._hf_hook.hooks[1:])


def test_devices_by_number() -> None:
    """``device_map="auto"`` numbers devices; what a number means is told by where the tensor came to lie."""
    graph = torch.fx.Graph()
    moved = graph.call_method("to", (graph.placeholder("x"), 1), {"non_blocking": False})
    graph.output(moved)
    for node, device in zip(graph.nodes, ("cpu", "meta")):
        node.meta["example_value"] = torch.empty(2, device=device)
    made = capture(GraphModule(torch.nn.Module(), graph), [torch.empty(2)])
    assert [node.args[1] for node in made.graph.nodes if node.target == "to"] == [torch.device("meta")] and moved.args[1] == 1


# -- two devices ------------------------------------------------------------------------------------------------------


class _Captured(Exception):
    """Ends a call that cannot run: half of its layers have no numbers."""


def captured(model: Any, inputs: dict[str, Any]) -> tuple[GraphModule, Sequence[Any]]:
    found: list[tuple[GraphModule, Sequence[Any]]] = []

    def backend(module: GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        found.append((module, given))
        raise _Captured

    in_one_piece = torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True)
    with torch.no_grad(), in_one_piece, contextlib.suppress(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(model, backend=backend, dynamic=False)(**inputs)
    ((module, given),) = found
    return module, given


def on_one_device(module: GraphModule) -> GraphModule:
    """The same graph, all of it on the CPU."""
    for node in module.graph.nodes:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs), lambda leaf: "cpu" if leaf in ("meta", torch.device("meta")) else leaf)
    module.recompile()
    return module


SCHEDULES = {
    "dropped on the second": dict(migration_depth=3), "dropped on the first": dict(migration_depth=1),
    "dropped between them": dict(migration_depth=2), "without merging": dict(migration_depth=3, merge=None),
    "constant weights": dict(migration_depth=3, merge=None, fusion=0.5),
    "two stages": dict(stages=(parvts_fx.Stage(keep=4, at=1), parvts_fx.Stage(keep=2, at=3))),
    "attention": dict(stages=(parvts_fx.Stage(keep=4, at=3, rule="text_rows"),)),
}


@pytest.mark.slow
@pytest.mark.supports("Calls", "layers on two devices: every tensor is moved to where it is read")
@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
def test_layers_on_two_devices(model: Any, options: dict[str, Any]) -> None:
    """Of two devices one is "meta", which has no numbers: what is written for both is then run on one, with the numbers."""
    prompt = llava.prompt(model, ROWS)
    wanted = expected(model, prompt, **options)
    weights = {name: held.clone() for name, held in (*model.named_parameters(), *model.named_buffers())}
    spread(model, second="meta")
    names = {id(held): name for name, held in (*model.named_parameters(), *model.named_buffers())}
    model._hf_hook.io_same_device = False  # the logits stay where they are: nothing can be copied out of "meta"
    open_hooks(model)
    module, given = captured(model, {**prompt.inputs, "use_cache": False})
    devices = {held.device.type for held in given if isinstance(held, torch.Tensor)}
    assert devices == {"cpu", "meta"}
    with torch.no_grad():
        rewritten = parvts_fx.rewrite(module, given, options={"strict": True, **options})
        found = on_one_device(rewritten)(*(weights.get(names.get(id(held)), held) for held in given))
    logits = next(held for held in found if held.shape[-1:] == wanted[0].logits.shape[-1:])
    for sample, one in enumerate(wanted):
        assert relative_error(logits[sample], one.logits) < TOLERANCE
