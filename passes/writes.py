"""Writes into tensors that a plan would split: what is written into copies of some rows, nobody else would see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.fx import Node

from parvts_fx.analysis.values import changed_in_place, is_tensor, storage_of
from parvts_fx.errors import Refusal

if TYPE_CHECKING:
    from parvts_fx.passes.emit import Emitter


def refuse_split_writes(emitter: Emitter, nodes: Sequence[Node]) -> None:
    """
    Args:
        nodes: those of the decoder that are written, in graph order.

    Raises:
        Refusal: a tensor is written into on some of its rows, and read elsewhere on others.
    """
    levels, written = emitter.plan.levels, [node for node in nodes if changed_in_place(node) is not None]
    alive = set(nodes)

    def within_call(*members: Node) -> bool:
        """Whether nodes are an attention call's own: they are written together, on the same rows, each time it is asked."""
        calls = {id(emitter.attentions.get(member)) for member in members}
        return len(calls) == 1 and members[0] in emitter.attentions

    for write in written:
        shared = storage_of(changed_in_place(write))
        for other in nodes:
            if other >= write or not is_tensor(other) or storage_of(other) != shared:
                continue
            later = [user for user in other.users if user > write and (user in alive or user.op == "output")]
            if not later or within_call(write, other, *later):
                continue
            level = levels.get(write, 0)
            if other not in emitter.fresh:
                split = levels.get(other, 0) != level
            else:  # one for each kind of rows, if it has rows
                split = bool(emitter.decoder.tokens.axes.get(other)) and any(
                    emitter.level_read_by(user, other) != level for user in later)
            if split:
                raise Refusal("a tensor in front of the rows' restriction is changed in place behind it", write)
