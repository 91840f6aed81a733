"""What kept visual tokens take over of dropped ones, one token after the other: the reference of Stage.merge="clusters"."""

from __future__ import annotations

import dataclasses
import math

import torch
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
    tokens = hidden.double()
    mean = tokens[rows].mean(0)
    kept = [row for row in rows if subject[row]]
    members: dict[int, list[int]] = {row: [] for row in kept}
    clear = math.inf
    for row in rows:
        if subject[row]:
            continue
        own = [other for other in kept if pictures[other] == pictures[row]] or kept
        found = [float(torch.nn.functional.cosine_similarity(tokens[row] - mean, tokens[other] - mean, dim=0)) for other in own]
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
