"""Compiles a graph for all the sizes that have names in it, from the first call on.

torch.compile takes the sizes of a first call for constants, and gives names to those in which a later one differs: a graph
that is compiled when a call first needs it would be compiled three times until prompts of any length and batches of any size
have run, although it says itself what varies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.merge import is_merge
from parvts_fx.analysis.values import is_input_number, value
from parvts_fx.capture import copy_graph_module
from parvts_fx.torch_private import expression, is_symbol, may_be_negative, may_vary

Compiled = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class _Input:
    """What becomes of one of a graph's inputs."""

    axes: tuple[int, ...] = ()
    """Of a tensor, those whose sizes vary."""

    left_out: bool = False
    """A number that is read off a tensor's size."""

    carried: bool = False
    """A number that is none's size; an empty tensor of that many rows tells it, for torch.compile takes numbers for constants."""

    is_number: bool = False
    """A tensor of which the graph reads the number that is in it, and which torch.compile would not look into."""

    def given(self, held: Any, device: torch.device | None) -> Any:
        if self.is_number:
            return held.item()
        if self.carried:
            held = torch.empty(held, 0, device=device)
            may_vary(held, 0)
        elif self.axes:
            held = held.view(held.shape)  # the caller's own stays as it is
            for axis in self.axes:
                may_vary(held, axis)
        return held


def compile_varying(graph: GraphModule, backend: Callable[..., Compiled]) -> Compiled:
    """The graph compiled by ``torch.compile``; it is given what the graph is given."""
    copy = copy_graph_module(graph)
    _spread_masks(copy)
    inputs = _with_sizes(copy, [node for node in copy.graph.nodes if node.op == "placeholder"])
    compiled = torch.compile(copy, backend=backend)
    if all(each == _Input() for each in inputs):
        return compiled

    def call(*given: Any) -> Any:
        device = next((held.device for held in given if isinstance(held, torch.Tensor)), None)
        return compiled(*(each.given(held, device) for each, held in zip(inputs, given) if not each.left_out))

    return call


def _spread_masks(module: GraphModule) -> None:
    """Have masks the size of what is written into: left to masked_scatter, that breaks the graph where sizes have names and
    generate is what calls it (torch 2.13; "SymIntArrayRef expected to contain only concrete integers")."""
    for node in list(module.graph.nodes):
        if is_merge(node) and len(node.args) > 1 and value(node.args[1]).dim() == value(node.args[0]).dim():
            with module.graph.inserting_before(node):
                spread = module.graph.call_method("expand_as", (node.args[1], node.args[0]))
            node.update_arg(1, spread)


def _with_sizes(module: GraphModule, placeholders: Sequence[Node]) -> list[_Input]:
    """Have the graph read numbers off sizes."""
    names: dict[Any, tuple[Node, int]] = {}
    for node in placeholders:
        for axis in _varying(value(node)):
            if is_symbol(size := value(node).shape[axis]):
                names.setdefault(expression(size), (node, axis))
    inputs, behind = [], placeholders[-1].next if placeholders else None
    for node in placeholders:
        held, reads = value(node), [user for user in node.users if is_input_number(user)]
        if reads and len(reads) == len(node.users):
            inputs.append(_Input(is_number=True))
            for read in reads:
                read.replace_all_uses_with(node)
                module.graph.erase_node(read)
            continue
        if not isinstance(held, torch.SymInt):
            inputs.append(_Input(_varying(held)))
            continue
        tensor, axis = names.get(expression(held), (None, 0))
        if tensor is None and may_be_negative(held):
            inputs.append(_Input())
            continue
        inputs.append(_Input(left_out=tensor is not None, carried=tensor is None))
        with module.graph.inserting_before(behind):
            read = module.graph.call_method("size", (tensor or node, axis))
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read, delete_user_cb=lambda user, read=read: user is not read)
        node.meta = {}
        if tensor is not None:
            module.graph.erase_node(node)
    module.recompile()
    return inputs


def _varying(held: object) -> tuple[int, ...]:
    return tuple(axis for axis, size in enumerate(held.shape) if isinstance(size, torch.SymInt)) if isinstance(
        held, torch.Tensor) else ()
