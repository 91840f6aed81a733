"""A schedule is data: where visual tokens are chosen, by what, how many stay, and what becomes of the rest.

Every published way of dropping visual tokens inside a language model answers these four questions, once or several times.
A schedule is a tuple of :class:`Stage`, one for each time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch

Rule = Callable[..., torch.Tensor]

_LARGEST_PARTS, _MOST_VISUALS = 10_000, 1 << 17
"""Of a share's denominator; of a sample's visual tokens, to which whole numbers are checked."""


def _fail(field: str, value: object, expected: str, remedy: str, number: int | None = None) -> None:
    place = "" if number is None else f"[{number}]"
    raise ValueError(f"parvts_fx: option stages{place}.{field}={value!r}: expected {expected}. {remedy}".rstrip())


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One choice of visual tokens, and what becomes of those not chosen (the non-subject tokens).

    Raises:
        ValueError: for a value outside its range; the message names the field, the value and what to do.
    """

    at: int | float = 0
    """The layer at whose input the choice is made; a share of the layers (rounded half up) if a float in (0, 1)."""

    keep: int | float = 1 / 9
    """How many visual tokens per sample stay: a count if an int, else a share of the sample's original visual tokens, of
    which ``max(1, floor(keep * n + 0.5))`` stay. Never more than there still are."""

    rule: str | Rule = "auto"
    """A rule's name or a callable (:mod:`parvts_fx.scores`): it ranks the visual tokens that are still there."""

    migrate: int | float = 0
    """Layers ``at`` to ``at + migrate - 1`` run both groups; the non-subject rows leave at the input of layer ``at + migrate``.
    A share of the layers if a float in (0, 1)."""

    paths: str = "parallel"
    """"parallel": while both groups run they do not see each other. "joint": they do."""

    fusion: str | float = "attention"
    """How text rows take in both groups: "attention", or the constant weight of the subject path in [0, 1], with which each
    path has its own copy of the text until the non-subject rows leave (ParVTS, arXiv 2511.18875)."""

    merge: str | None = None
    """What the kept tokens take over of the dropped ones: nothing, or with "clusters" every dropped one is merged into the
    kept one most like it (:mod:`parvts_fx.passes.clusters`)."""

    def __post_init__(self) -> None:
        if not (_is_count(self.at) and self.at >= 0 or _is_share(self.at) and 0 < self.at < 1):
            _fail("at", self.at, "a layer's number from 0 on, or a share of the layers as a float between 0 and 1",
                  "0 chooses in front of the first layer.")
        if not (_is_count(self.keep) and self.keep >= 1 or _is_share(self.keep) and 0 < self.keep <= 1):
            _fail("keep", self.keep, "a count of at least 1 as an int, or a share in (0, 1] as a float",
                  "64 keeps 64 tokens, 1/9 keeps 64 of 576, 1.0 keeps all.")
        if not (isinstance(self.rule, str) or callable(self.rule)):
            _fail("rule", self.rule, "a rule's name or a callable", 'Use "auto" if unsure.')
        if not (_is_count(self.migrate) and self.migrate >= 0 or _is_share(self.migrate) and 0 < self.migrate < 1):
            _fail("migrate", self.migrate, "a number of layers from 0 on, or a share of them as a float between 0 and 1",
                  "0 drops the other tokens where the choice is made.")
        if self.paths not in ("parallel", "joint"):
            _fail("paths", self.paths, '"parallel" or "joint"', 'Use "parallel" for ParVTS.')
        weighed = not isinstance(self.fusion, (str, bool)) and isinstance(self.fusion, (int, float))
        if not (0 <= self.weight <= 1 if weighed else self.fusion == "attention"):
            _fail("fusion", self.fusion, '"attention" or a number in [0, 1] (the subject path\'s weight)',
                  'Use "attention" if unsure.')
        if self.paths == "joint" and weighed:
            _fail("fusion", self.fusion, '"attention" together with paths="joint"',
                  "With joint paths there is one copy of the text rows and nothing to weigh.")
        if self.migrate == 0 and (self.paths == "joint" or weighed):
            field, held = ("paths", self.paths) if self.paths == "joint" else ("fusion", self.fusion)
            _fail(field, held, f"the default together with migrate={self.migrate!r}",
                  "Where the other tokens leave at once there is no second group; give migrate, or leave this out.")
        if self.merge not in (None, "clusters"):
            _fail("merge", self.merge, 'None or "clusters"', "None drops what is not kept.")
        if self.merge is not None and weighed:
            _fail("merge", self.merge, f'None together with fusion={self.fusion!r}', "Constant weights give each path its own "
                  'copy of the text; use fusion="attention" to merge.')

    @property
    def weight(self) -> float:
        """The subject path's constant weight."""
        return float(self.fusion)


@dataclasses.dataclass(frozen=True)
class PlacedStage:
    """A stage in a decoder whose number of layers is known."""

    number: int
    """How many stages drop tokens in front of it."""

    stage: Stage
    at: int
    end: int
    """The layer at whose input the non-subject rows leave; the number of layers for "behind the last layer"."""

    written_as: int = 0
    """Which stage of the user's schedule this is: one that drops nothing from the prompt at hand is left out."""

    @property
    def is_weighed(self) -> bool:
        """Whether each path has its own copy of the text rows."""
        return self.stage.fusion != "attention" and self.end > self.at

    @property
    def is_parallel(self) -> bool:
        """Whether both groups run beside each other, over one copy of the text rows."""
        return self.stage.paths == "parallel" and self.end > self.at and not self.is_weighed

    def runs_both(self, layer: int) -> bool:
        """Whether a layer runs subject and non-subject rows."""
        return self.at <= layer < self.end


