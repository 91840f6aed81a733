"""What kept visual tokens take over of dropped ones, and writing it into the graph (``Stage.merge="clusters"``).

Every dropped token i is assigned to the kept token s that is most like it where the stage chooses (by the cosine of their
differences from the sample's mean visual token), within its own picture where that has a kept one. n_s counts what s stands
for, itself included and over several stages. Then

1. at the drop, ``H_s += sum_i w_i (X_i - X_s)``, with X the residual stream that enters the last layer that all rows run
   through (behind what is done to the embeddings in front of the first layer), and ``w_i = BETA n_i / (n_s' + BETA sum n_i)``,
   n_i and n_s' being what these stood for before;
2. in the layers behind, ``log n_s`` is added to the logits of key s for the queries of text rows, in the prefill alone;
3. cached values of the layers in front are mixed as in 1, and all shifted alike so that their mean over kept visual tokens
   is that over all: what decode steps pool over the cache is then what it would have been.

1 with differences needs no row that would not run without it; mixing the states at the drop themselves is as accurate
(docs/merging.md) and needs the dropped rows in a whole layer more. After the "attention logit collapse" of ERA
(arXiv 2606.31982), which adds log n as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.fx import Node

from parvts_fx.analysis.samples import Samples, along, samples_of, stream_axis
from parvts_fx.analysis.values import value
from parvts_fx.errors import Refusal
from parvts_fx.passes.agree import agreed
from parvts_fx.passes.rows import live

if TYPE_CHECKING:
    from parvts_fx.passes.emit import Emitter
    from parvts_fx.passes.plan import Merging

BETA = 0.3
"""How much a dropped token weighs in the mixture, against 1 for the kept one."""


def clusters(
    hidden: torch.Tensor, visual: torch.Tensor, kept: torch.Tensor, pictures: torch.Tensor, sizes: torch.Tensor,
    count: int, subjects: int,
) -> dict[str, torch.Tensor]:
    """Assign the dropped tokens of every sample to kept ones.

    Args:
        hidden: [batch, rows, hidden], what enters the layer where the stage chooses.
        visual: [batch, rows] bool, with ``count`` true entries per sample.
        kept: [batch, rows that stay] int64: their places among the rows, ascending; ``subjects`` of them are visual.
        pictures: [batch, rows] int64: which picture a visual row belongs to.
        sizes: [batch, rows] float: how many tokens each stands for so far.

    Returns:
        "visual" [batch, count] int64, places of visual rows; "slots" [batch, rows that stay] int64, which of the subject
        rows each is (0 for text), and "is_text" bool; [batch, subjects, count] float32: "steps", what the mixture adds to
        each subject row, and "values", the mixture and the shift; "sizes" [batch, rows that stay] float32.
    """
    places = torch.sort(visual.int(), dim=1, descending=True, stable=True).indices[:, :count]
    is_text = ~visual.gather(1, kept)
    subject = kept.gather(1, torch.sort(is_text.int(), dim=1, stable=True).indices[:, :subjects])
    tokens = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2])).float()
    direction = F.normalize(tokens - tokens.mean(1, keepdim=True), dim=-1)
    own = places[:, :, None] == subject[:, None]
    chosen = direction.gather(1, own.int().argmax(1)[..., None].expand(-1, -1, direction.shape[2]))
    likeness = direction @ chosen.transpose(1, 2)
    near = pictures.gather(1, places)[:, :, None] == pictures.gather(1, subject)[:, None]
    likeness = torch.where(near | ~near.any(2, keepdim=True), likeness, -torch.inf)
    nearest = likeness.argmax(2)[..., None] == torch.arange(own.shape[2], device=own.device)
    members = torch.where(own.any(2, keepdim=True), own, nearest)
    stands_for = members * sizes.gather(1, places)[..., None]
    shares = stands_for * torch.where(own, 1.0, BETA)
    mixture = (shares / shares.sum(1, keepdim=True)).transpose(1, 2)
    slots = torch.where(is_text, 0, (~is_text).long().cumsum(1) - 1)
    return {
        "visual": places, "slots": slots, "is_text": is_text, "steps": mixture - own.transpose(1, 2).float(),
        "values": mixture - mixture.mean(1, keepdim=True) + 1 / places.shape[1],
        "sizes": torch.where(is_text, 1.0, stands_for.sum(1).gather(1, slots)),
    }


def taken_over(
    rows: torch.Tensor, weights: torch.Tensor, visual: torch.Tensor, axis: int, samples: Samples | None
) -> torch.Tensor:
    """``weights`` times the visual rows of a tensor: [entries of the samples' axis, subjects, the other axes flattened] float32.

    Args:
        rows: any shape, with the rows of a stage along ``axis`` and the samples where ``samples`` says.
        weights: [batch, subjects, count].
        visual: [batch, count] int64, places of the visual rows.
    """
    shape = [visual.shape[1] if i == axis else rows.shape[i] for i in range(rows.dim())]
    picked = rows.gather(axis, along(visual, samples, axis, rows.dim()).expand(shape)).float()
    if samples is None:
        picked, own = picked.movedim(axis, 0)[None], weights
    else:
        picked = picked.movedim((samples.axis, axis), (0, 1))
        own = samples.spread(weights.flatten(1)).unflatten(1, weights.shape[1:])
    return own @ picked.reshape(*picked.shape[:2], -1)


def spread_over(
    mixed: torch.Tensor, like: torch.Tensor, slots: torch.Tensor, axis: int, samples: Samples | None
) -> torch.Tensor:
    """What :func:`taken_over` gives, laid out as ``like`` is: for each of its rows the subject row that ``slots`` names."""
    rest = [size for i, size in enumerate(like.shape) if i != axis and (samples is None or i != samples.axis)]
    mixed = mixed.reshape(*mixed.shape[:2], *rest)
    mixed = mixed[0].movedim(0, axis) if samples is None else mixed.movedim((0, 1), (samples.axis, axis))
    return mixed.gather(axis, along(slots, samples, axis, like.dim()).expand(like.shape))


def choose_clusters(emitter: Emitter, merging: Merging, hidden: Node, visual: Node, places: Node) -> None:
    """Write a stage's assignment, where it has chosen."""
    editor, number = emitter.editor, merging.stage.number
    parts, sizes = emitter.partitions[number], emitter.sizes.get(number)

    def assign(
        hidden: torch.Tensor, visual: torch.Tensor, kept: torch.Tensor, places: torch.Tensor, texts: torch.Tensor,
        *sizes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        count, subjects = visual.shape[1] - texts.shape[1], kept.shape[1] - texts.shape[1]
        known = sizes[0] if sizes else torch.ones_like(visual, dtype=torch.float32)
        return clusters(hidden, visual, kept, places[..., 0], known, count, subjects)

    given = [hidden, visual, parts["subject"], places, parts["text"], *([] if sizes is None else [sizes])]
    emitter.clusters[number] = {
        name: agreed(emitter, held) if value(held).is_floating_point() else held
        for name, held in editor.inline(assign, *given).items()}


def note_sizes(emitter: Emitter, number: int) -> None:
    """How many tokens each row stands for that is left behind a stage; nothing where no stage has merged."""
    if number in emitter.clusters:
        emitter.sizes[number + 1] = emitter.clusters[number]["sizes"]
    elif number in emitter.sizes:
        places = emitter.sets.places(live(number + 1), live(number))
        emitter.sizes[number + 1] = emitter.editor.call(torch.gather, emitter.sizes[number], 1, places)


def mix(emitter: Emitter, merging: Merging) -> None:
    """What kept rows take over of the residual stream where all rows run for the last time."""
    number, source = merging.stage.number, merging.source
    axis, samples = stream_axis(emitter.decoder, source), samples_of(emitter.decoder, source)
    parts = emitter.clusters[number]
    emitter.mixed[number] = emitter.editor.inline(
        lambda rows, weights, visual: taken_over(rows, weights, visual, axis, samples),
        emitter.main.read(source, live(number)), parts["steps"], parts["visual"])


def take_over(emitter: Emitter, merging: Merging) -> None:
    """At the drop, the kept rows with what they take over."""
    number, drop = merging.stage.number, merging.drop
    assert drop is not None, "only where layers follow"
    axis, samples = stream_axis(emitter.decoder, drop), samples_of(emitter.decoder, drop)
    there = samples_of(emitter.decoder, merging.source)
    if samples is not None and there is not None and (samples.each, samples.inner) != (there.each, there.inner):
        raise Refusal("the residual stream folds its samples otherwise where dropped tokens are merged", drop)
    parts, name = emitter.clusters[number], live(number + 1)

    def add(rows: torch.Tensor, mixed: torch.Tensor, slots: torch.Tensor, is_text: torch.Tensor) -> torch.Tensor:
        taken = rows.float() + spread_over(mixed, rows, slots, axis, samples)
        return torch.where(along(is_text, samples, axis, rows.dim()), rows, taken.to(rows.dtype))

    taken = emitter.editor.inline(
        add, emitter.main.read(drop, name), emitter.mixed[number], parts["slots"], parts["is_text"])
    wider = {other: held for other, held in emitter.main.held[drop].items() if not emitter.sets.is_within(other, name)}
    emitter.main.held[drop] = {**wider, name: taken}


def cached_values(emitter: Emitter, node: Node) -> Node:
    """A layer's values for the rows that are left in the end, mixed by every stage that merges behind the layer."""
    plan, editor = emitter.plan, emitter.editor
    axis, samples, start = stream_axis(emitter.decoder, node), samples_of(emitter.decoder, node), plan.live[node]
    rank, held = value(node).dim(), emitter.main.read(node, live(start))

    def shorten(
        rows: torch.Tensor, weights: torch.Tensor, visual: torch.Tensor, kept: torch.Tensor, slots: torch.Tensor,
        is_text: torch.Tensor,
    ) -> torch.Tensor:
        shape = [kept.shape[1] if i == axis else rows.shape[i] for i in range(rank)]
        stays = rows.gather(axis, along(kept, samples, axis, rank).expand(shape))
        mixed = spread_over(taken_over(rows, weights, visual, axis, samples), stays, slots, axis, samples)
        return torch.where(along(is_text, samples, axis, rank), stays, mixed.to(rows.dtype))

    for level in range(start, plan.final):
        if level in plan.mergings:
            parts = emitter.clusters[level]
            held = editor.inline(shorten, held, parts["values"], parts["visual"], emitter.partitions[level]["subject"],
                                 parts["slots"], parts["is_text"])
        else:
            held = emitter.sets.take(held, axis, live(level + 1), live(level), samples)
    return held
