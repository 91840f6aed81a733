"""A vision-language model in plain PyTorch, as small projects write them: nothing of transformers, nothing of ours.

A vision transformer, whose features are shuffled to fewer and wider ones and projected; a decoder with grouped keys, rotary
positions and a cache that is a list of dicts. Features take the place of the embeddings of placeholder ids by assignment.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_TOKEN, VOCABULARY = 1, 67
WIDTH, HEADS, GROUPS, HEAD_DIM, LAYERS = 48, 4, 2, 12, 3
PIXELS, PATCH, SEEING, SHUFFLED = 32, 4, 24, 2
TOKENS = (PIXELS // PATCH // SHUFFLED)**2
"""Visual tokens of a picture."""

Cache = dict[str, Tensor]


class SeeingBlock(nn.Module):
    def __init__(self, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(SEEING), nn.LayerNorm(SEEING)
        self.qkv, self.out = nn.Linear(SEEING, 3 * SEEING), nn.Linear(SEEING, SEEING)
        self.up, self.down = nn.Linear(SEEING, 40), nn.Linear(40, SEEING)

    def forward(self, x: Tensor) -> Tensor:
        batch, patches, width = x.shape
        query, key, value = (
            part.view(batch, patches, self.heads, -1).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, dim=-1))
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, patches, width)
        x = x + self.out(seen)
        return x + self.down(F.gelu(self.up(self.second(x)), approximate="tanh"))


class Vision(nn.Module):
    """[pictures, 3, side, side] to [pictures, patches, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, SEEING, PATCH, stride=PATCH)
        self.places = nn.Parameter(torch.zeros(1, (PIXELS // PATCH)**2, SEEING))
        self.blocks, self.norm = nn.ModuleList(SeeingBlock() for _ in range(2)), nn.LayerNorm(SEEING)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Projector(nn.Module):
    """Squares of neighbouring features side by side as one, [pictures, tokens, decoder's width]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SEEING * SHUFFLED**2, WIDTH, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        pictures, patches, width = features.shape
        side = int(patches**0.5)
        grid = features.view(pictures, side // SHUFFLED, SHUFFLED, side // SHUFFLED, SHUFFLED, width).transpose(2, 3)
        return self.linear(grid.reshape(pictures, patches // SHUFFLED**2, width * SHUFFLED**2))


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cosine.unsqueeze(1) + torch.cat([-right, left], dim=-1) * sine.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False), nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)
        self.key, self.value = (nn.Linear(WIDTH, GROUPS * HEAD_DIM, bias=False) for _ in range(2))

    def forward(
        self, x: Tensor, cosine: Tensor, sine: Tensor, real: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Cache]:
        """``real`` [batch, keys]: which are no padding."""
        batch, asking, _ = x.shape
        query, key, value = (
            linear(x).view(batch, asking, -1, HEAD_DIM).transpose(1, 2) for linear in (self.query, self.key, self.value))
        query, key = rotated(query, cosine, sine), rotated(key, cosine, sine)
        if cache is not None:
            key, value = torch.cat([cache["key"], key], dim=2), torch.cat([cache["value"], value], dim=2)
        cache = {"key": key, "value": value}
        key, value = (part.repeat_interleave(HEADS // GROUPS, dim=1) for part in (key, value))
        keys, mask = key.shape[2], None
        if real is not None:
            mask = torch.zeros(batch, 1, 1, keys, dtype=x.dtype, device=x.device).masked_fill(
                real[:, None, None, :keys] == 0, torch.finfo(x.dtype).min)
            if asking > 1:
                ahead = torch.ones(asking, keys, dtype=torch.bool, device=x.device).triu(1)
                mask = mask.masked_fill(ahead, float("-inf"))
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None and asking == keys > 1)
        return self.out(seen.transpose(1, 2).contiguous().view(batch, asking, -1)), cache


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.gate, self.up, self.down = (nn.Linear(*sizes, bias=False) for sizes in ((WIDTH, 56), (WIDTH, 56), (56, WIDTH)))

    def forward(self, x: Tensor, **sides: Any) -> tuple[Tensor, Cache]:
        seen, cache = self.attention(self.first(x), **sides)
        x = x + seen
        inner = self.second(x)
        return x + self.down(F.silu(self.gate(inner)) * self.up(inner)), cache


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.RMSNorm(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("frequencies", 1 / 1000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))

    def forward(
        self, x: Tensor, real: Tensor | None = None, caches: list[Cache] | None = None, start: int = 0
    ) -> tuple[Tensor, list[Cache]]:
        """``x`` [batch, rows, width], of which the first has position ``start``; logits and what each block caches."""
        positions = torch.arange(start, start + x.shape[1], device=x.device).unsqueeze(0).expand(x.shape[0], -1)
        angles = positions[..., None] * torch.cat([self.frequencies, self.frequencies])
        sides = dict(cosine=angles.cos(), sine=angles.sin(), real=real)
        held = list(caches) if caches is not None else [None] * len(self.blocks)
        for index, block in enumerate(self.blocks):
            x, held[index] = block(x, **sides, cache=held[index])
        return self.head(self.norm(x)), held


class GeneratingDecoder(Decoder):
    """A text model that can be used by itself."""

    @torch.inference_mode()
    def generate(self, ids: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            ids = torch.cat([ids, self(self.tokens(ids))[0][:, -1:].argmax(-1)], 1)
        return ids


class VisionLanguageModel(nn.Module):
    def __init__(self, decoder: type[Decoder] = Decoder) -> None:
        super().__init__()
        self.vision, self.projector, self.decoder = Vision(), Projector(), decoder()

    def embedded(self, ids: Tensor, pixels: Tensor | None) -> Tensor:
        x = self.decoder.tokens(ids)
        if pixels is not None:
            x = x.clone()
            x[ids == IMAGE_TOKEN] = self.projector(self.vision(pixels)).view(-1, WIDTH).to(x.dtype)
        return x

    def forward(
        self, ids: Tensor, pixels: Tensor | None = None, real: Tensor | None = None, caches: list[Cache] | None = None,
        start: int = 0,
    ) -> tuple[Tensor, list[Cache]]:
        return self.decoder(self.embedded(ids, pixels), real, caches, start)

    @torch.inference_mode()
    def answer(self, ids: Tensor, pixels: Tensor, steps: int) -> Tensor:
        """[batch, steps] greedy tokens, by calls of the whole model."""
        logits, caches = self(ids, pixels)
        answer = [logits[:, -1:].argmax(-1)]
        for step in range(steps - 1):
            logits, caches = self(answer[-1], None, None, caches, ids.shape[1] + step)
            answer.append(logits[:, -1:].argmax(-1))
        return torch.cat(answer, 1)

    @torch.inference_mode()
    def generate(self, ids: Tensor, pixels: Tensor, steps: int) -> Tensor:
        """The same by calls of the decoder, in front of which the features are merged."""
        logits, caches = self.decoder(self.embedded(ids, pixels))
        answer = [logits[:, -1:].argmax(-1)]
        for step in range(steps - 1):
            logits, caches = self.decoder(self.decoder.tokens(answer[-1]), None, caches, ids.shape[1] + step)
            answer.append(logits[:, -1:].argmax(-1))
        return torch.cat(answer, 1)


def build(decoder: type[Decoder] = GeneratingDecoder, seed: int = 0) -> VisionLanguageModel:
    """With random weights, large enough that every token matters."""
    model, generator = VisionLanguageModel(decoder), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model.eval().requires_grad_(False)


def prompt(before: tuple[int, ...] = (3,), length: int = 25, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ids [batch, length] of text with a picture behind so many tokens, and the pictures."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (len(before), length), generator=generator)
    for row, first in zip(ids, before):
        row[first:first + TOKENS] = IMAGE_TOKEN
    return ids, torch.randn(len(before), 3, PIXELS, PIXELS, generator=generator)
