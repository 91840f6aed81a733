"""The non-subject path's own copy of some layers (constant weights), and where it joins the subject path."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from parvts_fx.analysis.masks import Mask
from parvts_fx.analysis.samples import along, samples_of, stream_axis
from parvts_fx.analysis.values import changed_in_place, is_tensor, storage_of, value
from parvts_fx.passes.paths import Path
from parvts_fx.passes.plan import Twin
from parvts_fx.passes.rows import TEXT, RowSet, behind, live, non_subject

if TYPE_CHECKING:
    from parvts_fx.passes.emit import Emitter


class TwinPath(Path):
    """Path B in the layers in which it has its own text rows.

    Where it shares the text in front with path A, it runs on the rows behind, and each attention call takes the keys and
    values in front from path A.
    """

    def __init__(self, emitter: Emitter, twin: Twin, main: Path):
        self.twin = twin
        number = twin.stage.number
        self.all_rows, self.text_rows = non_subject(number), TEXT
        written = {storage_of(target) for node in twin.nodes if (target := changed_in_place(node)) is not None}
        buffers = {node for node in emitter.fresh if is_tensor(node) and storage_of(node) in written}
        super().__init__(
            emitter, buffers.union(twin.nodes),
            lambda node: self.text_rows if node in twin.text_alone else self.all_rows,
            lambda node: non_subject(number), main)
        self.shared: Node | None = None
        """int: how many leading rows path A computes for both, known when the graph runs."""

        self.joining: dict[str, Node] = {}
        """What the join reads: see :func:`parvts_fx.passes.insert_partition.partition`."""

    def keys(self, node: Node, axis: int, name: str) -> Node:
        if self.shared is None or node not in self.nodes or name != non_subject(self.twin.stage.number):
            return super().keys(node, axis, name)
        editor, own = self.emitter.editor, self.read(node, self.all_rows)
        theirs = self.emitter.main.read(node, live(self.twin.stage.number + 1))
        return editor.call(torch.cat, [editor.call(torch.narrow, theirs, axis, 0, self.shared), own], dim=axis)


def join(path: TwinPath) -> None:
    """Merge the text rows of both paths; the subject rows, and text that path A computes for both, stay."""
    emitter, end, name = path.emitter, path.twin.end, live(path.twin.stage.number + 1)
    weight, axis = path.twin.stage.stage.weight, stream_axis(emitter.decoder, end)
    samples, rank = samples_of(emitter.decoder, end), value(end).dim()
    text_alone = path.rows(end) == path.text_rows
    other = path.read(end, path.text_rows if text_alone else path.all_rows)

    def fuse(a: torch.Tensor, b: torch.Tensor, is_text: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
        partner = b.gather(axis, along(partners, samples, axis, rank).expand(a.shape))
        return torch.where(along(is_text, samples, axis, rank), weight * a + (1 - weight) * partner, a)

    parts = path.joining or emitter.partitions[path.twin.stage.number]
    joined = emitter.editor.inline(
        fuse, emitter.main.read(end, name), other, parts["is_text"], parts["text_partners" if text_alone else "partners"])
    emitter.main.held[end] = {name: joined}


def share_prefix(path: TwinPath) -> None:
    """Count the leading rows that path A computes for both, and leave them out of path B."""
    if path.twin.prefix is None:
        return
    emitter, parts = path.emitter, path.emitter.partitions[path.twin.stage.number]
    editor, sets = emitter.editor, emitter.sets
    calls = path.twin.prefix
    masks = list(dict.fromkeys(mask for call in calls for mask in call))

    def measure(text: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        held = dict(zip(masks, values))
        count = leading(text)
        apart = torch.ones((), dtype=torch.bool, device=text.device)
        for call in calls:
            if call:
                front = torch.arange(held[call[0]].shape[call[0].key_axis], device=text.device) < count
                apart = apart & see_themselves_alone([(mask, held[mask]) for mask in call], front)
        return torch.where(apart, count, 0)

    def behind_it(
        count: torch.Tensor, is_text: torch.Tensor, partners: torch.Tensor, text_partners: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return (is_text & (text_partners >= count), (partners - count).clamp(min=0), (text_partners - count).clamp(min=0))

    counted = editor.inline(measure, sets[TEXT].index, *(emitter.mapped(mask.node) for mask in masks))
    names = ("is_text", "partners", "text_partners")
    path.joining = dict(zip(names, editor.inline(behind_it, counted, *(parts[name] for name in names))))
    shapes = editor.mode.shape_env
    assert shapes is not None, "only a graph that may hold data shares a prefix"
    with shapes.ignore_fresh_unbacked_symbols():  # the lowering's own tracing binds its own
        path.shared = editor.method("item", counted)
    emitter.kept.add(editor.check(editor.call(operator.ge, path.shared, 0)))
    path.all_rows = _without_front(path, path.all_rows)
    path.text_rows = _without_front(path, TEXT, path.all_rows)
    text = editor.call(operator.sub, _narrowed(path, parts["text_in_non_subject"], path.text_rows), counted)
    sets.note_places(path.text_rows, path.all_rows, text)


def _narrowed(path: TwinPath, index: Node, name: str) -> Node:
    return path.emitter.editor.call(torch.narrow, index, 1, path.shared, path.emitter.sets[name].count)


def _without_front(path: TwinPath, name: str, within: str | None = None) -> str:
    """A set of rows without the leading ones; returns its name."""
    editor, sets, number = path.emitter.editor, path.emitter.sets, path.twin.stage.number
    size = editor.plus(sets[name].count, path.shared, -1)
    for comparison, bound in ((operator.ge, 1), (operator.ne, 0)):  # the first does not tell that of every size
        path.emitter.kept.add(editor.check(editor.call(comparison, size, bound)))
    new = behind(f"{name} of stage {number}" if name == TEXT else name)
    index = editor.call(torch.narrow, sets[name].index, 1, path.shared, size)
    larger = [name, non_subject(number), *(live(level) for level in range(number + 1))]
    sets.add(RowSet(new, index, size), [*larger, *([within] if within else [])])
    return new


def leading(text: torch.Tensor) -> torch.Tensor:
    """[] int64: how many positions are text in every sample before any is not; at least one text row stays behind.
    ``text``: [batch, texts] positions, ascending."""
    return (text[:, :-1] == torch.arange(text.shape[1] - 1, device=text.device)).all(0).sum()


def see_themselves_alone(masks: Sequence[tuple[Mask, torch.Tensor]], front: torch.Tensor) -> torch.Tensor:
    """Whether no row in front sees a key behind, and every one sees its own. ``front``: [seq] bool."""
    ahead = front[:, None] & ~front
    hidden = torch.zeros_like(front)
    for mask, values in masks:
        forbidden = mask.forbidden(values)
        if mask.query_axis is None:
            forbidden = forbidden.movedim(mask.key_axis, -1).unsqueeze(-2)
        else:
            forbidden = forbidden.movedim((mask.query_axis, mask.key_axis), (-2, -1))
        ahead = ahead & ~forbidden.reshape(-1, *forbidden.shape[-2:]).all(0)
        own = mask.forbidden_to_themselves(values)
        hidden = hidden | own.reshape(-1, own.shape[-1]).any(0)
    return ~ahead.any() & ~(hidden & front).any()
