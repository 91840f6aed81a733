"""Hold a model, compiled, against the eager reference: forward and generate."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import parvts_fx
from parvts_fx.runtime.caches import find_caches
from tests.models.oracle import Oracle, fill
from tests.models.registry import Built, stands_for_features
from tests.reference import relative_error


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


class Comparison:
    """One model, compiled with one choice of options, against the reference with the same."""

    def __init__(self, built: Built, *, keep_ratio: float = 0.25, fusion: str | float = "attention", depth: int = 1):
        self.built, self.model = built, built.model
        self.options = dict(keep_ratio=keep_ratio, migration_depth=depth, fusion=fusion)
        called = getattr(built.model, built.part) if built.part else built.model
        self.oracle, self.generating = (
            Oracle(module, built.token, depth=depth, keep_ratio=keep_ratio, score=scattered, fusion=fusion)
            for module in (built.model, called))

    def __enter__(self) -> Comparison:
        parvts_fx.compile(self.model, lowering="eager", strict=True, score=scattered, **self.options)
        self._compiled = {part: part._compiled_call_impl for part in self.model.modules() if part._compiled_call_impl}
        self.compiled = self._compiled[self.model]
        self._noting = vars(self.model).get("generate")
        self._switch(False)
        return self

    def __exit__(self, *_: object) -> None:
        self._switch(False)

    def _switch(self, on: bool) -> None:
        """Let the model, and what its ``generate`` calls, run compiled or not."""
        for module, compiled in self._compiled.items():
            module._compiled_call_impl = compiled if on else None
        vars(self.model).pop("generate", None)
        if on and self._noting is not None:
            self.model.generate = self._noting

    def forward(self, inputs: Mapping[str, Any]) -> float:
        """Largest relative error over all logits of path A and every cache tensor."""
        wanted = self.oracle.prefill(inputs)
        cache = {} if self.oracle.makes_cache else {"past_key_values": self.oracle.fresh_cache()}
        with torch.no_grad():
            actual = self.compiled(**inputs, use_cache=True, **cache)
        error = logit_error(actual.logits, wanted.logits)
        (held,) = find_caches(actual, cache)
        return max(error, cache_error(held, self._as_cached(wanted)))

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
        wanted = self.run_reference(inputs, steps)
        actual = self.run_compiled(inputs, steps)
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
        self._switch(True)
        try:
            return run_generate(self.model, inputs, steps)
        finally:
            self._switch(False)
