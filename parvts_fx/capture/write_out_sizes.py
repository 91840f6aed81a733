"""Write a size that is a value of its own into the operations that take it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from parvts_fx.pipeline import PassResult, Work


@dataclasses.dataclass(frozen=True)
class WriteOutSizes:
    """``size = torch.Size([1, s, 48]); x.view(size)``  ==>  ``x.view([1, s, 48])``

    So that every number of positions is an operation's own argument. The values computed stay the same.
    """

    name: ClassVar[str] = "write_out_sizes"

    def run(self, work: Work) -> PassResult:
        count = 0
        for node in list(work.module.graph.nodes):
            if node.op == "call_function" and node.target is torch.Size and node.args:
                count += _write_out(node)
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
