"""What kept visual tokens take over of dropped ones, one token after the other: the reference of Stage.merge="clusters"."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.3


@dataclasses.dataclass
class Clusters:
    """Of one sample's live rows."""

    members: dict[int, list[int]]
    """By kept visual row: the dropped rows that it stands for."""

    weights: dict[int, tuple[float, dict[int, float]]]
    """By kept visual row: its own share of the mixture, and that of each member."""

    sizes: Tensor
    """[rows] float64: how many tokens each row stands for behind the stage (1 for text)."""

    gap: float
    """How much nearer the nearest kept token is than the next one, where that is least clear."""

    def taken_over(self, rows: Tensor) -> Tensor:
        """[..., rows, n] with the kept rows moved towards those that they stand for."""
        result, given = rows.clone(), rows.double()
        for kept, (_, shares) in self.weights.items():
            step = sum((share * (given[..., row, :] - given[..., kept, :]) for row, share in shares.items()),
                       torch.zeros_like(given[..., kept, :]))
            result[..., kept, :] = (given[..., kept, :] + step).to(rows.dtype)
        return result

    def shifted(self, values: Tensor, visual: Tensor) -> Tensor:
        """[..., rows, n]: values mixed alike, then moved by one vector: their mean over kept rows is that over all."""
        mixed, kept = self.taken_over(values), sorted(self.weights)
        shift = values[..., visual.nonzero()[:, 0], :].mean(-2) - mixed[..., kept, :].mean(-2)
        mixed[..., kept, :] += shift[..., None, :]
        return mixed


def clusters_of(hidden: Tensor, visual: Tensor, subject: Tensor, pictures: Tensor, sizes: Tensor) -> Clusters:
    """One sample's clusters.

    Args:
        hidden: [rows, hidden] at the input of the layer where the stage chooses.
        visual, subject: [rows] bool.
        pictures: [rows], which picture a visual row is of.
        sizes: [rows], how many tokens each stands for so far.
    """
    rows = visual.nonzero()[:, 0].tolist()
    tokens, pictures = hidden.double().cpu(), pictures.tolist()  # thousands of numbers are read one by one
    tokens = tokens - tokens[rows].mean(0)
    kept = [row for row in rows if subject[row]]
    members: dict[int, list[int]] = {row: [] for row in kept}
    clear = math.inf
    for row in rows:
        if subject[row]:
            continue
        own = [other for other in kept if pictures[other] == pictures[row]] or kept
        found = F.cosine_similarity(tokens[row], tokens[own], dim=-1).tolist()
        best = max(range(len(own)), key=lambda place: found[place])
        clear = min([clear, *(found[best] - other for place, other in enumerate(found) if place != best)])
        members[own[best]].append(row)
    weights, after = {}, torch.ones(len(visual), dtype=torch.float64)
    for row, others in members.items():
        total = float(sizes[row]) + BETA * sum(float(sizes[other]) for other in others)
        weights[row] = float(sizes[row]) / total, {other: BETA * float(sizes[other]) / total for other in others}
        after[row] = sizes[row] + sum(float(sizes[other]) for other in others)
    return Clusters(members, weights, after, clear)


def pictures_of(visual: Tensor) -> Tensor:
    """[seq] int64: a number for each run of visual positions."""
    number, runs, before = 0, [], False
    for now in visual.tolist():
        number += now and not before
        runs.append(number)
        before = now
    return torch.tensor(runs)


@contextlib.contextmanager
def counting(sizes: torch.Tensor, text: torch.Tensor) -> Iterator[None]:
    """While active, the logits of every attention call over these rows as keys count those that stand for several.

    Args:
        sizes: [rows], how many tokens each stands for.
        text: [rows] bool: which count them when they ask.
    """
    if not bool((sizes > 1).any()):
        yield
        return
    fused, softmaxes = F.scaled_dot_product_attention, (F.softmax, torch.softmax)

    def bias(queries: int) -> torch.Tensor:
        return text[-queries:, None] * sizes.log()

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
               dropout_p: float = 0.0, is_causal: bool = False, **named: Any) -> torch.Tensor:
        asking, keys = query.shape[-2], key.shape[-2]
        if keys != len(sizes):
            return fused(query, key, value, attn_mask, dropout_p, is_causal, **named)
        if attn_mask is None:
            attn_mask = torch.ones(asking, keys, dtype=torch.bool)
            attn_mask = attn_mask.tril() if is_causal else attn_mask
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, torch.finfo(torch.float32).min)
        return fused(query, key, value, (attn_mask + bias(asking)).to(query.dtype), dropout_p, **named)

    def softmax(logits: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> torch.Tensor:
        """By the tensor's method: F.softmax calls itself by its name where a device is set, and would come here twice."""
        if logits.dim() == 4 and logits.shape[-1] == len(sizes):
            logits = logits + bias(logits.shape[-2]).to(logits.dtype)
        return logits.softmax(dim, dtype)

    F.scaled_dot_product_attention = attend
    F.softmax = torch.softmax = softmax
    try:
        yield
    finally:
        F.scaled_dot_product_attention, (F.softmax, torch.softmax) = fused, softmaxes
