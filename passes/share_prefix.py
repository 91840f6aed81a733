"""Find the text in front of every image, which both paths would compute alike (constant fusion weights)."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.fx import Node

from parvts_fx.analysis.masks import Mask, masks_of
from parvts_fx.analysis.values import ancestors, changed_in_place, hint, is_tensor, needed_for, value
from parvts_fx.passes.base import PassResult, Prefix, State
from parvts_fx.passes.editing import Rows


@dataclasses.dataclass(frozen=True)
class SharePrefix:
    """Count the leading rows whose results the non-subject path may read from the subject path.

    ``layers(h0[A])``, ``layers(h0[B])``  ==>  the second on B's rows behind the prefix alone, with A's keys in front

    These are the positions in front of the first visual token of any sample, if none of them sees a later one. Both are
    data, so the count is read from the tensors at each call: zero where a mask lets the prefix look ahead, or where it
    hides a prefix row from itself (padding, whose rows may attend to anything). Leaves a graph alone in whose migration
    layers tokens meet other than by masked attention, or that may not hold numbers that depend on data: where
    torch._dynamo.config.capture_scalar_outputs is off (parvts_fx.compile switches it on), where CUDA graphs are asked for,
    and where the lowering is not known to take them.
    """

    name: ClassVar[str] = "share_prefix"

    def run(self, state: State) -> PassResult:
        graph, parts = state.module.graph, state.partition
        if not _may_hold_data(state):
            return PassResult(0, "the graph may not hold numbers that depend on data")
        needed = needed_for(graph, [state.cut])
        merge = state.decoder.merge.output
        region = [node for node in state.decoder.nodes if node in needed and node is not merge and is_tensor(node)]
        if not region or hint(value(parts.text.index).shape[1]) < 2 or any(map(changed_in_place, region)):
            return PassResult(0)
        inside = set(state.decoder.nodes)
        calls = [self._masks(mixer.attention, region[0], inside) for mixer in state.migration_mixers]
        if not calls or any(masks is None for masks in calls) or region[0] < parts.text.ready:
            return PassResult(0, "not all of these layers are masked attention")
        calls = list(dict.fromkeys(map(tuple, calls)))
        with graph.inserting_before(region[0]):
            state.prefix = self._measure(state, calls)
        return PassResult(1, "how many rows is read at each call")

    def _masks(self, attention: object, first: Node, inside: set[Node]) -> list[Mask] | None:
        """What forbids a call's rows to look ahead; None where that is not known in front of the first layer."""
        masks = [] if attention is None else masks_of(attention)
        if attention is None or not (masks or attention.is_causal):
            return None
        early = all(mask.node < first for mask in masks)
        return masks if early and not inside & ancestors(mask.node for mask in masks) else None

    def _measure(self, state: State, calls: Sequence[Sequence[Mask]]) -> Prefix:
        parts, editor = state.partition, state.editor
        masks = list(dict.fromkeys(mask for call in calls for mask in call))

        def measure(text: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            held = dict(zip(masks, values))
            count = _leading(text)
            apart = torch.ones((), dtype=torch.bool, device=text.device)
            for call in calls:
                if call:
                    front = torch.arange(held[call[0]].shape[call[0].key_axis], device=text.device) < count
                    apart = apart & _see_themselves_alone([(mask, held[mask]) for mask in call], front)
            return torch.where(apart, count, 0)

        def behind(
            count: torch.Tensor, is_text: torch.Tensor, partners: torch.Tensor, text_partners: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            return (is_text & (text_partners >= count), (partners - count).clamp(min=0), (text_partners - count).clamp(min=0))

        leading = editor.inline(measure, parts.text.index, *(mask.node for mask in masks))
        is_text, partners, text_partners = editor.inline(behind, leading, parts.is_text, parts.partners, parts.text_partners)
        with state.editor.mode.shape_env.ignore_fresh_unbacked_symbols():  # the lowering's own tracing binds its own
            count = editor.method("item", leading)
        state.keep(editor.check(editor.call(operator.ge, count, 0)))

        def skip(rows: Rows, name: str, shift: bool = False) -> Rows:
            size = editor.plus(rows.count, count, -1)
            for comparison, bound in ((operator.ge, 1), (operator.ne, 0)):  # the first does not tell that of every size
                state.keep(editor.check(editor.call(comparison, size, bound)))
            index = editor.call(torch.narrow, rows.index, 1, count, size)
            return Rows(name, editor.call(operator.sub, index, leading) if shift else index, size)

        return Prefix(
            count=count, non_subject=skip(parts.non_subject, "non_subject_behind"), text=skip(parts.text, "text_behind"),
            text_in_non_subject=skip(parts.text_in_non_subject, "text_in_non_subject_behind", shift=True),
            is_text=is_text, partners=partners, text_partners=text_partners)


def _may_hold_data(state: State) -> bool:
    shapes, options = state.editor.mode.shape_env, state.options
    captured = value(state.decoder.merge.output).device.type == "cuda" and options.mode in ("reduce-overhead", "max-autotune")
    known = callable(options.lowering) or options.lowering in ("inductor", "eager", "aot_eager")
    return shapes is not None and shapes.allow_scalar_outputs and known and not captured


def _leading(text: torch.Tensor) -> torch.Tensor:
    """[] int64: how many positions are text in every sample before any is not; at least one text row stays behind.
    ``text``: [batch, texts] positions, ascending."""
    return (text[:, :-1] == torch.arange(text.shape[1] - 1, device=text.device)).all(0).sum()


def _see_themselves_alone(masks: Sequence[tuple[Mask, torch.Tensor]], front: torch.Tensor) -> torch.Tensor:
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
