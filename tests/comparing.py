"""Compile a small LLaVA with parvts, run it, and hold it against the eager reference."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from parvts_fx import scores
from tests import llava, reference, replaying

TOLERANCE = 2e-5
_SAME_RESULT = ("skip_dead_rows", "share_prefix")
"""Options for the product alone."""


def rule(name: str = "auto"):
    """A built-in scoring rule; tests of the rules themselves are in test_scores.py."""
    return scores.rule_named(name)


def expected(model: Any, prompt: llava.Prompt, inputs: dict | None = None, **options: Any) -> list[reference.Prefill]:
    """The reference's prefill; ``stages``, or ``migration_depth`` and the like, as the backend takes them."""
    options = {name: value for name, value in options.items() if name not in _SAME_RESULT}
    if "stages" not in options:
        score, depth = options.pop("score", "auto"), options.pop("migration_depth", 2)
        options |= {"depth": depth, "score": rule(score) if isinstance(score, str) else score}
    return reference.prefill(
        model, llava.text_model(model).layers, llava.finish(model), inputs or prompt.inputs, prompt.visual, **options)


def pruned(model: Any, **options: Any) -> contextlib.AbstractContextManager:
    """A context in which the eager model prefills as the reference does."""
    def run(inputs: dict) -> list[reference.Prefill]:
        return expected(model, llava.Prompt(inputs, inputs["input_ids"] == llava.IMAGE_TOKEN), **options)

    return prefilled(model, run, llava.IMAGE_TOKEN)


@contextlib.contextmanager
def prefilled(
    model: Any, run: Callable[[dict[str, Any]], list[reference.Prefill]], token: int
) -> Iterator[Any]:
    """While active, the eager model prefills multimodal prompts with what ``run`` gives, so that anything may call it.

    Args:
        token: the id of visual tokens.
    """
    forward = model.forward

    @functools.wraps(forward)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        ids, cache = kwargs.get("input_ids"), kwargs.get(reference.CACHE)
        started = cache is not None and cache.get_seq_length() > 0
        if ids is None or started or not bool((ids == token).any()):
            return forward(*args, **kwargs)
        model.forward = forward
        inputs = {name: held for name, held in kwargs.items() if name not in (reference.CACHE, "logits_to_keep")}
        try:
            done = run(inputs)
        finally:
            model.forward = replaced
        cache = DynamicCache() if cache is None else cache
        for index in range(len(done[0].keys)):
            cache.update(torch.cat([d.keys[index] for d in done]), torch.cat([d.values[index] for d in done]), index)
        return CausalLMOutputWithPast(logits=torch.stack([d.logits for d in done]), past_key_values=cache)

    model.forward = replaced
    try:
        yield model
    finally:
        del model.forward


def compile_with_parvts(model: Any, lowering: Any = "eager", dynamic: bool | None = None, **options: Any) -> None:
    model.compile(backend="parvts", options=_given(lowering, options), dynamic=dynamic)


def _given(lowering: Any, options: dict[str, Any]) -> dict[str, Any]:
    own = {} if "stages" in options else {"migration_depth": 2}
    return {**own, "lowering": lowering, "strict": True, **options}


def uncompile(model: Any) -> None:
    model._compiled_call_impl = None


def assert_equal_prefill(output: Any, wanted: list[reference.Prefill], tolerance: float = TOLERANCE) -> None:
    """Whole logits and whole caches, every sample; all cache layers have the length of the rows that live."""
    assert output.logits.shape[0] == len(wanted)
    for sample, one in enumerate(wanted):
        error = reference.relative_error(output.logits[sample], one.logits)
        assert error <= tolerance, f"sample {sample}: logits are off by {error:.1e}"
        for index, layer in enumerate(output.past_key_values.layers):
            assert layer.keys.shape[-2] == len(one.rows)
            for held, ours in ((layer.keys, one.keys[index]), (layer.values, one.values[index])):
                error = reference.relative_error(held[sample:sample + 1], ours)
                assert error <= tolerance, f"sample {sample}, layer {index}: the cache is off by {error:.1e}"


def check(model: Any, prompt: llava.Prompt, *, steps: int = 0, tolerance: float = TOLERANCE, lowering: Any = "eager",
          dynamic: bool | None = None, **options: Any) -> None:
    """Forward (and generate, for ``steps`` greedy tokens) against the reference.

    Captured as under :func:`parvts_fx.compile`, which lets data into graphs, and once for alike prompts.
    """
    wanted = expected(model, prompt, **options)
    continued = expected(model, prompt, prompt.with_positions, **options) if steps else []
    sizes = tuple((name, tuple(held.shape)) for name, held in prompt.inputs.items())
    model._compiled_call_impl = replaying.compiled(
        (model, sizes), model._call_impl, _given(lowering, options), dynamic)
    try:
        with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
            output = model(**prompt.inputs)
            assert_equal_prefill(output, wanted, tolerance)
            if steps:
                ids = model.generate(**prompt.inputs, max_new_tokens=steps, do_sample=False)[:, -steps:]
    finally:
        uncompile(model)
    for sample, one in enumerate(continued):
        tokens, _ = reference.generate(model, one, prompt.inputs["attention_mask"][sample], steps)
        assert ids[sample].tolist() == tokens
