"""Later calls on a pruned cache: their mask has the columns of the rows that are cached.

A model is given a mask over all positions of the conversation, [batch, positions], and takes as many of its columns, from the
front, as the cache has rows. That is right behind pruned prompts as long as all padding stands in front of the first of them.
Where samples were pruned one by one (:mod:`parvts_fx.runtime.by_sample`), or a further turn is padded, it is not, and the columns
of each prompt are put in place by which of its rows are cached.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from parvts_fx.runtime.caches import find_caches
from parvts_fx.runtime.pruned_caches import PrunedPrompt, pruned_prompts

MASK = "attention_mask"
_PADDED = "has_padded_turns"
"""What a cache is marked with that holds a turn with padding behind a pruned prompt."""


def with_cached_columns(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """A call's arguments, with a mask over the rows that its cache holds where the mask's own columns are others.

    Raises:
        ValueError: the mask that was given is not [batch, positions].
    """
    cache = next((cache for cache in find_caches(args, kwargs) if pruned_prompts(cache)), None)
    if cache is None or not cache.get_seq_length():
        return args, kwargs
    prompts, seen = pruned_prompts(cache), int(cache.get_seq_length())
    known = getattr(cache, _PADDED, False) or any(prompt.rows is not None for prompt in prompts)
    if not known and not args and not _pads_a_turn(kwargs.get(MASK), seen):
        return args, kwargs  # nearly every decode step
    signature = inspect.signature(forward)
    given = signature.bind_partial(*args, **kwargs)
    named = given.arguments if MASK in signature.parameters else dict(kwargs)
    mask = named.get(MASK)
    if not known and not _pads_a_turn(mask, seen):
        return args, kwargs
    setattr(cache, _PADDED, True)
    if mask is None:
        mask = torch.ones(len(prompts[0].visual), seen + _new_rows(given.arguments), dtype=torch.int64,
                          device=prompts[0].visual.device)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError(
            "parvts_fx: a batch goes on from a cache whose samples were pruned one by one, or which holds a padded turn behind a "
            "pruned prompt, and its attention_mask is not [batch, positions]: which of its columns belong to which cached row "
            "cannot be told. Give a mask with two axes.")
    named[MASK] = _columns(mask, prompts)
    return (given.args, given.kwargs) if MASK in signature.parameters else (args, named)


def mask_columns(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many columns a call's mask [batch, positions] has; None where it has none such."""
    signature = inspect.signature(forward)
    mask = (signature.bind_partial(*args, **kwargs).arguments if MASK in signature.parameters else kwargs).get(MASK)
    return mask.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _pads_a_turn(mask: object, seen: int) -> bool:
    """Whether a further turn of several tokens comes with padding."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] > seen + 1 and not bool(mask[:, seen:].all())


def _columns(mask: torch.Tensor, prompts: Sequence[PrunedPrompt]) -> torch.Tensor:
    """[batch, cached and new rows]: those of a mask [batch, positions]."""
    parts, place = [], 0
    for prompt in prompts:
        rows = prompt.rows
        own = mask[:, prompt.begin:prompt.end - prompt.dropped] if rows is None else rows.to(mask.dtype)  # padding is in front
        parts += [mask[:, place:prompt.begin], own]
        place = prompt.end
    return torch.cat([*parts, mask[:, place:]], 1)


def _new_rows(given: Mapping[str, Any]) -> int:
    held = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
    return held.shape[1]
