"""Writes a stage's choice: scores, a stable sort, and the rows of each path."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from parvts_fx.analysis.merge import flatten_mask
from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.samples import samples_of, stream_axis
from parvts_fx.analysis.tower import trace_attended
from parvts_fx.analysis.values import value
from parvts_fx.errors import Refusal
from parvts_fx.passes.agree import agreed
from parvts_fx.passes.attend import attention_weights
from parvts_fx.passes.clusters import choose_clusters, note_sizes
from parvts_fx.passes.insert_partition import partition
from parvts_fx.passes.look_ahead import look_ahead
from parvts_fx.passes.plan import Choice
from parvts_fx.passes.rows import LAST, TEXT, RowSet, live, non_subject
from parvts_fx.passes.trace_rule import trace_rule
from parvts_fx.places import places_of
from parvts_fx.scores import ATTENDED, asks_all_text, reads_places
from parvts_fx.stages import counts_left

if TYPE_CHECKING:
    from parvts_fx.passes.emit import Emitter

_ASKED = "last text row"


def choose(emitter: Emitter, choice: Choice) -> None:
    """Write one choice, and lay out the rows that follow from it."""
    editor, stage = emitter.editor, choice.stage
    here = live(stage.number)
    visual = _visual(emitter, here)
    attention = None if choice.attention is None else _attention(emitter, choice, choice.attention, here, visual)
    if choice.ahead:
        attention = look_ahead(emitter, choice, _asked(emitter, choice, here, visual), here)
        attention = _behind_visual(emitter, attention, here, visual)
    hidden = _hidden(emitter, choice.link, here) if choice.reads_link else None
    if stage.stage.rule == ATTENDED:
        scores = _attended_in_tower(emitter, here)
    else:
        places = _places(emitter, here) if reads_places(stage.stage.rule) else None
        scores = trace_rule(emitter, stage, hidden, visual, attention, places)
    scores = agreed(emitter, scores)
    merged, features = _sizes(emitter)
    count, stages = emitter.decoder.merge.count, [placed.stage for placed in emitter.plan.stages[:stage.number + 1]]

    def split(
        prompt: torch.Tensor, scores: torch.Tensor, visual: torch.Tensor, *features: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        *_, left, kept = counts_left(stages, _visuals(prompt, features, count))
        return partition(scores, visual, kept, left)

    tensors = editor.inline(split, merged, scores, visual, *features)
    emitter.partitions[stage.number] = tensors
    _lay_out(emitter, stage.number, tensors)
    if stage.number in emitter.plan.mergings:
        assert hidden is not None, "a stage that merges reads the residual stream"
        choose_clusters(emitter, emitter.plan.mergings[stage.number], hidden, visual, _places(emitter, here))
    note_sizes(emitter, stage.number)


def _sizes(emitter: Emitter) -> tuple[Node, list[Node]]:
    """What tells how many rows a sample has: the merged embeddings [batch, seq, hidden], and the features where they do."""
    merge = emitter.decoder.merge
    features = [emitter.mapped(node) for node in merge.features] if merge.count is None else []
    return emitter.main.held[merge.output][live(0)], features


def _visuals(prompt: torch.Tensor, features: Sequence[torch.Tensor], count: int | None) -> int:
    """Visual tokens of a sample; a torch.SymInt that the tracing follows where sizes are symbolic."""
    if count is not None:
        return count
    return sum(feature.numel() // prompt.shape[2] for feature in features) // prompt.shape[0]


def _hidden(emitter: Emitter, link: Node, here: str) -> Node:
    """The residual stream as [batch, rows, hidden], however the model lays it out."""
    held, axis = emitter.main.read(link, here), stream_axis(emitter.decoder, link)
    samples = samples_of(emitter.decoder, link)
    if samples is not None and samples.each > 1:
        raise Refusal("the rows of all samples lie along one axis where tokens are chosen", link)
    if samples is None and (axis, value(link).dim()) == (1, 3) or samples is not None and (samples.axis, axis) == (0, 1):
        return held

    def ordered(stream: torch.Tensor) -> torch.Tensor:
        if samples is None:
            return stream.movedim(axis, 0).flatten(1)[None]
        return stream.movedim((samples.axis, axis), (0, 1)).flatten(2)

    return emitter.editor.inline(ordered, held)


def _attended_in_tower(emitter: Emitter, here: str) -> Node:
    scores = trace_attended(emitter.editor, emitter.decoder.merge, emitter.mapped, emitter.visual)
    index = emitter.sets[here].index
    return scores if index is None else emitter.editor.call(torch.gather, scores, 1, index)


def _visual(emitter: Emitter, here: str) -> Node:
    """[batch, rows] bool: which of the rows that are left are visual."""
    editor, sets = emitter.editor, emitter.sets
    if emitter.visual is None:
        masks = [emitter.any(mask) for mask in emitter.decoder.merge.masks]
        merged = emitter.main.held[emitter.decoder.merge.output][live(0)]

        def union(prompt: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
            visual = flatten_mask(masks[0])
            for mask in masks[1:]:
                visual = visual | flatten_mask(mask)
            return visual.expand(prompt.shape[0], -1)

        emitter.visual = editor.inline(union, merged, *masks)
    if sets[here].index is None:
        return emitter.visual
    return editor.call(torch.gather, emitter.visual, 1, sets[here].index)


def _places(emitter: Emitter, here: str) -> Node:
    """[batch, rows, 3] int64: where in its picture each of the rows that are left stands."""
    editor, index = emitter.editor, emitter.sets[here].index
    assert emitter.visual is not None, "a choice has needed it"
    if emitter.places is None:
        grid = emitter.decoder.grid
        known = [] if grid is None else [emitter.mapped(grid)]
        emitter.places = editor.inline(lambda visual, *known: places_of(visual, *known), emitter.visual, *known)
    if index is None:
        return emitter.places
    return editor.inline(lambda places, rows: places.gather(1, rows[..., None].expand(-1, -1, 3)), emitter.places, index)


def _lay_out(emitter: Emitter, number: int, tensors: dict[str, Node]) -> None:
    """Name the rows that follow from a choice, as positions of the prompt."""
    editor, sets, here = emitter.editor, emitter.sets, live(number)

    def positions(name: str) -> Node:
        places = tensors[name]
        return places if sets[here].index is None else editor.call(torch.gather, sets[here].index, 1, places)

    larger = [live(level) for level in range(number + 1)]
    subject, other = live(number + 1), non_subject(number)
    for name, key in ((subject, "subject"), (other, "non_subject")):
        sets.add(RowSet(name, positions(key), editor.size(tensors[key], 1)), larger)
        sets.note_places(name, here, tensors[key])
    if TEXT not in sets:
        sets.add(RowSet(TEXT, tensors["text"], editor.size(tensors["text"], 1)), [])
    sets.add(sets[TEXT], [*larger, subject, other])
    for other_name, key in ((here, "text"), (subject, "text_in_subject"), (other, "text_in_non_subject")):
        sets.note_places(TEXT, other_name, tensors[key])
    plan = emitter.plan
    if number + 1 == plan.final and plan.take is not None:
        index = editor.call(operator.getitem, sets[subject].index, (slice(None), slice(-plan.take_count, None)))
        sets.add(RowSet(LAST, index, plan.take_count), [*larger, subject])


def _attention(emitter: Emitter, choice: Choice, attention: Attention, here: str, visual: Node) -> Node:
    """[batch, heads, rows that are asked, rows that are left] float32.

    Of the text rows those in front of the first visual one, which may be padding, have zeros.
    """
    editor, sets = emitter.editor, emitter.sets
    asked, keys = _asked(emitter, choice, here, visual), live(emitter.plan.live.get(attention.output, 0))
    weights = attention_weights(emitter.main, attention, asked, keys)
    if keys != here:
        def columns(weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            return weights.gather(3, places[:, None, None, :].expand(-1, *weights.shape[1:3], -1))

        weights = editor.inline(columns, weights, sets.places(here, keys))
    return weights if asked == _ASKED else _behind_visual(emitter, weights, here, visual)


def _asked(emitter: Emitter, choice: Choice, here: str, visual: Node) -> str:
    """The name of the text rows whose attention a rule reads: the last one, or all."""
    editor, sets = emitter.editor, emitter.sets
    if TEXT not in sets:
        text = _text_places(emitter, visual)
        sets.add(RowSet(TEXT, text, editor.size(text, 1)), [live(0)])
    all_text = bool(choice.ahead) or asks_all_text(choice.stage.stage.rule)
    if not all_text and _ASKED not in sets:
        index = editor.call(operator.getitem, sets[TEXT].index, (slice(None), slice(-1, None)))
        sets.add(RowSet(_ASKED, index, 1), [])
    asked = TEXT if all_text else _ASKED
    sets.add(sets[asked], [live(level) for level in range(choice.stage.number + 1)])
    return asked


def _behind_visual(emitter: Emitter, weights: Node, here: str, visual: Node) -> Node:
    """[batch, any, text rows, rows], with zeros for the text rows in front of the first visual one."""
    def behind_visual(weights: torch.Tensor, visual: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return torch.where((visual.cumsum(1) > 0).gather(1, text)[:, None, :, None], weights, 0.0)

    return emitter.editor.inline(behind_visual, weights, visual, emitter.sets.places(TEXT, here))


def _text_places(emitter: Emitter, visual: Node) -> Node:
    """[batch, texts]: where the text stands in the prompt."""
    merged, features = _sizes(emitter)
    count = emitter.decoder.merge.count

    def places(visual: torch.Tensor, prompt: torch.Tensor, *features: torch.Tensor) -> torch.Tensor:
        texts = prompt.shape[1] - _visuals(prompt, features, count)
        return torch.sort((~visual).int(), dim=1, descending=True, stable=True).indices[:, :texts]

    return emitter.editor.inline(places, visual, merged, *features)
