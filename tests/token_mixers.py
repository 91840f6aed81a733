"""Operations in which tokens meet outside attention, each written in the forms that models use.

What each of them means is said a second time, without a graph and for one sample, in :mod:`tests.mixing_reference`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.plain_specification import Mixing

TAPS = (0.5, -0.7, 0.9)
"""Of the filter: weights of the row before the last, the last one and the row itself."""
DECAY = 0.6


@torch.library.custom_op("plain_tokens::scan", mutates_args=())
def scan(x: Tensor) -> Tensor:
    """x [batch, rows, hidden]; opaque: a decaying sum along the rows."""
    state, result = torch.zeros_like(x[:, 0]), torch.empty_like(x)
    for row in range(x.shape[1]):
        state = DECAY * state + x[:, row]
        result[:, row] = state
    return result


@scan.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("plain_tokens::each_row", mutates_args=())
def each_row(x: Tensor) -> Tensor:
    """Opaque, and row by row."""
    return torch.sin(x) * x.abs().amax(-1, keepdim=True)


@each_row.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _by_slices(x: Tensor) -> Tensor:
    moved = torch.zeros_like(x)
    moved[:, 1:] = x[:, :-1]
    return moved


def _by_convolution(x: Tensor, taps: tuple[float, ...]) -> Tensor:
    weight = torch.tensor(taps, dtype=x.dtype).expand(x.shape[-1], 1, -1)
    padded = F.conv1d(x.transpose(1, 2), weight, padding=len(taps) - 1, groups=x.shape[-1])
    return padded[..., :x.shape[1]].transpose(1, 2)


def _by_unfolding(x: Tensor) -> Tensor:
    windows = F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1)
    return (windows * torch.tensor(TAPS, dtype=x.dtype)).sum(-1)


def _share(length: Tensor) -> Tensor:
    return length / (length.mean(-1, keepdim=True) + 1e-6)


def _index(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def _whole_norm(x: Tensor) -> Tensor:
    centred = x - x.mean((1, 2), keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean((1, 2), keepdim=True) + 1e-5)


# x [batch, rows, hidden] to something that broadcasts with it
CODES: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "mean": (
        lambda x: x.mean(1, keepdim=True),
        lambda x: x.sum(dim=1, keepdim=True) / x.shape[1],
        lambda x: (torch.einsum("bsh->bh", x) / x.shape[1]).unsqueeze(1),
        lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1).transpose(1, 2),
        lambda x: torch.mean(x.permute(0, 2, 1), -1)[:, None, :],
        lambda x: torch.full((1, x.shape[1]), 1 / x.shape[1], dtype=x.dtype) @ x,
    ),
    "sum": (lambda x: 0.1 * x.sum(1, keepdim=True), lambda x: 0.1 * torch.einsum("bsh->bh", x)[:, None]),
    "maximum": (lambda x: x.amax(1, keepdim=True), lambda x: x.max(dim=1, keepdim=True)[0],
                lambda x: F.adaptive_max_pool1d(x.transpose(1, 2), 1).transpose(1, 2)),
    "deviation": (lambda x: x.std(1, keepdim=True, correction=0),
                  lambda x: (x.pow(2).mean(1, keepdim=True) - x.mean(1, keepdim=True).pow(2)).clamp(min=0).sqrt()),
    "share": (lambda x: _share(torch.linalg.vector_norm(x, dim=1, keepdim=True)),
              lambda x: _share(x.norm(p=2, dim=1, keepdim=True)),
              lambda x: _share(x.pow(2).sum(1, keepdim=True).sqrt())),
    "count": (lambda x: x / x.shape[1], lambda x: x * (1.0 / x.size(1))),
    "softmax": (lambda x: x.softmax(1), lambda x: F.softmax(x.transpose(1, 2), dim=-1).transpose(1, 2),
                lambda x: x.exp() / x.exp().sum(1, keepdim=True)),
    "pooled": (lambda x: torch.einsum("bs,bsh->bh", x.mean(-1).softmax(-1), x)[:, None],
               lambda x: (x * x.mean(-1, keepdim=True).softmax(1)).sum(1, keepdim=True)),
    "running sum": (lambda x: 0.1 * x.cumsum(1), lambda x: 0.1 * torch.cumsum(x.transpose(1, 2), -1).transpose(1, 2),
                    lambda x: 0.1 * torch.ones(x.shape[1], x.shape[1]).tril() @ x),
    "running mean": (lambda x: x.cumsum(1) / (_index(x)[:, None] + 1),
                     lambda x: x.cumsum(1) / torch.ones_like(x).cumsum(1)),
    "running maximum": (lambda x: x.cummax(1)[0], lambda x: torch.cummax(x, dim=-2).values),
    "previous": (
        lambda x: F.pad(x, (0, 0, 1, -1)),
        lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1),
        lambda x: _by_convolution(x, (1.0, 0.0)),
        _by_slices,
        lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1],
        lambda x: F.pad(x[:, :x.shape[1] - 1], (0, 0, 1, 0)),
    ),
    "rolled": (lambda x: x.roll(1, 1), lambda x: torch.cat([x[:, -1:], x[:, :-1]], 1),
               lambda x: x.index_select(1, (_index(x) - 1) % x.shape[1])),
    "flipped": (lambda x: x.flip(1), lambda x: x.index_select(1, x.shape[1] - 1 - _index(x)),
                lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)]),
    "sorted": (lambda x: x.sort(1)[0], lambda x: torch.sort(x.transpose(1, 2), dim=-1).values.transpose(1, 2)),
    "filter": (lambda x: _by_convolution(x, TAPS), _by_unfolding),
    "whole norm": (lambda x: F.layer_norm(x, x.shape[1:]), _whole_norm),
    "scan": (lambda x: scan(x),),
    "each row": (lambda x: each_row(x),),
    "last": (lambda x: x[:, -1:], lambda x: x[:, x.shape[1] - 1][:, None]),
    "first": (lambda x: x[:, :1], lambda x: x.select(1, 0).unsqueeze(1)),
    "positions": (lambda x: x * (0.1 * _index(x)[:, None]),),
}


def combine(how: str, x: Tensor, taken: Tensor) -> Tensor:
    if how == "add":
        return x + taken
    if how == "subtract":
        return x - taken
    if how == "gate":
        return x * torch.sigmoid(taken)
    if how == "divide":
        return x / (1 + taken.abs())
    return taken.expand_as(x)


def mix(mixing: Mixing | None, x: Tensor, rows_first: bool = False) -> Tensor:
    """x [batch, rows, hidden], or [rows, batch, hidden]."""
    while mixing is not None:
        codes = CODES[mixing.kind]
        given = x.transpose(0, 1) if rows_first else x
        taken = codes[mixing.code % len(codes)](given)
        x = combine(mixing.combine, x, taken.transpose(0, 1) if rows_first else taken)
        mixing = mixing.then
    return x


def linear_attention(kind: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, heads, rows, dim] each; returns the rows and the state [batch, heads, dim, dim] behind the last one."""
    query, key = F.elu(query) + 1, F.elu(key) + 1
    state = torch.einsum("bhsd,bhse->bhde", key, value)
    if kind == "linear, whole":
        mixed, mass = query @ state, query @ key.sum(2)[..., None]
    elif kind == "linear, masked":
        weights = (query @ key.transpose(2, 3)).tril()
        mixed, mass = weights @ value, weights.sum(-1, keepdim=True)
    else:
        mixed = torch.einsum("bhsd,bhsde->bhse", query, (key[..., None] * value[..., None, :]).cumsum(2))
        mass = (query * key.cumsum(2)).sum(-1, keepdim=True)
    return mixed / mass, state
