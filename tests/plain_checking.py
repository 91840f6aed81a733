"""Holds one compiled model of :mod:`tests.plain` against its reference, and says what came of it."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import parvts_fx
from parvts_fx import scores
from parvts_fx.stages import Stage
from tests import replaying
from tests.plain import Plain, Prompt, Specification, build, prompt, read
from tests.plain_reference import PlainPrefill, begin_of, error_of, reference, steps_of
from tests.reference import kept, placed, relative_error

TOLERANCE, ROUNDING = 2e-5, 1e-5
_OPENING = "parvts_fx: this multimodal prefill cannot be rewritten: "
INTERNAL = ("the rewriting failed", "works only at the traced prompt length")
"""Parts of reasons that say nothing about the model: something went wrong inside."""


def tied(hidden: Tensor, visual: Tensor) -> Tensor:
    """Three scores for all tokens, so that ties decide."""
    return (visual.long().cumsum(1) % 3).float()


def partly_undefined(hidden: Tensor, visual: Tensor) -> Tensor:
    return torch.where(visual.long().cumsum(1) % 2 == 0, hidden[..., 0], torch.nan)


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "diverse": scores.diverse, "norm": scores.norm, "distinct": scores.distinct, "uniform": scores.uniform,
    "tied": tied, "partly undefined": partly_undefined,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The options of one example."""

    depth: int = 1
    keep: int | float = 2
    """An int for ``keep_tokens``, a float for ``keep_ratio``."""
    fusion: str | float = "attention"
    paths: str = "parallel"
    rule: str = "diverse"
    data_in_sizes: bool = True
    """Whether graphs may hold numbers that depend on data, as under parvts_fx.compile: weights then share a prefix."""
    skip_dead_rows: bool = True
    merge: str | None = None
    dynamic: bool | None = None
    """As torch.compile takes it."""
    stages: tuple[Stage, ...] = ()
    """In place of depth, keep, fusion, paths, rule and merge. Rules are names, too: of RULES, of READINGS, or registered."""

    @property
    def semantic(self) -> dict[str, Any]:
        if self.stages:
            return {"stages": tuple(dataclasses.replace(s, rule=RULES.get(s.rule, s.rule)) for s in self.stages)}
        name = "keep_tokens" if isinstance(self.keep, int) else "keep_ratio"
        return {name: self.keep, "migration_depth": self.depth, "fusion": self.fusion, "paths": self.paths,
                "merge": self.merge}

    @property
    def options(self) -> dict[str, Any]:
        own = {"lowering": "eager", "strict": True, "skip_dead_rows": self.skip_dead_rows}
        if self.stages:
            return {**own, "stages": tuple(dataclasses.replace(one, rule=_given(one.rule)) for one in self.stages)}
        return {**own, **self.semantic, "score": _given(self.rule)}

    def kept(self, spec: Specification) -> int:
        live = spec.visual
        for keep in [stage.keep for stage in self.stages] or [self.keep]:
            live = kept(keep, live, spec.visual)
        return spec.length - spec.visual + live


def _given(rule: str) -> str | Callable[[Tensor, Tensor], Tensor]:
    """A rule as the product takes it."""
    return RULES[rule] if rule in RULES and rule not in scores.known_rules() else rule


@dataclasses.dataclass(frozen=True)
class Outcome:
    kind: str
    """"rewritten" (and right), "refused" (and the plain answer), "wrong", or "unfit": a model too sensitive to compare."""

    reason: str = ""
    """Of a refusal, or what is wrong."""

    @property
    def is_internal(self) -> bool:
        return self.kind == "refused" and any(part in self.reason for part in INTERNAL)

    @property
    def summary(self) -> str:
        """The reason without nodes, numbers and quotations, so that alike ones count together."""
        first = self.reason.strip().splitlines()[0] if self.reason else ""
        reason = re.sub(r"\(at node '[^']*'\)", "", first.removeprefix(_OPENING))
        return re.sub(r"\d[\d.e+-]*", "N", re.sub(r"'[^']*'|\[[^\]]*\]", "...", reason)).strip()[:150]


@functools.lru_cache(maxsize=32)
def captured_call(spec: Specification, dynamic: bool | None, data_in_sizes: bool) -> replaying.Capture | None:
    """Remembered by what is asked for: whoever changes the code of models has it forget."""
    return replaying.capture(build(spec), prompt(spec).arguments, dynamic)


