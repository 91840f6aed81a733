"""What must be alike in all processes over which a model is spread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from parvts_fx.torch_private import of_first_process

if TYPE_CHECKING:
    from parvts_fx.passes.emit import Emitter


def agreed(emitter: Emitter, decides: Node) -> Node:
    """What the first process of each group has come to, of numbers that decide which rows are left and what they take over.

    Every process computes them from the same states, but sums of several processes need not be equal to the last bit in each.
    """
    for group in emitter.groups:
        decides = of_first_process(emitter.editor.call, decides, group)
    return decides
