"""Graphs of the models of :mod:`tests.plain`, as Dynamo hands them to a backend, and what it takes to rewrite them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule

import parvts_fx
from parvts_fx.passes import PassResult, Plan, Work
from parvts_fx.stages import PlacedStage, Stage
from tests import replaying
from tests.plain import Plain, Row, Specification, prompt

# 13 tokens: a size that nothing else in these models has, so that it tells rows of the whole prompt.
ROWS = (Row(before=2), Row(padding=2, before=1, between=2))
SPECIFICATIONS = {
    "causal": Specification(layers=3, length=13),
    "masked": Specification(layers=3, length=13, rows=ROWS, attention="masked", heads=4, groups=2, fused_qkv=True),
    "written": Specification(layers=3, length=13, rows=ROWS, attention="written", flat=True, numbering="mask"),
    "GPT-J": Specification(layers=3, length=13, rows=ROWS, attention="masked", parallel=True, norm="layer"),
}
# Nor are there other sizes of 11, 10 and 9, which are the rows that are left with 3, 2 and 1 visual tokens.
_ONE = dict(keep_tokens=2, merge=None)
CHOICES: dict[str, dict[str, Any]] = {
    "before layer 0": dict(_ONE, migration_depth=0),
    "attention, 1": dict(_ONE, migration_depth=1),
    "attention, 2": dict(_ONE, migration_depth=2),
    "attention, all": dict(_ONE, migration_depth=3),
    "weight, 2": dict(_ONE, migration_depth=2, fusion=0.4),
    "weight, all": dict(_ONE, migration_depth=3, fusion=0.4),
    "joint, 2": dict(_ONE, migration_depth=2, paths="joint"),
    "merged, 2": dict(keep_tokens=2, migration_depth=2),
    "two stages": dict(stages=(Stage(keep=3, migrate=1), Stage(at=1, keep=1, migrate=1))),
    "two stages, apart": dict(stages=(Stage(keep=3, rule="norm"), Stage(at=1, keep=1, migrate=2, paths="joint"))),
    "two stages, read": dict(stages=(Stage(keep=3, migrate=1), Stage(at=1, keep=1, rule="last_row", migrate=2))),
    "two stages, weight": dict(stages=(Stage(keep=3, migrate=1), Stage(at=2, keep=1, migrate=1, fusion=0.4))),
}
LAYERS = 3


def capture(
    function: Callable[..., Any], *inputs: torch.Tensor, dynamic: bool | None = None
) -> tuple[GraphModule, list]:
    """The one graph that Dynamo makes, and its example inputs."""
    with torch.no_grad():
        (traced,), _ = replaying.trace(function, inputs, dynamic, fullgraph=True)
    return traced.graph, list(traced.examples)


@functools.cache
def captured(spec: Specification, dynamic: bool | None = None) -> tuple[GraphModule, list]:
    return capture(Plain(spec), *prompt(spec).arguments, dynamic=dynamic)


@dataclasses.dataclass(frozen=True)
class Call:
    """A pass that calls a function."""

    name: ClassVar[str] = "broken_pass"
    action: Callable[[Work], Any]

    def run(self, work: Work) -> PassResult:
        self.action(work)
        return PassResult(1)


@dataclasses.dataclass(frozen=True)
class Refine:
    """A pass that changes the plan."""

    name: ClassVar[str] = "broken_pass"
    change: Callable[[Plan], Plan]

    def plan(self, plan: Plan) -> tuple[Plan, PassResult]:
        return self.change(plan), PassResult(1)


def options(**choice: Any) -> parvts_fx.Options:
    """Without the saving of dead rows, so that all migration layers look alike; it has tests of its own."""
    return parvts_fx.Options(**{"skip_dead_rows": False, **choice})


def stages_of(choice: dict[str, Any]) -> tuple[PlacedStage, ...]:
    """A choice's stages in these models."""
    return options(**choice).placed(LAYERS)
