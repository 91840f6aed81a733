"""Published methods as schedules: where each chooses, by what, how many tokens it keeps, and when the others leave.

What is theirs is the schedule: where they choose and how many layers run both groups. The share that is kept here is one
that their papers report; write the stages yourself for another. How a method ranks tokens is said as far as it can be said
as a rule (:mod:`parvts_fx.scores`); what cannot is named in docs/schedules.md.
"""

from __future__ import annotations

from parvts_fx.stages import Stage

SCHEDULES: dict[str, tuple[Stage, ...]] = {
    # Parallel Vision Token Scheduling, arXiv 2511.18875: both groups run beside each other, then the non-subject path ends.
    "parvts": (Stage(at=0, keep=1 / 9, migrate=3),),
    # The same without separate paths: the ablation.
    "joint": (Stage(at=0, keep=1 / 9, migrate=3, paths="joint"),),
    # FastV, arXiv 2403.06764: from layer 2 on, the half that the last row looked at most in the layer in front.
    "fastv": (Stage(at=2, keep=0.5, rule="last_row"),),
    # PyramidDrop, arXiv 2410.17247: four parts of the model, half of the tokens in each further one.
    "pyramiddrop": (
        Stage(at=0.25, keep=0.5, rule="last_row"), Stage(at=0.5, keep=0.25, rule="last_row"),
        Stage(at=0.75, keep=0.125, rule="last_row")),
    # DivPrune, arXiv 2503.02175: in front of the first layer, those that differ most (ranked, where it chooses greedily).
    "divprune": (Stage(at=0, keep=1 / 9, rule="diverse"),),
    # VisionZip, arXiv 2412.04467: in front of the first layer, those that the vision tower itself looks at (its dominant
    # tokens; it adds averages of the others).
    "visionzip": (Stage(at=0, keep=1 / 9, rule="attended"),),
    # Two baselines.
    "random": (Stage(at=0, keep=1 / 9, rule="random"),),
    "uniform": (Stage(at=0, keep=1 / 9, rule="uniform"),),
}
"""By name, what the option ``stages`` takes as a string."""
