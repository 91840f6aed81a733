"""Which of a call's tensors are key-value caches, and which of these are shorter than the conversation.

A cache of transformers' own is told how many tokens were dropped (:mod:`parvts_fx.runtime.pruned_caches`). Where a call goes on
from another one and counts positions from its length, that is said.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from parvts_fx.analysis.calls import attention_nodes
from parvts_fx.analysis.values import descendants, hint_shape, is_tensor, output_node, value
from parvts_fx.errors import warn
from parvts_fx.runtime.call import Conversation, current_call


def cache_outputs(module: GraphModule, rewritten: GraphModule | None = None) -> frozenset[int]:
    """Which outputs of a graph may be what it caches: numbers with three axes or more, computed in front of attention.

    What is computed behind the last attention is hidden states and logits.

    Args:
        rewritten: the graph's rewritten form; of the outputs, those that it has shortened.
    """
    attentions = attention_nodes(module.graph)
    last = [node for node in module.graph.nodes if node in attentions][-1:]
    behind = set(descendants(module.graph, last))
    found = []
    for position, result in enumerate(_results(module)):
        if not is_tensor(result) or result in behind or not value(result).is_floating_point() or value(result).dim() < 3:
            continue
        other = None if rewritten is None else _results(rewritten)[position]
        if not is_tensor(other) or hint_shape(value(other)) != hint_shape(value(result)):
            found.append(position)
    return frozenset(found)


def _results(module: GraphModule) -> Sequence[Any]:
    results = output_node(module.graph).args[0]
    return results if isinstance(results, (tuple, list)) else (results,)


def note_short_caches(outputs: Sequence[object], positions: Iterable[int], goes_on: Conversation | None = None) -> None:
    """Remember the tensors at those positions, which a rewritten prefill hands out, or a graph that goes on from it.

    Until :func:`~parvts_fx.runtime.pruned_caches.remember_pruned` corrects the count of the cache that holds them.
    """
    conversation, call = goes_on or Conversation(), current_call()
    for position in positions:
        held = outputs[position]
        if isinstance(held, torch.Tensor):
            call.shortened.note(held, conversation)


def watch_short_caches(call: Callable[..., Any], caches: Iterable[int], counts_kept: bool = False) -> Callable[..., Any]:
    """Wrap a graph that has attention: warn where it counts positions from a shortened cache.

    Positions are taken to be given if two inputs or more hold one integer per new token (ids and positions), or one
    beside embeddings.

    Args:
        caches: which of the graph's outputs may be caches (:func:`cache_outputs`).
        counts_kept: whether the count of a transformers cache is corrected, so that this is another one.
    """

    def watching(*inputs: Any) -> Any:
        outputs = call(*inputs)
        conversation = current_call().conversation_of(inputs)
        if conversation is not None:
            _warn_of_positions(inputs, conversation, counts_kept)
            note_short_caches(outputs, caches, conversation)
        return outputs

    return watching


def _warn_of_positions(inputs: Sequence[object], conversation: Conversation, counts_kept: bool) -> None:
    integers = [x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.int64 and x.dim() >= 1]
    new = min((x.shape[-1] for x in integers if x.dim() >= 2), default=0)
    embedded = any(isinstance(x, torch.Tensor) and x.dim() == 3 and x.is_floating_point() and x.shape[1] == new
                   for x in inputs)
    remedy = ("a cache of transformers' Cache class, whose count parvts_fx.compile keeps" if counts_kept else
              "parvts_fx.compile(model), which keeps the count of a transformers cache")
    if sum(x.shape[-1] == new for x in integers) < (1 if embedded else 2):
        text = ("parvts_fx: the model goes on from a cache out of which visual tokens were dropped, and is given no "
                "position_ids: it counts positions from the short cache. Pass position_ids that go on from the full prompt, "
                f"or use {remedy}")
    elif new > 1:
        text = ("parvts_fx: a further prompt goes on from a cache out of which visual tokens were dropped: ids and "
                "position_ids must be those that follow the full prompt (generate takes the cache's length for it). "
                f"The remedy is {remedy}")
    else:
        return
    if text not in conversation.told:
        conversation.told.add(text)
        warn(text)


def is_cache(held: object) -> bool:
    """Whether an object answers the questions of transformers' Cache that matter here."""
    return all(hasattr(held, name) for name in ("layers", "get_seq_length", "get_query_offset", "get_mask_sizes"))


def has_stream(cache: object) -> bool:
    """Whether a cache moves its layers between devices on a stream of its own, in its ``update``: no graph can hold that, and
    torch 2.11 does not survive the attempt."""
    return any(isinstance(held, (torch.Stream, torch.cuda.Stream)) for held in vars(cache).values())


_CACHE_NAMES = ("cache", "past_key_values")  # what outputs call it: from transformers 5.24 on, and before


def with_own_caches(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's keyword arguments with copies of its caches, for a call that is not the user's."""
    return {name: copy.deepcopy(held) if is_cache(held) else held for name, held in kwargs.items()}


def find_caches(*given: object) -> list[Any]:
    """The caches among what a call was given and has returned: by themselves, in containers however deep, or in the output
    of a part of the model."""
    found: dict[int, Any] = {}
    stack = list(given)
    while stack:
        held = stack.pop()
        if is_cache(held):
            found[id(held)] = held
        elif isinstance(held, (tuple, list)):
            stack.extend(held)
        elif isinstance(held, Mapping):
            stack.extend(held.values())
        else:
            stack.extend(getattr(held, name) for name in _CACHE_NAMES if hasattr(held, name))
    return list(found.values())
