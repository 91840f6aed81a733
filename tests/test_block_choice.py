"""Attention to blocks of keys that an index chooses: which rows make up a block follows from the rows that are there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import parvts_fx
from parvts_fx.stages import Stage
from tests.plain import Row, Specification, build, prompt
from tests.plain_checking import TOLERANCE, Choice, outcome, wanted
from tests.plain_reference import error_of, unpruned

BASE = dict(layers=3, attention="blocks", length=19, visual=8, rows=(Row(before=4),))
SCHEDULES = {
    "0": Choice(depth=0), "1": Choice(depth=1), "2": Choice(depth=2), "all": Choice(depth=3),
    "joint": Choice(depth=2, paths="joint"), "weight": Choice(depth=2, fusion=0.4), "merged": Choice(depth=2, merge="clusters"),
    "by attention": Choice(stages=(Stage(at=0, keep=0.5, rule="diverse", migrate=1), Stage(at=2, keep=0.25, rule="last_row"))),
}


def test_the_reference_is_the_model() -> None:
    spec = Specification(**BASE)
    model, given = build(spec), prompt(spec)
    with torch.no_grad():
        assert error_of(spec, model(*given.arguments), unpruned(model, given)) < 1e-5


CASES = [(name, 19) for name in SCHEDULES] + [("2", 18)]
"""In a prompt of 19 rows the last block is there in part."""


@pytest.mark.slow
@pytest.mark.parametrize("schedule, length", CASES)
def test_blocks_are_those_of_the_rows_that_are_left(schedule: str, length: int) -> None:
    result = outcome(Specification(**{**BASE, "length": length}), dataclasses.replace(SCHEDULES[schedule], dynamic=True))
    assert result.kind == "rewritten", result


def test_static_sizes_do_not_tell() -> None:
    result = outcome(Specification(**BASE), Choice())
    assert result.kind == "refused" and "dynamic=True" in result.reason, result


@pytest.mark.slow
def test_the_call_is_captured_again_where_sizes_have_names() -> None:
    """So that a compiled model prunes without being told; what explains it says so, too."""
    spec, choice = Specification(**BASE), SCHEDULES["2"]
    model, given = build(spec), prompt(spec)
    report = parvts_fx.explain(model, *given.arguments, options=choice.options)
    assert [graph.status for graph in report.graphs] == ["rewritten"] and report.prefill.prompt_tokens == 19
    static = torch._dynamo.config.assume_static_by_default
    parvts_fx.compile(model, **choice.options)
    with torch.no_grad():
        actual = model(*given.arguments)
    assert parvts_fx.last_call(model).pruned and error_of(spec, actual, wanted(model, given, choice)) < TOLERANCE
    assert torch._dynamo.config.assume_static_by_default is static
