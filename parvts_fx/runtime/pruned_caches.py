"""What a key-value cache has to know of prompts out of which visual tokens were dropped.

A rewritten prefill caches the rows of path A only. transformers asks a cache for its length for two purposes: to tell
how many keys there are (attention masks), and to tell how many tokens have been seen (positions of the next tokens,
which part of a conversation is new). After pruning these are two different numbers. A graph cannot change Python
attributes, so this happens behind the call that :func:`parvts_fx.compile` has arranged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from parvts_fx.runtime.call import current_call


@dataclasses.dataclass(frozen=True)
class PrunedPrompt:
    """A prompt of a conversation, as its cache holds it."""

    begin: int
    """Positions of the conversation in front of it."""

    positions: int
    """Its own: as many as it had, the dropped ones included."""

    dropped: int
    """How many of these have no row in the cache."""

    visual: torch.Tensor
    """[batch, positions] bool: where visual tokens stood."""

    rows: torch.Tensor | None = None
    """[batch, positions - dropped] bool: which of its cached rows are a sample's own, where samples were pruned one by one; None
    where all are, or are padding that stood in front."""

    @property
    def end(self) -> int:
        return self.begin + self.positions

    @property
    def text_behind(self) -> int:
        """Positions behind the last visual token of any sample: the last rows are theirs."""
        if self.rows is not None:
            return 0
        return int((self.visual.flip(1).cumsum(1) == 0).sum(1).min())

    def without(self, positions: int) -> PrunedPrompt:
        """The same without its last positions, which are text."""
        return dataclasses.replace(self, positions=self.positions - positions, visual=self.visual[:, :-positions])


def remember_pruned(cache: Any, positions: int, dropped: int, visual: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """Let a cache's ``get_seq_length`` count the dropped tokens of its last prompt, and everything about its keys leave them out.

    The cache object stays the same; its class becomes a subclass of what it was.

    Args: of :class:`PrunedPrompt`.
    """
    for layer in cache.layers:
        if isinstance(getattr(layer, "cumulative_length", None), int):  # a sliding window's count of its own keys
            layer.cumulative_length -= dropped
        for held in getattr(layer, "__dict__", {}).values():
            if isinstance(held, torch.Tensor):
                current_call().correct(held)
    begin = int(cache.get_seq_length()) - (positions - dropped)
    cache.pruned_prompts = (*pruned_prompts(cache), PrunedPrompt(begin, positions, dropped, visual, rows))
    kind: Any = type(cache)
    if not getattr(kind, "counts_dropped_tokens", False):
        cache.__class__ = _counting(kind)


def pruned_prompts(cache: Any) -> tuple[PrunedPrompt, ...]:
    """Those of its conversation, in order."""
    return getattr(cache, "pruned_prompts", ())


@functools.cache
def _counting(cache_class: Any) -> Any:
    class Counting(cache_class):
        counts_dropped_tokens = True
        pruned_prompts: tuple[PrunedPrompt, ...] = ()

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            """Tokens seen so far, the dropped ones included; 0 for a cache that has been emptied."""
            length, dropped = super().get_seq_length(layer_idx), sum(prompt.dropped for prompt in self.pruned_prompts)
            if isinstance(length, torch.Tensor):  # a static cache's, which graphs may read
                return length + dropped * (length > 0)
            return length + dropped if length else length

        def get_query_offset(self, layer_idx: int = 0) -> int:
            """Keys that stand in front of the next one."""
            return super().get_seq_length(layer_idx)

        def reset(self) -> None:
            super().reset()
            self.pruned_prompts = ()

        def crop(self, tokens_to_remove: int) -> None:
            """Forget the conversation's last tokens, the dropped ones included. A positive number, where transformers takes
            one, is how many are to be left.

            Raises:
                ValueError: it ends among the visual tokens of a pruned prompt.
            """
            length = self.get_seq_length()
            left, rows = _cropped(self.pruned_prompts, length, length - tokens_to_remove if tokens_to_remove > 0
                                  else -tokens_to_remove)
            super().crop(self.get_query_offset() - rows if tokens_to_remove > 0 else -rows)
            self.pruned_prompts = left

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx)
            self._choose_samples(lambda held: held.index_select(0, beam_idx.to(held.device)))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            self._choose_samples(lambda held: held.repeat_interleave(repeats, 0))

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            super().batch_select_indices(indices)
            self._choose_samples(lambda held: held[indices])

        def _choose_samples(self, choice: Callable[[torch.Tensor], torch.Tensor]) -> None:
            self.pruned_prompts = tuple(
                dataclasses.replace(prompt, visual=choice(prompt.visual), rows=prompt.rows if prompt.rows is None
                                    else choice(prompt.rows)) for prompt in self.pruned_prompts)

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Pickled by the class that it was: this one has no name that could be looked up."""
            return _restored, (cache_class, self.__dict__)

    Counting.__name__ = Counting.__qualname__ = cache_class.__name__
    Counting.__module__ = cache_class.__module__
    return Counting


def _restored(cache_class: Any, state: dict[str, Any]) -> Any:
    kind = _counting(cache_class)
    cache = kind.__new__(kind)
    cache.__dict__.update(state)
    return cache


def _cropped(prompts: tuple[PrunedPrompt, ...], length: int, remove: int) -> tuple[tuple[PrunedPrompt, ...], int]:
    """The prompts that are left without so many of a conversation's last tokens, and how many cached rows these have."""
    left, rows = list(prompts), 0
    while remove > 0 and left:
        last = left[-1]
        behind = min(remove, length - last.end)
        rows, remove, length = rows + behind, remove - behind, length - behind
        if remove == 0:
            break
        if remove >= last.positions:
            left.pop()
            rows, remove, length = rows + last.positions - last.dropped, remove - last.positions, last.begin
        elif remove <= last.text_behind:
            left[-1] = last.without(remove)
            return tuple(left), rows + remove
        else:
            text = last.text_behind
            raise ValueError(
                f"parvts_fx: a crop takes {remove} of the {last.positions} tokens of a prompt out of whose visual tokens "
                f"{last.dropped} were dropped: which cached rows these are cannot be told. Take at most {text} (the text behind "
                "them) or the whole prompt.")
    return tuple(left), rows + remove
