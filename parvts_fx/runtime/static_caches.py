"""Prompts on an empty cache that no graph can fill: pruned on one that grows, whose rows are then put into it.

A graph writes into a static cache's buffers at places that it counts itself, as many as the prompt has. So the prompt is run
on a :class:`transformers.DynamicCache` for the duration of the call, and the static one, the caller's own object, takes over the
rows that are left by its own ``update``: decode steps find them where they look, and may be compiled with CUDA graphs as ever.
The same is done for a cache that keeps its layers on another device (an offloaded one), whose ``update`` moves them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F

from parvts_fx.runtime.cached_rows import MASK
from parvts_fx.runtime.caches import has_stream, is_cache


@dataclasses.dataclass(frozen=True)
class Lent:
    """A call with a growing cache in place of another."""

    kwargs: Mapping[str, Any]
    own: Any
    """The caller's."""
    growing: Any

    def give_back(self, output: Any, dropped: int) -> Any:
        """Fill the caller's cache, and put it in the output in place of the other.

        Args:
            dropped: of the prompt's tokens, how many per sample have no row.
        """
        for index, layer in enumerate(self.growing.layers):
            if layer.keys is None:
                continue
            rows = getattr(layer, "cumulative_length", layer.keys.shape[2] + dropped) - dropped
            missing = rows - layer.keys.shape[2]  # behind the window: nobody reads them, and the count is right
            self.own.update(*(F.pad(held, (0, 0, missing, 0)) for held in (layer.keys, layer.values)), index)
        if isinstance(output, MutableMapping):
            for name in [name for name, held in output.items() if held is self.growing]:
                output[name] = self.own
            return output
        return tuple(self.own if held is self.growing else held for held in output) if isinstance(output, tuple) else output


def lend_growing_cache(kwargs: Mapping[str, Any]) -> Lent | None:
    """The arguments of a call with a growing cache, whose layers have the same windows; None where none of them is an empty
    static or offloaded one."""
    found = [(name, held) for name, held in kwargs.items() if is_cache(held) and hasattr(held, "is_compileable")]
    if len(found) != 1 or not (found[0][1].is_compileable or has_stream(found[0][1])):
        return None
    from transformers import cache_utils  # whoever made the cache has imported it

    makes = {
        cache_utils.StaticLayer: lambda layer: cache_utils.DynamicLayer(),
        cache_utils.StaticSlidingWindowLayer: lambda layer: cache_utils.DynamicSlidingWindowLayer(layer.max_cache_len),
        getattr(cache_utils, "DummyLayer", None): lambda layer: type(layer)(),  # of layers that read another's
        cache_utils.DynamicLayer: lambda layer: type(layer)(),
        cache_utils.DynamicSlidingWindowLayer: lambda layer: type(layer)(layer.sliding_window),
    }
    (name, own), = found
    grows = getattr(own, "layer_class_to_replicate", None) in makes
    if not (own.layers or grows) or any(type(layer) not in makes for layer in own.layers) or int(own.get_seq_length()):
        return None
    growing = cache_utils.DynamicCache()
    if own.layers:
        growing.layers = [makes[type(layer)](layer) for layer in own.layers]
    return Lent({**kwargs, name: growing, **({MASK: _of_prompt(kwargs[MASK])} if MASK in kwargs else {})}, own, growing)


def _of_prompt(mask: Any) -> Any:
    """A mask [batch, heads, prompt, size of the cache] for the prompt's own keys; any other as it is."""
    if isinstance(mask, Mapping):
        return {name: _of_prompt(held) for name, held in mask.items()}
    return mask[..., :mask.shape[-2]] if isinstance(mask, torch.Tensor) and mask.dim() == 4 else mask
