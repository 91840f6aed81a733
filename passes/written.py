"""What the emitter has written, for the checks and the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from parvts_fx.analysis.records import Attention
from parvts_fx.passes.plan import Plan


@dataclasses.dataclass(frozen=True)
class Call:
    """An attention call that was written."""

    attention: Attention
    queries: str
    keys: str
    """The names of the rows that ask, and of those that are asked."""

    output: Node


@dataclasses.dataclass(frozen=True)
class Written:
    """What the emitter wrote, for the checks and the report."""

    plan: Plan
    held: Mapping[Node, Mapping[str, Node]]
    """By node of the decoder as it was captured: what holds it, by the name of its rows."""

    counts: Mapping[str, Any]
    """By name of rows: how many a sample has, an int or a node."""

    calls: tuple[Call, ...]
    copied: int
    """How many nodes stand there as they stood before."""

    side_nodes: frozenset[Node]
    """Outside the decoder; they stay even where nothing reads them (entering and leaving ``vmap``), as do checks."""

    original_inputs: tuple[str, ...]
    original_outputs: tuple[object, ...]
    """The example values of what the graph returned."""

    rows: Node | None
    """[batch, rows] int64: the positions of the prompt that are left in the end."""

    shortened: frozenset[int]
    """Outputs that may become shorter along other axes than the prompt's: they hold its last rows, or as many as there are
    (caches of sliding windows), or other cached rows in front of them."""
