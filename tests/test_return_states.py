"""States that layers write into a filled cache: returned while the graph is rewritten, and written at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Node

import parvts_fx
from parvts_fx.analysis.values import changed_in_place, output_node
from parvts_fx.capture import capture
from parvts_fx.capture.return_states import ReturnStates, write_states
from parvts_fx.pipeline import Work
from tests.models.installed import build
from tests.reference import relative_error

TOLERANCE = 2e-5


@pytest.mark.slow
@pytest.mark.supports("Calls", "a picture behind a cached system prompt, for models whose layers write a state into the cache")
@pytest.mark.parametrize("name, options", [
    ("qwen3_5", dict(migration_depth=1)), ("lfm2_vl", dict(migration_depth=1, fusion=0.4, merge=None)),
    ("nemotron_h_omni", dict(migration_depth=0))], ids=["gated delta rule", "convolutions", "state spaces"])
@torch.no_grad()
def test_equals_the_one_long_prompt(name: str, options: dict[str, Any]) -> None:
    assert error(name, options) < TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_a_state_that_is_not_written_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritten(work: Work, end: Node) -> None:
        write_states(work, end)
        for node in [node for node in work.module.graph.nodes if node.target == "copy_"]:
            work.module.graph.erase_node(node)

    monkeypatch.setattr(sys.modules["parvts_fx.rewriting"], "write_states", unwritten)
    assert error("lfm2_vl", dict(migration_depth=1)) > 1e-3


def error(name: str, options: dict[str, Any]) -> float:
    """Of the logits of a prompt behind a cached one, and of three decode steps, which read the states that it has left."""
    model, _, inputs = behind_words(name)
    words = inputs["input_ids"][:, :5]
    if difference(model, words, inputs) > 1e-3:
        pytest.skip("this version's model does not begin with the state that its cache holds, compiled or not")
    parvts_fx.compile(model, lowering="eager", strict=True, keep_ratio=0.25, **options)
    found = difference(model, words, inputs)
    record = parvts_fx.last_call(model)
    assert record.pruned and record.prompt_tokens == inputs["input_ids"].shape[1] - 5
    return found


@pytest.mark.slow
@pytest.mark.supports("Batches", "rows with other numbers of visual tokens behind a cached prompt, for models whose layers write "
                      "a state into the cache")
@pytest.mark.parametrize("name", ["lfm2_vl", "qwen3_5"])
@torch.no_grad()
def test_batches_whose_samples_differ(name: str) -> None:
    """A picture in one row and none in the other, behind cached words: the first as it is by itself, the other as it was."""
    model, both, picture = behind_words(name)
    (_, whole), told = answered(model, both), list[Any]()
    parvts_fx.compile(model, lowering="eager", strict=True, keep_ratio=0.25, migration_depth=1, on_call=told.append)
    first, other = answered(model, both)
    assert [record.pruned for record in told] == [False, True] and told[1].kept_tokens == (4, 0)
    (alone,) = answered(model, picture)
    assert relative_error(first, alone) < TOLERANCE and relative_error(other, whole) < TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_windows_of_batches_whose_samples_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run whole: later calls' masks count a window's rows from its end, and samples with fewer new ones have other old
    ones there. Without that check a row is wrong."""
    model, both, picture = behind_words("exaone4_5")
    parvts_fx.compile(model, lowering="eager", keep_ratio=0.25, migration_depth=1)
    with pytest.warns(parvts_fx.ParvtsWarning, match="a result holds the last rows of a filled cache"):
        answered(model, both)
    torch._dynamo.reset()
    parvts_fx.uncompile(model)
    monkeypatch.setattr(sys.modules["parvts_fx.passes.single_sample"]._Writer, "_is_state_alone", lambda *_: True)
    parvts_fx.compile(model, lowering="eager", keep_ratio=0.25, migration_depth=1, strict=True)
    (alone,) = answered(model, picture)
    assert relative_error(answered(model, both)[0], alone) > 1e-3


def behind_words(name: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A model; a batch of its prompt and of text as long, both behind five words; the prompt alone behind them."""
    built = build(name)
    words = torch.tensor([[7, 9, 11, 13, 5]])
    text = torch.randint(4, 90, built.inputs["input_ids"].shape, generator=torch.Generator().manual_seed(9))
    one, both = dict(built.inputs), dict(built.inputs)
    for inputs, ids in (one, [one["input_ids"]]), (both, [one["input_ids"], text]):
        inputs["input_ids"] = torch.cat([words.expand(len(ids), -1), torch.cat(ids)], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (5, 0))
            inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(kinds)])[:len(ids)]
    return built.model, both, one


def answered(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """[batch, steps, vocabulary]: the logits of a prompt behind its cached first words, and of two decode steps."""
    how = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)
    cache = model(input_ids=inputs["input_ids"][:, :5], use_cache=True).past_key_values
    found = model.generate(**inputs, past_key_values=cache, **how, max_new_tokens=3, min_new_tokens=3)
    return torch.stack(found.logits, 1)


def difference(model: Any, words: torch.Tensor, inputs: dict[str, Any]) -> float:
    """Between a prompt in one piece, and the same behind its cached first words."""
    how = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)
    whole = model.generate(**inputs, **how, max_new_tokens=4)
    cache = model.generate(input_ids=words, **how, max_new_tokens=1).past_key_values
    parts = model.generate(**inputs, past_key_values=cache, **how, max_new_tokens=4)
    return max(map(relative_error, parts.logits, whole.logits))


def state_and_sum(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.sum(1) + state
    state.copy_(total)
    return x * 2, state + 1


def one_result(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state.copy_(x.sum(1))
    return x * 2


def worked_on(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[Work, int]:
    """The graph with its states returned, and how many there are."""
    work = Work(capture(torch.fx.symbolic_trace(function), inputs))
    merged = next(node for node in work.module.graph.nodes if node.op == "placeholder")
    return work, ReturnStates(merged).run(work).matches


@pytest.mark.parametrize("function", [state_and_sum, one_result])
def test_returned_and_written_at_the_end(function: Callable[..., Any]) -> None:
    x, state = torch.randn(2, 5, 3), torch.randn(2, 3)
    wanted_state = state.clone()
    wanted = function(x, wanted_state)
    work, found = worked_on(function, x, state)
    assert found == 1 and not any(map(changed_in_place, work.module.graph.nodes))
    end = output_node(work.module.graph)
    assert isinstance(end.args[0], tuple) and len(end.args[0]) == (3 if function is state_and_sum else 2)
    write_states(work, end)
    work.module.recompile()
    torch.testing.assert_close(work.module(x, state), wanted)
    torch.testing.assert_close(state, wanted_state)


def in_parts(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state[:, :2].copy_(x.sum(1)[:, :2])
    return x


def spread(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state.copy_(x.sum((0, 1)))
    return x


def twice(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    state.copy_(x.sum(1))
    state.add_(1)
    return x


def read_by_another_name(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    view = state.view(-1)
    state.copy_(x.sum(1))
    return x + view.sum()


@pytest.mark.parametrize("function", [in_parts, spread, twice, read_by_another_name])
def test_other_writes_stay(function: Callable[..., Any]) -> None:
    work, found = worked_on(function, torch.randn(2, 5, 3), torch.randn(2, 3))
    assert found == 0 and any(map(changed_in_place, work.module.graph.nodes))
