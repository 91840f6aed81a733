"""Weights that are not plain float32 tensors: adapters, quantised, in half precision, placed by a device map."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import parvts_fx
from tests import llava, reference
from tests.comparing import TOLERANCE, assert_equal_prefill, expected, pruned, rule

OPTIONS = {"keep_ratio": 0.25, "migration_depth": 1}
STRICTLY = {"lowering": "eager", "strict": True}
ROWS = [[3, "image", 6], [2, "image", 3]]
STEPS = 3


def compile_in_place(way: str, model: torch.nn.Module, **options: Any) -> None:
    """By ``parvts_fx.compile`` or by the backend's name; nothing may fall back."""
    options = OPTIONS | STRICTLY | options
    if way == "compile":
        parvts_fx.compile(model, **options)
    else:
        model.compile(backend="parvts", options=options)


def generated(model: torch.nn.Module, prompt: llava.Prompt) -> Any:
    return model.generate(**prompt.inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True,
                          return_dict_in_generate=True)


def references(model: torch.nn.Module, prompt: llava.Prompt, **options: Any) -> tuple[list[reference.Prefill], Any]:
    """The eager reference's prefill, and what ``generate`` makes of it."""
    prefill = expected(model, prompt, **OPTIONS | options)
    with pruned(model, **OPTIONS | options):
        return prefill, generated(model, prompt)


def assert_equal_forward(model: torch.nn.Module, prompt: llava.Prompt, wanted: list[reference.Prefill]) -> None:
    with torch.no_grad():
        assert_equal_prefill(model(**prompt.inputs), wanted)


def assert_equal_generation(model: torch.nn.Module, prompt: llava.Prompt, generation: Any) -> None:
    """Greedy tokens, the logits of every step and the cache that is left."""
    actual = generated(model, prompt)
    pairs = list(zip(actual.logits, generation.logits, strict=True))
    for ours, theirs in zip(actual.past_key_values.layers, generation.past_key_values.layers, strict=True):
        pairs += [(ours.keys, theirs.keys), (ours.values, theirs.values)]
    error = max(reference.relative_error(*pair) for pair in pairs)
    assert error <= TOLERANCE, f"generate is off by {error:.1e} (inf: other sizes, so not pruned)"
    assert actual.sequences.tolist() == generation.sequences.tolist()


# -- adapters ---------------------------------------------------------------------------------------------------------


def with_lora() -> tuple[peft.PeftModel, transformers.LlavaForConditionalGeneration]:
    """(PEFT's wrapper, the model inside it), with adapters on the decoder's projections that are not zero."""
    model = llava.build(layers=2)
    projections = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)"
    wrapper = peft.get_peft_model(model, peft.LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=projections, init_lora_weights=False)).eval()
    adapters = [held for name, held in model.named_parameters() if "lora_B" in name]
    assert len(adapters) == 2 * 6 and all(bool(held.any()) for held in adapters)
    return wrapper, model


@pytest.mark.slow
@pytest.mark.supports("Weights", "LoRA adapters of PEFT: the wrapper compiled, or the model inside it")
@pytest.mark.parametrize("way, which", [("compile", "wrapper"), ("compile", "inner"), ("string", "inner")])
def test_lora(way, which):
    """The wrapper's ``generate`` is that of the model inside: it must not run uncompiled, whichever was compiled."""
    wrapper, inner = with_lora()
    prompt = llava.prompt(inner, ROWS)
    prefill, generation = references(inner, prompt)
    compiled = {"wrapper": wrapper, "inner": inner}[which]
    compile_in_place(way, compiled)
    assert_equal_forward(compiled, prompt, prefill)
    assert_equal_generation(wrapper, prompt, generation)


@pytest.mark.slow
@pytest.mark.supports("Weights", "LoRA adapters of PEFT: the wrapper called by torch.compile")
def test_lora_by_torch_compile():
    wrapper, inner = with_lora()
    prompt = llava.prompt(inner, ROWS)
    wanted = expected(inner, prompt, **OPTIONS)
    fast = torch.compile(wrapper, backend="parvts", options=OPTIONS | STRICTLY)
    assert_equal_forward(fast, prompt, wanted)


@pytest.mark.slow
@pytest.mark.supports("Weights", "LoRA adapters of PEFT, switched off and on after compiling")
def test_lora_switched_off_and_on():
    wrapper, inner = with_lora()
    prompt = llava.prompt(inner, ROWS)
    adapted, bare = expected(inner, prompt, **OPTIONS), expected(llava.build(layers=2), prompt, **OPTIONS)
    assert reference.relative_error(adapted[0].logits[-1], bare[0].logits[-1]) > 0.1, "the adapters do nothing"
    compile_in_place("compile", wrapper)
    assert_equal_forward(wrapper, prompt, adapted)
    with wrapper.disable_adapter():
        assert_equal_forward(wrapper, prompt, bare)
    assert_equal_forward(wrapper, prompt, adapted)


