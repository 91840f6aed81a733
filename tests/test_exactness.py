"""Small LLaVA models against the eager reference: logits, caches and greedy tokens."""

from __future__ import annotations

import pytest
import torch

from parvts_fx.backends import parvts as backend
from parvts_fx.rewriting import rewrite_graph
from tests import llava
from tests.comparing import assert_equal_prefill, check, compile_with_parvts, expected, uncompile

PROMPTS = {
    "one image": [[3, "image", 6]],
    "image first": [["image", 7]],
    "image last": [[5, "image"]],
    "two images": [[3, "image", 2, "image", 4]],
    "left padding": [[3, "image", 6], [2, "image", 3]],
    "positions differ": [[3, "image", 2, "image", 4], [1, "image", "image", 9], ["image", 11, "image"]],
}


@pytest.fixture(scope="module")
def model():
    return llava.build()


@pytest.mark.captures_once
@pytest.mark.supports(
    "Prompts", "one or several images anywhere in the prompt; batches with left padding and images at different positions")
@pytest.mark.parametrize("fusion", ["attention", 0.3])
@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
def test_prompts(model, rows, fusion):
    check(model, llava.prompt(model, rows), keep_ratio=0.25, fusion=fusion,
          steps=3 if fusion == "attention" and len(rows) > 1 else 0)


@pytest.mark.slow
@pytest.mark.captures_once
@pytest.mark.supports("Options", "migration depth 0 to the number of layers, both fusions")
@pytest.mark.parametrize("fusion", ["attention", 0.0, 1.0])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_migration_depths(model, depth, fusion):
    check(model, llava.prompt(model, PROMPTS["left padding"]), migration_depth=depth, fusion=fusion, keep_tokens=5)


@pytest.mark.slow
@pytest.mark.captures_once
@pytest.mark.supports("Options", "one token to all but one kept, by share or by count")
@pytest.mark.parametrize("fusion", ["attention", 0.6])
@pytest.mark.parametrize("keep", [dict(keep_tokens=1), dict(keep_tokens=15), dict(keep_ratio=0.03), dict()], ids=str)
def test_kept_shares(model, keep, fusion):
    check(model, llava.prompt(model, PROMPTS["one image"]), fusion=fusion, **keep)


@pytest.mark.slow
@pytest.mark.captures_once
@pytest.mark.supports("Options", "joint paths")
@pytest.mark.parametrize("depth", [0, 2, 3])
def test_joint_paths(model, depth):
    prompt = llava.prompt(model, PROMPTS["left padding"])
    check(model, prompt, paths="joint", migration_depth=depth, keep_ratio=0.25, steps=3 if depth == 2 else 0)


@pytest.mark.slow
@pytest.mark.captures_once
@pytest.mark.supports("Models", "LLaVA with Llama or Qwen2 text models; GQA, MHA and MQA")
@pytest.mark.parametrize("text", ["llama", "qwen2"])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 1)], ids=["MHA", "MQA"])
def test_text_models(text, heads, groups):
    model = llava.build(text, heads=heads, groups=groups, seed=3)
    check(model, llava.prompt(model, PROMPTS["left padding"]), keep_ratio=0.25, steps=3 if text == "qwen2" and groups == 1 else 0)


@pytest.mark.slow
@pytest.mark.captures_once
@pytest.mark.supports("Models", "fused attention (sdpa) and attention written out (eager)")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(attention):
    model = llava.build(attention=attention)
    check(model, llava.prompt(model, PROMPTS["left padding"]), keep_ratio=0.25, steps=3)
    check(model, llava.prompt(model, PROMPTS["one image"]), keep_ratio=0.25, fusion=0.5)


COLLISIONS = {
    "sequence = hidden = heads x head dim": (dict(), [[15, "image", 17]]),
    "sequence = vocabulary": (dict(vocabulary=48), [[15, "image", 17]]),
    "sequence = head dim": (dict(hidden=96, heads=2, groups=1, head_dim=24), [[4, "image", 4]]),
    "sequence = patches": (dict(), [["image"]]),
    "sequence = MLP width": (dict(), [[10, "image", 10, "image", 4]]),
    "sequence = batch": (dict(patches=2), [[1, "image", 1]] * 6),
    "sequence = heads": (dict(patches=2), [["image"]] * 2),
    "kept = text": (dict(), [[2, "image", 2]]),
}


