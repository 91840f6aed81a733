"""Other options for one request: compiled forms side by side."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import parvts_fx
from parvts_fx import Stage
from tests import llava
from tests.comparing import TOLERANCE, expected
from tests.reference import relative_error

ROWS = [[3, "image", 5], [2, "image", 2]]


class Counted:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


@pytest.fixture
def lowering() -> Counted:
    return Counted()


@pytest.fixture
def model(lowering: Counted) -> Any:
    return parvts_fx.compile(llava.build(layers=2), lowering=lowering, strict=True, keep_ratio=0.5, migration_depth=1)


def kept(model: Any, prompt: llava.Prompt) -> tuple[int, ...]:
    with torch.no_grad():
        model(**prompt.inputs)
    return parvts_fx.last_call(model).kept_tokens


@pytest.mark.slow
@pytest.mark.supports("torch.compile", "parvts_fx.override: other options for one request, compiled forms kept side by side")
def test_each_has_its_own_form(model: Any, lowering: Counted) -> None:
    prompt = llava.prompt(model, ROWS)
    wanted = expected(llava.build(layers=2), prompt, keep_tokens=3, migration_depth=1)

    def turn() -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        found = [kept(model, prompt)]
        with parvts_fx.override(model, keep_tokens=3) as same, torch.no_grad():
            assert same is model
            for row, one in zip(model(**prompt.inputs).logits, wanted, strict=True):
                assert relative_error(row, one.logits) <= TOLERANCE
            with parvts_fx.override(model, stages=(Stage(at=1, keep=2, rule="last_row"),)):
                found.append(kept(model, prompt))
            found.append(kept(model, prompt))
            copied = copy.deepcopy(model)
        return [*found, kept(model, prompt)], kept(copied, prompt)

    assert turn() == ([(8, 8), (2, 2), (3, 3), (8, 8)], (8, 8))
    graphs = lowering.graphs
    assert turn()[0] == [(8, 8), (2, 2), (3, 3), (8, 8)]
    assert lowering.graphs < graphs + graphs // 3, "the copy alone has been compiled anew"


def test_generating(model: Any) -> None:
    prompt = llava.prompt(model, ROWS)
    with parvts_fx.override(model, keep_tokens=3):
        output = model.generate(**prompt.inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert output.past_key_values.layers[0].keys.shape[2] == prompt.visual.shape[1] - 16 + 3 + 2


@pytest.mark.slow
def test_threads_see_their_own(model: Any) -> None:
    prompt, found, together = llava.prompt(model, ROWS), {}, threading.Barrier(3)

    def run(count: int) -> None:
        with parvts_fx.override(model, keep_tokens=count), torch.no_grad():
            together.wait()
            for _ in range(3):
                found.setdefault(count, set()).add(model(**prompt.inputs).past_key_values.layers[0].keys.shape[2])

    threads = [threading.Thread(target=run, args=(count,)) for count in (2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rest = prompt.visual.shape[1] - 16
    assert found == {count: {rest + count} for count in (2, 3, 4)} and kept(model, prompt) == (8, 8)


@pytest.mark.parametrize("options, words", [
    ({"keep_tokens": 0}, "keep_tokens=0"), ({"keep_ratio": 2}, "keep_ratio=2"),
    ({"dynamic": True}, "dynamic belongs to the whole"),
    ({"on_call": print}, "on_call belongs"), ({"stages": (Stage(keep=2),), "keep_ratio": 0.5}, "keep_ratio")])
def test_bad_options(model: Any, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words), parvts_fx.override(model, **options):
        pass


def test_what_is_not_compiled() -> None:
    plain = llava.build(layers=1)
    with pytest.raises(ValueError, match="Compile it first"), parvts_fx.override(plain, keep_tokens=3):
        pass
    with pytest.raises(TypeError), parvts_fx.override("llava"):
        pass


@pytest.mark.slow
def test_explain_follows_the_models_own_options(model: Any) -> None:
    prompt = llava.prompt(model, ROWS)
    assert [graph.subject_tokens for graph in parvts_fx.explain(model, **prompt.inputs).graphs if graph.layers] == [8]
    report = parvts_fx.explain(model, options={"keep_tokens": 3, "migration_depth": 1}, **prompt.inputs)
    assert [graph.subject_tokens for graph in report.graphs if graph.layers] == [3]
