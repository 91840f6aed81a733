"""Caches of a fixed size: pruned as on one that grows."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

import parvts_fx
from tests import llava
from tests.comparing import TOLERANCE, expected
from tests.models.installed import build
from tests.models.prompts import mixed
from tests.reference import relative_error

ROWS = [[3, "image", 5], [2, "image", 2]]
UNEVEN = [[2, "image", 3], [4, "image", 1, "image", 2], [5]]
OPTIONS = dict(keep_tokens=3, migration_depth=1)


@pytest.fixture
def model() -> Any:
    return llava.build(layers=3)


def generated(model: Any, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **more)


@pytest.mark.supports("Caches", "static caches, by generate or by hand: tokens as with a growing cache")
def test_generating(model: Any) -> None:
    prompt = llava.prompt(model, ROWS)
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    growing = generated(model, prompt.inputs)
    static = model.generate(
        **prompt.inputs, max_new_tokens=6, do_sample=False, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(static.sequences, growing)
    assert parvts_fx.last_call(model).pruned
    cache, rows = static.past_key_values, prompt.visual.shape[1] - 16 + 3
    assert isinstance(cache, StaticCache) and cache.layers[0].keys.shape[2] > rows + 5
    assert int(cache.get_query_offset()) == rows + 5 and int(cache.get_seq_length()) == prompt.visual.shape[1] + 5


@pytest.mark.slow
@pytest.mark.supports("Caches", "static caches whose decode steps generate compiles by itself, as it does on GPUs")
def test_steps_that_generate_compiles(model: Any, recwarn: pytest.WarningsRecorder) -> None:
    prompt = llava.prompt(model, ROWS)
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    growing = generated(model, prompt.inputs)
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # what lets it compile on a CPU
    for _ in range(2):
        static = generated(model, prompt.inputs, cache_implementation="static", compile_config=config)
        assert torch.equal(static, growing) and parvts_fx.last_call(model).pruned
    assert hasattr(model, "_compiled_call"), "generate has compiled its steps"
    assert not [warning for warning in recwarn if issubclass(warning.category, parvts_fx.ParvtsWarning)]


@pytest.mark.slow
def test_a_prompt_and_steps_by_hand(model: Any) -> None:
    """The caller's object, its rows against the reference; used again behind a reset."""
    prompt = llava.prompt(model, ROWS)
    wanted = expected(model, prompt, prompt.with_positions, **OPTIONS)
    positions = prompt.with_positions["position_ids"][:, -1:] + 1
    step = {"input_ids": torch.full((2, 1), 13), "position_ids": positions,
            "attention_mask": torch.cat([prompt.inputs["attention_mask"], torch.ones(2, 1).long()], 1)}
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    with torch.no_grad():
        growing = model(**prompt.with_positions).past_key_values
        plain = model(**step, past_key_values=growing).logits
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        for _ in range(2):
            output = model(**prompt.with_positions, past_key_values=cache)
            assert output.past_key_values is cache
            for row, one in enumerate(wanted):
                assert relative_error(output.logits[row], one.logits) <= TOLERANCE
                for index, layer in enumerate(cache.layers):
                    count = len(one.rows)
                    assert relative_error(layer.keys[row:row + 1, :, :count], one.keys[index]) <= TOLERANCE
                    assert relative_error(layer.values[row:row + 1, :, :count], one.values[index]) <= TOLERANCE
                    assert not layer.keys[:, :, count:].any()
            assert relative_error(model(**step, past_key_values=cache).logits, plain) <= TOLERANCE
            cache.reset()


@pytest.mark.slow
def test_what_runs_whole_fills_it_as_well(model: Any) -> None:
    prompt, uneven = llava.prompt(model, ROWS), llava.prompt(model, [[2, "image", 3], [4]])
    plain = generated(model, prompt.inputs)
    parvts_fx.compile(model, lowering="eager", keep_ratio=1)
    assert torch.equal(generated(model, prompt.inputs, cache_implementation="static"), plain)

    def logits_on_a_static_cache() -> torch.Tensor:
        visible = uneven.inputs["attention_mask"].bool()[:, None, None] & torch.ones(21, 21).tril().bool()
        mask = torch.nn.functional.pad(visible, (0, 64 - 21))  # the caller's own: which of its later columns are whose?
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", parvts_fx.ParvtsWarning)
            return model(**{**uneven.with_positions, "attention_mask": mask}, past_key_values=cache).logits

    parvts_fx.uncompile(model)
    plain = logits_on_a_static_cache()
    parvts_fx.compile(model, lowering="eager", **OPTIONS)
    assert relative_error(logits_on_a_static_cache(), plain) <= TOLERANCE
    assert not parvts_fx.last_call(model).pruned and "growing cache" in parvts_fx.last_call(model).reason


@pytest.mark.slow
@pytest.mark.supports("Batches", "rows with other numbers of visual tokens on static caches, by generate or by hand")
@pytest.mark.parametrize("compiles_steps", [False, True], ids=["steps as they are", "steps that generate compiles"])
def test_generating_where_samples_differ(model: Any, compiles_steps: bool) -> None:
    prompt = llava.prompt(model, UNEVEN)
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = compiles_steps
    how = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    growing = model.generate(**prompt.inputs, **how)
    for more in ({}, {"num_beams": 2}):
        static = model.generate(**prompt.inputs, **how, **more, cache_implementation="static", compile_config=config)
        assert set(parvts_fx.last_call(model).kept_tokens) == {3, 0}
        if not more:
            assert max(map(relative_error, static.logits, growing.logits)) <= TOLERANCE
        else:
            assert torch.equal(static.sequences, model.generate(**prompt.inputs, **how, **more).sequences)
    cache = static.past_key_values
    assert isinstance(cache, StaticCache) and int(cache.get_query_offset()) == 7 + 3 + 4


