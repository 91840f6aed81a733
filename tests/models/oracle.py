"""The eager reference of ParVTS for any Hugging Face model: its own layers, run one by one on chosen rows.

One sample at a time, no graph and no compilation. A first eager run records what every layer is called with. Then the
layers are run on path A's rows (and, in front of the migration depth, on the others), with block masks in place of
separate attention calls; at the end the model's own forward finishes from the last layer's output.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import cache_utils

from tests.models.registry import stands_for_features
from tests.reference import CACHE, subject_count, subjects_of

_TOWERS = ("vision", "visual", "audio", "tower", "perceiver", "vqmodel", "qformer", "image_", "projector")
_LISTS = ("layers", "h", "layer", "blocks")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The text model's layers, by the names that the tests' models give them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] in _LISTS:
            if not any(word in f"{name}." for word in _TOWERS):
                return list(module)
    raise LookupError("no decoder layers in this model")


@dataclasses.dataclass
class Call:
    """What one layer was called with and what it returned."""

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor | None = None


@dataclasses.dataclass
class Pruned:
    logits: torch.Tensor
    """[1, path A, vocabulary]"""
    cache: Any
    """The cache of path A's rows, with every layer's keys in full."""
    dropped: int


class Oracle:
    """Args: ``depth`` counts the entries of the model's own list of layers; ``score(hidden, visual) -> scores``, of the
    positions alone: models differ in what they make of the merged embeddings before the first layer."""

    def __init__(self, model: Any, token: int | tuple[int, ...] | None, *, depth: int, keep_ratio: float, score: Callable,
                 fusion: str | float = "attention"):
        self.model, self.token, self.depth, self.keep_ratio = model, token, depth, keep_ratio
        self.score, self.fusion = score, fusion
        self.visual: torch.Tensor | None = None
        """Where visual tokens stand in a prompt that comes as embeddings alone."""
        self.layers = decoder_layers(model)

    # -- the recording run --------------------------------------------------------------------------------------------

    def _record(self, inputs: Mapping[str, Any]) -> tuple[list[Call], Any]:
        calls: list[Call] = []
        empty: list[Any] = []

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not empty:
                held = [held for held in (*args, *kwargs.values()) if isinstance(held, cache_utils.Cache)]
                empty.append(copy.deepcopy(held[0] if held else None))
            hidden, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
            rest = {name: _copied(held) for name, held in kwargs.items() if name != "hidden_states"}
            calls.append(Call(_copied(hidden), args, rest))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            calls[-1].output = _first(output).clone()  # a model may add to it in place before the next layer

        with _hooks(self.layers, before, after), torch.no_grad():
            self.model(**{**inputs, "use_cache": True})
            self.makes_cache = empty[0] is not None
            if not self.makes_cache:
                calls.clear()
                empty.clear()
                self.model(**inputs, past_key_values=self.fresh_cache())
        if len(calls) != len(self.layers):
            raise LookupError(f"{len(calls)} calls of {len(self.layers)} layers")
        return calls, empty[0]

    def fresh_cache(self) -> cache_utils.DynamicCache:
        return cache_utils.DynamicCache(config=self.model.config.get_text_config(decoder=True))

    # -- the pruned prefill -------------------------------------------------------------------------------------------

    def prefill(self, inputs: Mapping[str, Any]) -> Pruned:
        """The pruned prefill of one sample without padding."""
        self.calls, self.empty = self._record(inputs)
        hidden = self.calls[0].hidden
        self.axis = 1 if hidden.dim() == 3 else next(i for i, n in enumerate(hidden.shape) if n > 4)
        self.length = length = hidden.shape[self.axis]
        visual = self._visual(inputs, length)
        positions = visual[0].nonzero()[:, 0].tolist()
        if not positions:
            raise LookupError("no visual token stands in the decoder's sequence")
        scores = self.score(hidden, visual)[0].double().tolist()
        chosen = set(subjects_of(scores, positions, subject_count(len(positions), self.keep_ratio)))
        is_subject = torch.tensor([p in chosen for p in range(length)])
        other = visual[0] & ~is_subject
        rows_a, rows_b = (~other).nonzero()[:, 0], (~is_subject).nonzero()[:, 0]
        free = torch.ones(length, length, dtype=torch.bool)
        shared: dict[str, Any] = {}
        cache = _storing(self.empty)
        with torch.no_grad():
            if self.fusion == "attention":
                allowed = free.clone()
                allowed[is_subject[:, None] & other[None, :]] = False
                allowed[other[:, None] & is_subject[None, :]] = False
                for index in range(self.depth):
                    hidden = self._run(index, hidden, torch.arange(length), allowed, cache, shared)
                hidden = hidden.index_select(self.axis, rows_a)
                _keep_rows(cache, rows_a, length)
                shared = {key: _cut(held, rows_a, length) for key, held in shared.items()}
            else:
                a, b = hidden.index_select(self.axis, rows_a), hidden.index_select(self.axis, rows_b)
                scratch, shared_b = _storing(self.empty), {}
                for index in range(self.depth):
                    a = self._run(index, a, rows_a, free, cache, shared)
                    b = self._run(index, b, rows_b, free, scratch, shared_b)
                hidden = a
                if self.depth:
                    text_a, text_b = (~visual[0])[rows_a].nonzero()[:, 0], (~visual[0])[rows_b].nonzero()[:, 0]
                    fused = self.fusion * a.index_select(self.axis, text_a) + (1 - self.fusion) * b.index_select(
                        self.axis, text_b)
                    hidden = a.index_copy(self.axis, text_a, fused)
            for index in range(self.depth, len(self.layers)):
                hidden = self._run(index, hidden, rows_a, free, cache, shared)
            logits = self._finish(inputs, hidden)
        self.rows = len(rows_a)
        return Pruned(logits, cache, length - self.rows)

    def _visual(self, inputs: Mapping[str, Any], length: int) -> torch.Tensor:
        ids = inputs.get("input_ids")
        if ids is None:
            return self.visual
        if self.token is not None:
            return stands_for_features(ids, self.token)
        if "image_embeds_position_mask" in inputs:
            return inputs["image_embeds_position_mask"] == 1
        return (torch.arange(length) < length - ids.shape[1])[None]  # features stand in front of the text

    def _run(self, index: int, hidden: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor, cache: Any,
             shared: dict[str, Any]) -> torch.Tensor:
        call, layer, length = self.calls[index], self.layers[index], self.length
        asking = call.hidden.shape[self.axis]
        if asking < length:  # from here on the model goes on with its last rows alone
            hidden = hidden.narrow(self.axis, hidden.shape[self.axis] - asking, asking)

        def own(name: str, held: Any) -> Any:
            if isinstance(held, cache_utils.Cache):
                return cache
            if isinstance(held, (dict, collections.UserDict)):  # filled by layers, read by later ones
                return shared.setdefault(name, type(held)())
            if attends and (held is None and name == "attention_mask" or _is_mask(held, asking, length)):
                mask = _mask(held, allowed[length - asking:])
                return (mask.index_select(2, rows) if asking == length else mask).index_select(3, rows)
            return _cut(held, rows, length)

        attends = self._attends(index, cache)
        kwargs = {name: own(name, held) for name, held in call.kwargs.items()}
        args = tuple(own(str(place), held) for place, held in enumerate(call.args))
        output = _first(layer(hidden, *args, **kwargs))
        if index + 1 < len(self.layers) and self.calls[index + 1].hidden.shape == call.output.shape:
            extra = self.calls[index + 1].hidden - call.output  # what the model adds between layers
            output = output + extra.index_select(self.axis, rows)
        return output

    def _attends(self, index: int, cache: Any) -> bool:
        held = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        return not (isinstance(held, cache_utils.LinearAttentionLayer) and not isinstance(held, cache_utils.DynamicLayer))

    def _finish(self, inputs: Mapping[str, Any], hidden: torch.Tensor) -> torch.Tensor:
        """The model's own forward from the last layer's output."""

        def replace(module: nn.Module, args: tuple, output: Any) -> Any:
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = self.layers[-1].register_forward_hook(replace)
        try:
            return self.model(**inputs).logits
        finally:
            handle.remove()

    # -- the model, pruned, for anything that calls it ----------------------------------------------------------------

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While active, the eager model's first call is the pruned prefill, and later calls go on from it."""
        forward = self.model.forward
        done: list[Pruned] = []

        @functools.wraps(forward)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if done:
                cache = kwargs[CACHE]
                if "get_seq_length" not in vars(cache):
                    # a model may count positions from the cache's length, which must be the full prompt's, even beside
                    # those that it is given (git, in transformers 5.17)
                    keys = cache.get_seq_length
                    cache.get_query_offset = keys
                    cache.get_seq_length = lambda *args: keys(*args) + done[0].dropped
                return forward(*args, **kwargs)
            self.model.forward = forward
            inputs = {name: held for name, held in kwargs.items() if name not in (CACHE, "logits_to_keep")}
            if kwargs.get(CACHE) is None:
                kwargs[CACHE] = self.fresh_cache()
            try:
                done.append(self.prefill(inputs))
                output = forward(**kwargs)  # its class, and whatever else it holds
            finally:
                self.model.forward = replaced
            output.logits = done[0].logits
            fill(kwargs[CACHE], done[0].cache, self.empty)
            return output

        self.model.forward = replaced
        try:
            yield
        finally:
            del self.model.forward


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _copied(held: Any) -> Any:
    """Layers may write into what they are given; dicts that they fill are told apart by being empty at first."""
    if isinstance(held, torch.Tensor):
        return held.clone()
    if isinstance(held, (dict, collections.UserDict)):
        return type(held)()
    if isinstance(held, (tuple, list)):
        return type(held)(_copied(entry) for entry in held)
    return held


