"""Later calls on a cache whose samples are of different lengths: their mask has the cache's columns, not the prompt's.

A model is given a mask over all positions of the conversation, [batch, positions], and takes as many of its columns, from the
front, as the cache has rows. That is right behind a pruned prompt as long as all that lies in front of a sample's rows is
padding that was there before. Where samples were pruned one by one (:mod:`parvts_fx.runtime.by_sample`) it is not, and the
columns of the prompt are put in place by which of the cached rows are a sample's own.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from parvts_fx.runtime.caches import PROMPT_ROWS, find_caches

MASK = "attention_mask"


@dataclasses.dataclass
class PromptRows:
    """What a cache holds of a prompt."""

    rows: torch.Tensor
    """[batch, rows] bool: which of its first rows are a sample's own."""

    positions: int
    """Of the prompt."""


def note_rows(cache: Any, rows: torch.Tensor, positions: int) -> None:
    setattr(cache, PROMPT_ROWS, PromptRows(rows, positions))


def with_cached_columns(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """A call's arguments, with a mask over the rows that its cache holds, if that holds samples of different lengths.

    Raises:
        ValueError: the mask that was given is not [batch, positions].
    """
    cache = next((cache for cache in find_caches(args, kwargs) if getattr(cache, PROMPT_ROWS, None) is not None), None)
    if cache is None or not cache.get_seq_length():
        return args, kwargs
    prompt: PromptRows = getattr(cache, PROMPT_ROWS)
    signature = inspect.signature(forward)
    given = signature.bind_partial(*args, **kwargs)
    named = given.arguments if MASK in signature.parameters else dict(kwargs)
    mask = named.get(MASK)
    cached = cache.get_query_offset()
    rows = prompt.rows[:, :cached]
    if mask is None:
        new = _new_rows(given.arguments)
        mask = torch.ones(rows.shape[0], prompt.positions + cached - rows.shape[1] + new, dtype=torch.int64, device=rows.device)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        raise ValueError(
            "parvts_fx: a batch goes on from a cache whose samples were pruned one by one, and its attention_mask is not "
            "[batch, positions]: which of its columns belong to which cached row cannot be told. Give a mask with two axes.")
    named[MASK] = torch.cat([rows.to(mask.dtype), mask[:, prompt.positions:]], 1)
    return (given.args, given.kwargs) if MASK in signature.parameters else (args, named)


def _new_rows(given: Mapping[str, Any]) -> int:
    held = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
    return held.shape[1]
