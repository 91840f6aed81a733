"""What a user is told where a prompt with pictures is not pruned: the cause of this call, at the user's line; and the model's own
errors in the model's own words."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

import parvts_fx
from tests import llava
from tests.comparing import TOLERANCE, assert_equal_prefill, expected

OPTIONS = dict(lowering="eager", migration_depth=1)


@pytest.fixture
def model() -> Any:
    return llava.build(layers=2)


@pytest.fixture
def prompt(model: Any) -> llava.Prompt:
    return llava.prompt(model, [[3, "image", 6]])


def unrewritten(model: Any, prompt: llava.Prompt, plain: Any, **more: Any) -> str:
    """The reason why a call ran whole, which the warning, at this file's line, and the record agree on."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model(**prompt.inputs, **more)
    told = [warning for warning in caught if issubclass(warning.category, parvts_fx.ParvtsWarning)]
    record = parvts_fx.last_call(model)
    assert torch.allclose(output.logits, plain.logits, atol=TOLERANCE)
    assert not record.pruned and [str(w.message).partition("runs unrewritten: ")[2] for w in told] == [record.reason]
    assert [warning.filename for warning in told] == [__file__]
    return record.reason


def of_eager(model: Any, prompt: llava.Prompt, **more: Any) -> Any:
    with torch.no_grad():
        return model(**prompt.inputs, **more)


@pytest.mark.supports("Left unrewritten", "whatever turns torch.compile off, with its name")
@pytest.mark.parametrize("off", ["disable", "force_eager", "TORCHDYNAMO_DISABLE"])
def test_nothing_is_compiled(model: Any, prompt: llava.Prompt, off: str) -> None:
    plain = of_eager(model, prompt)
    parvts_fx.compile(model, **OPTIONS, disable=off == "disable")
    disabled = torch._dynamo.config.patch(disable=off == "TORCHDYNAMO_DISABLE")  # what the variable sets
    with disabled, torch.compiler.set_stance("force_eager" if off == "force_eager" else "default"):
        reason = unrewritten(model, prompt, plain)
    assert reason.startswith("nothing is compiled: ") and off in reason


@pytest.mark.supports("Left unrewritten", "layers inside of torch.utils.checkpoint, with its name")
def test_gradient_checkpointing(model: Any, prompt: llava.Prompt) -> None:
    for layer in llava.text_model(model).layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    plain = of_eager(model, prompt, use_cache=False)
    parvts_fx.compile(model, **OPTIONS)
    assert "gradient_checkpointing_disable" in unrewritten(model, prompt, plain, use_cache=False)


@pytest.mark.slow
@pytest.mark.supports("Left unrewritten", "accelerate's hooks, which exclude themselves from compiling, with their name")
def test_hooks_that_are_excluded_from_compiling(model: Any, prompt: llava.Prompt) -> None:
    """Later calls compile nothing, and say the same."""
    accelerate.cpu_offload(model, execution_device="cpu")
    plain = of_eager(model, prompt)
    parvts_fx.compile(model, **OPTIONS)
    reason = unrewritten(model, prompt, plain)
    assert "AlignDevicesHook.pre_forward is excluded by torch.compiler.disable" in reason
    of_eager(model, prompt)
    assert parvts_fx.last_call(model).reason == reason


def test_a_model_without_a_decoder() -> None:
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPConfig(text_config=dict(vocab_size=50, **sizes),
                                     vision_config=dict(image_size=16, patch_size=4, **sizes))
    model = transformers.CLIPModel(config).eval()
    parvts_fx.compile(model, **OPTIONS)
    with pytest.warns(parvts_fx.ParvtsWarning, match="no decoder that reads them"), torch.no_grad():
        model(input_ids=torch.randint(3, 40, (1, 5)), pixel_values=torch.randn(1, 3, 16, 16))


@pytest.mark.slow
@pytest.mark.supports("Calls", "output_attentions with sdpa, which gives none")
def test_attention_weights_that_the_model_does_not_give(model: Any, prompt: llava.Prompt) -> None:
    """What transformers logs about it does not break the graph."""
    wanted = expected(model, prompt, migration_depth=1)
    parvts_fx.compile(model, strict=True, **OPTIONS)
    output = of_eager(model, prompt, output_attentions=True)
    assert_equal_prefill(output, wanted)
    assert parvts_fx.last_call(model).pruned and not any(isinstance(held, torch.Tensor) for held in output.attentions)


def test_messages_stay_where_nothing_is_captured(model: Any, prompt: llava.Prompt) -> None:
    """Left out of what Dynamo captures for the duration of a call, and nowhere else."""
    before = set(torch._dynamo.config.ignore_logging_functions)
    parvts_fx.compile(model, **OPTIONS)
    of_eager(model, prompt)
    assert torch._dynamo.config.ignore_logging_functions == before

    @torch.compile(backend="eager")
    def logs(x: torch.Tensor) -> torch.Tensor:
        logging.getLogger("a model").warning("seen")
        return x + 1

    logs(torch.ones(1))
    assert len(torch._dynamo.utils.graph_break_reasons) and "Logger" in torch._dynamo.utils.graph_break_reasons[-1].reason


@pytest.mark.supports("Calls", "another torch.compile around a compiled model, whose own options go on to hold, with a warning")
def test_a_compile_around_a_compiled_model(model: Any, prompt: llava.Prompt) -> None:
    wanted = expected(model, prompt, migration_depth=1)
    parvts_fx.compile(model, strict=True, **OPTIONS)
    outer = torch.compile(model, backend="parvts", options={"lowering": "eager", "keep_tokens": 1})
    with torch.no_grad(), pytest.warns(parvts_fx.ParvtsWarning, match="by its own options") as caught:
        assert_equal_prefill(outer(**prompt.inputs), wanted)
        assert_equal_prefill(outer(**prompt.inputs), wanted)
    assert len(caught) == 1


def test_what_torch_compile_has_made_is_no_model(model: Any) -> None:
    with pytest.raises(TypeError, match="generate is that of the original.*_orig_mod"):
        parvts_fx.compile(torch.compile(model))


@pytest.mark.slow
@pytest.mark.supports("Calls", "the model's own errors, in its own words")
@pytest.mark.parametrize("prompts_before", [0, 1])
def test_the_models_own_errors(model: Any, prompt: llava.Prompt, prompts_before: int) -> None:
    """One place too few for the features; the cache that was given is as it was."""
    parvts_fx.compile(model, **OPTIONS)
    for _ in range(prompts_before):
        of_eager(model, prompt)
    wrong = copy.deepcopy(prompt)
    wrong.inputs["input_ids"][0, 4] = 9
    cache = transformers.DynamicCache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", parvts_fx.ParvtsWarning)
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            of_eager(model, wrong, past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert torch.isfinite(of_eager(model, prompt).logits).all() and parvts_fx.last_call(model).pruned
