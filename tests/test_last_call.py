"""What became of a call: the record, the callback, and compilation undone."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch

import parvts_fx
from parvts_fx.errors import Refusal
from parvts_fx.runtime.by_sample import BySample
from parvts_fx.runtime.record import KEPT_ALL, NO_VISUALS
from tests import llava
from tests.comparing import expected
from tests.models.builders import BUILDERS

OPTIONS = dict(lowering="eager", migration_depth=1, keep_tokens=3)
EVEN, UNEVEN = [[3, "image", 5], [2, "image", 2]], [[2, "image", 3], [4]]


@pytest.fixture
def model() -> Any:
    return llava.build(layers=3)


def called(model: Any, inputs: dict, **more: Any) -> Any:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", parvts_fx.ParvtsWarning)
        return model(**inputs, **more)


@pytest.mark.supports("Calls", "parvts_fx.last_call and on_call: what was pruned of each row, or why nothing")
def test_a_pruned_prompt(model: Any) -> None:
    given, told = llava.prompt(model, EVEN), []
    parvts_fx.compile(model, on_call=told.append, **OPTIONS)
    assert parvts_fx.last_call(model) is None
    model.generate(**given.inputs, max_new_tokens=3, do_sample=False)
    record = parvts_fx.last_call(model)
    assert told == [record], "decode steps make no record"
    assert record.pruned and record.reason == "" and record.graph == "rewritten"
    counts = tuple(given.visual.sum(1).tolist())
    assert (record.prompt_tokens, record.visual_tokens, record.kept_tokens) == (given.visual.shape[1], counts, (3, 3))


@pytest.mark.slow
@pytest.mark.supports("Calls", "parvts_fx.last_call tells which visual tokens are left, also of rows that differ")
@pytest.mark.parametrize("options", [
    dict(keep_tokens=3, migration_depth=1), dict(keep_tokens=3, migration_depth=1, fusion=0.4),
    dict(stages=(parvts_fx.Stage(at=0, keep=9, migrate=1), parvts_fx.Stage(at=2, keep=3, rule="last_row")))],
    ids=["one stage", "constant weights", "two stages"])
def test_which_tokens_are_left(model: Any, options: dict[str, Any]) -> None:
    """Those of the eager reference, in batches whose rows are pruned together and sample by sample."""
    even, uneven = llava.prompt(model, EVEN), llava.prompt(model, UNEVEN)
    wanted = [prefill.rows for prefill in expected(model, even, even.with_positions, **options)]
    alone = uneven.row(0)
    single = expected(model, alone, alone.with_positions, **options)[0].rows
    parvts_fx.compile(model, lowering="eager", strict=True, **options)
    called(model, even.with_positions)
    kept = parvts_fx.last_call(model).kept
    for row, rows, visual in zip(kept, wanted, even.visual, strict=True):
        assert row.nonzero()[:, 0].tolist() == [place for place in rows.tolist() if visual[place]] and row.sum() == 3
    called(model, uneven.with_positions)
    kept = parvts_fx.last_call(model).kept
    in_front = int((uneven.inputs["attention_mask"][0] == 0).sum())
    wanted_places = [place + in_front for place in single.tolist() if alone.visual[0, place]]
    assert kept[0].nonzero()[:, 0].tolist() == wanted_places and not kept[1].any()


def test_an_uneven_batch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row's own numbers; where it cannot be pruned the reason names the rows' counts, and is the warning's."""
    uneven = llava.prompt(model, UNEVEN)
    parvts_fx.compile(model, **OPTIONS)
    called(model, uneven.inputs)
    record, counts = parvts_fx.last_call(model), tuple(uneven.visual.sum(1).tolist())
    assert record.pruned and record.visual_tokens == counts and record.kept_tokens == (3, 0)
    monkeypatch.setattr(BySample, "__call__", refused)
    with pytest.warns(parvts_fx.ParvtsWarning) as caught, torch.no_grad():
        model(**uneven.inputs)
    record = parvts_fx.last_call(model)
    assert not record.pruned and record.graph == "unrewritten"
    assert f"different numbers of visual tokens: {counts[0]}, {counts[1]}; and its samples cannot run one by one: so" in (
        record.reason)
    assert any(record.reason in str(warning.message) for warning in caught)


def refused(*_: Any) -> None:
    raise Refusal("so it is")