def answer(spec: Specification, options: dict[str, Any], dynamic: bool | None = None, data_in_sizes: bool = True) -> Any:
    """What a specification's compiled model gives for its prompt; captured once for all options."""
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=data_in_sizes):
        captured = captured_call(spec, dynamic, data_in_sizes)
        if captured is not None:
            return captured.under(options)
        torch._dynamo.reset()
        return torch.compile(build(spec), backend="parvts", options=options, dynamic=dynamic)(*prompt(spec).arguments)


def _refusal(error: BaseException) -> str | None:
    """Why a model was not rewritten, wherever in the chain of errors that is said."""
    while error is not None:
        if isinstance(error, parvts_fx.NotRewritten):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def outcome(spec: Specification, choice: Choice) -> Outcome:
    """Compiles, runs and compares; a refusal is followed by a run of the model that nothing has rewritten."""
    model, given = build(spec), prompt(spec)
    try:
        actual = answer(spec, choice.options, choice.dynamic, choice.data_in_sizes)
    except Exception as error:  # an outcome like another: what is drawn goes on
        reason = _refusal(error)
        if reason is None:
            return Outcome("wrong", f"raises {type(error).__name__}: {error}")
        return _left_alone(spec, choice, model, given, reason)
    expected = wanted(model, given, choice)
    error = error_of(spec, actual, expected)
    if not error < TOLERANCE:
        if _noise(spec, model, given, choice) > TOLERANCE / 2:
            return Outcome("unfit", "the eager model itself is as far from the reference: its numbers are rounding")
        if (choice.stages or choice.merge) and min(sample.gap for sample in expected) < ROUNDING:
            return Outcome("unfit", "which tokens are chosen is rounding")
        return Outcome("wrong", _diagnosis(spec, choice, model, given, actual, error))
    if choice.kept(spec) == spec.length and not _alike(spec, actual, model, given):
        return Outcome("wrong", "keeps all and differs from the unmodified model")
    return Outcome("rewritten")


def wanted(model: Plain, given: Prompt, choice: Choice, begin: int | None = None) -> list[PlainPrefill]:
    """The reference's prefill of an example."""
    with torch.no_grad():
        return reference(model, given, RULES[choice.rule], **choice.semantic, begin=begin)


def _noise(spec: Specification, model: Plain, given: Prompt, choice: Choice) -> float:
    """How far the unmodified model is from the reference that keeps all."""
    with torch.no_grad():
        whole = reference(model, given, RULES[choice.rule], keep_ratio=1.0)
        return error_of(spec, model(*given.arguments), whole)


def _alike(spec: Specification, actual: Any, model: Plain, given: Prompt) -> bool:
    """Whether that is what the unmodified model gives."""
    with torch.no_grad():
        whole = model(*given.arguments)
    actual, whole = _tensors(read(spec, actual)), _tensors(read(spec, whole))
    return len(actual) == len(whole) and all(relative_error(*pair) < TOLERANCE for pair in zip(actual, whole))


def _tensors(parts: tuple[Tensor, list, list]) -> list[Tensor]:
    logits, caches, states = parts
    return [logits, *(part for pair in caches for part in pair), *states]


def _left_alone(spec: Specification, choice: Choice, model: Plain, given: Prompt, reason: str) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", parvts_fx.ParvtsWarning)
        options = {**choice.options, "strict": False}
        try:
            actual = answer(spec, options, choice.dynamic, choice.data_in_sizes)
        except Exception as error:  # as above
            return Outcome("wrong", f"refused, and raises {type(error).__name__}: {error}")
    if not _alike(spec, actual, model, given):
        return Outcome("wrong", f"refused, and differs from the unmodified model ({reason})")
    return Outcome("refused", reason)


def _diagnosis(spec: Specification, choice: Choice, model: Plain, given: Prompt, actual: Any, error: float) -> str:
    """How far off, and whether it would be right had layers been counted otherwise, or had nothing been pruned."""
    if _alike(spec, actual, model, given):
        return "not rewritten, without a word"
    first = begin_of(spec, placed(choice.stages, spec.layers)[-1].begin) if choice.stages else 0
    for begin, step in list(enumerate([*steps_of(spec), "the final norm"]))[first:]:
        if error_of(spec, actual, wanted(model, given, choice, begin)) < TOLERANCE:
            return f"pruned in front of {step}"
    shapes = [tuple(part.shape) for part in _tensors(read(spec, actual))] if error == float("inf") else []
    return f"error {error:.1e}" + (f", {choice.kept(spec)} rows are kept, shapes are {shapes}" if shapes else "")
