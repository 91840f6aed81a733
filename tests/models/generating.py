"""Hold ``generate`` on any Hugging Face model against the eager reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import parvts_fx
from parvts_fx.scores import diverse
from tests import reference

VISION = ("vision", "visual", "audio", "tower")


def decoder_of(model: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """The text model's layers and its final norm, by the names that the tests' models give them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("layers") and not any(word in name for word in VISION):
            parent = model.get_submodule(name.rsplit(".", 1)[0])
            return list(module), parent.norm
    raise LookupError("no decoder layers in this model")


class Oracle:
    """The reference with a tail that is the model's own: its final norm is fed the pruned rows."""

    def __init__(self, model: Any, token: int, **options: Any):
        self.model, self.token, self.options = model, token, options
        self.layers, self.norm = decoder_of(model)

    def prefill(self, inputs: dict[str, Any]) -> list[reference.Prefill]:
        return reference.prefill(self.model, self.layers, self.tail(inputs), inputs, inputs["input_ids"] == self.token,
                                 score=diverse, **self.options)

    def tail(self, inputs: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        forward = self.model.forward

        def finish(hidden: torch.Tensor) -> torch.Tensor:
            hook = self.norm.register_forward_pre_hook(lambda module, args: (hidden,))
            try:
                return forward(**inputs).logits
            finally:
                hook.remove()

        return finish

    def generate(self, inputs: dict[str, Any], steps: int) -> Any:
        with reference.pruned(self.model, self.prefill, self.token), torch.no_grad():
            return _generate(self.model, inputs, steps)


def _generate(model: Any, inputs: dict[str, Any], steps: int) -> Any:
    return model.generate(**inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True)


def largest_error(model: Any, inputs: dict[str, Any], token: int, *, steps: int = 3, **options: Any) -> tuple[float, int]:
    """(largest relative error over every step's logits and every cache tensor, rows that the prefill kept)."""
    keep = {name: held for name, held in options.items() if name != "migration_depth"}
    wanted = Oracle(model, token, depth=options["migration_depth"], **keep).generate(inputs, steps)
    parvts_fx.compile(model, lowering="eager", strict=True, score=diverse, **options)
    try:
        with torch.no_grad():
            actual = _generate(model, inputs, steps)
    finally:
        model._compiled_call_impl = None
    errors = [reference.relative_error(ours, theirs) for ours, theirs in zip(actual.logits, wanted.logits, strict=True)]
    for ours, theirs in zip(actual.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        errors += [reference.relative_error(ours.keys, theirs.keys), reference.relative_error(ours.values, theirs.values)]
    if actual.sequences.tolist() != wanted.sequences.tolist():
        errors.append(float("inf"))
    return max(errors), max(layer.keys.shape[-2] for layer in actual.past_key_values.layers) - steps + 1
