"""The decoder layers of :mod:`tests.plain`: attention in several layouts, mixers in its place, and feed-forwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.plain_specification import EPSILON, Specification
from tests.token_mixers import TAPS, linear_attention, mix, scan

EXPERTS, CHOSEN = 4, 2
BLOCK, BLOCKS = 3, 2
"""Rows in a block of keys, and how many blocks a row sees at most."""
Cached = list[tuple[Tensor, Tensor]]


def chosen_blocks(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """[batch, 1, rows, rows] bool: a row itself, and of the blocks that it sees to their ends those whose keys fit it best.

    The last block may have fewer rows than it has places: then nobody sees it.
    """
    batch, _, length, _ = key.shape
    count = (length + BLOCK - 1) // BLOCK
    places = torch.arange(count * BLOCK).view(count, BLOCK)
    rows = places.clamp(max=length - 1)
    pooled = key[:, 0][:, rows].sum(2)
    scores = query.mean(1) @ pooled.mT
    able = mask[:, 0].expand(batch, length, length).gather(-1, rows[:, -1].expand(batch, length, count))
    able = able & (places < length).all(-1)
    best = scores.masked_fill(~able, -torch.inf).topk(min(BLOCKS, count), -1).indices
    chosen = torch.zeros_like(able).scatter_(-1, best, True) & able
    seen = chosen[..., None].expand(batch, length, count, BLOCK).flatten(-2)[..., :length]
    return ((seen & mask[:, 0]) | torch.eye(length, dtype=torch.bool))[:, None]


def norm_of(spec: Specification) -> nn.Module:
    return (nn.RMSNorm if spec.norm == "rms" else nn.LayerNorm)(spec.hidden, eps=EPSILON)


class Attention(nn.Module):
    """A second attention call's weights."""

    def __init__(self, spec: Specification):
        super().__init__()
        self.norm = norm_of(spec)
        self.qkv = nn.Linear(spec.hidden, spec.hidden + 2 * spec.groups * spec.head_dim)
        self.out = nn.Linear(spec.hidden, spec.hidden)


