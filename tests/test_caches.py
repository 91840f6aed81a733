"""What becomes of a shortened cache's count of tokens: corrected, warned about, or neither because nothing is wrong."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import parvts_fx
from parvts_fx.runtime.caches import find_caches
from tests import llava
from tests.comparing import TOLERANCE, pruned
from tests.reference import relative_error

IMAGE, HIDDEN, HEADS, LAYERS, VISUAL = 1, 12, 2, 2, 8
OPTIONS = dict(keep_tokens=2, migration_depth=1, lowering="eager", strict=True)
WAYS = ("string", "parvts_fx.compile")
NO_POSITIONS, FURTHER = "is given no position_ids", "a further prompt goes on"


@dataclasses.dataclass
class Memory:
    """A cache of somebody's own."""

    keys: list[Tensor] = dataclasses.field(default_factory=list)
    values: list[Tensor] = dataclasses.field(default_factory=list)


Pairs = list[tuple[Tensor, Tensor]]
FORMS = ("pairs", "lists", "flat", "stacked", "one", "heads first", "named", "object")


def packed(form: str, pairs: Pairs, given: Any) -> Any:
    """Keys and values [batch, heads, tokens, head dim] of all layers, as a model may hand them out."""
    if form == "object":
        given.keys, given.values = [key for key, _ in pairs], [value for _, value in pairs]
        return given
    if form == "heads first":
        return tuple((key.flatten(0, 1), value.flatten(0, 1)) for key, value in pairs)
    if form in ("stacked", "one"):
        layers = [torch.stack(pair) for pair in pairs]
        return torch.stack(layers) if form == "one" else layers
    return {"pairs": tuple(pairs), "lists": [list(pair) for pair in pairs], "named": {"past": {"layers": pairs}},
            "flat": tuple(held for pair in pairs for held in pair)}[form]


def unpacked(form: str, past: Any) -> Pairs:
    if past is None or form == "object":
        return [] if past is None else list(zip(past.keys, past.values))
    if form == "heads first":
        return [(key.unflatten(0, (-1, HEADS)), value.unflatten(0, (-1, HEADS))) for key, value in past]
    if form == "flat":
        return list(zip(past[::2], past[1::2]))
    return [(layer[0], layer[1]) for layer in (past["past"]["layers"] if form == "named" else past)]


class Chat(nn.Module):
    """A small multimodal decoder that counts positions from its cache where it is given none."""

    def __init__(self, form: str):
        super().__init__()
        self.form = form
        self.tokens, self.learned, self.head = nn.Embedding(19, HIDDEN), nn.Embedding(64, HIDDEN), nn.Linear(HIDDEN, 19)
        self.projection = nn.Linear(5, HIDDEN)
        self.norms = nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(LAYERS))
        self.qkv = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.requires_grad_(False).parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))

    def forward(self, ids: Tensor, past: Any = None, features: Tensor | None = None,
                positions: Tensor | None = None) -> tuple[Tensor, Any]:
        held, new = unpacked(self.form, past), ids.shape[1]
        start = held[0][0].shape[2] if held else 0
        x = self.tokens(ids)
        if features is not None:
            x = x.masked_scatter((ids == IMAGE)[..., None], self.projection(features))
        x = x + self.learned(torch.arange(start, start + new) if positions is None else positions)
        allowed = torch.ones(new, start + new, dtype=torch.bool).tril(start)
        pairs = []
        for index in range(LAYERS):
            split = self.qkv[index](self.norms[index](x)).chunk(3, -1)
            query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in split)
            if held:
                key, value = torch.cat([held[index][0], key], 2), torch.cat([held[index][1], value], 2)
            pairs.append((key, value))
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
            x = x + self.out[index](mixed.transpose(1, 2).flatten(2))
        return self.head(x), packed(self.form, pairs, past)