@pytest.mark.slow
def test_reasons(model: Any) -> None:
    given = llava.prompt(model, EVEN)
    parvts_fx.compile(model, **OPTIONS | {"keep_tokens": 1000})
    called(model, given.inputs)
    assert parvts_fx.last_call(model).reason == KEPT_ALL
    called(model, {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)})
    assert parvts_fx.last_call(model).reason == NO_VISUALS
    parvts_fx.compile(model, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", parvts_fx.ParvtsWarning)
        model(**given.inputs)  # records gradients
    assert "gradients" in parvts_fx.last_call(model).reason
    assert parvts_fx.last_call(model).visual_tokens == parvts_fx.last_call(model).kept_tokens == ()


@pytest.mark.slow
def test_strict_leaves_a_record(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    even, uneven = llava.prompt(model, EVEN), llava.prompt(model, UNEVEN)
    told: list[parvts_fx.CallRecord] = []
    parvts_fx.compile(model, on_call=told.append, strict=True, **OPTIONS)
    called(model, even.inputs)
    monkeypatch.setattr(BySample, "__call__", refused)
    with pytest.raises(parvts_fx.NotRewritten):
        called(model, uneven.inputs)
    assert [record.pruned for record in told] == [True, False] and parvts_fx.last_call(model) is told[1]
    assert "different numbers" in told[1].reason


def test_features_that_no_graph_merges() -> None:
    built = BUILDERS["mllama"]()
    parvts_fx.compile(built.model, **OPTIONS)
    called(built.model, built.inputs)
    assert "no captured graph merges" in parvts_fx.last_call(built.model).reason


def test_a_part_that_generate_calls() -> None:
    """BLIP-2 merges in generate and calls its text model: both have the record."""
    built, told = BUILDERS["blip-2"](), []
    parvts_fx.compile(built.model, on_call=told.append, **OPTIONS)
    with torch.no_grad():
        built.model.generate(**built.inputs, max_new_tokens=2, do_sample=False)
    assert [record.pruned for record in told] == [True]
    assert parvts_fx.last_call(built.model) is parvts_fx.last_call(built.model.language_model) is told[0]


@pytest.mark.supports("torch.compile", "parvts_fx.uncompile, and compiling again with other options")
def test_uncompile_and_compile_again(model: Any) -> None:
    given = llava.prompt(model, EVEN)
    with torch.no_grad():
        whole = model(**given.inputs).logits
    before = set(vars(model))
    parvts_fx.compile(model, **OPTIONS)
    assert called(model, given.inputs).past_key_values.get_seq_length(0) > 0 and parvts_fx.last_call(model).pruned
    parvts_fx.compile(model, **OPTIONS | {"keep_tokens": 5})
    called(model, given.inputs)
    assert parvts_fx.last_call(model).kept_tokens == (5, 5)
    assert parvts_fx.uncompile(model) is model and set(vars(model)) == before
    with torch.no_grad():
        assert torch.equal(model(**given.inputs).logits, whole)


@pytest.mark.slow
@pytest.mark.supports("torch.compile", "copies of a compiled model are compiled alike; pickled ones come back uncompiled")
def test_copies(model: Any) -> None:
    given, told = llava.prompt(model, EVEN), []
    parvts_fx.compile(model, on_call=told.append, **OPTIONS)
    pickled = pickle.dumps(model)
    copied = copy.deepcopy(copy.deepcopy(model))
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    copied.generate(**given.inputs, max_new_tokens=2, do_sample=False)
    assert parvts_fx.last_call(copied) is told[0] and told[0].pruned and parvts_fx.last_call(model) is None
    assert not called(copied, given.inputs).logits.any() and called(model, given.inputs).logits.any(), "weights of its own"
    assert [record.pruned for record in told] == [True, True, True]
    for plain in (copy.deepcopy(parvts_fx.uncompile(copied)), pickle.loads(pickled)):
        called(plain, given.inputs)
        called(copy.deepcopy(plain), given.inputs)
    assert len(told) == 3


@pytest.mark.parametrize("given, words", [
    (None, "got None. Give the model"), (torch.nn.Linear, r"the class Linear. Build the model first: parvts_fx.compile\(Linear"),
    (lambda x: x, r"torch.compile\(function, backend=\"parvts\"\)"), ("llava", "got 'llava'. Give the model")])
def test_what_is_no_model(given: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        parvts_fx.compile(given)


def test_a_callback_that_is_none(model: Any) -> None:
    with pytest.raises(TypeError, match="on_call='log': expected a callable"):
        parvts_fx.compile(model, on_call="log")
