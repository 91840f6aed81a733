"""What the token mixers of :mod:`tests.token_mixers` mean: one sample's rows [rows, hidden], no graph, no batch."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.plain_specification import Mixing
from tests.token_mixers import DECAY, TAPS


def _recurrent(x: Tensor, kind: str) -> Tensor:
    state, rows = x[0], [x[0]]
    for row in x[1:]:
        state = {"scan": DECAY * state + row, "sum": state + row, "maximum": torch.maximum(state, row)}[kind]
        rows.append(state)
    return torch.stack(rows)


def _taken(kind: str, x: Tensor, positions: Tensor) -> Tensor:
    count, zero = len(x), torch.zeros_like(x[0])
    if kind in ("mean", "sum", "maximum", "deviation", "share", "pooled", "last", "first"):
        return _one_for_all(kind, x).expand_as(x)
    if kind == "count":
        return x / count
    if kind == "softmax":
        return torch.stack([torch.softmax(column, 0) for column in x.T], 1)
    if kind == "running sum":
        return 0.1 * _recurrent(x, "sum")
    if kind == "running mean":
        return torch.stack([x[:row + 1].mean(0) for row in range(count)])
    if kind == "running maximum":
        return _recurrent(x, "maximum")
    if kind == "previous":
        return torch.stack([zero, *x[:count - 1]])
    if kind == "rolled":
        return torch.stack([x[count - 1], *x[:count - 1]])
    if kind == "flipped":
        return torch.stack(list(reversed(x)))
    if kind == "sorted":
        return torch.stack([torch.tensor(sorted(column.tolist())) for column in x.T], 1)
    if kind == "filter":
        return filtered(x)
    if kind == "whole norm":
        centred = x - x.sum() / x.numel()
        return centred / (centred.square().sum() / x.numel() + 1e-5).sqrt()
    if kind == "scan":
        return _recurrent(x, "scan")
    if kind == "each row":
        return torch.stack([row.sin() * row.abs().max() for row in x])
    assert kind == "positions", kind
    return 0.1 * positions[:, None] * x


def _one_for_all(kind: str, x: Tensor) -> Tensor:
    count = len(x)
    if kind == "mean":
        return x.sum(0) / count
    if kind == "sum":
        return 0.1 * x.sum(0)
    if kind == "maximum":
        return torch.stack([column.max() for column in x.T])
    if kind == "deviation":
        return ((x - x.sum(0) / count).square().sum(0) / count).sqrt()
    if kind == "share":
        length = x.square().sum(0).sqrt()
        return length / (length.mean() + 1e-6)
    if kind == "pooled":
        weights = torch.softmax(x.mean(1), 0)
        return sum(weight * row for weight, row in zip(weights, x))
    return x[count - 1] if kind == "last" else x[0]


def filtered(x: Tensor) -> Tensor:
    """Each row with the two rows in front of it."""
    rows = [torch.zeros_like(x[0])] * 2 + list(x)
    return torch.stack([sum(tap * rows[row + back] for back, tap in enumerate(TAPS)) for row in range(len(x))])


def scanned(x: Tensor) -> Tensor:
    return _recurrent(x, "scan")


def mixed(mixing: Mixing | None, x: Tensor, positions: Tensor) -> Tensor:
    """The rows [rows, hidden] that run, in prompt order; ``positions`` are their places in the whole prompt."""
    while mixing is not None:
        taken = _taken(mixing.kind, x, positions)
        x = {"add": x + taken, "subtract": x - taken, "gate": x * torch.sigmoid(taken), "replace": taken,
             "divide": x / (1 + taken.abs())}[mixing.combine]
        mixing = mixing.then
    return x


def linear_attention(kind: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """One head [rows, dim]; the rows, and the state behind the last one."""
    query, key = (torch.where(part > 0, part + 1, part.exp()) for part in (query, key))
    rows = []
    for row in range(len(query)):
        seen = len(key) if kind == "linear, whole" else row + 1
        weights = key[:seen] @ query[row]
        rows.append(weights @ value[:seen] / weights.sum())
    return torch.stack(rows), key.T @ value
