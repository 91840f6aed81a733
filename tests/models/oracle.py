"""The eager reference of any schedule for any Hugging Face model: its own layers, run one by one on chosen rows.

One sample at a time, no graph and no compilation. A first eager run records what every layer is called with. Then the
layers are run on the rows that live, with block masks in place of separate attention calls; at the end the model's own
forward finishes from the last layer's output.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import cache_utils

from parvts_fx import Stage
from parvts_fx.scores import layers_ahead
from tests.clusters_reference import Clusters, clusters_of, counting, pictures_of
from tests.models.registry import stands_for_features
from tests.reference import CACHE, READINGS, Placed, chosen, placed, watched

_TOWERS = ("vision", "visual", "audio", "tower", "perceiver", "vqmodel", "qformer", "image_", "projector")
_LISTS = ("layers", "h", "layer", "blocks")

CLEAR = 1e-4
"""How far apart the last token that stays and the first that goes must be, as a share of the largest score."""


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
    """[1, rows that live at the end, vocabulary]"""
    cache: Any
    """The cache of these rows, with every layer's keys in full."""
    dropped: int


@dataclasses.dataclass
class _Path:
    """Some of the prompt's rows on their way through the layers."""

    rows: torch.Tensor
    hidden: torch.Tensor
    cache: Any
    shared: dict[str, Any]
    """What layers have filled for later ones, by the argument's name."""
    sizes: torch.Tensor
    """[rows]: how many tokens each stands for."""
    weights: torch.Tensor | None = None
    """[heads, rows, rows] in the layer behind which they stand, where that was watched."""
    entered: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    """What has entered each layer so far, by its number: models may keep it for later layers to choose among."""


