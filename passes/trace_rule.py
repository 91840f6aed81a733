"""Writes a scoring rule into the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from parvts_fx.analysis.values import ancestors, concrete, hint, is_tensor, value
from parvts_fx.scores import rule_named
from parvts_fx.stages import PlacedStage

if TYPE_CHECKING:
    from parvts_fx.passes.emit import Emitter


def _refuse_data_dependent_sizes(nodes: set[Node]) -> None:
    for node in nodes:
        shape = value(node).shape if is_tensor(node) else [value(node)]
        if any(isinstance(size, torch.SymInt) and hint(size) is None for size in shape):
            raise TypeError(f"the size of {node.name} depends on data")


def trace_rule(
    emitter: Emitter, stage: PlacedStage, hidden: Node | None, visual: Node, attention: Node | None, places: Node | None
) -> Node:
    """Write a stage's rule into the graph.

    Args:
        hidden: [batch, rows, hidden]; None for a rule that does not look at it.
        visual: [batch, rows] bool.
        attention: [batch, heads, rows that are asked, rows]; None for a rule that reads none.
        places: [batch, rows, 3] int64; None for a rule that does not look at them.

    Raises:
        ValueError: the rule cannot be traced, or does not return a [batch, rows] tensor of real numbers.
    """
    rule, number = stage.stage.rule, stage.written_as
    name = rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)
    function = rule_named(rule)
    returned: list[Any] = []

    def traced(visual: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        rest = list(given)
        returned.append(function(rest.pop(0) if hidden is not None else None, visual, *rest))
        return returned[-1]

    given = [held for held in (visual, hidden, attention, places) if held is not None]
    what = f"option score={name!r}" if emitter.plan.options.stages is None else (
        f"option stages[{number}].rule={name!r}")
    try:
        node = emitter.editor.inline(traced, *given)
        _refuse_data_dependent_sizes(ancestors([node]) - ancestors(given))
    except Exception as error:
        if returned and not isinstance(returned[-1], torch.Tensor):
            node = None  # not even a tensor: said below
        else:
            raise ValueError(
                f"parvts_fx: {what}: the rule cannot be traced into the graph ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}). Use tensor operations only: no .item(), no branch "
                "on a tensor's values, no data-dependent sizes, no tensors created outside the rule.") from error
    result = returned[-1]
    expected = tuple(value(visual).shape)
    if not isinstance(result, torch.Tensor) or result.is_complex() or [concrete(s) for s in result.shape] != [
            concrete(s) for s in expected]:
        got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
        raise ValueError(f"parvts_fx: {what}: the rule must return a real tensor [batch, seq] = "
                         f"{expected}, one score per position, and returned {got}.")
    return node