class Layer(nn.Module):
    def __init__(self, spec: Specification, index: int = 0):
        super().__init__()
        self.spec, self.index = spec, index
        hidden, narrow = spec.hidden, spec.groups * spec.head_dim
        self.first, self.second = norm_of(spec), norm_of(spec)
        self.qkv = nn.Linear(hidden, hidden + 2 * narrow)
        self.out = nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, spec.mlp), nn.Linear(spec.mlp, hidden)
        if spec.pair:
            self.further = Attention(spec)
        if spec.experts:
            self.router = nn.Linear(hidden, EXPERTS)
            self.wide = nn.Parameter(torch.empty(EXPERTS, hidden, spec.mlp))
            self.narrow = nn.Parameter(torch.empty(EXPERTS, spec.mlp, hidden))

    @property
    def rows_first(self) -> bool:
        return self.spec.stream == "rows first"

    def project(self, x: Tensor, qkv: nn.Linear | None = None) -> tuple[Tensor, ...]:
        qkv = self.qkv if qkv is None else qkv
        sizes = [self.spec.hidden] + 2 * [self.spec.groups * self.spec.head_dim]
        if self.spec.fused_qkv:
            return qkv(x).split(sizes, dim=-1)
        parts = zip(qkv.weight.split(sizes), qkv.bias.split(sizes))
        return tuple(F.linear(x, weight, bias) for weight, bias in parts)

    def parts(self, x: Tensor, qkv: nn.Linear | None = None) -> list[Tensor]:
        """Queries, keys and values [batch, heads, rows, dim] (heads first where the layout says so)."""
        dim = self.spec.head_dim
        parts = [part.view(x.shape[0], x.shape[1], -1, dim) for part in self.project(x, qkv)]
        if self.spec.layout == "heads first":
            return [part.permute(2, 1, 0, 3) if self.rows_first else part.permute(2, 0, 1, 3) for part in parts]
        return [part.permute(1, 2, 0, 3) if self.rows_first else part.transpose(1, 2) for part in parts]

    def together(self, mixed: Tensor) -> Tensor:
        """Heads side by side, in the stream's layout."""
        heads_first = self.spec.layout == "heads first"
        order = ((2, 1, 0, 3) if heads_first else (2, 0, 1, 3)) if self.rows_first else (
            (1, 2, 0, 3) if heads_first else (0, 2, 1, 3))
        mixed = mixed.permute(*order).contiguous()
        return mixed.view(mixed.shape[0], mixed.shape[1], self.spec.hidden)

    def attend(
        self, x: Tensor, mask: Tensor | None, bias: Tensor | None, angles: Tensor | None,
        past: tuple[Tensor, Tensor] | None = None, own: Attention | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec, weights = self.spec, self if own is None else own
        heads_first, repeats = spec.layout == "heads first", spec.heads // spec.groups
        query, key, value = self.parts(x, weights.qkv)
        if heads_first:
            mask, bias, angles = (_swapped(side) for side in (mask, bias, angles))
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        if past is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(past, (key, value)))
        if spec.layout == "folded":
            return self.folded(weights.out, query, key, value, mask, bias)
        if spec.attention == "blocks":
            mask = chosen_blocks(query, key, mask)
        if spec.attention in ("causal", "masked", "blocks"):
            wide = [part.repeat_interleave(repeats, 0) if heads_first else part for part in (key, value)]
            mixed = F.scaled_dot_product_attention(
                query, *wide, attn_mask=mask, is_causal=mask is None, scale=spec.scale,
                enable_gqa=repeats > 1 and not heads_first)
        else:
            wide_key, wide_value = (part.repeat_interleave(repeats, 0 if heads_first else 1) for part in (key, value))
            scores = torch.matmul(query, wide_key.transpose(2, 3)) * spec.score_scale
            if spec.attention in ("counted", "given"):
                bias = counted(query, bias)
            scores = scores if bias is None else scores + bias
            if spec.attention == "sinks":
                scores = torch.cat([scores + mask, query[..., :1]], -1)
                mixed = F.softmax(scores, dim=-1)[..., :-1] @ wide_value
            else:
                mixed = F.softmax(scores + mask, dim=-1) @ wide_value
        return weights.out(self.together(mixed)), key, value

    def folded(
        self, out: nn.Linear, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heads and batch as one axis, as torch.bmm wants them; keys and values are handed out like that, too."""
        spec, (batch, heads, length, dim) = self.spec, query.shape
        query, cached_key, cached_value = (part.reshape(-1, length, dim) for part in (query, key, value))
        wide_key, wide_value = (
            part.repeat_interleave(heads // spec.groups, 1).reshape(-1, length, dim) for part in (key, value))
        if bias is not None:
            mask = mask + bias
        if mask is not None:
            mask = mask.expand(batch, heads, length, length).reshape(batch * heads, length, length)
        if spec.attention in ("causal", "masked"):
            mixed = F.scaled_dot_product_attention(
                query, wide_key, wide_value, attn_mask=mask, is_causal=mask is None, scale=spec.scale)
        else:
            scores = torch.baddbmm(mask, query, wide_key.transpose(1, 2), alpha=spec.score_scale)
            mixed = torch.bmm(scores.softmax(-1), wide_value)
        return out(self.together(mixed.view(batch, heads, length, dim))), cached_key, cached_value

    def replaced(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What stands in place of attention in a hybrid layer, and its state."""
        spec = self.spec
        if spec.hybrid.startswith("linear"):
            query, key, value = self.parts(x)
            axis = 0 if spec.layout == "heads first" else 1
            key, value = (part.repeat_interleave(spec.heads // spec.groups, axis) for part in (key, value))
            mixed, state = linear_attention(spec.hybrid, query, key, value)
            return self.out(self.together(mixed)), state.transpose(0, 1) if axis == 0 else state
        inner = self.project(x)[0]
        inner = inner.transpose(0, 1) if self.rows_first else inner
        if spec.hybrid == "scan":
            inner = scan(inner)
        else:
            weight = torch.tensor(TAPS, dtype=x.dtype).expand(spec.hidden, 1, -1)
            padded = F.conv1d(inner.transpose(1, 2), weight, padding=2, groups=spec.hidden)
            inner = padded[..., :inner.shape[1]].transpose(1, 2)
        return self.out(inner.transpose(0, 1) if self.rows_first else inner), None

    def mixed(self, x: Tensor, place: str) -> Tensor:
        """Where tokens meet outside attention, if they do so at this place of this layer."""
        for mixing in (self.spec.feed_mixing, self.spec.norm_mixing):
            if mixing is not None and mixing.place == place and self.spec.mixes(self.index):
                x = mix(mixing, x, self.rows_first)
        return x

    def feed(self, x: Tensor) -> Tensor:
        x = self.mixed(x, "in")
        shape = x.shape
        x = x.reshape(-1, shape[-1]) if self.spec.flat_feed else x

        def inside(held: Tensor, place: str) -> Tensor:
            if not self.spec.flat_feed:
                return self.mixed(held, place)
            return self.mixed(held.view(shape[0], shape[1], -1), place).reshape(-1, held.shape[-1])

        if self.spec.experts:
            x = self.expert(x)
        else:
            held = inside(self.up(x), "hidden")
            active = inside(F.gelu(held), "active")
            if self.spec.feed_mixing is not None and self.spec.feed_mixing.place == "gate":
                active = active * torch.sigmoid(inside(held, "gate"))
            x = self.down(active)
        return self.mixed(x.view(shape) if self.spec.flat_feed else x, "out")

    def expert(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows).softmax(-1).topk(CHOSEN, dim=-1)
        if self.spec.experts == "every":
            every = torch.bmm(F.gelu(torch.bmm(rows.expand(EXPERTS, -1, -1), self.wide)), self.narrow)
            share = torch.zeros(rows.shape[0], EXPERTS).scatter(1, chosen, weights)
            return (every * share.t()[..., None]).sum(0).reshape(x.shape)
        order = chosen.flatten().argsort(stable=True)
        owner, picked = order // CHOSEN, chosen.flatten()[order]
        given = F.gelu(torch.bmm(rows[owner][:, None], self.wide[picked])) @ self.narrow[picked]
        if self.spec.experts == "added":
            given = given[:, 0] * weights.flatten()[order][:, None]
            return torch.zeros_like(rows).index_add(0, owner, given).reshape(x.shape)
        back = given[order.argsort(), 0].view(-1, CHOSEN, x.shape[-1])
        return (back * weights[..., None]).sum(1).view(x.shape)

    def attentions(
        self, x: Tensor, *sides: Any
    ) -> tuple[Tensor, Cached, Tensor | None]:
        """What attention (or what stands in its place) adds to the stream; x is normalised."""
        if self.spec.is_hybrid(self.index):
            mixed, state = self.replaced(x)
            return mixed, [], state
        mixed, *cached = self.attend(x, *sides)
        if self.spec.pair not in ("chain", "sum") and not (self.spec.pair and self.spec.parallel):
            return mixed, [tuple(cached)], None
        other, *second = self.attend(mixed if self.spec.pair == "chain" else x, *sides, own=self.further)
        return other if self.spec.pair == "chain" else mixed + other, [tuple(cached), tuple(second)], None

    def normed(self, norm: nn.Module, which: str, x: Tensor, function: Callable[..., Tensor]) -> Tensor:
        return self.mixed(function(norm, self.mixed(x, f"before {which}")), f"behind {which}")

    def forward(
        self, x: Tensor, *sides: Any, call: Callable[..., Tensor] = nn.Module.__call__, read: Tensor | None = None
    ) -> tuple[Tensor, Cached, Tensor | None]:
        """``sides``: mask, bias, angles and cached keys and values; ``call``: how norms are called; ``read``: what attention
        reads in place of the stream."""
        post = self.spec.place == "post"
        inner = x if post else self.normed(self.first, "first", x if read is None else read, call)
        mixed, cached, state = self.attentions(inner, *sides)
        if self.spec.parallel:
            x = x + mixed + self.feed(inner)
            return self.mixed(self.normed(self.first, "first", x, call) if post else x, "stream"), cached, state
        x = self.normed(self.first, "first", x + mixed, call) if post else x + mixed
        if self.spec.pair == "own" and not self.spec.is_hybrid(self.index):
            own = self.further
            mixed, *second = self.attend(x if post else call(own.norm, x), *sides, own=own)
            x, cached = (call(own.norm, x + mixed) if post else x + mixed), [*cached, tuple(second)]
        if post:
            x = self.normed(self.second, "second", x + self.feed(x), call)
        else:
            x = x + self.feed(self.normed(self.second, "second", x, call))
        return self.mixed(x, "stream"), cached, state


def _swapped(side: Tensor | None) -> Tensor | None:
    """A mask, a bias or angles for heads in front of the batch."""
    return side.transpose(0, 1) if side is not None and side.dim() == 4 else side


def counted(query: Tensor, distance: Tensor | None) -> Tensor:
    """[..., queries, keys]: one of a query's own entries for each of the nearest keys, more of it in later rows.

    Args:
        distance: [1, 1, queries, keys]; None to count it here.
    """
    number = torch.arange(query.shape[2])
    if distance is None:
        distance = (number[:, None] - torch.arange(query.shape[2]))[None, None]
    bias = query.gather(-1, distance.clamp(0, query.shape[3] - 1).expand(*query.shape[:2], -1, -1))
    return bias.masked_fill((distance < 0) | (distance >= query.shape[3]), 0.0) * (number + 1).sqrt()[:, None]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], dim=-1)


def flat_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON) * norm.weight
    return x + norm.bias if isinstance(norm, nn.LayerNorm) else x


