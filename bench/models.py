"""What every measurement runs on: a model, a prompt, and the three calls that answer it (tower, prefill, decode)."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PATCH, PICTURE = 14, 576
"""Pixels along a patch's side; visual tokens of one picture of LLaVA-1.5 (24 x 24)."""

TEXT_BEFORE, TEXT_AFTER = 35, 29


@dataclasses.dataclass(frozen=True)
class Scene:
    """A model and a batch of prompts of one length: text, visual tokens, text."""

    model: nn.Module
    ids: torch.Tensor
    """[batch, prompt]"""

    features: torch.Tensor
    """[batch * visual, width], what the vision tower makes of ``pixels``; or the pixels, to have the prefill see them."""

    visual: int
    """Visual tokens of each prompt."""

    pixels: torch.Tensor | None = None
    """[batch * pictures, 3, height, width]; None where the vision tower is left out."""

    positions: torch.Tensor | None = None
    """Position ids as the decoder takes them; None where it counts from 0."""

    next_position: int | None = None
    """Position of the first new token; None where it follows the prompt's length."""

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def prompt(self) -> int:
        """Tokens of each prompt."""
        return self.ids.shape[1]

    @property
    def first_visual(self) -> int:
        """The position of the first visual token."""
        return int((self.ids[0] == self.model.config.image_token_id).nonzero()[0])

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What a prefill is called with."""
        return (self.ids, self.features) if self.positions is None else (self.ids, self.features, self.positions)

    def downsampled(self, kept: int) -> Scene:
        """The same text around one picture each, made so small that it has ``kept`` visual tokens.

        Of several pictures the first stands for all: in LLaVA-NeXT it is the overview, and the others are its tiles.
        """
        height, width = rectangle(kept)
        overview = self.pixels[::self.pixels.shape[0] // self.batch]
        pixels = F.interpolate(overview.float(), (height * PATCH, width * PATCH), mode="bilinear", antialias=True)
        first = self.first_visual
        ids = torch.cat([self.ids[:, :first], self.ids[:, first:first + 1].expand(-1, kept),
                         self.ids[:, first + self.visual:]], 1)
        pixels = pixels.to(self.pixels.dtype)
        return Scene(self.model, ids, see(self.model, pixels), kept, pixels)


def rectangle(count: int) -> tuple[int, int]:
    """The most square grid of ``count`` patches, as (height, width)."""
    height = next(side for side in range(int(count**0.5), 0, -1) if count % side == 0)
    return height, count // height


@torch.no_grad()
def build_scene(model: nn.Module, visual: int, batch: int = 1, *, tower: bool = True, seed: int = 0) -> Scene:
    """Random pictures and text for a LLaVA; multiples of 576 visual tokens are so many pictures, others are one.

    Args:
        tower: False for random features in place of the vision tower's.
    """
    pictures = visual // PICTURE if visual % PICTURE == 0 else 1
    height, width = rectangle(visual // pictures)
    weight = model.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    image = model.config.image_token_id
    text = torch.randint(4, min(image, weight.shape[0]), (batch, TEXT_BEFORE + TEXT_AFTER), generator=generator)
    ids = torch.cat([text[:, :TEXT_BEFORE], torch.full((batch, visual), image), text[:, TEXT_BEFORE:]], 1)
    ids = ids.to(weight.device)
    if not tower:
        features = torch.randn(batch * visual, weight.shape[1], generator=generator).to(weight)
        return Scene(model, ids, features, visual)
    pixels = torch.randn(batch * pictures, 3, height * PATCH, width * PATCH, generator=generator).to(weight)
    return Scene(model, ids, see(model, pixels), visual, pixels)


class Tower(nn.Module):
    """Pictures to visual features, as ``generate`` runs it in front of the prefill."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[pictures, 3, height, width] to [pictures * tokens, width]."""
        return see(self.model, pixels)


def see(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Visual features, [pictures * tokens, width]."""
    found = model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True, return_dict=True)
    return torch.cat(list(found.pooler_output), 0)


class Prefill(nn.Module):
    """Embeds, merges, runs the decoder: what is timed as "prefill", for every method alike."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, features: torch.Tensor,
                positions: torch.Tensor | None = None) -> tuple[torch.Tensor, Any]:
        """Logits of the next token [batch, vocabulary], and the cache."""
        out = self.model.model.language_model(
            inputs_embeds=self.merge(ids, features), position_ids=positions, use_cache=True)
        return self.model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values

    def merge(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The decoder's input, [batch, prompt, width], from features or pixels."""
        if features.dim() == 4:
            features = see(self.model, features)
        embedded = self.model.get_input_embeddings()(ids)
        return embedded.masked_scatter((ids == self.model.config.image_token_id)[..., None], features)


class Decode(nn.Module):
    """One step of generation on a filled cache."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits [batch, vocabulary] from tokens [batch, 1] and positions as the decoder takes them; cache grows."""
        out = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(tokens), position_ids=positions, past_key_values=cache,
            use_cache=True)
        return self.model.lm_head(out.last_hidden_state[:, -1])


def step_positions(scene: Scene, step: int) -> torch.Tensor:
    """Position ids of the step-th new token: [batch, 1], or [3, batch, 1] for M-RoPE."""
    start = scene.prompt if scene.next_position is None else scene.next_position
    leading = () if scene.positions is None else scene.positions.shape[:-2]
    return torch.full((*leading, scene.batch, 1), start + step, device=scene.ids.device)


def shallow_copy(cache: Any) -> Any:
    """The same keys and values in a cache of their own, so that steps on the copy leave the first as it is."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def cache_bytes(cache: Any) -> int:
    """Memory that a cache keeps alive; tensors that share storage count once."""
    held = {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())
