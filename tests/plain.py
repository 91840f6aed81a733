"""Small multimodal models in plain PyTorch, built from a specification.

A specification says in words what a model and its prompts look like, so that a property-based test that fails shrinks
to words. Their eager reference is in :mod:`tests.plain_reference`.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_FIRST = 2
"""Where the image stands in prompts whose features are joined in."""
IMAGE_TOKEN, PAD, FEATURES, POSITIONS, EPSILON = 1, 0, 5, 64, 1e-6


@dataclasses.dataclass(frozen=True)
class Row:
    """Where one sample's tokens lie: padding, then text, then the image; after it (and between its halves) text."""

    padding: int = 0
    before: int = 2
    between: int = 0
    """Text tokens between the first and the second half of the visual tokens; 0 for one image."""


@dataclasses.dataclass(frozen=True)
class Specification:
    layers: int = 2
    heads: int = 2
    groups: int = 1
    """Key and value heads; divides ``heads``."""
    head_dim: int = 6
    norm: str = "rms"
    """"rms" or "layer"."""
    place: str = "pre"
    """Norms in front of attention and MLP ("pre"), or behind each sum ("post")."""
    attention: str = "causal"
    """"causal" (fused, no mask: padding is seen), "masked" (fused, bool mask), "written" (softmax, float mask) or
    "relative" (written out, with a bias by distance added to the scores)."""
    span: str = "causal"
    """With a mask: "causal", "window" (of 5 tokens), "images" (visual tokens see each other in both directions) or
    "all" (so do all tokens)."""
    reads_padding: bool = True
    """False: one mask for all samples, in which padding is seen."""
    scale: float | None = None
    """Of the scores; None for one over the root of ``head_dim``."""
    positions: str = "rotary"
    """"rotary" or "learned"."""
    numbering: str = "index"
    """Position ids: "index" (0 .. seq-1, one row for all samples) or "mask" (counted without the padding)."""
    fused_qkv: bool = False
    parallel: bool = False
    """Attention and MLP read the same normalised rows (GPT-J)."""
    flat: bool = False
    """One function of other operations (einsum, permute, unflatten) in place of modules."""
    merge: str = "scatter"
    """How features enter: "scatter", "assign", "put", "choose" (where), "choose the text" or "join" (cat; one row)."""
    caches: bool = True
    last_only: bool = False
    """Logits of the last row alone."""
    length: int = 11
    visual: int = 5
    """Visual tokens per sample."""
    rows: tuple[Row, ...] = (Row(),)
    pad_right: bool = False

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def mlp(self) -> int:
        return self.hidden + 7

    @property
    def vocabulary(self) -> int:
        return 23

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True)
class Prompt:
    ids: Tensor
    features: Tensor
    mask: Tensor

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids, self.features, self.mask

    @property
    def visual(self) -> Tensor:
        return self.ids == IMAGE_TOKEN


def prompt(spec: Specification, seed: int = 1) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, spec.vocabulary, (len(spec.rows), spec.length), generator=generator)
    mask = torch.ones_like(ids)
    for index, row in enumerate(spec.rows):
        padded = slice(spec.length - row.padding, None) if spec.pad_right else slice(0, row.padding)
        ids[index, padded], mask[index, padded] = PAD, 0
        start = row.before + (0 if spec.pad_right else row.padding)
        half = spec.visual // 2 if row.between else spec.visual
        ids[index, start:start + half] = IMAGE_TOKEN
        ids[index, start + half + row.between:start + row.between + spec.visual] = IMAGE_TOKEN
    return Prompt(ids, torch.randn(len(spec.rows) * spec.visual, FEATURES, generator=generator), mask)


class Layer(nn.Module):
    def __init__(self, spec: Specification):
        super().__init__()
        self.spec = spec
        hidden, narrow = spec.hidden, spec.groups * spec.head_dim
        norm = nn.RMSNorm if spec.norm == "rms" else nn.LayerNorm
        self.first, self.second = norm(hidden, eps=EPSILON), norm(hidden, eps=EPSILON)
        self.qkv = nn.Linear(hidden, hidden + 2 * narrow)
        self.out = nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, spec.mlp), nn.Linear(spec.mlp, hidden)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        sizes = [self.spec.hidden] + 2 * [self.spec.groups * self.spec.head_dim]
        if self.spec.fused_qkv:
            return self.qkv(x).split(sizes, dim=-1)
        parts = zip(self.qkv.weight.split(sizes), self.qkv.bias.split(sizes))
        return tuple(F.linear(x, weight, bias) for weight, bias in parts)

    def attend(self, x: Tensor, mask: Tensor | None, bias: Tensor | None, angles: Tensor | None) -> tuple[Tensor, ...]:
        spec, (batch, length, _) = self.spec, x.shape
        query, key, value = (part.view(batch, length, -1, spec.head_dim).transpose(1, 2) for part in self.project(x))
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        if spec.attention in ("causal", "masked"):
            mixed = F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=spec.scale,
                enable_gqa=spec.heads > spec.groups)
        else:
            wide_key, wide_value = (part.repeat_interleave(spec.heads // spec.groups, 1) for part in (key, value))
            scores = torch.matmul(query, wide_key.transpose(2, 3)) * spec.score_scale
            scores = scores if bias is None else scores + bias
            mixed = F.softmax(scores + mask, dim=-1) @ wide_value
        return self.out(mixed.transpose(1, 2).contiguous().view(batch, length, spec.hidden)), key, value

    def feed(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None, angles: Tensor | None) -> tuple[Tensor, ...]:
        post = self.spec.place == "post"
        inner = x if post else self.first(x)
        mixed, key, value = self.attend(inner, mask, bias, angles)
        if self.spec.parallel:
            x = x + mixed + self.feed(inner)
            return (self.first(x) if post else x), key, value
        x = self.first(x + mixed) if post else x + mixed
        x = self.second(x + self.feed(x)) if post else x + self.feed(self.second(x))
        return x, key, value


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], dim=-1)


