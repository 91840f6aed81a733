"""What ``parvts-fx try`` has found, and the one sentence that it comes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parvts_fx.command.measuring import Flops, Side, Spread
from parvts_fx.cost import Comparison
from parvts_fx.runtime.record import CallRecord

_MATTERS = 1.05
"""By how much the medians must differ to be called different."""

_SCATTERS = 1.5
"""How many times the fastest call the slowest must take to be told."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One prompt, answered with all visual tokens and with few."""

    settings: dict[str, Any]
    pruned: bool
    reason: str
    """Why nothing was pruned; empty where something was."""

    prompt_tokens: int
    visual_tokens: int | None
    """None where no graph has told."""

    kept_tokens: int | None
    kept: list[int] | None
    """Places in the prompt of the visual tokens that are left; None where no graph has told."""

    flops: Flops | None
    """None where no graph was rewritten in a single call."""

    whole: Side
    few: Side
    patches: Path | None
    plan: Path | None
    """Pictures, where they could be drawn."""

    notes: list[str]
    costs: tuple[Comparison, ...] = ()
    """What is predicted for the prefill alone, by processor; empty where nothing was pruned."""

    @classmethod
    def of(
        cls, settings: dict[str, Any], ids: torch.Tensor, record: CallRecord, flops: Flops | None, sides: tuple[Side, Side],
        patches: Path | None, plan: Path | None, notes: Sequence[str], costs: Sequence[Comparison] = (),
    ) -> Result:
        """Args: ``ids``, the prompt's [1, tokens]."""
        count = sum(record.visual_tokens) if record.visual is not None else None
        kept = sum(record.kept_tokens) if record.visual is not None else None
        if any(side.first_token.most > _SCATTERS * side.first_token.least for side in sides):
            notes = [*notes, "the times scatter widely: other work on this machine may disturb them (try --repeats 15)"]
        places = None if record.kept is None else record.kept[0].nonzero()[:, 0].tolist()
        return cls(settings, record.pruned, record.reason, record.prompt_tokens or ids.shape[1], count, kept, places,
                   flops if record.pruned else None, *sides, patches, plan, list(notes), tuple(costs) if record.pruned else ())

    @property
    def equal(self) -> bool:
        """Whether both answers have the same tokens."""
        return self.whole.tokens == self.few.tokens

    @property
    def first_token_ratio(self) -> float:
        """How many times sooner the first token is there."""
        return self.whole.first_token.median / self.few.first_token.median

    @property
    def step_ratio(self) -> float | None:
        if self.whole.step is None or self.few.step is None:
            return None
        return self.whole.step.median / self.few.step.median

    @property
    def verdict(self) -> str:
        """Whether it pays here, in one sentence."""
        if not self.pruned:
            return f"Nothing was pruned, so there is nothing to gain here: {self.reason.splitlines()[0]}."
        times = f"the first token comes {_times(self.first_token_ratio)}"
        if self.flops is not None:
            times += f" (FLOPs allow {self.flops.allow:.2f}x)"
        if self.step_ratio is not None and self.whole.step and self.few.step and _differ(self.whole.step, self.few.step):
            times += f", each further one {_times(self.step_ratio)}"
        same = "and the answer is the same" if self.equal else "but the answer is another one: judge it, or keep more tokens"
        if self.first_token_ratio < _MATTERS:
            return f"It does not pay here: {times}, {same}."
        if not _differ(self.whole.first_token, self.few.first_token):
            return f"Whether it pays cannot be told here: {times}, which is within the scatter of the calls, {same}."
        return f"It pays here: {times}, {same}." if self.equal else f"It is quicker here: {times}, {same}."

    def as_json(self) -> dict[str, Any]:
        """Numbers, lists and text alone."""
        flops = None if self.flops is None else dataclasses.asdict(self.flops) | {"allow": self.flops.allow}
        return {
            **self.settings, "pruned": self.pruned, "reason": self.reason, "prompt_tokens": self.prompt_tokens,
            "visual_tokens": self.visual_tokens, "kept_tokens": self.kept_tokens, "kept": self.kept, "flops": flops,
            "all": dataclasses.asdict(self.whole), "few": dataclasses.asdict(self.few), "answers_equal": self.equal,
            "first_token_ratio": self.first_token_ratio, "step_ratio": self.step_ratio,
            "predicted": [_predicted(cost) for cost in self.costs],
            "pictures": [str(path) for path in (self.patches, self.plan) if path is not None], "notes": self.notes,
            "verdict": self.verdict,
        }


def _predicted(cost: Comparison) -> dict[str, Any]:
    sides = {}
    for name, one in (("all", cost.whole), ("few", cost.few)):
        sides[name] = dataclasses.asdict(one) | {"dtype": str(one.dtype).removeprefix("torch."), "seconds": one.seconds}
    return {"processor": cost.few.processor, **sides, "kernels_ratio": cost.kernels_ratio, "ratio": cost.ratio}


def _differ(one: Spread, other: Spread) -> bool:
    """Whether two medians are further apart than both matters and scatters."""
    ratio = one.median / other.median
    return not 1 / _MATTERS <= ratio <= _MATTERS and not one.is_within(other) and not other.is_within(one)


def _times(ratio: float) -> str:
    if ratio >= 1:
        return f"{ratio:.2f}x sooner"
    return f"{1 / ratio:.2f}x later"