class Oracle:
    """Args: ``stages`` count the entries of the model's own list of layers. Their rules look at positions or at attention
    weights, not at hidden states: models differ in what they make of the merged embeddings before the first layer."""

    def __init__(self, model: Any, token: int | tuple[int, ...] | None, stages: Sequence[Stage]):
        self.model, self.token, self.stages = model, token, stages
        self.visual: torch.Tensor | None = None
        """Where visual tokens stand in a prompt that comes as embeddings alone."""
        self.layers = decoder_layers(model)
        self.counts_keys, self.mixes_values = True, True
        """Whether a model has a place for these steps of merging: logits to add to, caches that hold values alone."""

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

        with hooked(self.layers, before, after), torch.no_grad():
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
        """The pruned prefill of one sample without padding.

        Raises:
            LookupError: it cannot be told what the result is to be.
        """
        with self.model.device:  # of what is made on the way
            return self._prefill(inputs)

    def _prefill(self, inputs: Mapping[str, Any]) -> Pruned:
        self.calls, self.empty = self._record(inputs)
        hidden = self.calls[0].hidden
        self.axis = 1 if hidden.dim() == 3 else next(i for i, n in enumerate(hidden.shape) if n > 4)
        self.length = hidden.shape[self.axis]
        self.seen = self._visual(inputs, self.length)[0]
        if not self.seen.any():
            raise LookupError("no visual token stands in the decoder's sequence")
        turns, done = placed(self.stages, len(self.layers)), 0
        read_at = [turn.begin for turn in turns if turn.stage.rule in READINGS]
        path = _Path(torch.arange(self.length), hidden, _storing(self.empty), {}, torch.ones(self.length))
        with torch.no_grad():
            for turn in turns:
                if self.calls[turn.begin].hidden.shape[self.axis] < self.length:
                    raise LookupError(f"layer {turn.begin} runs the last rows alone")
                path = self._through(path, done, turn.begin, watch=turn.begin in read_at)
                streams = path.hidden.reshape(-1, *path.hidden.shape[self.axis:])
                subject, gap = chosen(
                    turn.stage, streams[0], path.rows, self.seen, path.weights, ahead=self._ahead(path, turn))
                if gap < CLEAR:
                    raise LookupError(f"the choice at layer {turn.begin} is about rounding")
                path, done = self._migrated(path, turn, subject, watch=turn.end in read_at), turn.end
            path = self._through(path, done, len(self.layers))
            logits = self._finish(inputs, path)
        self.rows = len(path.rows)
        return Pruned(logits, path.cache, self.length - self.rows)

    def _ahead(self, path: _Path, turn: Placed) -> list[torch.Tensor]:
        """[heads, rows, rows] of each layer with attention that the rule looks ahead to, were these states its input."""
        found: list[torch.Tensor] = []
        layers = range(turn.begin, min(len(self.layers), turn.begin + layers_ahead(turn.stage.rule)))
        if not layers:
            return found
        beside = dataclasses.replace(path, cache=copy.deepcopy(path.cache), shared=dict(path.shared))
        stream = path.hidden - self._own(turn.begin, path.rows)
        for layer in layers:
            beside = dataclasses.replace(beside, hidden=stream + self._own(layer, path.rows))
            with contextlib.suppress(LookupError):
                found.append(self._through(beside, layer, layer + 1, watch=True).weights)
        return found

    def _migrated(self, path: _Path, turn: Placed, subject: torch.Tensor, watch: bool) -> _Path:
        """The path behind a stage, the non-subject rows gone; ``subject`` is [rows] bool."""
        text = ~self.seen[path.rows]
        stays = text | subject
        if turn.has_copies and not stays.all():
            a, b = (self._through(self._only(path, at), turn.begin, turn.end, watch=watch) for at in (stays, ~subject))
            text_a, text_b = (text[at].nonzero()[:, 0] for at in (stays, ~subject))
            share = turn.stage.fusion
            fused = share * a.hidden.index_select(self.axis, text_a) + (1 - share) * b.hidden.index_select(self.axis, text_b)
            return dataclasses.replace(a, hidden=a.hidden.index_copy(self.axis, text_a, fused))
        apart = torch.zeros(self.length, self.length, dtype=torch.bool)
        if turn.stage.paths == "parallel":
            one, other = path.rows[subject], path.rows[~stays]
            apart[one[:, None], other] = apart[other[:, None], one] = True
        last = max(turn.begin, turn.end - 1)
        entering = self._through(path, turn.begin, last, apart)
        behind = self._through(entering, last, turn.end, apart, watch)
        if turn.stage.merge is not None and not stays.all():
            stream = (path.hidden - self._own(turn.begin, path.rows)).movedim(self.axis, 0).flatten(1)
            found = clusters_of(stream, self.seen[path.rows], subject, pictures_of(self.seen)[path.rows], path.sizes)
            if found.gap < CLEAR:
                raise LookupError("which kept token is the nearest is about rounding")
            behind = self._merged(behind, found, entering.hidden - self._own(last, path.rows), turn)
        return self._only(behind, stays)

    def _merged(self, path: _Path, found: Clusters, entering: torch.Tensor, turn: Placed) -> _Path:
        """With what kept rows take over: of the states that entered the last layer of all rows, and of cached values."""
        cache = copy.deepcopy(path.cache)
        for layer in cache.layers[:turn.end] if cache is not None and self.mixes_values else []:
            held = getattr(layer, "values", None)
            if held is not None and held.dim() == 4 and held.shape[2] == len(path.rows) and not torch.equal(held, layer.keys):
                layer.values = found.shifted(held, self.seen[path.rows])
        if turn.end == len(self.layers):
            return dataclasses.replace(path, cache=cache, sizes=found.sizes)
        moved = found.taken_over(entering.movedim(self.axis, -2)).movedim(-2, self.axis)
        return dataclasses.replace(path, hidden=path.hidden + moved - entering, cache=cache, sizes=found.sizes)

    def _only(self, path: _Path, at: torch.Tensor) -> _Path:
        """The rows where ``at`` [rows] bool is true, beside the path that was."""
        count, at, cache = len(path.rows), at.nonzero()[:, 0], copy.deepcopy(path.cache)
        _keep_rows(cache, at, count)
        shared = {name: _cut(held, at, count) for name, held in path.shared.items()}
        weights = None if path.weights is None else path.weights[:, at][:, :, at]
        entered = {index: held.index_select(self.axis, at) for index, held in path.entered.items()}
        return _Path(path.rows[at], path.hidden.index_select(self.axis, at), cache, shared, path.sizes[at], weights, entered)

    def _through(self, path: _Path, begin: int, end: int, apart: torch.Tensor | None = None, watch: bool = False) -> _Path:
        """The path behind layer ``end - 1``; ``apart`` [seq, seq] is what the groups do not see of each other."""
        allowed = torch.ones(self.length, self.length, dtype=torch.bool) if apart is None else ~apart
        for index in range(begin, end):
            watching = watch and index == end - 1
            with watched() if watching else contextlib.nullcontext([]) as weights:
                hidden = self._run(index, path, allowed)
            if watching and (not weights or weights[-1].shape[-2:] != (len(path.rows),) * 2):
                raise LookupError(f"layer {index} shows no attention of every row to every row")
            path = dataclasses.replace(
                path, hidden=hidden, weights=weights[-1][0] if weights else None, entered={**path.entered, index: path.hidden})
        return path

    def _visual(self, inputs: Mapping[str, Any], length: int) -> torch.Tensor:
        ids = inputs.get("input_ids")
        if ids is None:
            return self.visual
        if self.token is not None:
            return stands_for_features(ids, self.token)
        if "image_embeds_position_mask" in inputs:
            return inputs["image_embeds_position_mask"] == 1
        return (torch.arange(length) < length - ids.shape[1])[None]  # features stand in front of the text

    def _run(self, index: int, path: _Path, allowed: torch.Tensor) -> torch.Tensor:
        call, layer, length = self.calls[index], self.layers[index], self.length
        hidden, rows, cache = path.hidden, path.rows, path.cache
        asking = call.hidden.shape[self.axis]
        if asking < length:  # from here on the model goes on with its last rows alone
            hidden = hidden.narrow(self.axis, hidden.shape[self.axis] - asking, asking)

        def own(name: str, held: Any) -> Any:
            if isinstance(held, cache_utils.Cache):
                return cache
            if isinstance(held, (dict, collections.UserDict)):  # filled by layers, read by later ones
                return path.shared.setdefault(name, type(held)())
            if attends and (held is None and name == "attention_mask" or _is_mask(held, asking, length)):
                mask = _mask(held, allowed[length - asking:])
                return (mask.index_select(2, rows) if asking == length else mask).index_select(3, rows)
            kept = self._kept(held, index, path)
            return _cut(held, rows, length) if kept is None else kept

        attends = self._attends(index, cache)
        if attends and not allowed.all() and not _takes_mask(call, asking, length):
            return self._by_group(index, path, allowed)
        kwargs = {name: own(name, held) for name, held in call.kwargs.items()}
        args = tuple(own(str(place), held) for place, held in enumerate(call.args))
        sizes = path.sizes if self.counts_keys else torch.ones_like(path.sizes)
        with counting(sizes, ~self.seen[rows]):
            output = _first(layer(hidden, *args, **kwargs))
        return output + self._added(index + 1, rows) if output.shape[self.axis] == len(rows) else output

    def _kept(self, held: Any, index: int, path: _Path) -> torch.Tensor | None:
        """What has entered earlier layers, laid side by side on an axis of its own, as these rows have it; None for all else."""
        first = self.calls[0].hidden
        if not isinstance(held, torch.Tensor) or held.dim() != first.dim() + 1 or not held.numel():
            return None
        layers = [next((layer for layer in range(index) if torch.equal(self.calls[layer].hidden, state)), None)
                  for state in held.unbind(-2)] if held[..., 0, :].shape == first.shape else [None]
        return None if None in layers else torch.stack([path.entered[layer] for layer in layers], -2)

    def _by_group(self, index: int, path: _Path, allowed: torch.Tensor) -> torch.Tensor:
        """A layer that is given no mask of pairs: a group's rows come from a run on what they see, others from one on all."""
        whole, seen = torch.ones_like(allowed), allowed[path.rows][:, path.rows]
        groups = [(see, (seen == see).all(1)) for see in seen.unique(dim=0) if not see.all()]
        parts = [(self._run(index, self._only(path, see), whole), see, own) for see, own in groups]
        output = self._run(index, path, whole)
        for part, see, own in parts:
            rows = part.index_select(self.axis, own[see].nonzero()[:, 0])
            output = output.index_copy(self.axis, own.nonzero()[:, 0], rows)
        return output

    def _added(self, index: int, rows: torch.Tensor) -> torch.Tensor | float:
        """What the model adds to the stream between layers, in front of this one."""
        if not 0 < index < len(self.layers) or self.calls[index].hidden.shape != self.calls[index - 1].output.shape:
            return 0.0
        return (self.calls[index].hidden - self.calls[index - 1].output).index_select(self.axis, rows)

    def _own(self, index: int, rows: torch.Tensor) -> torch.Tensor | float:
        """The same where it happens in front of every layer but the first: then it counts as the layer's own."""
        each = [self._added(layer, rows) for layer in range(1, len(self.layers))]
        return self._added(index, rows) if all(isinstance(added, torch.Tensor) and added.any() for added in each) else 0.0

    def _attends(self, index: int, cache: Any) -> bool:
        held = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        return not (isinstance(held, cache_utils.LinearAttentionLayer) and not isinstance(held, cache_utils.DynamicLayer))

    def _finish(self, inputs: Mapping[str, Any], path: _Path) -> torch.Tensor:
        """The model's own forward from the last layer's output, and from what it has kept of earlier ones."""

        def replace(module: nn.Module, args: tuple, output: Any) -> Any:
            return (path.hidden, *output[1:]) if isinstance(output, tuple) else path.hidden

        def give(module: nn.Module, args: tuple) -> Any:
            kept = [self._kept(held, len(self.layers), path) for held in args]
            return tuple(held if own is None else own for held, own in zip(args, kept))

        inside = {part for layer in self.layers for part in layer.modules()}
        behind = [module for module in self.model.modules() if module not in inside]
        handles = [self.layers[-1].register_forward_hook(replace), *(module.register_forward_pre_hook(give) for module in behind)]
        try:
            return self.model(**inputs).logits
        finally:
            for handle in handles:
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


def _takes_mask(call: Call, asking: int, length: int) -> bool:
    """Whether a layer is given a mask of pairs, or may be."""
    given = {**call.kwargs, **{str(place): held for place, held in enumerate(call.args)}}
    return any(name == "attention_mask" and held is None or _is_mask(held, asking, length) for name, held in given.items())


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
            words = "conv", "recurrent", "previous_state"
            states = {name: entry for name, entry in vars(held).items() if any(word in name for word in words)}
            vars(own).update(states)
            if held.keys is not None:
                own.update(held.keys, held.values)
        cache.layers[index] = own


@contextlib.contextmanager
def hooked(modules: list[nn.Module], before: Callable, after: Callable | None = None) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules if after is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
