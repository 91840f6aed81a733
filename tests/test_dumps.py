"""explain(), the log and the dumps."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

import parvts_fx
from parvts_fx.passes.dumps import DUMP_VARIABLE
from tests import llava
from tests.comparing import compile_with_parvts, uncompile


@pytest.fixture(scope="module")
def model():
    return llava.build(layers=3)


@pytest.fixture(scope="module")
def prompt(model):
    prompt = llava.prompt(model, [[3, "image", 6], [2, "image", 3]])
    with torch.no_grad():
        model(**prompt.inputs)  # transformers installs its hooks in the first call, which would break the first graph
    return prompt


def linear_flops(rows: int, hidden: int, heads: int, groups: int, head_dim: int, width: int) -> int:
    return 2 * rows * hidden * head_dim * (2 * heads + 2 * groups) + 2 * rows * 3 * hidden * width


def attention_flops(queries: int, keys: int, heads: int, head_dim: int) -> int:
    return 2 * 2 * queries * keys * heads * head_dim


@pytest.mark.versions
@pytest.mark.parametrize("skip_dead_rows", [True, False])
def test_explain_against_a_closed_formula(model, prompt, skip_dead_rows):
    report = parvts_fx.explain(model, **prompt.inputs, options={
        "keep_tokens": 4, "migration_depth": 1, "score": "norm", "merge": None, "skip_dead_rows": skip_dead_rows})
    prefill = report.prefill
    assert prefill.status == "rewritten"
    assert (prefill.batch, prefill.prompt_tokens, prefill.visual_tokens, prefill.subject_tokens) == (2, 25, 16, 4)
    assert prefill.tokens_kept == 13
    assert [layer.rows for layer in prefill.layers] == [
        {"text": 9, "subject": 4, "non-subject": 12}, {"kept": 13}, {"kept": 13}]
    sizes = dict(hidden=48, heads=4, groups=2, head_dim=12, width=56)

    def layer(rows: int, *pairs: tuple[int, int]) -> int:
        return linear_flops(rows, **sizes) + sum(attention_flops(q, k, 4, 12) for q, k in pairs)

    head = 2 * 48 * 101
    before = 3 * layer(25, (25, 25)) + 25 * head
    first = layer(25, (13, 13), (21, 21), (9, 25))
    if skip_dead_rows:  # of the 12 non-subject rows only keys and values, and no attention call of their own
        first = layer(13, (13, 13), (9, 25)) + 2 * 12 * 48 * 12 * (2 * 2)
    after = first + 2 * layer(13, (13, 13)) + 13 * head
    vision_tower = prefill.flops_before - 2 * before  # in the same graph, and the same in both
    assert vision_tower >= 0 and prefill.flops_after == vision_tower + 2 * after


def test_explain_prints_tables(model, prompt):
    text = str(parvts_fx.explain(model, **prompt.inputs, options={"keep_tokens": 4, "migration_depth": 2}))
    for word in ("Prefill", "FLOPs before", "Layers", "fused masked", "Passes", "insert_partition", "prune_branch"):
        assert word in text


@pytest.mark.slow
def test_explain_gives_the_reason(model):
    prompt = llava.prompt(model, [[3, "image", 6]])
    report = parvts_fx.explain(model, **prompt.inputs, output_hidden_states=True)
    if report.prefill.status == "unrewritten":
        assert report.prefill.reason and report.prefill.reason in " ".join(str(report).split())
    text_only = parvts_fx.explain(model, **llava.prompt(model, [[5]]).inputs)
    assert text_only.prefill is None and "No graph merges visual features" in str(text_only)


def test_explain_leaves_the_model_alone(model, prompt):
    compile_with_parvts(model, keep_ratio=0.5)
    compiled = model._compiled_call_impl
    parvts_fx.explain(model, **prompt.inputs)
    assert model._compiled_call_impl is compiled
    uncompile(model)
    with pytest.raises(ValueError, match="keep_ratio"):
        parvts_fx.explain(model, **prompt.inputs, options={"keep_ratio": 3})


def test_one_log_line_per_pass(model, prompt):
    lines = []

    class Keep(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("parvts_fx"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        report = parvts_fx.explain(model, **prompt.inputs)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert lines == [str(record) for record in report.prefill.passes] and len(lines) >= 3


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("fusion", ["attention", 0.5])
def test_dumps_run(model, prompt, tmp_path, monkeypatch, fusion):
    monkeypatch.setenv(DUMP_VARIABLE, str(tmp_path))
    report = parvts_fx.explain(model, **prompt.inputs, options={"fusion": fusion, "keep_tokens": 4})
    files = sorted((tmp_path / "graph0").iterdir())
    names = ["00_captured", *(f"{record.position:02d}_{record.name}" for record in report.prefill.passes)]
    assert [file.stem for file in files] == names
    for file, rows in ((files[0], 25), (files[-1], 13)):
        done = subprocess.run([sys.executable, "-W", "ignore", str(file)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert str((2, rows, 101)) in done.stdout.splitlines()


def test_rewrite_for_those_who_hold_a_graph(model, prompt):
    held = []

    def backend(module, example_inputs):
        before = str(module.graph)
        result = parvts_fx.rewrite(module, example_inputs, {"keep_tokens": 4, "migration_depth": 1})
        assert str(module.graph) == before, "the argument stays as it is"
        held.append(result)
        return result.forward

    with torch.no_grad():
        output = torch.compile(model, backend=backend)(**prompt.inputs)
    assert output.logits.shape[1] == 13
    reports = [result.meta["parvts_fx"] for result in held]
    assert [r.status for r in reports].count("rewritten") == 1
    assert [r.meta["parvts_fx_precondition"] is not None for r in held] == [r.status == "rewritten" for r in reports]
