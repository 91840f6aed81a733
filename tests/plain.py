"""Small multimodal models in plain PyTorch, built from a specification (:mod:`tests.plain_specification`).

Their eager reference is in :mod:`tests.plain_reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.plain_layers import Cached, FlatLayer, Layer, flat_norm, norm_of
from tests.plain_specification import (
    FEATURES,
    IMAGE_FIRST,
    IMAGE_TOKEN,
    PAD,
    POSITIONS,
    SOUND_TOKEN,
    VIDEO_TOKEN,
    Mixing,
    Prompt,
    Row,
    Specification,
    prompt,
    words,
)
from tests.token_mixers import mix

__all__ = [
    "IMAGE_TOKEN", "PAD", "Mixing", "Plain", "Prompt", "Row", "Specification", "build", "prompt", "read", "words",
]


def merged(way: str, x: Tensor, visual: Tensor, features: Tensor) -> Tensor:
    """Embeddings [batch, seq, hidden] with features [visual tokens, hidden] where ``visual`` [batch, seq] is true."""
    if way == "scatter":
        return x.masked_scatter(visual[..., None], features)
    if way == "assign":
        x = x.clone()
        x[visual] = features
        return x
    if way == "put":
        return x.index_put((visual,), features)
    if way == "join":
        first = IMAGE_FIRST
        return torch.cat([x[:, :first], features[None], x[:, first + features.shape[0]:]], 1)
    order = (visual.flatten().cumsum(0) - 1).clamp(min=0)
    rows = features[order].view_as(x)
    return torch.where(visual[..., None], rows, x) if way == "choose" else torch.where(~visual[..., None], x, rows)


Past = Sequence[tuple[Tensor, Tensor]]
"""Cached keys and values of each layer [batch, groups, past, head_dim]; empty where nothing is cached."""


class Plain(nn.Module):
    """Token embedding, projected visual features merged in, decoder layers, final norm, head."""

    def __init__(self, spec: Specification, seed: int = 0):
        super().__init__()
        self.spec = spec
        self.tokens, self.learned = nn.Embedding(spec.vocabulary, spec.hidden), nn.Embedding(POSITIONS, spec.hidden)
        self.projection, self.head = nn.Linear(FEATURES, spec.hidden), nn.Linear(spec.hidden, spec.vocabulary)
        self.layers = nn.ModuleList((FlatLayer if spec.flat else Layer)(spec, index) for index in range(spec.layers))
        self.norm = norm_of(spec)
        if spec.sound:
            self.hearing = nn.Linear(FEATURES, spec.hidden)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # large enough that every token matters; norms away from one
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.25 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
        self.register_buffer("frequencies", 0.5 ** torch.arange(spec.head_dim // 2))
        self.register_buffer("slopes", -(0.3 ** torch.arange(1, spec.heads + 1)))
        self.eval().requires_grad_(False)

    def forward(self, ids: Tensor, features: Tensor, mask: Tensor, cached: Past = ()) -> tuple[Tensor, Any]:
        return self.decode(ids, mask, [(IMAGE_TOKEN, self.projection(features))], cached)

    def decode(
        self, ids: Tensor, mask: Tensor, merges: Sequence[tuple[int, Tensor]], cached: Past = ()
    ) -> tuple[Tensor, Any]:
        """``merges``: ids of what is merged, with its projected features, in this order."""
        spec, length = self.spec, ids.shape[1]
        x = self.tokens(ids)
        for token, features in merges:
            visual = (ids == token)[..., None]
            visual = visual.expand_as(x) if spec.flat else visual
            x = merged(spec.merge, x, visual[..., 0], features)
        x = self.behind_merge(x)
        index = torch.arange(length, device=ids.device)
        positions = (index if spec.numbering == "index" else (mask.cumsum(1) - 1).clamp(min=0)) + spec.past
        angles = None
        if spec.positions == "learned":
            x = x + self.learned(positions)
        else:
            angles = positions[..., None] * self.frequencies
            angles = angles if angles.dim() == 2 else angles[:, None]
        allowed = self._allowed(ids, mask, index) if spec.attention != "causal" else None
        bias = None
        if spec.attention == "relative":
            before = torch.arange(spec.past, device=ids.device).expand(*positions.shape[:-1], -1)
            distance = positions[..., :, None] - torch.cat([before, positions], -1)[..., None, :]
            bias = self.slopes[:, None, None] * distance.abs()[..., None, :, :]
            bias = bias if bias.dim() == 4 else bias[None]
        if spec.attention == "given":
            bias = (index[:, None] - index)[None, None]
        if spec.attention not in ("causal", "masked", "blocks"):
            allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(x.dtype).min)
        return self._layers(x, cached or [None] * spec.layers, allowed, bias, angles)

    def _layers(self, x: Tensor, cached: Sequence[Any], *sides: Tensor | None) -> tuple[Tensor, Any]:
        spec, rows_first = self.spec, self.spec.stream == "rows first"
        x = x.transpose(0, 1) if rows_first else x
        caches, states, kept = [], [], []
        for layer, past in zip(self.layers, cached):
            read = dict(read=chosen(kept, x)) if kept else {}
            kept += [x] if spec.kept and layer.index % 2 == 0 else []
            x, held, state = layer(x, *sides, past, **read)
            caches.extend(held)
            states.extend([] if state is None else [state])
        at_norm = spec.final_mixing.place if spec.final_mixing is not None else ""
        x = mix(spec.final_mixing, x, rows_first) if at_norm == "before" else x
        x = flat_norm(self.norm, x) if spec.flat else self.norm(x)
        x = mix(spec.final_mixing, x, rows_first) if at_norm == "behind" else x
        x = x.transpose(0, 1) if rows_first else x
        logits = self.head(x[:, -1:] if spec.last_only else x)
        handed = _handed_out(spec.cache_form, caches) if spec.caches else []
        return (logits, handed, states) if spec.states else (logits, handed)

    def behind_merge(self, x: Tensor) -> Tensor:
        """For models that do something in between."""
        return x

    def _allowed(self, ids: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        """[batch or 1, 1, seq, past + seq] bool; a padding row sees itself, so that every row is defined."""
        past = self.spec.past
        query, key = index[:, None], torch.arange(past + len(index), device=index.device)[None] - past
        allowed = key <= query
        if self.spec.span == "window":
            allowed = allowed & (key > query - 5)
        if self.spec.span == "images":
            visual = ids == IMAGE_TOKEN
            visual = visual | (ids == VIDEO_TOKEN) if self.spec.video else visual
            allowed = allowed | (visual[:, :, None] & F.pad(visual, (past, 0))[:, None, :])
        if self.spec.span == "all":
            allowed = torch.ones_like(allowed)
        if self.spec.reads_padding:
            allowed = allowed & F.pad(mask.bool(), (past, 0), value=True)[:, None, :] | (query == key)
        return allowed[:, None] if allowed.dim() == 3 else allowed[None, None]


def chosen(kept: Sequence[Tensor], x: Tensor) -> Tensor:
    """For each row a mixture of its states, by attention with one query for all."""
    stack = torch.cat([state.unsqueeze(-2) for state in (*kept, x)], -2)
    query = torch.ones(stack.shape[-1]).expand(*stack.shape[:-2], 1, -1)
    return F.scaled_dot_product_attention(query, stack, stack)[..., 0, :]


class Watching(Plain):
    """Two kinds of visual tokens, each with a merge."""

    def forward(
        self, ids: Tensor, pixel_values: Tensor, mask: Tensor, pixel_values_videos: Tensor, cached: Past = ()
    ) -> tuple[Tensor, Any]:
        return self.decode(ids, mask, [
            (IMAGE_TOKEN, self.projection(pixel_values)), (VIDEO_TOKEN, self.projection(pixel_values_videos))], cached)


class Listening(Plain):
    """Visual tokens, and sound."""

    def forward(
        self, ids: Tensor, pixel_values: Tensor, mask: Tensor, input_features: Tensor, cached: Past = ()
    ) -> tuple[Tensor, Any]:
        seen, heard = (IMAGE_TOKEN, self.projection(pixel_values)), (SOUND_TOKEN, self.hearing(input_features))
        return self.decode(ids, mask, [heard, seen] if self.spec.sound_first else [seen, heard], cached)


class Attending(Plain):
    """Two kinds of visual tokens, and sound."""

    def forward(
        self, ids: Tensor, pixel_values: Tensor, mask: Tensor, pixel_values_videos: Tensor, input_features: Tensor,
        cached: Past = (),
    ) -> tuple[Tensor, Any]:
        seen = [(IMAGE_TOKEN, self.projection(pixel_values)), (VIDEO_TOKEN, self.projection(pixel_values_videos))]
        heard = [(SOUND_TOKEN, self.hearing(input_features))]
        return self.decode(ids, mask, heard + seen if self.spec.sound_first else seen + heard, cached)


def build(spec: Specification, seed: int = 0) -> Plain:
    """The model whose forward takes what the specification's prompts give."""
    if spec.sound:
        return (Attending if spec.video else Listening)(spec, seed)
    return (Watching if spec.video else Plain)(spec, seed)


def _handed_out(form: str, caches: Cached) -> Any:
    if form == "flat":
        return tuple(part for pair in caches for part in pair)
    if form == "stacked":
        return [torch.stack(pair) for pair in caches]
    return torch.stack([torch.stack(pair) for pair in caches]) if form == "one" else caches


def read(spec: Specification, output: Any) -> tuple[Tensor, Cached, list[Tensor]]:
    """Logits, keys and values [batch, heads, rows, dim] of each attention call, and states, of what a model gives."""
    logits, held, states = output if spec.states else (*output, [])
    if spec.cache_form == "flat":
        held = list(zip(held[::2], held[1::2]))

    def ordered(part: Tensor) -> Tensor:
        if spec.layout == "heads first":
            return part.transpose(0, 1)
        return part.view(-1, spec.groups, *part.shape[1:]) if spec.layout == "folded" else part

    return logits, [(ordered(key), ordered(value)) for key, value in held], states