def flat_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * norm.weight
    return x + norm.bias if isinstance(norm, nn.LayerNorm) else x


def flat_layer(
    layer: Layer, x: Tensor, mask: Tensor | None, bias: Tensor | None, angles: Tensor | None
) -> tuple[Tensor, ...]:
    """:meth:`Layer.forward` in other operations."""
    spec, residual = layer.spec, x
    repeats = spec.heads // spec.groups
    inner = x if spec.place == "post" else flat_norm(layer.first, x)
    parts = [part.unflatten(2, (-1, spec.head_dim)).permute(0, 2, 1, 3) for part in layer.project(inner)]
    if angles is not None:
        parts[:2] = [rotate(part, angles) for part in parts[:2]]
    query, key, value = parts
    wide = [p[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for p in (key, value)]
    if spec.attention in ("causal", "masked"):
        options = {"is_causal": True} if mask is None else {"attn_mask": mask}
        mixed = F.scaled_dot_product_attention(query, *wide, scale=spec.score_scale, **options)
    else:
        scores = torch.einsum("bhqd,bhkd->bhqk", query, wide[0]).mul(spec.score_scale) + mask
        scores = scores if bias is None else scores + bias
        mixed = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), wide[1])
    mixed = mixed.permute(0, 2, 1, 3).flatten(2) @ layer.out.weight.t() + layer.out.bias
    if spec.parallel:
        x = torch.add(residual, mixed).add(layer.feed(inner))
        return (flat_norm(layer.first, x) if spec.place == "post" else x), key, value
    x = residual + mixed
    if spec.place == "post":
        x = flat_norm(layer.first, x)
        return flat_norm(layer.second, layer.feed(x) + x), key, value
    return layer.feed(flat_norm(layer.second, x)) + x, key, value


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


class Plain(nn.Module):
    """Token embedding, projected visual features merged in, decoder layers, final norm, head."""

    def __init__(self, spec: Specification, seed: int = 0):
        super().__init__()
        self.spec = spec
        self.tokens, self.learned = nn.Embedding(spec.vocabulary, spec.hidden), nn.Embedding(POSITIONS, spec.hidden)
        self.projection, self.head = nn.Linear(FEATURES, spec.hidden), nn.Linear(spec.hidden, spec.vocabulary)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = (nn.RMSNorm if spec.norm == "rms" else nn.LayerNorm)(spec.hidden, eps=EPSILON)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # large enough that every token matters; norms away from one
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.25 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
        self.register_buffer("frequencies", 0.5 ** torch.arange(spec.head_dim // 2))
        self.register_buffer("slopes", -(0.3 ** torch.arange(1, spec.heads + 1)))
        self.eval().requires_grad_(False)

    def forward(self, ids: Tensor, features: Tensor, mask: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        spec, length = self.spec, ids.shape[1]
        x = self.tokens(ids)
        visual = (ids == IMAGE_TOKEN)[..., None]
        visual = visual.expand_as(x) if spec.flat else visual
        x = self.behind_merge(merged(spec.merge, x, visual[..., 0], self.projection(features)))
        index = torch.arange(length, device=ids.device)
        positions = index if spec.numbering == "index" else (mask.cumsum(1) - 1).clamp(min=0)
        angles = None
        if spec.positions == "learned":
            x = x + self.learned(positions)
        else:
            angles = positions[..., None] * self.frequencies
            angles = angles if angles.dim() == 2 else angles[:, None]
        allowed = self._allowed(ids, mask, index) if spec.attention != "causal" else None
        bias = None
        if spec.attention == "relative":
            distance = positions[..., :, None] - positions[..., None, :]
            bias = self.slopes[:, None, None] * distance.abs()[..., None, :, :]
        if spec.attention in ("written", "relative"):
            allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(x.dtype).min)
        caches = []
        for layer in self.layers:
            x, key, value = (flat_layer if spec.flat else Layer.__call__)(layer, x, allowed, bias, angles)
            caches.append((key, value))
        x = flat_norm(self.norm, x) if spec.flat else self.norm(x)
        logits = self.head(x[:, -1:] if spec.last_only else x)
        return logits, caches if spec.caches else []

    def behind_merge(self, x: Tensor) -> Tensor:
        """For models that do something in between."""
        return x

    def _allowed(self, ids: Tensor, mask: Tensor, index: Tensor) -> Tensor:
        """[batch or 1, 1, seq, seq] bool; a padding row sees itself, so that every row is defined."""
        query, key = index[:, None], index[None, :]
        allowed = key <= query
        if self.spec.span == "window":
            allowed = allowed & (key > query - 5)
        if self.spec.span == "images":
            visual = ids == IMAGE_TOKEN
            allowed = allowed | (visual[:, :, None] & visual[:, None, :])
        if self.spec.span == "all":
            allowed = torch.ones_like(allowed)
        if self.spec.reads_padding:
            allowed = allowed & mask.bool()[:, None, :] | (query == key)
        return allowed[:, None] if allowed.dim() == 3 else allowed[None, None]
