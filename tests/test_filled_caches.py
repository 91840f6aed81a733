"""Pictures that come when the cache already holds tokens: a system prompt cached first, further turns, copies, crops."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

import parvts_fx
from parvts_fx import Stage
from tests import llava
from tests.plain import Row, Specification
from tests.plain_checking import Choice, captured_call, outcome
from tests.plain_layers import Layer
from tests.reference import relative_error

TOLERANCE = 2e-5
OPTIONS: dict[str, dict[str, Any]] = {
    "before layer 0": dict(keep_ratio=0.25, migration_depth=0, merge=None),
    "both groups": dict(keep_ratio=0.25, migration_depth=2, merge=None),
    "joint": dict(keep_ratio=0.25, migration_depth=2, merge=None, paths="joint"),
    "merged": dict(keep_ratio=0.25, migration_depth=1),
    "constant weights": dict(keep_ratio=0.25, migration_depth=1, fusion=0.3),
    "by attention": dict(stages=[
        Stage(at=1, keep=0.5, rule="last_row", merge="clusters"), Stage(at=2, keep=0.25, rule="text_rows")]),
    "looking ahead": dict(stages=[Stage(at=1, keep=0.25, rule=parvts_fx.LookAhead(2), merge="clusters")]),
}
BATCHES: dict[str, list[list[int | str]]] = {
    "one": [[5, "image", 6]],
    "padded": [[3, "image", 6], [5, "image", 6]],
    "two pictures": [[5, "image", 2, "image", 3], [5, 2, "image", "image", 3]],
}


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(attention: str = "sdpa", **options: Any) -> Any:
    return parvts_fx.compile(llava.build(attention=attention), lowering="eager", strict=True, **options)


def parts(prompt: llava.Prompt, cut: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A prompt's first rows, and the others as a further turn on their cache."""
    whole = prompt.with_positions
    first = {name: whole[name][:, :cut] for name in ("input_ids", "attention_mask", "position_ids")}
    return first, {**whole, **{name: whole[name][:, cut:] for name in ("input_ids", "position_ids")}}


def worst(one: Any, other: Any, padding: torch.Tensor) -> float:
    """Of logits of the same rows, and of all that is cached behind each sample's padding."""
    rows = one.logits.shape[1]
    held = [(getattr(mine, name), getattr(its, name)) for mine, its in zip(
        one.past_key_values.layers, other.past_key_values.layers, strict=True) for name in ("keys", "values")]
    assert all(mine.shape == its.shape for mine, its in held)
    return max(
        relative_error(one.logits, other.logits[:, -rows:]),
        *(relative_error(mine[row, :, pads:], its[row, :, pads:])
          for mine, its in held for row, pads in enumerate(padding.tolist())))


WAYS = [
    ("sdpa", "before layer 0", "two pictures"), ("sdpa", "both groups", "padded"), ("sdpa", "joint", "one"),
    ("sdpa", "merged", "padded"), ("sdpa", "constant weights", "padded"), ("sdpa", "by attention", "two pictures"),
    ("eager", "both groups", "padded"), ("eager", "merged", "two pictures"), ("eager", "by attention", "padded"),
    ("sdpa", "looking ahead", "padded"), ("eager", "looking ahead", "two pictures"),
]


@pytest.mark.slow
@pytest.mark.supports("Calls", "a picture behind a cached system prompt")
@pytest.mark.parametrize("attention, options, batch", WAYS, ids=map(" ".join, WAYS))
@torch.no_grad()
def test_equals_the_one_long_prompt(attention, options, batch):
    """No text in front of a picture sees it, so that nothing is different from the prompt in one piece."""
    model = compiled(attention, **OPTIONS[options])
    prompt = llava.prompt(model, BATCHES[batch])
    whole = model(**prompt.with_positions)
    first, further = parts(prompt, 5)
    cache = model(**first).past_key_values
    output = model(**further, past_key_values=cache)
    record = parvts_fx.last_call(model)
    assert record.pruned and record.prompt_tokens == prompt.visual.shape[1] - 5
    assert cache.get_seq_length() == prompt.visual.shape[1]
    assert worst(output, whole, (1 - prompt.inputs["attention_mask"]).sum(1)) < TOLERANCE


