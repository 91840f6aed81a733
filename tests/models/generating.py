"""Hold a model, compiled, against the eager reference: forward and generate."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch.fx import GraphModule

import parvts_fx
from parvts_fx import Stage
from parvts_fx.backends.parvts import parvts
from parvts_fx.rewritten import Rewriting
from parvts_fx.runtime.caches import find_caches
from tests.models.oracle import Oracle, decoder_layers, fill, hooked
from tests.models.registry import Built, stands_for_features
from tests.reference import one_stage, relative_error

COMPILED = dict(lowering="eager", strict=True)
SCHEDULES = "attention", "0.4", "two stages", "merged"
"""What every architecture is held against the reference with: one stage with either fusion, :func:`two_stages`, and one whose
dropped tokens are merged (:func:`merging`)."""
TWO_STAGES, MERGED = SCHEDULES[2:]


def scattered(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Scores that depend on the visual tokens' order alone, whatever stands in front of them."""
    return (visual.long().cumsum(1) * 37 % 101).float()


def cache_tensors(cache: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that a cache holds: keys and values, states of scans and convolutions."""
    for index, layer in enumerate(cache.layers):
        for name, held in vars(layer).items():
            entries = held.items() if isinstance(held, dict) else [("", held)]
            for key, entry in entries:
                if isinstance(entry, torch.Tensor) and entry.numel() and entry.is_floating_point():
                    yield f"{index}.{name}{key}", entry


def logit_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """As :func:`relative_error`, leaving out words that both forbid by the most negative number."""
    forbidden = torch.finfo(wanted.dtype).min
    if actual.shape == wanted.shape:
        both = (actual == forbidden) & (wanted == forbidden)
        actual, wanted = actual.masked_fill(both, 0), wanted.masked_fill(both, 0)
    return relative_error(actual, wanted)


def cache_error(actual: Any, wanted: Any) -> float:
    ours, theirs = dict(cache_tensors(actual)), dict(cache_tensors(wanted))
    if ours.keys() != theirs.keys():
        return math.inf
    return max((relative_error(ours[name], theirs[name]) for name in ours), default=0.0)


def run_generate(model: Any, inputs: Mapping[str, Any], steps: int) -> Any:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
                              return_dict_in_generate=True)


def cache_lengths(cache: Any) -> list[int]:
    """Entries per layer of every layer that holds keys."""
    return [layer.keys.shape[-2] for layer in cache.layers if getattr(layer, "keys", None) is not None]


def cache_entries(cache: Any) -> int:
    """How many numbers a cache holds, whatever its layers call what they hold."""
    return sum(held.numel() for _, held in cache_tensors(cache))


class Captured:
    """A compiled model that Dynamo captures once for several choices of options, until Dynamo is reset.

    Every graph is handed to the backend "parvts" once for each choice; what runs is the result for one of them.
    """

    def __init__(self, model: Any, *choices: Mapping[str, Any]):
        self.model, self.choices, self._chosen = model, choices, 0
        self.merging: dict[str, None] = {}
        """What takes part in merging, for choices that merge: in what order it was found."""
        with mock.patch.object(parvts_fx.api, "parvts", self._backend):
            parvts_fx.compile(model, **COMPILED, **choices[0])
        self._parts = {part: part._compiled_call_impl for part in model.modules() if part._compiled_call_impl}
        self._noting = vars(model).get("generate")
        self._switch(False)

    def _backend(self, module: GraphModule, example_inputs: Sequence[object], *, options: Any, **settings: Any) -> Callable:
        def note(_: object, __: object, done: Rewriting) -> None:
            self.merging |= dict.fromkeys(done.report.merging)

        settings["on_rewriting"] = note
        each = [parvts(module, example_inputs, options={**COMPILED, **choice}, **settings) for choice in self.choices]
        return lambda *inputs: each[self._chosen](*inputs)

    def _switch(self, on: bool) -> None:
        """Let the model, and what its ``generate`` calls, run compiled or not."""
        for module, compiled in self._parts.items():
            module._compiled_call_impl = compiled if on else None
        vars(self.model).pop("generate", None)
        if on and self._noting is not None:
            self.model.generate = self._noting

    @contextlib.contextmanager
    def running(self, options: Mapping[str, Any]) -> Iterator[Any]:
        """The model, compiled with one of the choices, in this context only."""
        self._chosen = self.choices.index(options)
        self._switch(True)
        try:
            yield self.model
        finally:
            self._switch(False)


class Comparison:
    """One model, compiled with one choice of options, against the reference with the same.

    Args:
        captured: the model, compiled with these options among others. None: it is compiled on entering the context.
    """

    def __init__(self, built: Built, *, keep_ratio: float = 0.25, fusion: str | float = "attention", depth: int = 1,
                 stages: Sequence[Stage] | None = None, captured: Captured | None = None):
        self.built, self.model, self._captured = built, built.model, captured
        self.options = dict(stages=stages) if stages else dict(
            keep_ratio=keep_ratio, migration_depth=depth, fusion=fusion, score=scattered, merge=None)
        turns = stages or one_stage(scattered, depth, keep_ratio, fusion=fusion, merge=None)
        called = getattr(built.model, built.part) if built.part else built.model
        self.oracle, self.generating = (Oracle(module, built.token, turns) for module in (built.model, called))

    def __enter__(self) -> Comparison:
        self._captured = Captured(self.model, self.options)
        return self

    def __exit__(self, *_: object) -> None:
        self._captured = None

    def forward(self, inputs: Mapping[str, Any]) -> float:
        """Largest relative error over all logits of the rows that live and every cache tensor."""
        wanted = self.oracle.prefill(inputs)
        cache = {} if self.oracle.makes_cache else {"past_key_values": self.oracle.fresh_cache()}
        with torch.no_grad(), self._captured.running(self.options) as model:
            actual = model(**inputs, use_cache=True, **cache)
        if any(stage.merge for stage in self.oracle.stages) and self._tell_steps(self.oracle):
            wanted = self.oracle.prefill(inputs)
        error = logit_error(actual.logits, wanted.logits)
        (held,) = find_caches(actual, cache)
        return max(error, cache_error(held, self._as_cached(wanted)))

    def _tell_steps(self, oracle: Oracle) -> bool:
        """Tell the reference which steps of merging the model has a place for; whether these are not all."""
        oracle.counts_keys, oracle.mixes_values = (word in self.merging for word in ("log n", "caches in front"))
        return not (oracle.counts_keys and oracle.mixes_values)

    @property
    def merging(self) -> str:
        """Which steps of merging the model gets."""
        return "; ".join(self._captured.merging)

    @property
    def kept(self) -> int:
        """Rows that the reference's last prefill for generate kept."""
        return self.generating.rows

    def _as_cached(self, wanted: Any) -> Any:
        cache = copy.deepcopy(self.oracle.empty)
        fill(cache, wanted.cache, self.oracle.empty)
        return cache

    def generate(self, inputs: Mapping[str, Any], steps: int = 3) -> float:
        """Largest relative error over every step's logits and every cache tensor; infinite if a token differs."""
        self.generating.rows = 0
        actual = self.run_compiled(inputs, steps)
        self._tell_steps(self.generating)
        wanted = self.run_reference(inputs, steps)
        errors = [logit_error(ours, theirs) for ours, theirs in zip(actual.logits, wanted.logits, strict=True)]
        errors.append(cache_error(actual.past_key_values, wanted.past_key_values))
        if not self.kept:
            raise LookupError("generate does not call the model's forward")
        if actual.sequences.tolist() != wanted.sequences.tolist():
            errors.append(math.inf)
        return max(errors)

    def run_reference(self, inputs: Mapping[str, Any], steps: int) -> Any:
        if self.built.part and self.built.token is not None:
            self.generating.visual = stands_for_features(inputs["input_ids"], self.built.token)
        with self.generating.installed():
            return run_generate(self.model, inputs, steps)

    def run_compiled(self, inputs: Mapping[str, Any], steps: int) -> Any:
        with self._captured.running(self.options) as model:
            return run_generate(model, inputs, steps)


def whole_layers(built: Built) -> int:
    """How many of the first layers run all rows of the prompt, in generate too: some models then go on with the last row."""
    layers, lengths = decoder_layers(built.model), dict[int, int]()

    def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        lengths.setdefault(layers.index(module), hidden.shape[-2])

    if built.generates:
        with hooked(layers, before):
            run_generate(built.model, built.inputs, 1)
    return sum(length == lengths[0] for length in lengths.values()) or len(layers)


def two_stages(built: Built) -> tuple[Stage, Stage]:
    """Half of the visual tokens from layer 1 on; a quarter from a late layer on, by the attention in the layer in front of it
    where that shows attention and leaves no choice to rounding."""
    last = len(decoder_layers(built.model)) - 1
    with contextlib.suppress(Exception):  # told where the reference is asked for more than where to choose
        for at in range(whole_layers(built) - 1, 0, -1):
            stages = Stage(at=0, keep=0.5, rule=scattered, migrate=1 if at > 1 else 0), Stage(at=at, keep=0.25, rule="last_row")
            with contextlib.suppress(LookupError):
                Oracle(built.model, built.token, stages).prefill(built.inputs)
                return stages
    return Stage(at=0, keep=0.5, rule=scattered, migrate=1), Stage(at=last, keep=0.25, rule="uniform")


def merging(built: Built) -> tuple[Stage]:
    """A quarter of the tokens, chosen at layer 1 where all rows run through more layers, the others merged one layer later.

    At layer 0 where the model's list has entries in which no tokens meet: to the product these belong to the entry before.
    """
    kinds = getattr(built.model.config.get_text_config(decoder=True), "layers_block_type", ())
    at = 0 if {"moe", "mlp"} & set(kinds) else max(0, min(1, whole_layers(built) - 2))
    return (Stage(at=at, keep=0.25, rule=scattered, migrate=1, merge="clusters"),)


def compared(built: Built) -> dict[str, Comparison]:
    """A model with the schedules that every architecture is held against the reference with, captured once for all."""
    given: tuple[dict[str, Any], ...] = (
        {}, dict(fusion=0.4), dict(stages=two_stages(built)), dict(stages=merging(built)))
    captured = Captured(built.model, *(Comparison(built, **schedule).options for schedule in given))
    return {name: Comparison(built, **schedule, captured=captured) for name, schedule in zip(SCHEDULES, given, strict=True)}