@pytest.mark.slow
def test_steps_by_hand_where_samples_differ(model: Any) -> None:
    prompt = llava.prompt(model, UNEVEN)
    positions = prompt.with_positions["position_ids"].amax(1, keepdim=True) + 1
    step = {"input_ids": torch.full((3, 1), 13), "position_ids": positions,
            "attention_mask": torch.cat([prompt.inputs["attention_mask"], torch.ones(3, 1).long()], 1)}
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    with torch.no_grad():
        logits = []
        for cache in (None, StaticCache(config=model.config.text_config, max_cache_len=64)):
            held = model(**prompt.with_positions, past_key_values=cache).past_key_values
            logits.append(model(**step, past_key_values=held).logits)
    assert relative_error(logits[1], logits[0]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.supports("Caches", "static caches with sliding windows, attention by chunks and layers that share keys")
@pytest.mark.parametrize(("name", "kept"), [("gemma3", 3), ("gemma3", 12), ("gemma4", 3), ("llama4", 3)])
def test_windows(name: str, kept: int) -> None:
    """Logits as with a growing cache, step by step: beyond the window, which the rows that are left do not fill, or do."""
    built = build(name)
    model, window = built.model, 22
    parvts_fx.compile(model, lowering="eager", strict=True, keep_tokens=kept, migration_depth=1)
    how = dict(max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True)
    growing = model.generate(**built.inputs, **how)
    static = model.generate(**built.inputs, **how, cache_implementation="static")
    assert parvts_fx.last_call(model).pruned
    assert torch.equal(static.sequences, growing.sequences)
    for ours, theirs in zip(static.logits, growing.logits, strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE
    rows = built.inputs["input_ids"].shape[1] - 16 + kept
    assert (rows > window) == (kept == 12) and rows + 10 > window
    assert isinstance(static.past_key_values, StaticCache) and static.past_key_values.layers[0].is_sliding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "llama4"])
def test_windows_where_samples_differ(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """Two pictures, one, and none; beyond the window, in steps whose window or chunk begins elsewhere in each row."""
    built = build(name)
    built.inputs.setdefault("attention_mask", torch.ones_like(built.inputs["input_ids"]))
    given, _ = mixed(built.inputs)
    parvts_fx.compile(built.model, lowering="eager", strict=True, keep_tokens=3, migration_depth=1)
    how = dict(max_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True)
    growing = built.model.generate(**given, **how)
    static = built.model.generate(**given, **how, cache_implementation="static")
    assert parvts_fx.last_call(built.model).pruned and static.past_key_values.layers[0].is_sliding
    assert max(map(relative_error, static.logits, growing.logits)) <= TOLERANCE
    assert not [warning for warning in recwarn if issubclass(warning.category, parvts_fx.ParvtsWarning)]


class Offloaded(DynamicCache):
    """As one that keeps its layers on another device: it holds a stream. (A real one needs a GPU: tests/gpu.)"""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.prefetch_stream = torch.Stream(device="cpu")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        assert not torch.compiler.is_compiling(), "no graph can hold what a stream does"
        return super().update(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.supports("Caches", "caches that keep layers on another device (offloaded): the prompt pruned, steps uncompiled")
@pytest.mark.parametrize("rows", [ROWS, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("knows_layers", [False, True])
def test_offloaded(model: Any, rows: Any, knows_layers: bool, recwarn: pytest.WarningsRecorder) -> None:
    prompt = llava.prompt(model, rows)
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    growing = generated(model, prompt.inputs)
    cache = Offloaded(**(dict(config=model.config.text_config) if knows_layers else {}))
    assert torch.equal(generated(model, prompt.inputs, past_key_values=cache), growing)
    assert parvts_fx.last_call(model).pruned
    assert cache.layers[0].keys.shape[2] < prompt.visual.shape[1], "filled with the rows that are left"
    assert not [warning for warning in recwarn if issubclass(warning.category, parvts_fx.ParvtsWarning)]


@pytest.mark.slow
def test_a_second_picture_on_an_offloaded_cache(model: Any) -> None:
    """Whole, and said so: as the eager model does it on the rows that are left."""
    prompt = llava.prompt(model, [[3, "image", 5]])
    parvts_fx.compile(model, lowering="eager", **OPTIONS)
    cache = Offloaded()
    with torch.no_grad():
        model(**prompt.with_positions, past_key_values=cache)
        rows, own = cache.layers[0].keys.shape[2], DynamicCache()
        for index, layer in enumerate(cache.layers):
            own.update(layer.keys, layer.values, index)
        second = {**prompt.with_positions, "position_ids": prompt.with_positions["position_ids"] + prompt.visual.shape[1]}
        del second["attention_mask"]
        with pytest.warns(parvts_fx.ParvtsWarning, match="moves layers between devices"):
            output = model(**second, past_key_values=cache)
        assert not parvts_fx.last_call(model).pruned
        assert cache.layers[0].keys.shape[2] == rows + prompt.visual.shape[1]
        parvts_fx.uncompile(model)
        assert relative_error(output.logits, model(**second, past_key_values=own).logits) <= TOLERANCE
