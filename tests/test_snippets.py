"""The Python in README and docs runs as it stands there, one block after another, and does what it is shown for."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import parvts_fx
from parvts_fx import scores
from parvts_fx.passes import PassResult
from tests import llava
from tests.supported import ROOT
from tests.test_rewrite import Prefill, exported

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class MyPass:
    """Changes nothing."""

    name = "my_pass"

    def run(self, work: Any) -> PassResult:
        return PassResult(0)


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def shown() -> list[Any]:
    return [pytest.param(block, id=f"{page.name}-{index}") for page in PAGES for index, block in enumerate(blocks(page))]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What a reader of any page has at hand: a compiled model, its inputs, a graph. Inductor would take half a minute a block."""
    monkeypatch.setattr(importlib.import_module("parvts_fx.backends.parvts"), "lower", lambda module, inputs, options: module)
    monkeypatch.setattr(scores, "_RULES", dict(scores._RULES))
    monkeypatch.chdir(tmp_path)
    model = llava.build(layers=6, hidden=24, heads=2, groups=1, patches=12).requires_grad_(False)
    prompt = llava.prompt(model, [[3, "image", 5]])
    features = torch.cat([*model.get_image_features(prompt.inputs["pixel_values"]).pooler_output]).reshape(-1, 24)
    gm, example_inputs = exported(
        Prefill(model), (prompt.inputs["input_ids"], features, prompt.inputs["attention_mask"]))
    return dict(parvts_fx=parvts_fx, torch=torch, model=parvts_fx.compile(model, strict=True), inputs=prompt.inputs, gm=gm,
                example_inputs=example_inputs, options=parvts_fx.Options(), MyPass=MyPass, metrics=[])


@pytest.mark.slow
@pytest.mark.supports("Docs", "every block of Python in README and docs")
@pytest.mark.parametrize("block", shown())
def test_blocks(block: str, names: dict[str, Any]) -> None:
    """What a block has compiled prunes the prompt; what it has computed is there."""
    model, inputs = names["model"], names["inputs"]
    if "last_call" in block:  # tells of a call that has been
        model.generate(**inputs, max_new_tokens=1)
    with torch.no_grad():
        exec(block, names)  # noqa: S102 (that is what is tested)
        names["model"].generate(**inputs, max_new_tokens=2, do_sample=False)
        if "fast" in names:
            assert cached(names["fast"](**inputs)) < inputs["input_ids"].shape[1]
    if "model.compile(" not in block:  # which leaves no record
        assert parvts_fx.last_call(names["model"]).pruned
    assert not names["metrics"] or names["metrics"][-1] == parvts_fx.last_call(model)
    assert "metrics" not in block or names["metrics"]


def cached(output: Any) -> int:
    return output.past_key_values.layers[0].keys.shape[2]


def test_there_are_blocks() -> None:
    assert blocks(PAGES[0]) and sum(len(blocks(page)) for page in PAGES) > 14