# -- quantised weights ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.supports("Weights", "int8 weights of torchao (weight only)")
@pytest.mark.parametrize("way, rows, fusion", [
    ("string", ROWS, "attention"), ("compile", ROWS, 0.3),
    ("compile", [[15, "image", 17]], "attention"),  # as many tokens as the weights have rows and columns
], ids=["string", "compile", "sequence = hidden"])
def test_int8(way, rows, fusion):
    model = llava.build(layers=2)
    quantize_(model, Int8WeightOnlyConfig())
    assert type(llava.text_model(model).layers[0].self_attn.q_proj.weight) not in (torch.Tensor, torch.nn.Parameter)
    prompt = llava.prompt(model, rows)
    prefill, generation = references(model, prompt, fusion=fusion)
    compile_in_place(way, model, fusion=fusion)
    assert_equal_forward(model, prompt, prefill)
    assert_equal_generation(model, prompt, generation)


@pytest.mark.slow
@pytest.mark.supports("Weights", "int8 weights of torchao (weight only), through Inductor (CPU)")
@pytest.mark.inductor
def test_int8_through_inductor():
    """Only the decoder is quantised, as one does where the vision tower is sensitive."""
    model = llava.build(layers=2)
    quantize_(llava.text_model(model), Int8WeightOnlyConfig())
    prompt = llava.prompt(model, ROWS)
    wanted = expected(model, prompt, **OPTIONS)
    compile_in_place("compile", model, lowering="inductor")
    assert_equal_forward(model, prompt, wanted)


# -- half precision ---------------------------------------------------------------------------------------------------


def of_output(output: Any) -> list[torch.Tensor]:
    """Logits and cache, each with all samples."""
    return [output.logits, *(held for layer in output.past_key_values.layers for held in (layer.keys, layer.values))]


def of_reference(samples: list[reference.Prefill]) -> list[torch.Tensor]:
    """As :func:`of_output`."""
    logits, caches = torch.stack([one.logits for one in samples]), zip(*(zip(one.keys, one.values) for one in samples))
    return [logits, *(torch.cat(held) for layer in caches for held in zip(*layer))]


def errors(actual: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    return [reference.relative_error(*pair) for pair in zip(actual, wanted, strict=True)]


@pytest.mark.slow
@pytest.mark.supports("Weights", "float16 and bfloat16, no less exact than the eager reference in the same precision")
@pytest.mark.parametrize("dtype, way, fusion", [
    (torch.float16, "compile", "attention"), (torch.bfloat16, "string", "attention"),
    (torch.float16, "string", 0.3), (torch.bfloat16, "compile", 0.3),
], ids=str)
def test_half_precision(dtype, way, fusion):
    """Both against the float32 reference with the same (rounded) weights, image and subject tokens.

    What a fixed tolerance has to be depends on depth and sizes of the model. But the compiled model and the reference
    in half precision do the same arithmetic in another order: the errors of both are draws from one distribution, and
    the largest among the hundreds of entries of a tensor varies little from draw to draw. A factor of two leaves room
    for that; their distance from each other, of two independent errors, is about 1.4 times one of them. A row dropped,
    kept or masked wrongly is an error of the order of 1, and here theirs are 0.02 (bfloat16) and 0.003 (float16).
    """
    model, exact = llava.build().to(dtype), llava.build().to(dtype).float()
    prompt = llava.prompt(model, ROWS)
    image = prompt.inputs["pixel_values"].to(dtype)
    prompt.inputs["pixel_values"] = image
    scores = []

    def remember(hidden, visual):  # which tokens are subjects is decided in half precision
        scores.append(rule("balanced")(hidden, visual))
        return scores[-1]

    options = {"keep_ratio": 0.25, "migration_depth": 2, "fusion": fusion, "merge": None}  # nearest tokens are a choice, too
    same = of_reference(expected(model, prompt, score=remember, **options))
    remembered = iter(scores)
    full = of_reference(expected(exact, prompt, {**prompt.inputs, "pixel_values": image.float()},
                                 score=lambda hidden, visual: next(remembered), **options))
    compile_in_place(way, model, score="balanced", **options)
    with torch.no_grad():
        ours = of_output(model(**prompt.inputs))
    assert all(held.dtype == dtype for held in ours)
    usual = errors(same, full)
    assert max(usual) <= 8 * torch.finfo(dtype).eps, "the reference itself is too rough to tell anything"
    for name, found in (("the float32 reference", errors(ours, full)), (f"the {dtype} reference", errors(ours, same))):
        assert all(a <= 2 * b for a, b in zip(found, usual, strict=True)), f"against {name}: {found}, usual are {usual}"


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.supports("Weights", "from_pretrained with a device_map onto one device")
@pytest.mark.parametrize("way", ["compile", "string"])
def test_device_map(way, tmp_path):
    original = llava.build(layers=2)
    original.save_pretrained(tmp_path)
    model = type(original).from_pretrained(tmp_path, device_map={"": "cpu"})
    model.generation_config.eos_token_id = None
    prompt = llava.prompt(original, ROWS)
    prefill, generation = references(original, prompt)
    compile_in_place(way, model)
    assert_equal_forward(model, prompt, prefill)
    assert_equal_generation(model, prompt, generation)
