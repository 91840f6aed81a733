"""log n on the logits of keys that stand for n tokens (step 2 of :mod:`parvts_fx.passes.clusters`)."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from parvts_fx.analysis.calls import fused_arguments, is_softmax
from parvts_fx.analysis.samples import Samples, samples_of
from parvts_fx.analysis.values import leaves, value, with_leaves
from parvts_fx.passes.rows import live

if TYPE_CHECKING:
    from parvts_fx.capture.editing import Size
    from parvts_fx.passes.emit import Emitter


def levels_of(emitter: Emitter, call: Node, keys: str) -> list[int]:
    """On which levels it is known how many tokens an attention call's keys stand for; none where it is to have no bias."""
    plan, sets = emitter.plan, emitter.sets
    if any(call in merging.unbiased for merging in plan.mergings.values()):
        return []
    return [level for level in emitter.sizes if level <= plan.live[call] and sets.is_within(keys, live(level))]


def biased(
    emitter: Emitter, call: Node, queries: str | int, keys: str, logits: Node | None, rank: int, samples: Samples | None,
    like: Node, columns: Size | None = None,
) -> Node | None:
    """Logits, or a mask that is added to them, with log n of the keys for the queries of text rows.

    Args:
        call: an attention call of the decoder, by its output.
        queries: the name of the rows that ask, or how many of the last rows do.
        logits: [..., queries, keys]; a bool mask is true where a query may look. None for none.
        rank: of the logits, and where samples lie in them.
        like: what has the dtype of the result.
        columns: how many keys there are where cached ones stand in front of the prompt's; None where none do.

    Returns:
        the same as ``logits`` where no key stands for several, or the call has no place for it.
    """
    levels = levels_of(emitter, call, keys)
    if not levels:
        return logits
    dtype = value(like).dtype
    key = (max(levels), queries, keys, rank, samples, dtype)
    if key not in emitter.biases:
        with emitter.editor.choosing():
            emitter.biases[key] = _bias(emitter, *key)
    bias = emitter.biases[key]
    if columns is not None:
        bias = _behind_cached(emitter, bias, columns)
    if logits is None:
        return bias
    if (*key, logits) not in emitter.biases:  # layers share their mask
        if value(logits).dtype == torch.bool:
            with emitter.editor.choosing():
                emitter.biases[*key, logits] = emitter.editor.inline(
                    lambda bias, held: bias.masked_fill(~held, -torch.inf), bias, logits)
        else:
            emitter.biases[*key, logits] = emitter.editor.call(operator.add, logits, bias)
    return emitter.biases[*key, logits]


def _behind_cached(emitter: Emitter, bias: Node, columns: Size) -> Node:
    """The bias for so many keys, the first of which are cached ones that stand for themselves."""
    editor = emitter.editor
    key = ("behind cached", bias, columns)
    if key not in emitter.biases:
        emitter.biases[key] = editor.call(F.pad, bias, (editor.plus(columns, editor.size(bias, value(bias).dim() - 1), -1), 0))
    return emitter.biases[key]


def counted(
    emitter: Emitter, call: Node, node: Node, fresh: list[Any], queries: str | None, keys: str
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a softmax or a fused call with log n for keys that stand for several.

    Args:
        call: the attention call that it is part of, by its output.
        node: the softmax or the fused call of the decoder.
        fresh: what its copy reads in place of its leaves.
        queries: the name of the rows that ask; None for as many of the last rows as the call has queries.
    """
    place = dict(zip(leaves(node), fresh))
    asks = node.all_input_nodes[0] if is_softmax(node) else fused_arguments(node)["query"]
    rows = value(asks).shape[-2] if queries is None else queries
    attention = emitter.attentions.get(call)
    scored = place[asks] if is_softmax(node) else place[fused_arguments(node)["key"]]
    columns = emitter.editor.size(scored, value(scored).dim() - (1 if is_softmax(node) else 2)) if (
        attention is not None and attention.on_filled_cache) else None
    if is_softmax(node):
        held = biased(emitter, call, rows, keys, place[asks], value(asks).dim(), samples_of(emitter.decoder, asks), place[asks],
                      columns)
        return with_leaves(node, [held if leaf is asks else new for leaf, new in zip(leaves(node), fresh)])
    named = {name: place.get(held, held) if isinstance(held, Node) else held for name, held in fused_arguments(node).items()}
    named["attn_mask"] = biased(
        emitter, call, rows, keys, named["attn_mask"], value(asks).dim(), samples_of(emitter.decoder, asks), named["query"],
        columns)
    operands = tuple(named.pop(name) for name in ("query", "key", "value"))
    return operands, named


def _bias(
    emitter: Emitter, level: int, queries: str | int, keys: str, rank: int, samples: Samples | None, dtype: torch.dtype
) -> Node:
    """log n of the keys where rows of text ask, to be broadcast with logits [..., queries, keys]."""
    sets, editor, sizes = emitter.sets, emitter.editor, emitter.sizes[level]
    if keys != live(level):
        sizes = editor.call(torch.gather, sizes, 1, sets.places(keys, live(level)))
    assert emitter.visual is not None, "a choice has needed it"
    index = sets[keys if isinstance(queries, int) else queries].index
    if isinstance(queries, int):
        assert index is not None, "the rows are fewer than the prompt's where keys stand for several"
        index = editor.call(operator.getitem, index, (slice(None), slice(-queries, None)))
    visual = emitter.visual if index is None else editor.call(torch.gather, emitter.visual, 1, index)
    wanted = (rank - 2, rank - 1) if samples is None else (samples.axis, rank - 2, rank - 1)

    def spread(sizes: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        bias = sizes.log()[:, None] * (~visual)[:, :, None]
        if samples is None:
            bias = bias[0]
        elif samples.each > 1:
            bias = samples.spread(bias.flatten(1)).unflatten(1, bias.shape[1:])
        return bias[tuple(slice(None) if i in wanted else None for i in range(rank))].to(dtype)

    return editor.inline(spread, sizes, visual)
