"""Numbers of rows have names of their own in what Inductor compiles: text, kept tokens, and those that each stage drops.

How many tokens stay is a rounded share of how many there are, and nearly every size behind the drop is a difference with that
in it. Inductor simplifies the index of every load and store of every kernel, and asks of many a size whether it is positive or
divides another: on such formulas that takes longer than all else that it does, and sometimes fails. Of names of positive
numbers every number of rows is a sum, the prompt's length as well.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.values import concrete, value
from parvts_fx.capture import copy_graph_module
from parvts_fx.capture.editing import COUNTS
from parvts_fx.errors import Refusal
from parvts_fx.runtime.guards import size_reader
from parvts_fx.torch_private import NamedSizes, expression, is_symbol, name_sources

Compiled = Callable[..., Any]


def compile_with_names(
    module: GraphModule, example_inputs: Sequence[Any], compile: Callable[[GraphModule, Sequence[Any]], Compiled]
) -> Compiled:
    """Compile a rewritten graph whose numbers of rows are inputs, and give them at each call."""
    parts = _parts(module)
    try:
        readers = [size_reader(module, part) for part in parts if isinstance(part, torch.SymInt)]
    except Refusal:  # one depends on data
        return compile(module, example_inputs)
    names = NamedSizes()
    try:
        added = [names.add(part) if isinstance(part, torch.SymInt) else part for part in parts]
        if not readers or any(part is None for part in added):
            return compile(module, example_inputs)
        copy = copy_graph_module(module)
        compiled = compile(copy, _rename(copy, added, names, example_inputs))
    finally:
        names.forget()
    return lambda *inputs: compiled(*inputs, *(read(inputs) for read in readers))


def _parts(module: GraphModule) -> list[Any]:
    """How many rows are text, how many stay in the end, and how many leave at each stage, the last one first; none where a
    prompt's length has no name that they could take the place of."""
    if COUNTS not in module.meta:
        return []
    text, visuals = module.meta[COUNTS]
    if not is_symbol(text + visuals[0]):
        return []
    leaving = [concrete(before - behind) for before, behind in zip(visuals, visuals[1:])]
    return [text, visuals[-1], *reversed(leaving)]


def _rename(module: GraphModule, parts: Sequence[Any], names: NamedSizes, example_inputs: Sequence[Any]) -> list[Any]:
    """Have the graph read its numbers of visual tokens off new inputs.

    Args:
        parts: what :func:`_parts` gives, symbolic ones by their new names.

    Returns:
        example inputs whose sizes are sums of these names.
    """
    text, visuals = module.meta[COUNTS]
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    own: list[int | Node] = []
    for number, part in enumerate(parts):
        if isinstance(part, torch.SymInt):
            with module.graph.inserting_after(placeholders[-1]):
                placeholders.append(module.graph.placeholder(f"rows_{number}"))
            placeholders[-1].meta["example_value"] = part
        own.append(placeholders[-1] if isinstance(part, torch.SymInt) else part)
    for level, count in enumerate(reversed(visuals), start=1):  # the first are those that are left in the end
        if is_symbol(count):
            names.replace(count, sum(parts[1:level + 1]))
        if isinstance(count, torch.SymInt):
            _read_off(module, count, own[1:level + 1], placeholders[-1])
    names.replace(text + visuals[0], sum(parts))
    inputs = []
    for node, given in itertools.zip_longest(placeholders, example_inputs):
        held = names.renamed(value(node))
        inputs.append(given if held is value(node) and given is not None else held)
        node.meta["example_value"] = held
    name_sources(module)
    module.recompile()
    return inputs


def _read_off(module: GraphModule, count: torch.SymInt, own: Sequence[int | Node], behind: Node) -> None:
    """Have a sum of the new inputs in the place of what computes a number of tokens."""
    formula = expression(count)
    found = [node for node in module.graph.nodes if node.op == "call_function" and isinstance(value(node), torch.SymInt)
             and node.target is not torch.ops.aten.sym_size.int and expression(value(node)) == formula]
    if not found:
        return
    with module.graph.inserting_before(behind.next):
        total: int | Node = own[0]
        for part in own[1:]:
            total = module.graph.call_function(operator.add, (total, part))
    for node in found:
        node.replace_all_uses_with(total)
        module.graph.erase_node(node)
