"""How different visual tokens are from one another: what scoring rules have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def spread_out(
    relevance: torch.Tensor, vectors: torch.Tensor, visual: torch.Tensor, further: torch.Tensor | float = 0.0,
    furthest: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Relevance [batch, seq] times the cosine distance (0 to 2) to the nearest visual token that is more relevant.

    Args:
        further: [batch, seq, seq], added to the distances; ``furthest`` [batch, seq] to that of a token with none ahead.
    """
    direction = F.normalize(vectors, dim=-1)
    distance = 1 - direction @ direction.transpose(1, 2) + further
    position = torch.arange(visual.shape[1], device=visual.device)
    ahead = (relevance[:, None, :] > relevance[:, :, None]) | (
        (relevance[:, None, :] == relevance[:, :, None]) & (position < position[:, None])
    )
    nearest = distance.masked_fill(~(ahead & visual[:, None, :]), torch.inf).amin(dim=-1)
    return relevance * torch.where(nearest.isinf(), 2.0 + furthest, nearest)


def further_apart(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`spread_out` adds to distances for where tokens stand in their pictures (the rule "placed")."""
    picture, known = places[..., 0], places[..., 1] >= 0
    apart = places[..., None, 1:] - places[..., None, :, 1:]
    rows, columns = (held.amax(1, keepdim=True).clamp(min=0).float() + 1 for held in places[..., 1:].unbind(-1))
    side = (rows * columns).sqrt()[..., None]  # where no grid is known at all it must not be 0 / 0
    near = torch.exp(-(apart.float() ** 2).sum(-1) / (2 * (side / 4) ** 2))
    further = 0.3 * (1 - torch.where(picture[:, :, None] == picture[:, None], near, 0.0)) * (known[:, :, None] & known[:, None])
    return further, 0.3 * known


def differences(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """[batch, seq, hidden] float32: of each visual token from the sample's mean one; zeros for text."""
    tokens = hidden.float()
    weight = visual[..., None].float()
    mean = (tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return (tokens - mean) * weight
