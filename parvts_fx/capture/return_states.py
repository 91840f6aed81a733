"""States that layers write into a filled cache are results of the graph while it is rewritten, and are written at its end."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from parvts_fx.analysis.values import changed_in_place, descendants, has_target, is_tensor, output_node, storage_of, value
from parvts_fx.capture.editing import Editor
from parvts_fx.pipeline import PassResult, Work

_COPIES = (torch.Tensor.copy_, torch.ops.aten.copy_.default)
_STATES = "parvts_states"


@dataclasses.dataclass(frozen=True)
class ReturnStates:
    """``state.copy_(new); return ...``  ==>  ``return (..., new)``, for a state that the graph is given.

    A convolution's last inputs or a scan's sum have no row for any token: one write of the whole, which nothing need be told of.
    Leaves alone what is written in parts, or read behind the write by another name.
    """

    name: ClassVar[str] = "return_states"
    merged: Node
    """Only what depends on these embeddings is rewritten."""

    def run(self, work: Work) -> PassResult:
        graph = work.module.graph
        found = [node for node in descendants(graph, [self.merged]) if _is_whole(graph, node)]
        writes = [node.args[:2] for node in found]
        for write, (target, new) in zip(found, writes):
            for user in [user for user in target.users if write < user]:
                user.replace_input_with(target, new)
            write.replace_all_uses_with(new)
            graph.erase_node(write)
        if writes:
            end = output_node(graph)
            returned = end.args[0]
            several = isinstance(returned, (tuple, list))
            end.meta[_STATES] = tuple(target.name for target, _ in writes), several
            end.args = ((*(returned if several else [returned]), *(new for _, new in writes)),)
        return PassResult(len(writes))


def _is_whole(graph: Graph, node: Node) -> bool:
    """Whether a node overwrites a whole input, which nothing else writes into and of which no view is read later."""
    if not has_target(node, _COPIES, ("copy_",)) or len(node.args) < 2 or not all(map(is_tensor, node.args[:2])):
        return False
    target, new = node.args[:2]
    held, given = value(target), value(new)
    if target.op != "placeholder" or held.shape != given.shape or held.dtype != given.dtype:
        return False
    alike = [other for other in graph.nodes if other not in (target, node) and is_tensor(other)
             and storage_of(other) == storage_of(target)]
    return not any(changed_in_place(other) is not None or any(user > node for user in other.users) for other in alike)


def returned_states(end: Node) -> tuple[tuple[str, ...], bool]:
    """The inputs that the last results of a graph are to be written into, and whether it returns several results beside them."""
    return end.meta.get(_STATES, ((), isinstance(end.args[0], (tuple, list))))


def write_states(work: Work, end: Node) -> None:
    """Write what the rewritten graph returns of states into those, and return the rest.

    Args:
        end: the output of the graph in which :class:`ReturnStates` has put them there.
    """
    names, returns_several = returned_states(end)
    if not names:
        return
    editor, now = Editor(work.module), output_node(work.module.graph)
    given = {node.name: node for node in work.module.graph.nodes if node.op == "placeholder"}
    left, states = now.args[0][:-len(names)], now.args[0][-len(names):]
    with work.module.graph.inserting_before(now):
        for name, state in zip(names, states):
            editor.method("copy_", given[name], state)
    now.args = (tuple(left) if returns_several else left[0],)
