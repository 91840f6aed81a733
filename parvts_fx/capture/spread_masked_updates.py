"""Spread updates of masked rows over the whole prompt, so that no size depends on data."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Set as AbstractSet
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from parvts_fx.analysis.merge import enters_a_layer, is_merge
from parvts_fx.analysis.values import (
    ancestors,
    descendants,
    has_target,
    hint,
    is_index,
    is_tensor,
    leaves,
    storage_of,
    value,
    with_leaves,
)
from parvts_fx.capture.editing import Editor
from parvts_fx.pipeline import PassResult, Work
from parvts_fx.torch_private import assert_scalar

_POINTWISE = (operator.add, operator.iadd, operator.mul, operator.imul, operator.sub, torch.add, torch.mul, torch.sub)
_POINTWISE_METHODS = ("add", "add_", "mul", "mul_", "sub", "to", "clone", "type_as")

_ASSERTIONS = (assert_scalar, torch._check)


@dataclasses.dataclass(frozen=True)
class SpreadMaskedUpdates:
    """Write updates of the rows that a mask chooses as operations on all rows.

    ``h[mask] = f(h[mask], features)``  ==>  ``h' = where(mask, f(h, spread(features)), h)``
    ``h.masked_scatter(mask, features)``  ==>  ``where(mask, spread(features), h)``, where attention came before

    ``spread`` puts the n-th feature at the n-th masked position. Features that join the residual stream inside the
    decoder (DeepStack) enter by such updates; spread, they have one row per token and can be cut like any other side
    input. Leaves updates alone that are not of this form. The values computed stay the same.
    """

    name: ClassVar[str] = "spread_masked_updates"
    merged: Node
    """Only what depends on these embeddings is rewritten."""

    attentions: AbstractSet[Node]

    def run(self, work: Work) -> PassResult:
        editor, count = Editor(work.module), 0
        for node in descendants(work.module.graph, [self.merged]):
            if is_merge(node) and enters_a_layer(node, self.attentions):
                count += _spread_scatter(editor, node)
            elif node.op == "call_function" and node.target is operator.setitem:
                count += _spread_setitem(editor, node)
        return PassResult(count)


def spread(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The n-th row of features [count, hidden] at the n-th true entry of mask [batch, seq]; others hold any row."""
    order = (mask.flatten().long().cumsum(0) - 1).clamp(min=0)
    return features.index_select(0, order).view(*mask.shape, *features.shape[1:])


def _spread_scatter(editor: Editor, node: Node) -> bool:
    named = {**dict(zip(("self", "mask", "source"), node.args)), **node.kwargs}
    target, mask, source = named.get("self", named.get("input")), named["mask"], named["source"]
    if not (is_tensor(target) and is_tensor(mask) and value(target).dim() == 3 and value(mask).dim() == 3):
        return False
    hidden = value(target).shape[2]
    while source.op == "call_method" and source.target in ("view", "reshape", "flatten") and value(source).dim() == 1:
        source = source.args[0]
    with editor.graph.inserting_before(node):
        flat = editor.call(operator.getitem, mask, (Ellipsis, 0))
        if value(source).dim() != 2:
            source = editor.method("reshape", source, -1, hidden)
        result, reads = _updated(editor, target, flat, source)
    if result is None:
        return False
    node.replace_all_uses_with(result)
    editor.graph.erase_node(node)
    _drop_assertions(editor.graph, reads)
    return True


def _masked_rows(index: object) -> Node | None:
    """The bool mask [batch, seq] of an index such as ``mask`` or ``(mask, :)``."""
    mask, *rest = index if isinstance(index, tuple) else (index,)
    if any(part not in (slice(None), Ellipsis) for part in rest):
        return None
    return mask if is_tensor(mask) and value(mask).dtype == torch.bool and value(mask).dim() == 2 else None


def _spread_setitem(editor: Editor, node: Node) -> bool:
    graph: Graph = editor.graph
    target, index, new = node.args
    mask = _masked_rows(index)
    if mask is None or not is_tensor(new) or not is_tensor(target) or value(target).dim() != 3:
        return False
    with graph.inserting_before(node):
        result, reads = _updated(editor, target, mask, new)
    if result is None:
        return False
    aliases = [user for user in target.users if user < node and is_tensor(user) and user not in reads and
               storage_of(user) == storage_of(target)]
    if aliases:
        return False
    for user in [user for user in target.users if node < user]:
        user.replace_input_with(target, result)
    graph.erase_node(node)
    _drop_assertions(graph, reads)
    return True


def _same_mask(one: Node, other: Node) -> bool:
    return _mask_root(one) is _mask_root(other)


def _mask_root(mask: Node) -> Node:
    """What a mask was made from by adding and dropping an axis of one entry."""
    while has_target(mask, (), ("squeeze", "unsqueeze")) or is_index(mask) and mask.args[1] == (Ellipsis, 0):
        mask = mask.args[0]
    return mask


def _updated(editor: Editor, target: Node, mask: Node, new: Node) -> tuple[Node | None, list[Node]]:
    """``target`` with its masked rows replaced by ``new`` [count, hidden], written on all rows; and what it read of them.

    The insertion point stands behind all three. None where ``new`` is made from the masked rows in another way than
    entry by entry.
    """
    graph = editor.graph
    before = ancestors([new])
    reads = [
        n for n in before if is_index(n) and is_tensor(n.args[0]) and (own := _masked_rows(n.args[1])) is not None
        and _same_mask(own, mask)
    ]
    inside = set(descendants(graph, reads)) & before
    if any(not has_target(member, _POINTWISE, _POINTWISE_METHODS) for member in inside - set(reads)):
        return None, reads
    if any(read.args[0] is not target for read in reads):
        return None, reads
    rows = hint(value(reads[0]).shape[0]) if reads else None
    full: dict[Node, Node] = dict.fromkeys(reads, target)

    def on_all_rows(source: Node) -> Node:
        if source not in full:
            is_feature = is_tensor(source) and value(source).dim() == 2 and (
                rows is None or hint(value(source).shape[0]) in (rows, None))
            full[source] = editor.inline(spread, source, mask) if is_feature else source
        return full[source]

    for member in [node for node in graph.nodes if node in inside and node not in full]:
        changed = [on_all_rows(leaf) if isinstance(leaf, Node) else leaf for leaf in leaves(member)]
        full[member] = editor.copy(member, *with_leaves(member, changed))
    result = editor.inline(
        lambda mask, rows, target: torch.where(mask[..., None], rows.to(target.dtype), target),
        mask, on_all_rows(new), target)
    return result, reads


def _drop_assertions(graph: Graph, reads: list[Node]) -> None:
    """Remove what read the masked rows: the update, and Dynamo's checks on their number.

    ``spread`` fails on its own where features are too few. A check may read a size that is known by then (torch 2.11).
    """
    behind = set(reads)
    for node in graph.nodes:
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    for node in [node for node in reversed(graph.nodes) if node in behind]:
        if not node.users and (node in reads or not node.is_impure() or has_target(node, _ASSERTIONS)):
            graph.erase_node(node)
