"""Holds decoders of any making against :mod:`tests.reference`, which calls layers as those of transformers are called."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import Prefill, prefill, relative_error

Cached = Callable[[Any], tuple[Tensor, Tensor | None, Tensor | None]]


class Named(nn.Module):
    """In place of a layer: calls it with the hidden states alone by position, so that all else is recorded by name."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.layer, self.signature = layer, inspect.signature(forward)
        kinds = ((name, parameter.kind) for name, parameter in self.signature.parameters.items())
        self.others = next((name for name, kind in kinds if kind is inspect.Parameter.VAR_KEYWORD), "")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (_, hidden), *named = self.signature.bind(*args, **kwargs).arguments.items()
        given = dict(named)
        others = given.pop(self.others, {})
        return self.layer(hidden, **given, **others)


class Adapted(nn.Module):
    """A model's block, called with a mask and a cache of transformers.

    Args:
        cached: of what the block returns, the hidden states and the keys and values [batch, heads, rows, dim], if it gives any.
    """

    def __init__(self, block: nn.Module, index: int, cached: Cached):
        super().__init__()
        self.block, self.index, self.cached = block, index, cached

    def forward(self, x: Tensor, *, attention_mask: Tensor | None = None, past_key_values: Any = None, **own: Any) -> Any:
        if past_key_values is None:  # the model's own call
            return self.block(x, **own)
        with _masked(attention_mask):
            x, key, value = self.cached(self.block(x, **own))
        if key is not None:
            past_key_values.update(key, value, self.index)
        return x


@contextlib.contextmanager
def _masked(further: Tensor) -> Iterator[None]:
    """Every attention inside sees no more than this mask lets it, [1, 1, rows, rows] bool or float; none is a layer's fast path,
    which could not be told."""
    fused, fast = F.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()

    def masked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0,
               is_causal: bool = False, **more: Any) -> Tensor:
        mask = _as_numbers(further, query.dtype)
        if is_causal:
            mask = mask.masked_fill(torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        if attn_mask is not None:
            mask = mask + _as_numbers(attn_mask, query.dtype)
        return fused(query, key, value, attn_mask=mask, **more)

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", masked):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask


def wanted(
    model: nn.Module, blocks: nn.ModuleList, finish: Callable[[Tensor], Tensor], inputs: dict[str, Any], visual: Tensor,
    cached: Cached | None = None, **choice: Any,
) -> list[Prefill]:
    """The reference's pruned prefill of each sample.

    Args:
        blocks: those of ``model``, as they stand in it.
        finish: as :func:`tests.reference.prefill` takes it, and so are ``visual`` and ``choice``.
        cached: as :class:`Adapted` takes it; None for blocks of transformers.
    """
    own, short = list(blocks), dict(choice)
    if "migration_depth" in short:
        short["depth"] = short.pop("migration_depth")
    layers = own if cached is None else [Adapted(block, index, cached) for index, block in enumerate(own)]
    for index, (block, layer) in enumerate(zip(own, layers)):
        blocks[index] = Named(layer, block.forward)
    try:
        return prefill(model, layers, finish, inputs, visual, **short)
    finally:
        for index, block in enumerate(own):
            blocks[index] = block


def error(logits: Tensor, caches: Sequence[tuple[Tensor, Tensor]], expected: Sequence[Prefill]) -> float:
    """The largest relative error over logits, keys and values of all samples; infinite where shapes differ."""
    errors = [relative_error(logits, torch.stack([one.logits for one in expected]))]
    if len(caches) != len(expected[0].keys):
        return math.inf
    for index, (key, value) in enumerate(caches):
        errors += [relative_error(key, torch.cat([one.keys[index] for one in expected])),
                   relative_error(value, torch.cat([one.values[index] for one in expected]))]
    return max(errors)
