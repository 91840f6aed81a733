"""What a call is given: ids, pictures, or the next token of a decode step; and which merged rows are none of the ids' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from parvts_fx.runtime.caches import is_cache
from parvts_fx.runtime.call import TensorTable
from parvts_fx.torch_private import tree_leaves


def read_call(
    args: Sequence[object], kwargs: Mapping[str, object], returned: TensorTable[bool]
) -> tuple[list[torch.Tensor], bool, bool]:
    """What may be the ids of a call, whether it is given a prompt's ids beside numbers that are neither a mask nor
    embeddings nor a cache nor anything else that an earlier call has returned (a cache in tuples): pictures. And whether it is
    a decode step.

    One id a sample beside a mask is a decode step, whatever else (positions as numbers, say) comes with it.
    """
    given = [held for held in (*args, *kwargs.values()) if not is_cache(held)]
    tensors = [held for held in tree_leaves(given) if isinstance(held, torch.Tensor) and held.dim() > 1]
    ids = [held for held in tensors if held.dtype == torch.int64 and held.dim() == 2]
    prompts = [held for held in ids if held.shape[1] > 1]
    pictures = bool(prompts) and any(
        held.is_floating_point() and held.shape[:2] != prompts[0].shape and held.shape[-1] != prompts[0].shape[1]
        and not returned.get(held) for held in tensors)
    if pictures and len(ids) > len(prompts) == 1 and int(prompts[0].max()) <= 1:
        pictures = False  # the one long row of integers is a mask over a cache
    embedded = any(held.is_floating_point() and held.dim() == 3 and held.shape[1] > 1 for held in tensors)
    is_step = len(ids) > len(prompts) or not prompts and not embedded
    return prompts, pictures, is_step


@torch.no_grad()
def rows_of_none_of(
    model: torch.nn.Module, prompts: Sequence[torch.Tensor], embeddings: torch.Tensor
) -> torch.Tensor | None:
    """[batch, seq] bool: rows of merged embeddings [batch, seq, hidden] that are not the input embeddings of the ids.

    None if there is no such row, or if they cannot be told apart: then no row with content is an id's own, or all others
    are alike (placeholders that are yet to be filled). Of several rows of integers the ids are those that most rows fit.
    """
    if embeddings.dim() != 3 or not embeddings.is_floating_point():
        return None
    table: Any = getattr(model, "get_input_embeddings", lambda: None)()
    size = getattr(getattr(table, "weight", None), "shape", (0,))[0]
    candidates = []
    for ids in prompts if size else ():
        if ids.shape == embeddings.shape[:2]:
            known = table(ids.clamp(0, size - 1))
            candidates.append((known == embeddings).all(-1) if known.shape == embeddings.shape else torch.zeros_like(ids).bool())
    candidates = [same for same in candidates if same.logical_and(embeddings.any(-1)).any()]
    if not candidates:
        return None
    same = max(candidates, key=lambda same: int(same.sum()))  # positions may be ids of a few rows by chance
    others = embeddings[~same]
    return None if len(others) == 0 or len(others) > 1 and bool((others == others[0]).all()) else ~same
