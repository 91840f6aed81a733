"""One tensor of visual features in place of one a picture: then their number is a size, and not part of what is compiled.

Libraries hand a model's forward the features of each picture by themselves, in a tuple, and Dynamo compiles for each length of
it: for every number of pictures, so for every batch size. Most models do nothing with the tuple but concatenate it. Whether a
model does is tried out: the first call with several features is made a second time with the joined ones, on copies of its
caches. Where all that comes out is the same, later calls are given the joined ones from the start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from parvts_fx.runtime.caches import find_caches, is_cache, with_own_caches
from parvts_fx.runtime.call import current_call
from parvts_fx.torch_private import tree_leaves

Call = Callable[[Mapping[str, Any]], Any]


class JoinedFeatures:
    """Of one model: whether it does nothing with the features of several pictures but join them, once that is known."""

    def __init__(self) -> None:
        self._same: bool | None = None

    def joined(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the model is to be given: features are joined if that is known to make no difference."""
        return (_joined(kwargs) or kwargs) if self._same else kwargs

    @staticmethod
    def parted(output: Any, given: Mapping[str, Any], joined: Mapping[str, Any]) -> Any:
        """What a call with joined features returns, with the ones it would have been given where it returns them."""
        if given is joined or not isinstance(output, MutableMapping):
            return output
        as_given = dict(_pairs(given, joined))
        for name, held in output.items():
            if type(held) in (tuple, list) and len(held) == 1 and id(held[0]) in as_given:
                output[name] = as_given[id(held[0])]
        return output

    def try_out(self, kwargs: Mapping[str, Any], call: Call) -> None:
        """See whether joined features make a difference, if that is not known yet and these arguments can tell.

        Args:
            call: the model, uncompiled, as a function of its keyword arguments.
        """
        if self._same is not None or (joined := _joined(kwargs)) is None:
            return
        try:
            one, other = with_own_caches(kwargs), with_own_caches(joined)
            self._same = _agree(_results(call(one), one), _results(call(other), other))
        except Exception:  # the model needs them one by one, or a cache cannot be copied: nothing is lost
            self._same = False


def _joined(kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments with the features of several pictures as one tensor; None if there are none. What is given stays."""
    changed = {name: new for name, held in kwargs.items() if (new := _with_joined(held)) is not None}
    return {**kwargs, **changed} if changed else None


def _with_joined(held: Any) -> Any:
    """A copy of nested dicts (outputs of modules among them) with joined features; None where nothing is to be joined."""
    if not isinstance(held, Mapping) or is_cache(held):
        return None
    changed = {}
    for name, entry in held.items():
        new = _join(entry) if _are_features(entry) else _with_joined(entry)
        if new is not None:
            changed[name] = new
    if not changed:
        return None
    made: Any = copy.copy(held)
    for name, entry in changed.items():
        made[name] = entry
    return made


def _pairs(given: Any, joined: Any) -> Iterator[tuple[int, Any]]:
    """The identity of each joined tensor, and the features that it was made of."""
    if isinstance(given, Mapping) and isinstance(joined, Mapping) and given is not joined and not is_cache(given):
        for name, held in given.items():
            yield from _pairs(held, joined[name])
    elif given is not joined and type(given) in (tuple, list) and isinstance(joined, (tuple, list)) and len(joined) == 1:
        yield id(joined[0]), given


def _join(features: Any) -> Any:
    """As many features in one tensor; None where it is not known of all alike what they were computed from."""
    origins = [current_call().origin_of(held) for held in features]
    if any(origin != origins[0] for origin in origins):
        return None
    joined = torch.cat(list(features))
    if origins[0] is not None:
        current_call().origins.note(joined, origins[0])
    return type(features)([joined])


def _are_features(held: Any) -> bool:
    """Tensors [features, ..., width] of several pictures, alike but for their number of features."""
    if type(held) not in (tuple, list) or len(held) < 2 or not all(isinstance(entry, torch.Tensor) for entry in held):
        return False
    first = held[0]
    return first.is_floating_point() and first.dim() > 1 and all(
        (entry.dtype, entry.device, entry.shape[1:]) == (first.dtype, first.device, first.shape[1:]) for entry in held)


def _results(output: Any, kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """All numbers that a call returns or leaves in its caches, but for what it was given."""
    own = {id(held) for held in tree_leaves(dict(kwargs))}
    leaves = [held for held in tree_leaves(output) if not is_cache(held) and id(held) not in own]
    for cache in find_caches(output, (), dict(kwargs)):
        leaves += tree_leaves([vars(layer) for layer in getattr(cache, "layers", ())])
    return (held for held in leaves if isinstance(held, torch.Tensor) and held.is_floating_point())


def _agree(one: Iterator[torch.Tensor], other: Iterator[torch.Tensor]) -> bool:
    """Whether numbers are the same but for rounding."""
    pairs = list(zip(one, other, strict=True))
    return bool(pairs) and all(
        ours.shape == theirs.shape and torch.allclose(
            ours, theirs, rtol=0, atol=torch.finfo(ours.dtype).eps ** 0.5 * float(ours.abs().max().clamp(min=1e-12)))
        for ours, theirs in pairs if ours.numel())
