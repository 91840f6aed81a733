"""Shares of right answers with confidence intervals, from answers kept one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.accuracy.questions import SHARES

RESAMPLES = 2000


def unpack(row: dict[str, Any], pictures: int) -> np.ndarray:
    """[pictures, kinds] float: 1 for a right answer."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), dtype=np.uint8))
    return bits[:pictures * len(SHARES)].reshape(pictures, len(SHARES)).astype(float)


def summarise(rows: Sequence[dict[str, Any]], full: dict[str, Any], pictures: int) -> list[dict[str, Any]]:
    """The rows with accuracy in per cent of the full model's, overall and by kind, and 95 % intervals.

    Intervals are percentiles over resampled pictures, since the questions of one picture share its difficulty; the full
    model is resampled with the same pictures.
    """
    base = unpack(full, pictures)
    chosen = np.random.default_rng(0).integers(pictures, size=(RESAMPLES, pictures))
    base_means = base.mean(1)[chosen].mean(1)
    summaries = []
    for row in rows:
        right = unpack(row, pictures)
        shares = 100 * right.mean(1)[chosen].mean(1) / base_means
        low, high = np.percentile(shares, [2.5, 97.5])
        by_kind = {kind: 100 * right[:, i].mean() / max(base[:, i].mean(), 1e-9) for i, kind in enumerate(SHARES)}
        summaries.append({**row, "accuracy": 100 * right.mean(), "share": 100 * right.mean() / base.mean(), "low": low,
                          "high": high, "by_kind": by_kind, "by_kind_alone": dict(zip(SHARES, 100 * right.mean(0))),
                          "flops_share": 100 * row["decoder_flops"] / full["decoder_flops"]})
    return summaries


def ahead(one: dict[str, Any], other: dict[str, Any], full: dict[str, Any], pictures: int) -> tuple[float, float, float]:
    """By how many points of the full model's accuracy one way is ahead of another: (difference, low, high)."""
    chosen = np.random.default_rng(0).integers(pictures, size=(RESAMPLES, pictures))
    base = unpack(full, pictures).mean(1)
    difference = unpack(one, pictures).mean(1) - unpack(other, pictures).mean(1)
    spread = 100 * difference[chosen].mean(1) / base[chosen].mean(1)
    low, high = np.percentile(spread, [2.5, 97.5])
    return 100 * difference.mean() / base.mean(), low, high
