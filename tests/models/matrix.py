"""What the matrix of supported models finds out about one architecture."""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

import parvts_fx
from parvts_fx import NotRewritten, ParvtsWarning
from tests.models import prompts
from tests.models.builders import BUILDERS, Built
from tests.models.generating import MERGED, TWO_STAGES, Comparison, cache_entries, compared, logit_error, run_generate, two_stages

TOLERANCE, LIMIT = 2e-5, 480
BATCH = "generate, batch of two"


@dataclasses.dataclass
class Finding:
    name: str
    verdict: str = ""
    """"rewritten", "rewritten singly" (no batches), "rewritten in one stage" (no schedule of two), "rewritten unmerged" (what is
    dropped cannot be merged), "generate only",
    "forward only", "unrewritten", "not compiled" (torch.compile fails), "unverified" (the reference does not run) or
    "wrong"."""
    reason: str = ""
    trait: str = ""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """Largest relative error by check."""
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def examine(name: str) -> Finding:
    """Build a model and hold everything that it supports against the reference; never raises."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    built = BUILDERS[name]()
    found = Finding(name, trait=built.trait)
    reasons: dict[str, str] = {}
    for check, run in _checks(built, found):
        try:
            with _limit(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.errors[check] = run()
        except NotRewritten as error:
            reasons[check] = _short(error)
        except _NotApplicable as note:
            found.notes.append(str(note))
        except Exception as error:
            reasons[check] = f"{type(error).__name__}: {_short(error)}"
    if not found.errors:
        found.errors["unrewritten"], told = _unrewritten(built)
        found.reason = told or next(iter(reasons.values()), "").removeprefix("LookupError: ")
        found.verdict = "unrewritten" if found.errors["unrewritten"] <= 1e-6 and found.reason else "wrong"
        if found.verdict == "wrong" and _dynamo_fails(built):
            found.verdict, found.errors = "not compiled", {}
            found.reason = f"torch.compile fails on this model, with any backend: {found.reason}"
    else:
        found.reason = "; ".join(f"{check}: {reason}" for check, reason in reasons.items())
        found.verdict = _verdict(found.errors, reasons)
        if two_stages(built)[1].rule == "uniform":
            found.notes.append("no layer shows attention that tells tokens apart: the second stage chooses by places")
    found.seconds = time.perf_counter() - start
    return found


def _verdict(errors: Mapping[str, float], reasons: Mapping[str, str]) -> str:
    """Of what some checks found, and why others did not run."""
    in_one = [check for check in reasons if TWO_STAGES not in check and MERGED not in check]
    done, failed = ({check.split(",")[0] for check in checks} for checks in (errors, in_one))
    whole = done - failed
    if max(errors.values()) > TOLERANCE:
        return "wrong"
    if failed and in_one != [BATCH]:
        return f"{whole.pop()} only" if len(whole) == 1 else "unverified"
    if any(MERGED in check for check in reasons):
        return "rewritten unmerged"
    if len(in_one) < len(reasons):
        return "rewritten in one stage"
    return "rewritten singly" if failed else "rewritten"


class _NotApplicable(Exception):
    """A check has no meaning for a model; says why."""


def _checks(built: Built, found: Finding) -> Iterator[tuple[str, Callable[[], float]]]:
    """Forward and generate, each captured once for all schedules; a batch by itself."""
    torch._dynamo.reset()
    for schedule, held in compared(built).items():
        yield f"forward, {schedule}", functools.partial(held.forward, built.inputs)
        if schedule == MERGED and held.merging:
            found.notes.append(f"merging: {held.merging}")
    if not built.generates:
        return
    torch._dynamo.reset()
    in_turn = compared(built)
    for schedule, held in in_turn.items():
        yield f"generate, {schedule}", functools.partial(held.generate, built.inputs)
    for schedule, held in in_turn.items():  # behind all others: from here on sizes are symbols
        if f"generate, {schedule}" in found.errors:
            yield f"generate, {schedule}, longer", functools.partial(held.generate, prompts.longer(built.inputs))
    if "input_ids" in built.inputs:
        torch._dynamo.reset()
        yield BATCH, lambda: _batch(built)


def _batch(built: Built) -> float:
    """A sample's logits in a padded batch, compiled, against the reference's for the sample alone."""
    alone = [built.inputs, prompts.second(built.inputs)]
    both = prompts.batch(built.inputs)
    try:
        eager = [run_generate(built.model, inputs, 2) for inputs in (*alone, both)]
    except Exception as error:
        raise _NotApplicable(f"the model itself takes no such batch ({_short(error)})") from error
    if _apart(eager) > 1e-4:
        raise _NotApplicable("the model's own result depends on padding")
    with Comparison(built) as compared:
        done = []
        for inputs in alone:
            done.append(compared.run_reference(inputs, 2))
        done.append(compared.run_compiled(both, 2))
    if cache_entries(done[-1].past_key_values) >= cache_entries(eager[-1].past_key_values):
        raise _NotApplicable("the batch runs unrewritten")
    return _apart(done)


def _apart(runs: list[Any]) -> float:
    *alone, both = runs
    return max(
        logit_error(together[sample:sample + 1], single)
        for sample, run in enumerate(alone) for together, single in zip(both.logits, run.logits)
    )


def _unrewritten(built: Built) -> tuple[float, str]:
    """(error of the compiled model against itself uncompiled, the warning's reason)."""
    with torch.no_grad():
        wanted = built.model(**built.inputs).logits
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught, _limit():
        warnings.simplefilter("always")
        try:
            parvts_fx.compile(built.model, lowering="eager", migration_depth=1, keep_ratio=0.25)
            with torch.no_grad():
                actual = built.model(**built.inputs).logits
        except Exception as error:
            return math.inf, _short(error)
        finally:
            for module in built.model.modules():
                module._compiled_call_impl = None
    told = [str(warning.message) for warning in caught if issubclass(warning.category, ParvtsWarning)]
    if actual.shape != wanted.shape:
        return math.inf, ""
    return logit_error(actual, wanted), _short(told[0]) if told else ""


def _dynamo_fails(built: Built) -> bool:
    """Whether torch.compile cannot run a model even with the backend that does nothing."""
    torch._dynamo.reset()
    try:
        with _limit(), torch.no_grad():
            torch.compile(built.model._call_impl, backend="eager")(**built.inputs)
    except Exception:
        return True
    return False


def _short(error: object) -> str:
    text = " ".join(str(error).split()).removeprefix("parvts_fx: ")
    for prefix in ("this multimodal prefill cannot be rewritten: ", "this multimodal prefill runs unrewritten: "):
        text = text.removeprefix(prefix)
    return text[:300]


class _limit:
    """A limit in seconds for one check."""

    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            raise TimeoutError(f"more than {LIMIT} s")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(LIMIT)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
