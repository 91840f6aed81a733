"""Modules that Dynamo cannot capture: one operation of the graph each, as long as they keep rows apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parvts_fx
from parvts_fx import NotRewritten
from parvts_fx.runtime.close_module import close
from parvts_fx.runtime.module_operation import parameter
from tests import llava
from tests.comparing import TOLERANCE, assert_equal_prefill, expected, pruned
from tests.reference import relative_error

HIDDEN, EXPERTS = 48, 5


class Looped(nn.Module):
    """Experts, of which those run that any token has chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.up = nn.Parameter(0.2 * torch.randn(EXPERTS, 20, HIDDEN))
        self.down = nn.Parameter(0.2 * torch.randn(EXPERTS, HIDDEN, 20))
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        weights, chosen = self.gate(flat).sigmoid().topk(2, -1)
        made = torch.zeros_like(flat)
        for expert in chosen.unique().tolist():
            row, place = torch.where(chosen == expert)
            done = F.linear(F.silu(F.linear(flat[row], self.up[expert])), self.down[expert])
            made.index_add_(0, row, self.scale * done * weights[row, place, None])
        return made.view_as(x)


class Apart(nn.Module):
    """Two modules for two kinds of rows, if there are both; tells the kinds, too, sample behind sample."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, offset: float = 0.0) -> tuple[Tensor, Tensor]:
        kind = x.sum(-1) > offset
        made = torch.zeros_like(x)
        if kind.any():
            made[kind], made[~kind] = self.one(x[kind]).tanh(), self.other(x[~kind]).tanh()
        else:
            made = self.other(x).tanh()
        return made, kind.flatten()[:, None].expand(-1, 3)


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.apart = Apart()

    def forward(self, x: Tensor) -> Tensor:
        return self.apart(x)[0]


class Meeting(nn.Module):
    """Branches on data, and lets rows meet."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(1, keepdim=True)) if (x > 0).any() else self.linear(x)


def model_with(kind: type[nn.Module], layers: int = 3) -> Any:
    model = llava.build(layers=layers)
    torch.manual_seed(7)
    for layer in llava.text_model(model).layers[1:]:
        layer.mlp = kind()
    return model


def mlps(model: Any) -> list[nn.Module]:
    return [part for layer in llava.text_model(model).layers for part in layer.mlp.modules()]


def compiled(model: Any, **options: Any) -> Any:
    return parvts_fx.compile(model, **{**dict(migration_depth=2, lowering="eager", strict=True), **options})


PROMPTS = {"one": [[2, "image", 3]], "longer": [[4, "image", 8]], "padded": [[4, "image", 8], [1, "image", 3]]}


@pytest.mark.slow
@pytest.mark.supports("Graphs", "modules of a layer that Dynamo cannot capture, and in which tokens do not meet: experts that "
                                "are looped over, or chosen apart for two kinds of tokens")
@pytest.mark.parametrize("kind, options", [(Looped, {}), (First, {"fusion": 0.4})])
def test_prompts_are_rewritten(kind: type[nn.Module], options: dict) -> None:
    model = model_with(kind)
    prompts = [llava.prompt(model, rows) for rows in PROMPTS.values()]
    wanted = [expected(model, prompt, **options) for prompt in prompts]
    compiled(model, **options)
    for prompt, each in zip(prompts, wanted):
        with torch.no_grad():
            assert_equal_prefill(model(**prompt.inputs), each)
        assert parvts_fx.last_call(model).pruned
    assert not any("forward" in vars(part) for part in mlps(model))


@pytest.mark.slow
def test_generate_and_a_copy() -> None:
    model = model_with(Looped)
    prompt = llava.prompt(model, PROMPTS["longer"])
    given = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        with pruned(model):
            wanted = model.generate(**prompt.inputs, **given)
        for each in (compiled(model), copy.deepcopy(model)):
            found = each.generate(**prompt.inputs, **given)
            assert found.sequences.tolist() == wanted.sequences.tolist() and parvts_fx.last_call(each).pruned
            assert all(relative_error(ours, theirs) <= TOLERANCE for ours, theirs in zip(found.logits, wanted.logits))


@pytest.mark.slow
def test_they_are_explained() -> None:
    model = model_with(First)
    with torch.no_grad():
        report = parvts_fx.explain(model, **llava.prompt(model, PROMPTS["one"]).inputs, options=dict(migration_depth=2))
    assert [graph.status for graph in report.graphs].count("rewritten") == 1 and len(report.graphs) == 1


@pytest.mark.slow
def test_through_inductor() -> None:
    model = model_with(Looped, layers=2)
    prompt = llava.prompt(model, PROMPTS["one"])
    wanted = expected(model, prompt, migration_depth=1)
    compiled(model, lowering="inductor", migration_depth=1)
    with torch.no_grad():
        assert_equal_prefill(model(**prompt.inputs), wanted)


