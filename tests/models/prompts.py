"""Other prompts for a builder's model: a longer one, a batch of two with left padding, and one of samples that differ."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Inputs = dict[str, torch.Tensor]


def longer(inputs: Mapping[str, torch.Tensor], extra: int = 7) -> Inputs:
    """The prompt with more text at the end."""
    ids = inputs["input_ids"]
    words = torch.randint(4, 90, (1, extra), generator=torch.Generator().manual_seed(4))

    def grow(name: str, held: torch.Tensor) -> torch.Tensor:
        if held.dim() < 2 or held.shape[1] != ids.shape[1] or not is_per_token(held, ids):
            return held
        if name == "input_ids":
            return torch.cat([held, words], 1)
        fill = held[:, -1:].expand(-1, extra, *held.shape[2:])
        return torch.cat([held, fill], 1)

    return {name: grow(name, held) for name, held in inputs.items()}


def is_per_token(held: torch.Tensor, ids: torch.Tensor) -> bool:
    return held.shape[:2] == ids.shape and not (held.is_floating_point() and held.dim() > 3)


def second(inputs: Mapping[str, torch.Tensor], shorter: int = 3) -> Inputs:
    """A prompt of the same kind with less text at the end and another image."""
    ids = inputs["input_ids"]

    def other(held: torch.Tensor) -> torch.Tensor:
        if held.dim() >= 2 and is_per_token(held, ids):
            return held[:, :-shorter]
        return 0.5 * held if held.is_floating_point() else held

    return {name: other(held) for name, held in inputs.items()}


def batch(inputs: Mapping[str, torch.Tensor], shorter: int = 3) -> Inputs:
    """The prompt and the second one, which has padding on its left."""
    ids, others = inputs["input_ids"], second(inputs, shorter)

    def join(held: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if held.shape != other.shape:
            other = torch.cat([torch.zeros_like(held[:, :shorter]), other], 1)
        return torch.cat([held, other])

    return {name: join(held, others[name]) for name, held in inputs.items() if held.dim() or ids is held}


def mixed(inputs: Mapping[str, torch.Tensor], shorter: int = 3) -> tuple[Inputs, list[Inputs]]:
    """A batch of the prompt, the second one with padding on its left, and text without a picture; and each by itself."""
    ids, two = inputs["input_ids"], batch(inputs, shorter)
    words = torch.randint(4, 90, ids.shape, generator=torch.Generator().manual_seed(9))

    def text(name: str, held: torch.Tensor) -> torch.Tensor:
        return words if name == "input_ids" else torch.ones_like(held) if name == "attention_mask" else torch.zeros_like(held)

    def third(name: str, held: torch.Tensor) -> list[torch.Tensor]:
        return [text(name, held)] if held.dim() > 1 and is_per_token(held, ids) else []

    joined = {name: torch.cat([two[name], *third(name, inputs[name])]) for name in two}
    alone = {name: text(name, inputs[name]) for name in ("input_ids", "attention_mask")}
    return joined, [dict(inputs), second(inputs, shorter), alone]
