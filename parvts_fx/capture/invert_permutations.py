"""Write the inversion of a permutation as a sort, so that no table of positions is scattered."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch
from torch.fx import Node

from parvts_fx.analysis.values import has_target, hint_shape, is_index, is_tensor, value
from parvts_fx.capture.editing import Editor
from parvts_fx.pipeline import PassResult, Work

_SORTS = (torch.sort, torch.argsort, torch.ops.aten.sort.default, torch.ops.aten.argsort.default)
_SORT_METHODS = ("sort", "argsort")
_TABLES = (torch.arange, torch.ops.aten.arange.default)
_BUFFERS = (torch.empty_like, torch.zeros_like, torch.empty, torch.zeros)
_BUFFER_METHODS = ("new_empty", "new_zeros")


@dataclasses.dataclass(frozen=True)
class InvertPermutations:
    """``inverse = empty_like(p); inverse[p] = arange(n)``  ==>  ``inverse = argsort(p)``, for the ``p`` of a sort.

    Experts put their rows back into order that way, with a table whose length is a multiple of the prompt's; a sort
    follows the number of rows by itself. The values computed stay the same.
    """

    name: ClassVar[str] = "invert_permutations"

    def run(self, work: Work) -> PassResult:
        module, editor, count = work.module, Editor(work.module), 0
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.target is operator.setitem and _inverts(*node.args):
                buffer, permutation, _ = node.args
                with module.graph.inserting_before(node):
                    inverse = editor.call(torch.argsort, permutation)
                for user in [user for user in buffer.users if node < user]:
                    user.replace_input_with(buffer, inverse)
                module.graph.erase_node(node)
                count += 1
        return PassResult(count)


def _inverts(buffer: Any, permutation: Any, table: Any) -> bool:
    if not (is_tensor(buffer) and is_tensor(permutation) and is_tensor(table)):
        return False
    shape = hint_shape(value(permutation))
    return (
        len(shape) == 1 and hint_shape(value(buffer)) == shape == hint_shape(value(table))
        and value(buffer).dtype == torch.int64
        and has_target(buffer, _BUFFERS, _BUFFER_METHODS)
        and has_target(table, _TABLES) and len(table.args) == 1
        and _is_order_of_a_sort(permutation)
    )


def _is_order_of_a_sort(node: Node) -> bool:
    if is_index(node):
        return node.args[1] == 1 and has_target(node.args[0], _SORTS[::2], ("sort",))
    return has_target(node, _SORTS[1::2], ("argsort",))