@pytest.mark.slow
@pytest.mark.captures_once
@pytest.mark.supports("Prompts", "sizes that collide: sequence length equal to hidden size, vocabulary, head size, batch, ...")
@pytest.mark.parametrize("fusion", ["attention", 0.3])
@pytest.mark.parametrize("sizes, rows", COLLISIONS.values(), ids=COLLISIONS.keys())
def test_colliding_sizes(sizes, rows, fusion):
    model = llava.build(layers=2, **sizes)
    check(model, llava.prompt(model, rows), keep_ratio=0.25, fusion=fusion, migration_depth=1)


@pytest.mark.slow
@pytest.mark.supports("torch.compile", "dynamic None, True and False; further calls with other lengths")
@pytest.mark.parametrize("dynamic, fusion", [(None, "attention"), (None, 0.3), (True, "attention"), (False, "attention")])
def test_further_calls_with_other_lengths(model, dynamic, fusion):
    rows = [[[3, "image", 6]], [[9, "image", 21]], [[3, "image", 6], [2, "image", 3]]]
    prompts = [llava.prompt(model, row, seed=5 + n) for n, row in enumerate(rows)]
    wanted = [expected(model, prompt, fusion=fusion) for prompt in prompts]
    compile_with_parvts(model, fusion=fusion, dynamic=dynamic)
    try:
        with torch.no_grad():
            for prompt, one in zip(prompts, wanted):
                assert_equal_prefill(model(**prompt.inputs), one)
    finally:
        uncompile(model)


@pytest.mark.slow
@pytest.mark.supports("torch.compile", "ten prompts of ten lengths and image positions: two compiles of the prefill")
@pytest.mark.parametrize("fusion", ["attention", 0.3])
def test_few_compiles_for_many_lengths(model, monkeypatch, fusion):
    found = []

    def counting(*given, **named):
        done = rewrite_graph(*given, **named)
        found.append(done.report.status)
        return done

    monkeypatch.setattr(backend, "rewrite_graph", counting)
    prompts = [llava.prompt(model, [[before, "image", 20 - before + extra]], seed=before)
               for before, extra in zip(range(2, 12), (5, 1, 8, 3, 0, 9, 4, 2, 7, 6))]
    assert len({prompt.inputs["input_ids"].shape[1] for prompt in prompts}) == 10
    wanted = [expected(model, prompt, fusion=fusion) for prompt in prompts]
    compile_with_parvts(model, fusion=fusion)
    try:
        with torch.no_grad():
            for prompt, one in zip(prompts, wanted):
                assert_equal_prefill(model(**prompt.inputs), one)
    finally:
        uncompile(model)
    assert 1 <= found.count("rewritten") <= 2


@pytest.mark.slow
@pytest.mark.supports("Models", "bfloat16, at its own tolerance")
@pytest.mark.parametrize("fusion", ["attention", 0.3])
def test_bfloat16(fusion):
    """Against the float32 reference with the same subject tokens; bf16 has 8 bits of mantissa."""
    model = llava.build().to(torch.bfloat16)
    exact = llava.build().to(torch.bfloat16).float()
    prompt = llava.prompt(model, PROMPTS["left padding"])
    prompt.inputs["pixel_values"] = prompt.inputs["pixel_values"].to(torch.bfloat16)
    rounded = llava.Prompt({**prompt.inputs, "pixel_values": prompt.inputs["pixel_values"].float()}, prompt.visual)

    def by_position(hidden, visual):  # the same choice in both precisions
        return -(torch.arange(visual.shape[1], device=visual.device) * 7 % 13).float().expand(visual.shape)

    wanted = expected(exact, rounded, fusion=fusion, score=by_position)
    compile_with_parvts(model, fusion=fusion, score=by_position)
    with torch.no_grad():
        assert_equal_prefill(model(**prompt.inputs), wanted, tolerance=3e-2)


@pytest.mark.supports("Prompts", "a sample's result depends neither on its batch nor on padding")
def test_a_sample_does_not_depend_on_its_batch(model):
    """One row alone, in a batch with others, and with more padding: the same logits."""
    rows = [[3, "image", 6], [8, "image", 20], [1, "image", 2]]
    together = llava.prompt(model, rows)
    compile_with_parvts(model, keep_ratio=0.25)
    try:
        with torch.no_grad():
            batch = model(**together.inputs).logits
            for sample in range(len(rows)):
                real = together.inputs["attention_mask"][sample].bool()
                alone = {
                    "input_ids": together.inputs["input_ids"][sample:sample + 1, real],
                    "attention_mask": together.inputs["attention_mask"][sample:sample + 1, real],
                    "pixel_values": together.inputs["pixel_values"][sample:sample + 1],
                }
                logits = model(**alone).logits[0]
                torch.testing.assert_close(batch[sample, -len(logits):], logits, rtol=1e-4, atol=1e-4)
    finally:
        uncompile(model)