def _is_mask(held: Any, asking: int, length: int) -> bool:
    return isinstance(held, torch.Tensor) and held.dim() == 4 and held.shape[2:] == (asking, length)


def _mask(given: torch.Tensor | None, allowed: torch.Tensor) -> torch.Tensor:
    """The model's mask (causal where it gave none) with what the paths forbid taken out: [1, heads or 1, seq, seq]."""
    if given is None:
        return (allowed & torch.ones_like(allowed).tril())[None, None]
    if given.dtype == torch.bool:
        return given & allowed
    return given.masked_fill(~allowed, torch.finfo(given.dtype).min)


def _cut(held: Any, rows: torch.Tensor, length: int) -> Any:
    """The rows of a layer's argument, along every axis of the prompt's length."""
    if isinstance(held, (dict, collections.UserDict)):
        return type(held)({key: _cut(entry, rows, length) for key, entry in held.items()})
    if isinstance(held, (tuple, list)):
        return type(held)(_cut(entry, rows, length) for entry in held)
    if isinstance(held, torch.Tensor):
        for axis, size in enumerate(held.shape):
            if size == length:
                held = held.index_select(axis, rows)
    return held


def _storing(empty: Any) -> Any:
    """A cache as the model's own, of which no layer forgets what leaves its window."""
    cache = copy.deepcopy(empty)
    for index, layer in enumerate(cache.layers if cache is not None else []):
        if isinstance(layer, cache_utils.LinearAttentionAndSlidingWindowAttentionLayer):
            cache.layers[index] = cache_utils.LinearAttentionAndFullAttentionLayer(
                number_of_states=layer.number_of_states)
        elif isinstance(layer, cache_utils.DynamicSlidingWindowLayer):
            cache.layers[index] = cache_utils.DynamicLayer()
    return cache


def _keep_rows(cache: Any, rows: torch.Tensor, length: int) -> None:
    for layer in cache.layers if cache is not None else []:
        for name in ("keys", "values", "indexer_keys", "indexer_position_ids"):
            held = getattr(layer, name, None)
            if isinstance(held, torch.Tensor):
                setattr(layer, name, _cut(held, rows, length))


def fill(cache: Any, source: Any, empty: Any) -> None:
    """Put the pruned rows into the model's own cache object, whose windows then forget what they would."""
    for index, held in enumerate(source.layers):
        own = copy.deepcopy(empty.layers[index])
        if type(own) is type(held):
            own = held
        else:
            states = {name: entry for name, entry in vars(held).items() if "conv" in name or "recurrent" in name}
            vars(own).update(states)
            if held.keys is not None:
                own.update(held.keys, held.values)
        cache.layers[index] = own


@contextlib.contextmanager
def _hooks(modules: list[nn.Module], before: Callable, after: Callable | None = None) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules if after is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
