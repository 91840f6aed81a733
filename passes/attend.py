"""Writes attention calls for some queries and some keys."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from parvts_fx.analysis.attention import KEY, QUERY
from parvts_fx.analysis.calls import fused_arguments, is_fused_attention
from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.samples import Samples, along, samples_of, samples_of_side
from parvts_fx.analysis.tokens import AtMost, AxisLabels, Computed, Count
from parvts_fx.analysis.values import leaves, value, with_leaves
from parvts_fx.passes.paths import Path
from parvts_fx.passes.rows import TEXT, gather, live, non_subject
from parvts_fx.passes.token_counts import biased, counted, levels_of


def write_attention(path: Path, attention: Attention) -> None:
    """An attention call on the rows that the plan gives its output; by group where the plan asks for it."""
    emitter, output = path.emitter, attention.output
    plan, name = emitter.plan, path.rows(output)
    stage = plan.groups.get(output) if path.outer is None else None
    if stage is None:
        result = attend(path, attention, name, path.rows_left(output))
    else:
        everything, subject = live(stage), live(stage + 1)
        text = (TEXT, everything)
        if name == everything:
            result = _joined(path, attention, stage, name, [(subject, subject), (non_subject(stage),) * 2, text])
        elif name == subject:
            result = _joined(path, attention, stage, name, [(subject, subject), text])
        else:
            result = _chosen(path, attention, stage, name)
    path.held[output] = {name: result}


def _joined(path: Path, attention: Attention, stage: int, name: str, calls: list[tuple[str, str]]) -> Node:
    """Every row's result from the call of its own group."""
    emitter, axis = path.emitter, attention.output_axis
    joined = emitter.editor.call(torch.cat, [attend(path, attention, *call) for call in calls], dim=axis)
    slots = emitter.partitions[stage]["slots" if len(calls) == 3 else "subject_slots"]
    samples = samples_of(emitter.decoder, attention.output)
    return gather(emitter.editor, joined, axis, slots, emitter.sets[name].count, samples)


