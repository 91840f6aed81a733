"""The masks of an attention call: which of its operands say which keys may be seen."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable

import torch
from torch.fx import Node

from parvts_fx.analysis.attention import KEY, QUERY
from parvts_fx.analysis.calls import is_fused_attention
from parvts_fx.analysis.records import Attention, Layer
from parvts_fx.analysis.tokens import AxisLabels
from parvts_fx.analysis.values import has_target, leaves, value

_FILLS = (torch.masked_fill, torch.ops.aten.masked_fill.Scalar)
_KEEPS = (torch.where, operator.and_, torch.logical_and)
"""Operations in which a bool mask is true where a key may be seen."""

_FORBIDS = torch.finfo(torch.float16).min / 2
"""A logit below it hides a key."""


@dataclasses.dataclass(frozen=True)
class Mask:
    """A tensor that an attention call pairs with its keys."""

    node: Node
    query_axis: int | None
    """None for a mask that is the same for all queries."""

    key_axis: int

    forbids: bool
    """Whether its true entries are those that must not be seen."""

    def forbidden(self, values: torch.Tensor) -> torch.Tensor:
        """Bool, of the same shape as the mask's values."""
        if values.dtype == torch.bool:
            return values ^ (not self.forbids)
        return values <= _FORBIDS

    def forbidden_to_themselves(self, values: torch.Tensor) -> torch.Tensor:
        """[..., seq] bool: which keys even their own rows do not see."""
        forbidden = self.forbidden(values)
        if self.query_axis is None:
            return forbidden.movedim(self.key_axis, -1)
        return forbidden.diagonal(dim1=self.query_axis, dim2=self.key_axis)

    def seen(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., seq] bool, twice: which keys their own rows see, and which any other row does."""
        visible = ~self.forbidden(values)
        if self.query_axis is None or visible.shape[self.query_axis] == 1:
            visible = visible.movedim(self.key_axis, -1)
            return visible, visible
        visible = visible.movedim((self.query_axis, self.key_axis), (-2, -1))
        others = visible & ~torch.eye(*visible.shape[-2:], dtype=torch.bool, device=visible.device)
        return visible.diagonal(dim1=-2, dim2=-1), others.any(-2)


def masks_of(attention: Attention) -> list[Mask]:
    """The masks that are understood; there may be others, which forbid more."""
    return [mask for node in attention.nodes for index, binding in attention.bindings.get(node, {}).items()
            if (mask := _as_mask(node, index, binding)) is not None]


def all_masks(layers: Iterable[Layer]) -> list[Mask]:
    """Those of all attention calls, each once."""
    return list(dict.fromkeys(mask for layer in layers for attention in layer.attentions for mask in masks_of(attention)))


def _as_mask(node: Node, index: int, binding: object) -> Mask | None:
    axes = {label: axis for axis, label in binding.axes} if isinstance(binding, AxisLabels) else {}
    mask = leaves(node)[index]
    if KEY not in axes:
        return None
    if has_target(node, _FILLS, ("masked_fill", "masked_fill_")):
        filled = node.kwargs.get("value", node.args[2] if len(node.args) > 2 else None)
        if isinstance(filled, (int, float)) and filled > _FORBIDS:
            return None  # a bias that is zero there
        return Mask(mask, axes.get(QUERY), axes[KEY], True)
    if value(mask).is_floating_point() or is_fused_attention(node) or has_target(node, _KEEPS):
        return Mask(mask, axes.get(QUERY), axes[KEY], False)
    return None
