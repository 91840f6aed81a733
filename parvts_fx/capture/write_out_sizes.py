"""Write a size that is a value of its own into the operations that take it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from parvts_fx.analysis.values import concrete, is_symbolic_int, symbols, value
from parvts_fx.pipeline import PassResult, Work


@dataclasses.dataclass(frozen=True)
class WriteOutSizes:
    """``size = torch.Size([1, s, 48]); x.view(size)``  ==>  ``x.view([1, s, 48])``, and ``s = y.shape[1]; x.view([1, s, 48])``
    ==>  ``x.view([1, 22, 48])`` where that size is static

    So that every number of positions is an operation's own argument. The values computed stay the same.
    """

    name: ClassVar[str] = "write_out_sizes"

    def run(self, work: Work) -> PassResult:
        count = 0
        for node in list(work.module.graph.nodes):
            if node.op == "call_function" and node.target is torch.Size and node.args:
                count += _write_out(node)
        for node in reversed(work.module.graph.nodes):
            if node.op in ("call_function", "call_method") and is_symbolic_int(node) and not symbols(value(node)):
                node.replace_all_uses_with(concrete(value(node)))
                work.module.graph.erase_node(node)
                count += 1
        return PassResult(count)


def _write_out(size: Node) -> int:
    numbers = size.args[0]

    def replaced(given: Node) -> object:
        return numbers if given is size else given

    for user in list(size.users):
        if user.op != "output":
            user.args, user.kwargs = map_arg(user.args, replaced), map_arg(user.kwargs, replaced)
    if not size.users:
        size.graph.erase_node(size)
    return 1
