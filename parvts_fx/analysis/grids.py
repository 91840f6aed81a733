"""Finds where a model itself says which row and column of its picture a token stands for: multimodal rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from parvts_fx.analysis.values import ancestors, is_tensor, value
from parvts_fx.torch_private import expression

_KINDS = (3, 4)
"""Time, row and column; some models put the position in the text in front."""


def find_grid(nodes: Sequence[Node], merged: Node, link: Node) -> Node | None:
    """Integers [3 or 4, batch, seq] that the graph has at hand before its first layer begins; None where it has none.

    That the last two are rows and columns is nothing but a guess, which is looked at in every prompt's own numbers
    (:func:`parvts_fx.places.places_of`).

    Args:
        nodes: of the decoder, all that depends on the merged embeddings.
        merged: the merged embeddings [batch, seq, hidden].
        link: what the first layer takes in.
    """
    entering, behind = ancestors([link]) | {link}, set(nodes)
    first = min(behind - entering)
    batch, size, _ = value(merged).shape
    able = [
        node for node in merged.graph.nodes
        if node < first and node not in behind and is_tensor(node) and value(node).dtype in (torch.int64, torch.int32)
        and value(node).dim() == 3 and _is_same(value(node).shape[0], *_KINDS)
        and _is_same(value(node).shape[1], batch) and _is_same(value(node).shape[2], size)]
    return able[-1] if able else None


def _is_same(one: int | torch.SymInt, *others: int | torch.SymInt) -> bool:
    """Whether a size is one of others, as far as the graph knows; a symbolic one is not compared, which would add a guard."""
    return any(one == other if isinstance(one, int) and isinstance(other, int) else
               not isinstance(one, int) and not isinstance(other, int) and expression(one) == expression(other)
               for other in others)
