"""A cache that holds keys and values as integers: those of the rows that are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, QuantizedCache, QuantizedLayer

import parvts_fx
from tests import llava
from tests.comparing import TOLERANCE, expected
from tests.reference import relative_error

OPTIONS = dict(keep_tokens=3, migration_depth=1)


class Int8(QuantizedLayer):
    """A scale for each row, and what comes behind the prompt as it is for four tokens."""

    def __init__(self) -> None:
        super().__init__(residual_length=4)

    def _quantize(self, tensor: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, held: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return held[0].to(held[1].dtype) * held[1]


def quantised(model: Any) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [Int8() for _ in range(model.config.text_config.num_hidden_layers)]
    return cache


@pytest.mark.supports("Caches", "quantised ones")
def test_rows_are_those_of_the_reference() -> None:
    """To a step of the integers, into which a rounding error may tip a value; steps go on from what is held."""
    model = llava.build(layers=3)
    prompt = llava.prompt(model, [[3, "image", 5], [2, "image", 2]])
    wanted = expected(model, prompt, prompt.with_positions, **OPTIONS)
    step = {"input_ids": torch.full((2, 1), 13), "position_ids": prompt.with_positions["position_ids"][:, -1:] + 1,
            "attention_mask": torch.cat([prompt.inputs["attention_mask"], torch.ones(2, 1).long()], 1)}
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    cache, whole = quantised(model), DynamicCache()
    with torch.no_grad():
        output = model(**prompt.with_positions, past_key_values=cache)
        for row, one in enumerate(wanted):
            assert relative_error(output.logits[row], one.logits) <= TOLERANCE
            for layer, keys, values in zip(cache.layers, one.keys, one.values, strict=True):
                for held, of_reference in ((layer._quantized_keys, keys), (layer._quantized_values, values)):
                    integers, scale = layer._quantize(of_reference, 0)
                    assert relative_error(held[1][row:row + 1], scale) <= TOLERANCE
                    assert int((held[0][row:row + 1].int() - integers.int()).abs().max()) <= 1
        for index, layer in enumerate(cache.layers):
            whole.update(layer._dequantize(layer._quantized_keys), layer._dequantize(layer._quantized_values), index)
        parvts_fx.uncompile(model)
        plain = model(**{**step, "attention_mask": step["attention_mask"][:, :whole.get_seq_length() + 1]},
                      past_key_values=whole).logits
        parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
        assert cache.get_seq_length() == prompt.visual.shape[1]
        assert relative_error(model(**step, past_key_values=cache).logits, plain) <= TOLERANCE


@pytest.mark.slow
def test_the_librarys_own() -> None:
    """One scale a tensor: what is cached is the reference's to a step of eight bits, and generating goes on from it."""
    model = llava.build(layers=3)
    prompt = llava.prompt(model, [[3, "image", 5]])
    (wanted,) = expected(model, prompt, prompt.with_positions, **OPTIONS)
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    cache = QuantizedCache("fp8", model.config.text_config)
    with torch.no_grad():
        model(**prompt.with_positions, past_key_values=cache)
    for layer, keys in zip(cache.layers, wanted.keys, strict=True):
        assert relative_error(layer._dequantize(layer._quantized_keys), keys) <= 2 ** -4
    model.generate(**prompt.inputs, max_new_tokens=8, do_sample=False,
                   past_key_values=(cache := QuantizedCache("fp8", model.config.text_config)))
    assert parvts_fx.last_call(model).pruned
    assert cache.get_query_offset() == len(wanted.rows) + 7 and cache.get_seq_length() == prompt.visual.shape[1] + 7
