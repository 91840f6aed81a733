"""What every test needs: a Dynamo without memory of the test before."""

from __future__ import annotations

import gc
import itertools
import logging

import pytest
import torch

from parvts_fx.runtime.call import UNWATCHED
from tests import covering, replaying

gc.set_threshold(200_000, 20)  # captures make millions of objects that live on: a fifth of all time went into looking at them
_COLLECT_AFTER = 30
"""Tests; what they leave behind is not freed before."""

_ran = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", choices=covering.SELECTIONS, default="covered", help="which tests and parameters to run: "
                     "those of make test, those that it leaves to CI, both, or all combinations [covered]")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``versions``: the first case of every test that shows what is supported, beside those that are marked."""
    left = covering.left_out(items, config.getoption("--cases"))
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]
    met = set()
    for item in items:
        if item.get_closest_marker("supports") and item.function not in met:
            met.add(item.function)
            item.add_marker(pytest.mark.versions)


@pytest.fixture(autouse=True)
def fresh_dynamo(request: pytest.FixtureRequest):
    once = request.node.get_closest_marker("captures_once") is not None
    if not once:
        replaying.forget()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # graph breaks of Hugging Face models
    yield
    if not once:
        torch._dynamo.reset()
    UNWATCHED.handed.clear()  # what a failed call has left behind
    UNWATCHED.lost.clear()
    if next(_ran) % _COLLECT_AFTER == 0:
        gc.collect()
