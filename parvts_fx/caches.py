"""Keep a shortened key-value cache honest about how many positions the conversation has had.

A rewritten prefill caches the rows of path A only. transformers asks a cache for its length for two purposes: to tell
how many keys there are (attention masks), and to tell how many tokens have been seen (positions of the next tokens,
which part of a conversation is new). After pruning these are two different numbers. A graph cannot change Python
attributes, so this happens behind the call that :func:`parvts_fx.compile` has arranged.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from parvts_fx.errors import ParvtsWarning

@dataclasses.dataclass
class Watch:
    """What the graphs of one call have told."""

    dropped: list[int] = dataclasses.field(default_factory=list)
    """Tokens per sample that each rewritten prefill dropped."""

    merged: bool = False
    """Whether a graph has merged visual features into embeddings, rewritten or not."""

    merged_rows: Callable[[torch.Tensor], torch.Tensor | None] = lambda embeddings: None
    """Which rows [batch, seq] of embeddings [batch, seq, hidden] are not those of the call's ids; None if none can be told."""


_WATCH: contextvars.ContextVar[Watch | None] = contextvars.ContextVar("parvts_fx_watch", default=None)


@contextlib.contextmanager
def watch_call() -> Iterator[Watch]:
    """Collect, for the duration of a call, what its graphs tell."""
    watch, outer = Watch(), _WATCH.get()
    token = _WATCH.set(watch)
    try:
        yield watch
    finally:
        _WATCH.reset(token)
        if outer is not None:
            outer.merged |= watch.merged


def tell_pruning(dropped: int) -> None:
    """Called by a rewritten prefill each time it has run."""
    watch = _WATCH.get()
    if watch is not None:
        watch.dropped.append(dropped)


def is_watched() -> bool:
    """Whether a call is being watched, whose end notices what its graphs have not done."""
    return _WATCH.get() is not None


def merged_rows(embeddings: torch.Tensor) -> torch.Tensor | None:
    """Rows of embeddings that differ from those of the ids that the running call was given (:class:`Watch`)."""
    watch = _WATCH.get()
    return None if watch is None or watch.merged else watch.merged_rows(embeddings)


def tell_merge() -> None:
    """Called by every graph that merges visual features, each time it runs."""
    watch = _WATCH.get()
    if watch is not None:
        watch.merged = True


_SHORT: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
"""Shortened cache tensors that are alive and whose count nobody corrects, by identity."""


def note_short_caches(outputs: Sequence[object]) -> None:
    """Remember the tensors that a rewritten prefill hands out, unless the caller corrects their cache's count."""
    if _WATCH.get() is None:
        _SHORT.update({id(held): held for held in outputs if isinstance(held, torch.Tensor) and held.dim() == 4})


def watch_short_caches(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a graph that has attention but no merge: warn where it counts positions from a shortened cache.

    Positions are taken to be given if two inputs or more hold one integer per new token (ids and positions), or one
    beside embeddings.
    """

    def watching(*inputs: object) -> Any:
        outputs = call(*inputs)
        if _SHORT and any(_SHORT.get(id(held)) is held for held in inputs):
            _warn_of_positions(inputs)
            note_short_caches(outputs)
        return outputs

    return watching


def _warn_of_positions(inputs: Sequence[object]) -> None:
    tensors = [held for held in inputs if isinstance(held, torch.Tensor)]
    counted = [x.shape[-1] for x in tensors if x.dim() >= 2 and x.dtype == torch.int64]
    new = min(counted, default=0)
    embedded = any(x.dim() == 3 and x.is_floating_point() and x.shape[1] == new for x in tensors)
    if counted.count(new) < (1 if embedded else 2):
        warnings.warn(
            "parvts_fx: the model goes on from a cache out of which visual tokens were dropped, and is given no "
            "position_ids: it counts positions from the short cache. Pass position_ids that go on from the full prompt, "
            "or use parvts_fx.compile(model), which keeps the count", ParvtsWarning, stacklevel=3)
    elif new > 1:
        warnings.warn(
            "parvts_fx: a further prompt goes on from a cache out of which visual tokens were dropped: ids and "
            "position_ids must be those that follow the full prompt (generate takes the cache's length for it). "
            "parvts_fx.compile(model) keeps the count", ParvtsWarning, stacklevel=3)


def is_cache(held: object) -> bool:
    """Whether an object answers the questions of transformers' Cache that matter here."""
    return all(hasattr(held, name) for name in ("layers", "get_seq_length", "get_query_offset", "get_mask_sizes"))


def find_caches(output: object, arguments: Mapping[str, Any]) -> list[Any]:
    """The caches that a call returned, on its own or inside a sub-model's output, or was given."""
    found: dict[int, Any] = {}
    stack = [output, *arguments.values()]
    while stack:
        held = stack.pop()
        if is_cache(held):
            found[id(held)] = held
        elif isinstance(held, (tuple, list)):
            stack.extend(held)
        elif isinstance(held, Mapping):
            stack.extend(held.values())
        elif held is output and hasattr(held, "past_key_values"):
            stack.append(held.past_key_values)
    return list(found.values())


def remember_dropped(cache: Any, dropped: int) -> None:
    """Let a cache's ``get_seq_length`` count the dropped tokens, and everything about its keys leave them out.

    The cache object stays the same; its class becomes a subclass of what it was.
    """
    for layer in cache.layers:
        if isinstance(getattr(layer, "cumulative_length", None), int):  # a sliding window's count of its own keys
            layer.cumulative_length -= dropped
    cache.dropped_tokens = getattr(cache, "dropped_tokens", 0) + dropped
    if not getattr(type(cache), "counts_dropped_tokens", False):
        cache.__class__ = _counting(type(cache))


@functools.cache
def _counting(cache_class: type) -> type:
    class Counting(cache_class):
        counts_dropped_tokens = True

        def get_seq_length(self, layer_idx: int = 0) -> int:
            """Tokens seen so far, the dropped ones included; 0 for a cache that has been emptied."""
            length = super().get_seq_length(layer_idx)
            return length + self.dropped_tokens if length else length

        def get_query_offset(self, layer_idx: int = 0) -> int:
            """Keys that stand in front of the next one."""
            return super().get_seq_length(layer_idx)

        def reset(self) -> None:
            super().reset()
            self.dropped_tokens = 0

    Counting.__name__ = Counting.__qualname__ = cache_class.__name__
    Counting.__module__ = cache_class.__module__
    return Counting