def counts_left(stages: Sequence[Stage], visuals: Any) -> list[Any]:
    """How many of a sample's visual tokens (an int, or a torch.SymInt that is no 0) are left in front of the first stage and
    behind each.

    Symbolic counts stand in every size behind the drop, and Inductor simplifies these for every kernel: nothing is written
    that need not be, no minimum of what cannot be larger, and no floating-point number where whole ones do.
    """
    left = [visuals]
    for number, stage in enumerate(stages):
        left.append(_kept(stages[:number], stage, left[-1], visuals))
    return left


def _kept(before: Sequence[Stage], stage: Stage, live: Any, visuals: Any) -> Any:
    """How many of ``live`` tokens a stage keeps, of ``visuals`` that there were; ``before``: the stages in front of it."""
    kept = stage.keep if isinstance(stage.keep, int) else _share(stage.keep, visuals)
    shares = [one.keep for one in (*before, stage) if isinstance(one.keep, float)]
    never_more = not isinstance(visuals, int) and len(shares) == len(before) + 1 and min(shares) == stage.keep
    return kept if never_more else torch.sym_min(live, kept)


def _share(share: float, visuals: Any) -> Any:
    """``max(1, floor(share * visuals + 0.5))``: as floating-point numbers round it, whatever it is computed in."""
    if isinstance(visuals, int):
        return max(1, math.floor(share * visuals + 0.5))
    fraction = _as_fraction(share)
    if fraction is None:  # sym_int rounds towards zero
        return torch.sym_max(1, torch.sym_int(share * torch.sym_float(visuals) + 0.5))
    times, parts = fraction
    return torch.sym_max(1, (2 * times * visuals + parts) // (2 * parts))


@functools.cache
def _as_fraction(share: float) -> tuple[int, int] | None:
    """Numerator and denominator by which whole numbers give what floating-point ones give; None if there are none."""
    found = Fraction(share).limit_denominator(_LARGEST_PARTS)
    times, parts = found.numerator, found.denominator
    # rounding errors can only tell where a product lies half way between two whole numbers
    halves = () if parts % 2 else range(parts // 2 * pow(times, -1, parts) % parts, _MOST_VISUALS, parts)
    alike = all((2 * times * count + parts) // (2 * parts) == math.floor(share * count + 0.5) for count in halves)
    return (times, parts) if times / parts == share and alike else None


def check_order(stages: Sequence[Stage]) -> None:
    """What can be told of a schedule before the model is known.

    Raises:
        ValueError: stages that run backwards or overlap, or that would keep more than the one before.
    """
    for number, (before, stage) in enumerate(zip(stages, stages[1:]), start=1):
        if type(before.at) is type(stage.at) and stage.at < before.at:
            _fail("at", stage.at, f"at least {before.at!r}, where the stage before chooses", "Put stages in the order of "
                  "their layers.", number)
        counted = all(_is_count(held) for held in (before.at, before.migrate, stage.at))
        if counted and stage.at < before.at + before.migrate:
            _fail("at", stage.at, f"at least {before.at + before.migrate}, where the non-subject tokens of the stage before "
                  "leave", "A stage begins where the one before it has ended, or behind.", number)
        if type(before.keep) is type(stage.keep) and stage.keep > before.keep:
            _fail("keep", stage.keep, f"at most {before.keep!r}, what the stage before keeps",
                  "What was dropped does not come back.", number)


def placed(stages: Sequence[Stage], layers: int) -> tuple[PlacedStage, ...]:
    """The stages in a decoder of so many layers.

    Raises:
        ValueError: a stage that lies beyond the layers, or overlaps with the one before.
    """
    found: list[PlacedStage] = []
    for number, stage in enumerate(stages):
        at = _layers(stage.at, layers)
        end = at + _layers(stage.migrate, layers)
        if at >= layers:
            _fail("at", stage.at, f"a layer of this model, at most {layers - 1}", f"It has {layers} decoder layers.", number)
        if end > layers:
            _fail("migrate", stage.migrate, f"at most {layers - at} (layer {at} of {layers} on)",
                  "The non-subject tokens leave behind the last layer at the latest.", number)
        if found and at < found[-1].end:
            _fail("at", stage.at, f"at least layer {found[-1].end}, where the non-subject tokens of the stage before leave "
                  f"(it came to layer {at})", "A stage begins where the one before it has ended, or behind.", number)
        found.append(PlacedStage(number, stage, at, end, number))
    return tuple(found)


def dropping(stages: Sequence[PlacedStage], visuals: int | torch.SymInt) -> tuple[PlacedStage, ...]:
    """The stages without those that drop none of so many visual tokens; where that is known only when the graph runs, all."""
    if not isinstance(visuals, int):
        return tuple(stages)
    found: list[PlacedStage] = []
    left = counts_left([placed_stage.stage for placed_stage in stages], visuals)
    for placed_stage, before, behind in zip(stages, left, left[1:]):
        if behind < before:
            found.append(dataclasses.replace(placed_stage, number=len(found)))
    return tuple(found)


def weighs_nothing(stages: Sequence[Stage], visuals: int) -> bool:
    """Whether a stage with constant weights drops none of so many tokens: then there is nothing to weigh its text with."""
    left = counts_left(stages, visuals)
    return any(before == behind and stage.fusion != "attention" for stage, before, behind in zip(stages, left, left[1:]))


def _layers(given: int | float, layers: int) -> int:
    return math.floor(given * layers + 0.5) if isinstance(given, float) else given