def turn(model: Any, rows: list[list[int | str]], cache: Any, seen: torch.Tensor, seed: int) -> tuple[Any, torch.Tensor]:
    """A further turn, padded on the left in its own columns; what it returns, and the conversation's mask behind it.

    Args:
        seen: [batch, positions] the conversation's mask so far.
    """
    prompt = llava.prompt(model, rows, seed)
    mask = torch.cat([seen, prompt.inputs["attention_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, seen.shape[1]:]
    given = {**prompt.inputs, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    return model(**given), mask


def conversation(model: Any, turns: list[list[list[int | str]]]) -> tuple[list[torch.Tensor], Any]:
    """The last row's logits behind each turn, and the cache."""
    cache, mask, logits = None, torch.zeros(len(turns[0]), 0, dtype=torch.int64), []
    for seed, rows in enumerate(turns, start=1):
        output, mask = turn(model, rows, cache, mask, seed)
        logits.append(output.logits[:, -1])
        cache = output.past_key_values
    return logits, cache


def alone(model: Any, talk: list[list[list[int | str]]], row: int) -> Iterator[torch.Tensor]:
    """The last row's logits behind each turn of one sample's conversation, without its padding."""
    cache, mask = None, torch.zeros(1, 0, dtype=torch.int64)
    for seed, rows in enumerate(talk, start=1):
        own = llava.prompt(model, rows, seed).row(row)
        mask = torch.cat([mask, own.inputs["attention_mask"]], 1)
        positions = (mask.cumsum(1) - 1)[:, -own.visual.shape[1]:]
        output = model(**{**own.inputs, "attention_mask": mask}, position_ids=positions, past_key_values=cache)
        cache = output.past_key_values
        yield output.logits[0, -1]


TALK: list[list[list[int | str]]] = [[[3, "image", 6]], [[4, "image", 2]], [[3]], [["image", 5]]]


def kept_by_place(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Every fourth token of a picture."""
    return (visual.long().cumsum(1) % 4 == 1).float()


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.supports("Calls", "further turns with pictures on a pruned cache")
@torch.no_grad()
def test_turns_with_pictures_equal_those_of_kept_tokens_alone():
    """Pruned in front of layer 0, a turn is the prompt that never had the dropped tokens, at the full prompt's positions."""
    options = dict(keep_ratio=0.25, migration_depth=0, merge=None, score=kept_by_place)
    logits, cache = conversation(compiled(**options), TALK)
    model, plain, seen = llava.build(), None, 0
    for seed, (rows, pruned) in enumerate(zip(TALK, logits), start=1):
        prompt = llava.prompt(model, rows, seed)
        embedded, visual = model.get_input_embeddings()(prompt.inputs["input_ids"]), prompt.visual
        if visual.any():
            features = torch.cat(list(model.get_image_features(pixel_values=prompt.inputs["pixel_values"]).pooler_output))
            embedded = embedded.masked_scatter(visual[..., None], features)
        kept = (~visual | (visual.cumsum(1) % 4 == 1) & visual)[0]
        positions = (seen + torch.arange(visual.shape[1]))[kept][None]
        output = model(inputs_embeds=embedded[:, kept], position_ids=positions, past_key_values=plain)
        plain, seen = output.past_key_values, seen + visual.shape[1]
        assert relative_error(pruned, output.logits[:, -1]) < TOLERANCE
    assert cache.get_seq_length() == seen and len(cache.pruned_prompts) == 3
    for mine, its in zip(cache.layers, plain.layers):
        assert relative_error(mine.keys, its.keys) < TOLERANCE and relative_error(mine.values, its.values) < TOLERANCE


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.supports("Calls", "batches whose further turns are padded, behind a pruned prompt")
@torch.no_grad()
def test_padded_turns():
    """Padding in the middle of the conversation: the mask's columns are put in place by which rows are cached."""
    talk = [[[3, "image", 6], [1, "image", 6]], [[2], [4]], [["image", 4], ["image", 1]], [[1], [1]], [[1], [1]]]
    model = compiled(keep_ratio=0.25, migration_depth=1)
    together, _ = conversation(model, talk)
    for row in range(2):
        for logits, own in zip(together, alone(model, talk, row), strict=True):
            assert relative_error(logits[row], own) < TOLERANCE


UNEVEN: list[list[list[int | str]]] = [
    [[3], [1], [4]], [[2, "image", 6], [1, "image", 1, "image"], [5]], [[2, "image"], [3], [1, "image", 3]], [[1], [3], [2]]]
"""Turns of three samples, in the second and third of which these have other numbers of visual tokens."""


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.supports("Batches", "rows with other numbers of visual tokens in further turns, on caches whose rows differ already")
@pytest.mark.parametrize("attention, options, talks", [
    ("sdpa", "merged", [[[[1], [2], [1]], UNEVEN[1]], UNEVEN]), ("eager", "by attention", [UNEVEN[:2]])],
    ids=["merged, two talks", "by attention, eager"])
@torch.no_grad()
def test_turns_whose_samples_differ(attention, options, talks):
    """Each as in a conversation of its own; cached rows become a size like any other from the second talk on."""
    told: list[Any] = []
    model = compiled(attention, on_call=told.append, **OPTIONS[options])
    for talk in talks:
        together, cache = conversation(model, talk)
        assert [record.pruned for record in told] == [any("image" in row for row in rows) for rows in talk]
        assert max(prompt.visual.sum(1).max() for prompt in cache.pruned_prompts) == 32
        for row in range(3 if talk is talks[-1] else 0):
            for logits, own in zip(together, alone(model, talk, row), strict=True):
                assert relative_error(logits[row], own) < TOLERANCE
        told.clear()


@pytest.mark.versions
@pytest.mark.supports("Calls", "copies of a cached prefix, branched, pickled and cropped")
@torch.no_grad()
def test_branches():
    """Other pictures behind copies of one cache, and behind one that a turn was taken off again."""
    model = compiled(keep_ratio=0.25, migration_depth=1)
    first, mask = turn(model, TALK[0], None, torch.zeros(1, 0, dtype=torch.int64), 1)
    prefix = first.past_key_values
    saved = pickle.dumps(prefix)

    def answered(cache: Any, seed: int) -> torch.Tensor:
        return turn(model, TALK[1], cache, mask, seed)[0].logits

    wanted = {seed: answered(copy.deepcopy(prefix), seed) for seed in (2, 3)}
    assert relative_error(wanted[2], wanted[3]) > 1e-2
    assert relative_error(answered(pickle.loads(saved), 3), wanted[3]) < TOLERANCE
    assert relative_error(answered(prefix, 2), wanted[2]) < TOLERANCE
    assert prefix.get_seq_length() == 25 + 22
    prefix.crop(*taken_off(prefix, 22))
    assert prefix.get_seq_length() == 25 and prefix.layers[0].keys.shape[-2] == 13
    assert relative_error(answered(prefix, 3), wanted[3]) < TOLERANCE
    with pytest.raises(ValueError, match="Take at most 2"):
        prefix.crop(*taken_off(prefix, 3))
    prefix.crop(*taken_off(prefix, 1))
    assert prefix.get_seq_length() == 25 + 21 and len(prefix.pruned_prompts) == 2


def taken_off(cache: Any, tokens: int) -> tuple[int]:
    """What ``crop`` is given: in older versions of transformers how many are to be left."""
    return (cache.get_seq_length() - tokens if "max_length" in inspect.signature(DynamicLayer.crop).parameters else -tokens,)


@pytest.mark.slow
@pytest.mark.supports("Warned about", "a picture on a pruned cache under the string backend, without position ids")
@torch.no_grad()
def test_the_string_backend_says_that_positions_are_counted_from_a_short_cache():
    model = llava.build()
    model.compile(backend="parvts", options={"lowering": "eager", "strict": True, "keep_ratio": 0.25, "migration_depth": 1})
    first, second = (llava.prompt(model, rows) for rows in TALK[:2])
    length, more = first.visual.shape[1], second.visual.shape[1]
    inputs = {name: held for name, held in second.inputs.items() if name != "attention_mask"}
    cache = model(**first.inputs).past_key_values
    places = torch.arange(length, length + more)[None]
    wanted = model(**inputs, past_key_values=copy.deepcopy(cache), position_ids=places)
    with pytest.warns(parvts_fx.ParvtsWarning, match="counts positions from the short cache"):
        output = model(**inputs, past_key_values=cache)
    assert output.past_key_values.layers[0].keys.shape[-2] == wanted.past_key_values.layers[0].keys.shape[-2] == 13 + 10
    assert relative_error(output.logits, wanted.logits) > 1e-2  # which is what the warning is for


@pytest.mark.parametrize("number", [14, math.log(14), 14**-0.5], ids=["length", "logarithm", "root"])
def test_a_number_that_may_count_all_keys(monkeypatch, number):
    """11 rows behind 3 cached ones: in a graph of static sizes nothing tells a constant from what fewer keys would change."""
    feed = Layer.feed
    monkeypatch.setattr(Layer, "feed", lambda layer, x: feed(layer, x) * number)
    spec = Specification(attention="masked", past=3, rows=(Row(before=1),))
    captured_call.cache_clear()
    told = outcome(spec, Choice(depth=1, keep=2))
    captured_call.cache_clear()
    assert spec.length == 11 and told.kind == "refused" and "may be the prompt's length or a constant" in told.reason
