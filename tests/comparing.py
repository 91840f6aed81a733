"""Compile a small LLaVA with parvts, run it, and hold it against the eager reference."""

from __future__ import annotations

from typing import Any

import torch

from parvts_fx import scores
from tests import llava, reference

TOLERANCE = 2e-5


def rule(name: str = "auto"):
    """A built-in scoring rule; tests of the rules themselves are in test_scores.py."""
    return scores.rule_named(name)


def expected(model: Any, prompt: llava.Prompt, inputs: dict | None = None, **options: Any) -> list[reference.Prefill]:
    """The reference's prefill; ``migration_depth`` and the other options as the backend takes them."""
    options = {"migration_depth": 2, **options}
    depth, score = options.pop("migration_depth"), options.pop("score", "auto")
    layers = llava.text_model(model).layers
    return reference.prefill(
        model, layers, llava.finish(model), inputs or prompt.inputs, prompt.visual, depth=depth,
        score=rule(score) if isinstance(score, str) else score, **options)


def pruned(model: Any, **options: Any):
    """A context in which the eager model prefills as the reference does."""
    def run(inputs: dict) -> list[reference.Prefill]:
        return expected(model, llava.Prompt(inputs, inputs["input_ids"] == llava.IMAGE_TOKEN), **options)

    return reference.pruned(model, run, llava.IMAGE_TOKEN)


def compile_with_parvts(model: Any, lowering: Any = "eager", dynamic: bool | None = None, **options: Any) -> None:
    options = {"migration_depth": 2, "lowering": lowering, "strict": True, **options}
    model.compile(backend="parvts", options=options, dynamic=dynamic)


def uncompile(model: Any) -> None:
    model._compiled_call_impl = None


def assert_equal_prefill(output: Any, wanted: list[reference.Prefill], tolerance: float = TOLERANCE) -> None:
    """Whole logits and whole caches, every sample; all cache layers have the length of path A."""
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
    """Forward (and generate, for ``steps`` greedy tokens) against the reference."""
    wanted = expected(model, prompt, **options)
    continued = expected(model, prompt, prompt.with_positions, **options) if steps else []
    compile_with_parvts(model, lowering, dynamic, **options)
    try:
        with torch.no_grad():
            output = model(**prompt.inputs)
            assert_equal_prefill(output, wanted, tolerance)
            if steps:
                ids = model.generate(**prompt.inputs, max_new_tokens=steps, do_sample=False)[:, -steps:]
    finally:
        uncompile(model)
    for sample, one in enumerate(continued):
        tokens, _ = reference.generate(model, one, prompt.inputs["attention_mask"][sample], steps)
        assert ids[sample].tolist() == tokens