def compiled(model: nn.Module, way: str, **options: Any) -> nn.Module:
    if way == "string":
        model.compile(backend="parvts", options={**OPTIONS, **options})
        return model
    return parvts_fx.compile(model, **{**OPTIONS, **options})


class Said:
    """Warnings of ours, as they come."""

    def __init__(self, caught: list):
        self._caught, self._seen = caught, 0

    def new(self) -> list[str]:
        told = [str(w.message) for w in self._caught[self._seen:] if issubclass(w.category, parvts_fx.ParvtsWarning)]
        self._seen = len(self._caught)
        return told


@pytest.fixture
def said() -> Iterator[Said]:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        yield Said(caught)


def prompt() -> tuple[Tensor, Tensor]:
    ids = torch.tensor([[4, 5] + [IMAGE] * VISUAL + [6, 7, 8]])
    return ids, torch.randn(VISUAL, 5, generator=torch.Generator().manual_seed(3))


def prefilled(model: Chat, *more: Any) -> tuple[Any, int]:
    """The pruned prompt's cache, and the full prompt's length."""
    ids, features = prompt()
    past = model(ids, Memory() if model.form == "object" else None, features, *more)[1]
    assert unpacked(model.form, past)[0][0].shape[2] == ids.shape[1] - VISUAL + 2
    return past, ids.shape[1]


@pytest.mark.supports("Calls", "a warning where positions would be counted from a shortened cache that is not transformers': "
                               "tuples, lists, stacked tensors, objects; by keyword or by position")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_other_caches_warn_once_without_positions(said: Said, form: str, way: str) -> None:
    model = compiled(Chat(form), way)
    past, _ = prefilled(model)
    assert said.new() == []
    past = model(torch.tensor([[9]]), past)[1]
    told = said.new()
    assert len(told) == 1 and NO_POSITIONS in told[0]
    assert ("or use parvts_fx.compile(model)" in told[0]) == (way == "string")
    past = model(torch.tensor([[10]]), past=past)[1]
    assert said.new() == []  # the same conversation
    past, _ = prefilled(model)
    model(torch.tensor([[9]]), past=past)
    assert [NO_POSITIONS in one for one in said.new()] == [True]  # another one


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["pairs", "one", "object"])
def test_other_caches_are_silent_with_positions(said: Said, form: str, way: str) -> None:
    """And right: the untouched model says the same on the same cache. A further step without positions is told."""
    model, plain = compiled(Chat(form), way), Chat("pairs")
    past, length = prefilled(model)
    pairs = [(key.clone(), value.clone()) for key, value in unpacked(form, past)]
    for step, positions in enumerate((torch.tensor([[length]]), torch.tensor([length + 1]))):  # [1, 1], and [1]
        ids = torch.tensor([[9 + step]])
        wanted, pairs = plain(ids, pairs, None, positions)
        logits, past = model(ids, past, None, positions)
        assert relative_error(logits, wanted) <= TOLERANCE
    assert said.new() == []
    model(torch.tensor([[3]]), past)
    assert [NO_POSITIONS in one for one in said.new()] == [True]


@pytest.mark.parametrize("way", WAYS)
def test_a_further_prompt_on_another_cache(said: Said, way: str) -> None:
    model = compiled(Chat("pairs"), way)
    past, length = prefilled(model)
    model(torch.tensor([[9, 10, 11]]), past, None, torch.arange(length, length + 3)[None])
    assert [FURTHER in one for one in said.new()] == [True]


@pytest.mark.parametrize("way", WAYS)
def test_what_has_lost_nothing_is_silent(said: Said, way: str) -> None:
    """A text prompt's cache, one with all tokens kept, and a prefill's logits given to a graph with attention."""
    model = compiled(Chat("pairs"), way)
    past = model(torch.tensor([[4, 5, 6]]))[1]
    model(torch.tensor([[9]]), past)
    whole = compiled(Chat("pairs"), way, keep_tokens=VISUAL)
    ids, features = prompt()
    whole(torch.tensor([[9]]), whole(ids, None, features)[1])
    logits = model(ids, None, features)[0]
    attend = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend="parvts", options=OPTIONS)
    attend(logits)
    assert said.new() == []


