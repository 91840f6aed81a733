"""What only a GPU can show: the rewritten graphs in its kernels, caches that move off it, CUDA graphs (``make test-gpu``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch

import parvts_fx
from tests import llava
from tests.comparing import TOLERANCE, assert_equal_prefill, expected
from tests.models import generating
from tests.models.generating import compared
from tests.models.installed import build
from tests.reference import relative_error

ARCHITECTURES = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "qwen3_5", "kimi_k25", "internvl")
"""Plain, multimodal rotary positions, DeepStack, sliding windows and a picture that sees itself, an unusual merge, linear
attention, latent keys and experts, and a model that scatters by position."""

ROWS = [[3, "image", 5], [2, "image", 2]]
UNEVEN = [[2, "image", 3], [4, "image", 1, "image", 2], [5]]
OPTIONS = dict(keep_tokens=3, migration_depth=1, strict=True)


def moved(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: held.cuda() if isinstance(held, torch.Tensor) else held for name, held in inputs.items()}


def on_gpu(prompt: llava.Prompt) -> llava.Prompt:
    return llava.Prompt(moved(prompt.inputs), prompt.visual.cuda())


@pytest.fixture
def model() -> Any:
    return llava.build(layers=3, head_dim=16).cuda()


def generated(model: Any, inputs: Mapping[str, Any], **how: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **how)


@pytest.mark.parametrize("options", [
    dict(merge=None), dict(merge="clusters"), dict(fusion=0.3), dict(paths="joint"),
    dict(stages=parvts_fx.schedules.SCHEDULES["pyramiddrop"])], ids=["dropped", "merged", "constant weights", "joint", "stages"])
def test_batches_and_padding(model: Any, options: dict[str, Any]) -> None:
    prompt = on_gpu(llava.prompt(model, ROWS))
    given = options if "stages" in options else dict(keep_tokens=3, migration_depth=1, **options)
    wanted = expected(model, prompt, **given)
    parvts_fx.compile(model, strict=True, **given)
    with torch.no_grad():
        assert_equal_prefill(model(**prompt.inputs), wanted)


def test_samples_that_differ(model: Any) -> None:
    prompt = on_gpu(llava.prompt(model, UNEVEN))
    rows = [prompt.row(index) for index in range(3)]
    with torch.no_grad():
        wanted = [expected(model, row, row.with_positions, keep_tokens=3, migration_depth=1)[0].logits if row.visual.any()
                  else model(**row.inputs).logits[0] for row in rows]
        parvts_fx.compile(model, **OPTIONS)
        logits = model(**prompt.with_positions).logits
    for row, one in zip(logits, wanted):
        assert relative_error(row[-len(one):], one) <= TOLERANCE
    assert set(parvts_fx.last_call(model).kept_tokens) == {3, 0}


@pytest.mark.parametrize("how", [
    dict(cache_implementation="static"), dict(cache_implementation="offloaded"),
    dict(cache_implementation="offloaded_static"), dict(cache_implementation="hybrid"), dict(num_beams=2)],
    ids=lambda how: "-".join(map(str, how.values())))
def test_caches(model: Any, how: dict[str, Any]) -> None:
    """Pruned as with a growing cache, or whole with a reason: the tokens say which."""
    prompt = on_gpu(llava.prompt(model, ROWS))
    beams = {"num_beams": how["num_beams"]} if "num_beams" in how else {}
    whole = generated(model, prompt.inputs, **beams)
    parvts_fx.compile(model, **{**OPTIONS, "strict": False})
    growing = generated(model, prompt.inputs, **beams)
    assert parvts_fx.last_call(model).pruned
    for _ in range(3):  # generate compiles decode steps on fixed caches, and records them in the third
        found = generated(model, prompt.inputs, **how)
        record = parvts_fx.last_call(model)
        print(how, "pruned" if record.pruned else record.reason)
        assert torch.equal(found, growing if record.pruned else whole), record
    assert record.pruned or record.reason


def test_cuda_graphs(model: Any) -> None:
    """mode="reduce-overhead": results of one call are not those of another, and answers are the default mode's."""
    prompts = [on_gpu(llava.prompt(model, ROWS, seed)) for seed in range(4)]
    parvts_fx.compile(model, **OPTIONS)
    wanted = [generated(model, prompt.inputs) for prompt in prompts]
    parvts_fx.uncompile(model)
    torch._dynamo.reset()
    parvts_fx.compile(model, mode="reduce-overhead", **OPTIONS)
    for _ in range(3):
        for prompt, one in zip(prompts, wanted):
            assert torch.equal(generated(model, prompt.inputs), one)
            assert parvts_fx.last_call(model).pruned


def test_a_second_turn(model: Any) -> None:
    first, second = (on_gpu(llava.prompt(model, [[4, "image", 3]], seed)) for seed in (1, 2))
    parvts_fx.compile(model, **OPTIONS)
    done = model.generate(**first.inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([done.sequences, second.inputs["input_ids"]], 1)
    pixels = second.inputs["pixel_values"]
    cache = done.past_key_values
    again = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, past_key_values=cache,
                           max_new_tokens=4, do_sample=False)
    assert parvts_fx.last_call(model).pruned and again.shape[1] == ids.shape[1] + 4


def test_half_precision(model: Any) -> None:
    """In bfloat16: no further from the float32 reference than the reference in bfloat16 is, twice over."""
    prompt = on_gpu(llava.prompt(model, ROWS))
    given = dict(keep_tokens=3, migration_depth=1, score="uniform")  # a choice that rounding does not change
    exact = expected(model, prompt, **given)
    model = model.to(torch.bfloat16)
    prompt.inputs["pixel_values"] = prompt.inputs["pixel_values"].bfloat16()
    rounded = expected(model, prompt, **given)
    parvts_fx.compile(model, strict=True, **given)
    with torch.no_grad():
        logits = model(**prompt.inputs).logits
    for sample, (one, other) in enumerate(zip(exact, rounded)):
        assert torch.equal(one.rows, other.rows)
        assert relative_error(logits[sample], one.logits) <= 2 * relative_error(other.logits, one.logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    """Through Inductor and Triton, in float32: logits of every step and all that is cached, as the eager reference has them."""
    built = build(name)
    built = dataclasses.replace(built, model=built.model.cuda(), inputs=moved(built.inputs))
    with mock.patch.dict(generating.COMPILED, lowering="inductor"):
        found = {schedule: held.generate(built.inputs) for schedule, held in compared(built).items()}
    assert max(found.values()) <= TOLERANCE, found
