"""What chooses tokens runs operation by operation on a CPU, inside Inductor's graph.

Scores, sorts and clusters are some eighty operations on tensors of a few hundred numbers. Inductor writes a kernel for every
two or three of them and its C++ compiler takes the better part of a second for each: as long as for all of the model's
decoder, and nothing of a prefill's time is won by it.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from parvts_fx.analysis.values import changed_in_place, is_tensor, value
from parvts_fx.capture import copy_graph_module
from parvts_fx.capture.editing import CHOOSES

_LEAST = 3
"""Operations: fewer are not worth a call."""

_regions: dict[str, GraphModule] = {}
"""By what they say, so that a compiled graph out of Inductor's cache finds them in another process."""

_library = torch.library.Library("parvts_fx", "FRAGMENT")
_library.define("uncompiled(str key, Tensor[] tensors, SymInt[] sizes) -> Tensor[]")


def _run(key: str, tensors: Sequence[torch.Tensor], sizes: Sequence[Any]) -> list[torch.Tensor]:
    """Results share no memory with what was given or with one another: operations may not do so unannounced."""
    return [held.clone(memory_format=torch.contiguous_format) for held in _regions[key](*tensors, *sizes)]


_library.impl("uncompiled", _run, "CompositeExplicitAutograd")
torch.library.register_fake("parvts_fx::uncompiled", _run, lib=_library)


def leave_choices_uncompiled(module: GraphModule) -> GraphModule:
    """A copy of the graph in which one operation stands for each part that chooses; the graph itself if there is none."""
    if not any(CHOOSES in node.meta for node in module.graph.nodes):
        return module
    copy = copy_graph_module(module)
    for region in _regions_of(copy.graph):
        _replace(copy, region)
    copy.graph.lint()
    copy.recompile()
    return copy


def _regions_of(graph: Graph) -> list[list[Node]]:
    """Runs of choosing nodes that may be computed where the last of each stands: nothing in between needs them earlier."""
    found, current = [], dict[Node, None]()
    for node in graph.nodes:
        if CHOOSES in node.meta and isinstance(value(node), (torch.Tensor, tuple, list)):
            current[node] = None
        elif current and (changed_in_place(node) is not None or any(source in current for source in node.all_input_nodes)):
            found.append(list(current))
            current = {}
    return [region for region in found if len(region) >= _LEAST]


def _with_fractions(region: Sequence[Node]) -> set[Node]:
    """The nodes, and what computes numbers for them that are not whole: an operation's sizes are."""
    found, stack = set(region), list(region)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found and isinstance(value(source), (torch.SymFloat, torch.SymBool)):
                found.add(source)
                stack.append(source)
    return found


def _replace(module: GraphModule, region: Sequence[Node]) -> None:
    """Put one operation in the place of a region's nodes."""
    inside, copied = set(region), dict.fromkeys(sorted(_with_fractions(region)))
    given = dict.fromkeys(source for node in copied for source in node.all_input_nodes if source not in copied)
    tensors, sizes = [node for node in given if is_tensor(node)], [node for node in given if not is_tensor(node)]
    read = [node for node in region if any(user not in inside for user in node.users)]
    part, copies = Graph(), dict[Node, Node]()
    for node in (*tensors, *sizes):
        copies[node] = part.placeholder(node.name)
    for node in copied:
        copies[node] = part.node_copy(node, copies.__getitem__)
    part.output([copies[node] for node in read])
    key = hashlib.sha256(part.python_code("self").src.encode()).hexdigest()
    _regions.setdefault(key, GraphModule(torch.nn.Module(), part))
    with module.graph.inserting_after(region[-1]):
        made = module.graph.call_function(torch.ops.parvts_fx.uncompiled.default, (key, tensors, sizes))
    made.meta["example_value"] = [value(node) for node in read]
    with module.graph.inserting_after(made):
        for number, node in reversed(list(enumerate(read))):
            result = module.graph.call_function(operator.getitem, (made, number))
            result.meta = dict(node.meta)
            node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
    for node in reversed(region):
        module.graph.erase_node(node)