@pytest.fixture(scope="module")
def conversation() -> tuple[Any, llava.Prompt, list[int]]:
    """A model, its first prompt, and the tokens that follow further ones at the positions behind the full prompt."""
    model = llava.build(layers=2)
    first = llava.prompt(model, [[3, "image", 6]])
    with torch.no_grad(), pruned(model, keep_tokens=2, migration_depth=1):
        cache, length, new, wanted = model(**first.inputs).past_key_values, first.visual.shape[1], MORE, []
        for _ in range(3):
            positions = torch.arange(length, length + new.shape[1])[None]
            logits = model(input_ids=new, past_key_values=cache, position_ids=positions).logits
            length, new = length + new.shape[1], logits[:, -1].argmax(-1, keepdim=True)
            wanted.append(int(new))
    return model, first, wanted


MORE = torch.tensor([[9, 8, 7, 6]])


class Nested(nn.Module):
    """Takes the cache inside containers, by position, and does not hand it back."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor], state: dict[str, Any]) -> Tensor:
        return self.model(**inputs, past_key_values=state["held"][0]).logits


def step(way: str, model: Any, inputs: dict[str, Tensor], cache: Any) -> Tensor:
    """Logits; the cache goes in by keyword, by position or inside containers."""
    if way == "nested":
        return model(inputs, {"held": [cache]})
    if way == "keyword":
        return model(**inputs, past_key_values=cache).logits
    names = ("input_ids", "pixel_values", "attention_mask", "position_ids")
    return model(*(inputs.get(name) for name in names), cache).logits


@pytest.mark.slow
@pytest.mark.supports("Calls", "with parvts_fx.compile, transformers caches keep their count, whichever way they are passed")
@pytest.mark.parametrize("passed", ["keyword", "position", "nested"])
def test_transformers_caches_are_corrected(said: Said, conversation: Any, passed: str) -> None:
    model, first, wanted = conversation
    called = parvts_fx.compile(Nested(model) if passed == "nested" else model, **OPTIONS)
    try:
        cache = transformers.DynamicCache()
        step(passed, called, first.inputs, cache)
        assert cache.get_seq_length() == first.visual.shape[1] and cache.layers[0].keys.shape[2] == 11
        new, tokens = MORE, []
        for _ in wanted:
            new = step(passed, called, {"input_ids": new}, cache)[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(new))
    finally:
        model._compiled_call_impl = None
    assert tokens == wanted and said.new() == []


@pytest.mark.slow
@pytest.mark.parametrize("passed", ["keyword", "position", "nested"])
def test_transformers_caches_warn_with_the_string(said: Said, conversation: Any, passed: str) -> None:
    model, first, wanted = conversation
    called = compiled(Nested(model) if passed == "nested" else model, "string")
    try:
        cache = transformers.DynamicCache()
        step(passed, called, first.inputs, cache)
        assert cache.get_seq_length() == 11 and said.new() == []
        for new in (MORE, MORE[:, :1]):
            step(passed, called, {"input_ids": new}, cache)
    finally:
        model._compiled_call_impl = None
    assert [NO_POSITIONS in one for one in said.new()] == [True]


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_where_caches_are_found(name: str) -> None:
    one, other = transformers.DynamicCache(), transformers.DynamicCache()

    class Output:
        pass

    setattr(Output, name, other)
    assert find_caches((torch.ones(1), {"a": [one]}), None, "text") == [one]
    assert {id(held) for held in find_caches(Output(), [one], {"past_key_values": one})} == {id(one), id(other)}
    assert find_caches(torch.ones(2), [(torch.ones(1), torch.ones(1))], Memory()) == []