@pytest.mark.slow
def test_another_model_keeps_what_it_has_compiled() -> None:
    """Beginning a call again throws away nothing of others'."""
    model, other, lowered = model_with(First), llava.build(), []
    prompt = llava.prompt(other, PROMPTS["one"])

    def lower(module: torch.fx.GraphModule, inputs: Any) -> Any:
        lowered.append(inputs)
        return module.forward

    compiled(other, lowering=lower)
    compiled(model)
    with torch.no_grad():
        for each in (other, model):
            each.generate(**prompt.inputs, max_new_tokens=1)
        before = len(lowered)
        other.generate(**prompt.inputs, max_new_tokens=1)
    assert before == len(lowered) > 0 and parvts_fx.last_call(model).pruned


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def changed_number(module: Looped) -> None:
    module.scale = 3.0


def changed_part(module: Looped) -> None:
    """As adapters are put in: with the weights where they were."""
    part = Doubled(HIDDEN, EXPERTS)
    part.load_state_dict(module.gate.state_dict())
    module.gate = part


@pytest.mark.slow
@pytest.mark.parametrize("change", [changed_number, changed_part])
def test_changes_are_seen(change: Any) -> None:
    model = model_with(Looped)
    prompt = llava.prompt(model, PROMPTS["one"])
    compiled(model)
    with torch.no_grad():
        before = model(**prompt.inputs).logits
        change(llava.text_model(model).layers[1].mlp)
        found = model(**prompt.inputs)
        assert parvts_fx.last_call(model).pruned
        parvts_fx.uncompile(model)
        assert_equal_prefill(found, expected(model, prompt))
    assert relative_error(before, found.logits) > 1e-3


@pytest.mark.slow
def test_gradients_are_the_models_own() -> None:
    model = model_with(Looped)
    prompt = llava.prompt(model, PROMPTS["one"])
    compiled(model, strict=False)
    with torch.no_grad():
        model(**prompt.inputs)
    with pytest.warns(parvts_fx.ParvtsWarning):
        model(**prompt.inputs).logits.sum().backward()
    own = list(llava.text_model(model).layers[-1].mlp.parameters())
    found = [held.grad.clone() for held in own]
    model.zero_grad()
    parvts_fx.uncompile(model)(**prompt.inputs).logits.sum().backward()
    assert found and all(torch.allclose(one, held.grad, rtol=1e-4, atol=1e-6) for one, held in zip(found, own))


@pytest.mark.slow
@pytest.mark.supports("Left unrewritten", "a layer's module that Dynamo cannot capture, and in which tokens meet")
def test_where_rows_meet_nothing_is_closed() -> None:
    model = model_with(Meeting)
    prompt = llava.prompt(model, PROMPTS["one"])
    with torch.no_grad():
        wanted = model(**prompt.inputs).logits
        with pytest.raises(NotRewritten, match="the graph breaks between the decoder's layers"):
            compiled(model)(**prompt.inputs)
        parvts_fx.uncompile(model)
        with pytest.warns(parvts_fx.ParvtsWarning, match="the graph breaks between the decoder's layers"):
            found = compiled(model, strict=False)(**prompt.inputs).logits
    assert relative_error(found, wanted) <= 1e-6


@pytest.mark.parametrize("batch", [1, 2])
def test_sizes_of_results_follow_those_of_what_is_given(batch: int) -> None:
    module = Apart().eval()
    closed = close(module, (torch.randn(batch, 7, HIDDEN), 0.5), {}, {})
    assert closed is not None and not closed.returns_one
    weights = [parameter(module, path) for path in closed.weights]
    for samples, rows in ((1, 11), (3, 4)):
        x = torch.randn(samples, rows, HIDDEN)
        found = torch.ops.parvts_fx.module(closed.key, [x], weights)
        bare = torch.ops.parvts_fx.module(closed.key, [x.to("meta")], weights)
        wanted = module(x, 0.5)
        assert [held.shape for held in bare] == [held.shape for held in wanted]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_layers_alike_are_one_operation() -> None:
    x = torch.randn(1, 7, HIDDEN)
    one, other, third = (close(module, (x,), {}, {}) for module in (Looped(), Looped(), Apart()))
    assert one is not None and third is not None and one is other and third.key != one.key


class Writing(Looped):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Remembering(Looped):
    def forward(self, x: Tensor) -> Tensor:
        self.rows = x.shape[1]
        return super().forward(x)


class Listing(Looped):
    def forward(self, x: Tensor) -> list[int]:
        return x.flatten().long().tolist()


class Constant(Looped):
    def forward(self, x: Tensor) -> Tensor:
        return self.gate.weight + x.sum()


def hooked() -> nn.Module:
    module = First()
    module.apart.register_forward_hook(lambda *_: None)
    return module


def holding() -> nn.Module:
    module = Looped()
    module.table = torch.zeros(3)
    return module


@pytest.mark.parametrize("make", [Meeting, Writing, Remembering, Listing, Constant, hooked, holding])
def test_what_stays_open(make: Any) -> None:
    module = make()
    assert close(module, (torch.randn(1, 8, HIDDEN),), {}, {}) is None
    assert close(Looped(), (torch.randn(1, 8, HIDDEN), object()), {}, {}) is None


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    module = nn.Bilinear(4, 4, 3)
    closed = close(module, (torch.randn(5, 4), torch.randn(5, 4)), {}, {})
    assert closed is not None
    weights = [parameter(module, path) for path in closed.weights]
    with pytest.raises(RuntimeError, match="do not belong together"):
        torch.ops.parvts_fx.module(closed.key, [torch.randn(size, 4, device="meta") for size in (5, 6)], weights)
