"""Dropped tokens merged into kept ones: compiled prefills equal the reference, caches and decode steps included."""

from __future__ import annotations

from typing import Any

import pytest

from tests import llava
from tests.comparing import check

PROMPTS = {
    "one picture": [[3, "image", 5]],
    "padding, pictures at other places": [[3, "image", 5], [2, "image", 2]],
    "two pictures": [[2, "image", 3, "image", 4]],
}


@pytest.fixture(scope="module")
def model() -> Any:
    return llava.build(layers=4)


@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_one_stage(model: Any, rows: list, depth: int) -> None:
    prompt = llava.prompt(model, rows)
    check(model, prompt, steps=4, migration_depth=depth, merge="clusters", keep_tokens=4)