class FlatLayer(Layer):
    """:class:`Layer` in other operations."""

    def attend(
        self, x: Tensor, mask: Tensor | None, bias: Tensor | None, angles: Tensor | None,
        past: tuple[Tensor, Tensor] | None = None, own: Attention | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec, weights = self.spec, self if own is None else own
        repeats = spec.heads // spec.groups
        parts = [part.unflatten(2, (-1, spec.head_dim)).permute(0, 2, 1, 3) for part in self.project(x, weights.qkv)]
        if angles is not None:
            parts[:2] = [rotate(part, angles) for part in parts[:2]]
        query, key, value = parts
        if past is not None:
            key, value = (torch.cat(pair, -2) for pair in zip(past, (key, value)))
        wide = [p[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for p in (key, value)]
        if spec.attention in ("causal", "masked"):
            options = {"is_causal": True} if mask is None else {"attn_mask": mask}
            mixed = F.scaled_dot_product_attention(query, *wide, scale=spec.score_scale, **options)
        else:
            scores = torch.einsum("bhqd,bhkd->bhqk", query, wide[0]).mul(spec.score_scale) + mask
            scores = scores if bias is None else scores + bias
            mixed = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), wide[1])
        return mixed.permute(0, 2, 1, 3).flatten(2) @ weights.out.weight.t() + weights.out.bias, key, value

    def forward(
        self, x: Tensor, *sides: Any, call: Callable[..., Tensor] = flat_norm
    ) -> tuple[Tensor, Cached, Tensor | None]:
        return super().forward(x, *sides, call=call)
