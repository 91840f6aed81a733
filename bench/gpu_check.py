"""A compiled prefill against the eager reference, in float32 or within the rounding of a lower precision."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench.measuring import Built
from bench.methods import methods
from bench.models import Prefill, Scene
from tests import reference

METHODS = {method.name: method for method in methods()}
TOLERANCE = 1e-3
"""In float32; a wrong token or mask shows as 0.01 to 1."""

NOISE = 2.0
"""In bfloat16 the compiled prefill may be this many times as far from the float32 reference as the reference run in
bfloat16 is: the same arithmetic in another order."""


@dataclasses.dataclass(frozen=True)
class Check:
    """The compiled prefill against the eager reference, as relative errors of (logits, all cached keys and values)."""

    logits: float
    cache: float
    allowed_logits: float
    allowed_cache: float

    @property
    def holds(self) -> bool:
        return self.logits <= self.allowed_logits and self.cache <= self.allowed_cache


def run_reference(scene: Scene, kept: int, dtype: torch.dtype) -> reference.Prefill:
    """The eager reference of the first sample, with the scene's weights and features in ``dtype``."""
    model, text = scene.model, scene.model.model.language_model
    first = scene.features[:scene.visual]
    inputs = {"ids": scene.ids[:1], "features": first.to(dtype)}
    if scene.positions is not None:
        inputs["positions"] = scene.positions[:, :1]
    with weights_in(dtype, [text.embed_tokens, *text.layers, text.norm, model.lm_head]):
        return reference.prefill(
            Prefill(model), text.layers, lambda hidden: model.lm_head(text.norm(hidden)), inputs,
            scene.ids[:1] == model.config.image_token_id, stages=METHODS["parvts"].stages(kept),
            grid=inputs.get("positions"))[0]


@contextlib.contextmanager
def weights_in(dtype: torch.dtype, modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While active, each module has its parameters in ``dtype`` for as long as it runs: a whole model in float32 may not fit.

    Parameters alone: tables of angles are float32 in any model.
    """
    held: dict[torch.nn.Parameter, torch.Tensor] = {}

    def before(module: torch.nn.Module, _: Any) -> None:
        for parameter in module.parameters():
            held[parameter] = parameter.data
            parameter.data = parameter.data.to(dtype)

    def after(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters():
            parameter.data = held.pop(parameter)

    hooks = [hook for module in modules for hook in (
        module.register_forward_pre_hook(before, prepend=True), module.register_forward_hook(after, always_call=True))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def distance(logits: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor],
             expected: reference.Prefill) -> tuple[float, float]:
    """Relative errors of the next token's logits, and of the worst cached tensor."""
    pairs = [*zip(keys, expected.keys, strict=True), *zip(values, expected.values, strict=True)]
    return reference.relative_error(logits, expected.logits[-1]), max(reference.relative_error(*pair) for pair in pairs)


def check(built: Built, exact: reference.Prefill, rounded: reference.Prefill | None) -> Check:
    """Args:
        exact: the reference in float32.
        rounded: the reference in the model's own precision, where that is a lower one.
    """
    logits, cache = built.run_prefill()
    keys, values = [layer.keys[:1] for layer in cache.layers], [layer.values[:1] for layer in cache.layers]
    found = distance(logits[0], keys, values, exact)
    if rounded is None:
        return Check(*found, TOLERANCE, TOLERANCE)
    noise = distance(rounded.logits[-1], rounded.keys, rounded.values, exact)
    return Check(*found, NOISE * noise[0], NOISE * noise[1])
