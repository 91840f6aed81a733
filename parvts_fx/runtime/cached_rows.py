"""Later calls on a pruned cache: their mask has the columns of the rows that are cached.

A model is given a mask over all positions of the conversation, [batch, positions], and takes as many of its columns, from the
front, as the cache has rows. That is right behind pruned prompts as long as all padding stands in front of the first of them.
Where samples were pruned one by one (:mod:`parvts_fx.runtime.by_sample`), or a further turn is padded, it is not, and the columns
of each prompt are put in place by which of its rows are cached. For caches of a fixed size ``generate`` makes other masks out of
that one, in front of the call; so there it is asked to make them out of the right columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch

from parvts_fx.runtime.caches import find_caches
from parvts_fx.runtime.call import TensorTable
from parvts_fx.runtime.pruned_caches import PrunedPrompt, pruned_prompts
from parvts_fx.torch_private import tree_leaves

MASK = "attention_mask"
MASKS = "create_masks_for_generate"
"""What ``generate`` asks a model for."""

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
    known = getattr(cache, _PADDED, False) or has_samples(prompts)
    if not known and not args and not _pads_a_turn(kwargs.get(MASK), seen):
        return args, kwargs  # nearly every decode step
    signature = inspect.signature(forward)
    given = signature.bind_partial(*args, **kwargs)
    named = given.arguments if MASK in signature.parameters else dict(kwargs)
    mask = named.get(MASK)
    if not known and not _pads_a_turn(mask, seen) or _is_in_place(mask):
        return args, kwargs
    setattr(cache, _PADDED, True)
    if not can_follow(mask):
        raise ValueError(
            "parvts_fx: a batch goes on from a cache whose samples were pruned one by one, or which holds a padded turn behind a "
            "pruned prompt, and its attention_mask is not [batch, positions]: which of its columns belong to which cached row "
            "cannot be told. Give a mask with two axes.")
    named[MASK] = _columns(mask, prompts, seen + _new_rows(given.arguments))
    return (given.args, given.kwargs) if MASK in signature.parameters else (args, named)


class MasksOfGenerate:
    """A model's ``create_masks_for_generate``, out of the columns of cached rows where samples were pruned one by one.

    An object and not a closure, so that the model can be copied and pickled.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from transformers import masking_utils  # whoever generates has imported it

        make = getattr(type(self._model), MASKS, masking_utils.create_masks_for_generate)
        cache, new = next(iter(find_caches(args, kwargs)), None), kwargs.get("inputs_embeds")
        if cache is None or MASK not in kwargs or not isinstance(new, torch.Tensor):
            return make(*args, **kwargs)  # another version's way to call it, of which nothing is known
        if has_samples(prompts := pruned_prompts(cache)):
            kwargs[MASK] = _columns(kwargs[MASK], prompts, int(cache.get_seq_length()) + new.shape[1])
        return _noted(make(*args, **kwargs))


def _noted(mask: Any) -> Any:
    if isinstance(mask, Mapping):
        return {name: _noted(held) for name, held in mask.items()}
    if isinstance(mask, torch.Tensor):
        mask = mask.contiguous()  # or generate makes it so, and it would be another
        _IN_PLACE.note(mask, True)
    return mask


_IN_PLACE: TensorTable[bool] = TensorTable()
"""What it has made."""


def can_follow(mask: Any) -> bool:
    """Whether a call that is given such a mask can go on from a batch whose samples were pruned one by one."""
    return mask is None or _is_by_position(mask) or _is_in_place(mask)


def _is_in_place(mask: Any) -> bool:
    held = [leaf for leaf in tree_leaves(mask) if isinstance(leaf, torch.Tensor)]
    return bool(held) and all(map(_IN_PLACE.get, held))


def has_samples(prompts: Sequence[PrunedPrompt]) -> bool:
    """Whether any was pruned sample by sample."""
    return any(prompt.rows is not None for prompt in prompts)


def given_mask(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The mask that a call is given, in whatever form; None where it is given none."""
    signature = inspect.signature(forward)
    return (signature.bind_partial(*args, **kwargs).arguments if MASK in signature.parameters else kwargs).get(MASK)


def rows_by_mask(mask: Any, caches: Sequence[Any]) -> frozenset[int] | None:
    """How many new rows a mask [batch, positions] may be for, behind those of caches; None for any other mask."""
    cached = {int(count()) for cache in caches for count in (cache.get_seq_length, cache.get_query_offset)} or {0}
    return frozenset(mask.shape[1] - count for count in cached) if _is_by_position(mask) else None


def _is_by_position(mask: object) -> TypeGuard[torch.Tensor]:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2


def _pads_a_turn(mask: object, seen: int) -> bool:
    """Whether a further turn of several tokens comes with padding."""
    return _is_by_position(mask) and mask.shape[1] > seen + 1 and not bool(mask[:, seen:].all())


def _columns(mask: torch.Tensor | None, prompts: Sequence[PrunedPrompt], positions: int) -> torch.Tensor:
    """[batch, cached and new rows]: those of a mask [batch, positions]; of ones where there is none."""
    if mask is None:
        mask = torch.ones(len(prompts[0].visual), positions, dtype=torch.int64, device=prompts[0].visual.device)
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