def _chosen(path: Path, attention: Attention, stage: int, name: str) -> Node:
    """For few rows of the subject path: text rows ask all rows, rows of the subject group ask the subject path's."""
    emitter, axis = path.emitter, attention.output_axis
    everything, subject = attend(path, attention, name, live(stage)), attend(path, attention, name, live(stage + 1))
    samples, rank = samples_of(emitter.decoder, attention.output), value(attention.output).dim()
    places = emitter.sets.places(name, live(stage + 1))

    def choose(
        everything: torch.Tensor, subject: torch.Tensor, is_text: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        return torch.where(along(is_text.gather(1, places), samples, axis, rank), everything, subject)

    return emitter.editor.inline(choose, everything, subject, emitter.partitions[stage]["is_text"], places)


def attend(path: Path, attention: Attention, queries: str, keys: str) -> Node:
    """Write an attention call for some queries and some keys; returns its output."""
    if len(attention.nodes) == 1:
        result = _attend_fused(path, attention, queries, keys)
    else:
        result = _write_out(path, attention, queries, keys, attention.output)
    path.emitter.note_call(attention, queries, keys, result)
    return result


def _write_out(path: Path, attention: Attention, queries: str, keys: str, result: Node) -> Node:
    """The call's own nodes as far as the result."""
    emitter, choice = path.emitter, {QUERY: queries, KEY: keys}
    editor, sets, decoder = emitter.editor, emitter.sets, emitter.decoder
    new: dict[Node, Any] = {operand.node: path.read(operand.node, queries) for operand in attention.queries}
    for operand in attention.keys:
        new[operand.node] = path.keys(operand.node, operand.axis, keys)
    for node in attention.nodes[:attention.nodes.index(result) + 1]:
        bindings = attention.bindings[node]
        fresh = []
        for index, leaf in enumerate(leaves(node)):
            binding = bindings.get(index)
            if isinstance(leaf, Node) and leaf in new:
                leaf = new[leaf]
            elif isinstance(binding, Count):
                leaf = path.recounted(leaf, binding, choice[binding.label])
            elif isinstance(binding, Computed):
                leaf = path.resized(leaf, choice[binding.label])
            elif isinstance(binding, AtMost):
                leaf = editor.least(emitter.mapped(leaf), sets[choice[binding.label]].count)
            elif isinstance(binding, AxisLabels):
                samples = samples_of_side(decoder, leaf, node, index, node)
                axes = [(axis, choice[label]) for axis, label in binding.axes]
                leaf = path.cut_side(leaf, axes, samples, path.rows_left(attention.output))
            elif isinstance(leaf, Node) and leaf in emitter.inside:
                leaf = path.read(leaf, keys)
            else:
                leaf = emitter.mapped(leaf)
            fresh.append(leaf)
        counts = emitter.sizes and node is attention.heart
        read = counted(emitter, attention.output, node, fresh, queries, keys) if counts else with_leaves(node, fresh)
        new[node] = editor.copy(node, *read)
    return new[result]


def _fused_operands(path: Path, attention: Attention, queries: str, keys: str) -> dict[str, Any]:
    """The arguments of a fused call by name, for some queries and some keys."""
    (node,) = attention.nodes
    emitter, named = path.emitter, fused_arguments(node)
    (query,), (key, val) = attention.queries, attention.keys
    weighed = bool(levels_of(emitter, attention.output, keys))
    if named["is_causal"] and queries != keys:
        samples = samples_of(emitter.decoder, query.node)
        mask = emitter.sets.causal_mask(queries, keys, value(query.node).dim(), samples)
        named.update(
            is_causal=False, attn_mask=mask if weighed else emitter.sets.added(mask, value(query.node).dtype))
    elif named["attn_mask"] is not None:
        ((index, binding),) = attention.bindings[node].items()
        assert isinstance(binding, AxisLabels), "a fused call's mask has axes, and nothing else of it is bound"
        samples = samples_of_side(emitter.decoder, named["attn_mask"], node, index, query.node)
        axes = [(axis, queries if label == QUERY else keys) for axis, label in binding.axes]
        named["attn_mask"] = path.cut_side(named["attn_mask"], axes, samples, path.rows_left(node))
    named["scale"] = emitter.mapped(named["scale"])
    named["query"] = path.read(query.node, queries)
    named["key"], named["value"] = (path.keys(operand.node, operand.axis, keys) for operand in (key, val))
    if weighed:
        rank, samples = value(query.node).dim(), samples_of(emitter.decoder, query.node)
        mask = emitter.sets.causal_mask(queries, keys, rank, samples) if named["is_causal"] else named["attn_mask"]
        bias = biased(emitter, attention.output, queries, keys, mask, rank, samples, named["query"])
        if bias is not mask:
            named |= {"attn_mask": bias, "is_causal": False}
    return named


def _attend_fused(path: Path, attention: Attention, queries: str, keys: str) -> Node:
    named = _fused_operands(path, attention, queries, keys)
    operands = [named.pop(name) for name in ("query", "key", "value")]
    return path.emitter.editor.call(F.scaled_dot_product_attention, *operands, **named)


def attention_weights(path: Path, attention: Attention, queries: str, keys: str) -> Node:
    """[batch, heads, queries, keys] float32: how much some rows look at others; rows that see nothing have zeros."""
    weights = _all_weights(path, attention, queries, keys)
    heart = attention.heart
    alone = is_fused_attention(heart) or all(kind.is_plain for kind in path.emitter.decoder.tokens.axes[heart].values())
    if alone and not attention.on_filled_cache:
        return weights
    editor, count = path.emitter.editor, path.emitter.sets[keys].count
    own = slice(None, count) if attention.others_behind else slice(editor.plus(editor.size(weights, 3), count, -1), None)
    return editor.call(operator.getitem, weights, (slice(None), slice(None), slice(None), own))


def _all_weights(path: Path, attention: Attention, queries: str, keys: str) -> Node:
    """The same, and how much they look at what else there is: cached rows in front of these, sinks behind them."""
    emitter = path.emitter
    heart = attention.heart
    if is_fused_attention(heart):
        query = fused_arguments(heart)["query"]
        samples = samples_of(emitter.decoder, query)
        if len(attention.nodes) == 1:
            named = _fused_operands(path, attention, queries, keys)
            mask = named["attn_mask"]
        else:
            named = fused_arguments(heart)
            named["scale"] = emitter.mapped(named["scale"])
            key, asked = named["key"], path.read(query, queries)
            named |= {"query": asked, "key": (
                _write_out(path, attention, queries, keys, key) if key in attention.nodes else path.read(key, keys))}
            mask = _mask_of(path, attention, heart, queries, keys)
            if emitter.sizes:
                columns = emitter.editor.size(named["key"], value(key).dim() - 2) if attention.on_filled_cache else None
                mask = biased(emitter, attention.output, queries, keys, mask, value(query).dim(), samples, asked, columns)
        scale, causal = named["scale"], named["is_causal"]
        if isinstance(scale, Node):  # an input, where Dynamo takes every number for one
            asked = emitter.editor.method("float", named["query"])
            named["query"], scale = emitter.editor.call(torch.mul, asked, scale), 1.0

        def weigh(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return _by_head(_weights(query, key, mask, scale, causal), samples)

        return emitter.editor.inline(weigh, named["query"], named["key"], *([] if mask is None else [mask]))
    samples = samples_of(emitter.decoder, heart)
    weights = _write_out(path, attention, queries, keys, heart)
    return emitter.editor.inline(lambda given: _by_head(given.float().nan_to_num(), samples), weights)


def _mask_of(path: Path, attention: Attention, call: Node, queries: str, keys: str) -> Node | None:
    """The mask of a fused call that is one of several nodes, for some queries and some keys."""
    emitter, mask = path.emitter, fused_arguments(call)["attn_mask"]
    if mask is None or mask in attention.nodes:
        return mask and _write_out(path, attention, queries, keys, mask)
    index = next(index for index, leaf in enumerate(leaves(call)) if leaf is mask)
    binding = attention.bindings[call].get(index)
    assert isinstance(binding, AxisLabels), "a mask has axes along queries or keys"
    axes = [(axis, queries if label == QUERY else keys) for axis, label in binding.axes]
    return path.cut_side(mask, axes, samples_of_side(emitter.decoder, mask, call, index, call), path.rows_left(attention.output))


def _weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float | None, is_causal: bool
) -> torch.Tensor:
    if query.dim() > 3 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query.float() @ key.float().transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return torch.softmax(scores, -1).nan_to_num()


def _by_head(weights: torch.Tensor, samples: Samples | None) -> torch.Tensor:
    """[..., queries, keys] with the samples along some axis, to [batch, heads, queries, keys]."""
    if samples is None:
        return weights.reshape(1, -1, *weights.shape[-2:])
    weights = weights.movedim(samples.axis, 0)
    batch, outer = weights.shape[0] // samples.each, samples.each // samples.inner
    weights = weights.reshape(outer, batch, samples.inner, *weights.shape[1:]).movedim(1, 0)
    return weights.reshape(batch, -1, *weights.shape[-2:])
