"""Answers and times of a model, whole and pruned, side by side."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from parvts_fx.command.errors import BadInput, because
from parvts_fx.cost import flops_of
from parvts_fx.report import Report
from parvts_fx.torch_private import dynamo_config

WARM_UP = 2
"""Calls of each that are not counted: the first compiles, the second compiles again for any sizes."""

_TIMED_TOKENS = 9
"""At most so many: eight decode steps a call."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Seconds of repeated calls."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        return cls(statistics.median(values), min(values), max(values)) if values else None

    def is_within(self, other: Spread) -> bool:
        """Whether the median is one of the times that the other took."""
        return other.least <= self.median <= other.most


@dataclasses.dataclass(frozen=True)
class Side:
    """What one of the two did."""

    answer: str
    tokens: list[int]
    """The ids that greedy decoding added."""

    first_token: Spread
    """From the pixels to the first token: vision tower, prefill, choice."""

    step: Spread | None
    """A decode step, the average of each call's; None where one token was asked for."""

    peak_bytes: int | None
    """The most that a call up to the first token held on the device beyond what was there before; None where no device tells."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of everything up to the first token, by torch's FlopCounterMode."""

    whole: int
    pruned: int

    @property
    def allow(self) -> float:
        """How many times sooner the first token could be there, were FLOPs all that counts."""
        return self.whole / self.pruned


class _Clock:
    """A streamer for ``generate``: when each token was on the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        value.tolist()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def twin_of(model: Any) -> Any:
    """A copy that shares all weights, to be compiled by itself."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held})


def compile_plainly(model: Any, lowering: str) -> None:
    """In place, as by torch.compile."""
    with because(f"--lowering {lowering}"):
        model.compile(backend=lowering)


def many_compiles() -> Any:
    """A context in which Dynamo compiles code of transformers' for both models, and for every length that comes up."""
    return dynamo_config().patch(recompile_limit=64, accumulated_recompile_limit=1024)


def compare(
    whole: Any, pruned: Any, inputs: dict[str, Any], new_tokens: int, repeats: int, text_of: Callable[[torch.Tensor], str],
    advance: Callable[[str], None],
) -> tuple[Side, Side]:
    """Answers, and times taken in turns.

    Args:
        advance: told in words what comes next, ``2 + WARM_UP + repeats`` times.

    Raises:
        BadInput: the model does not take the inputs.
    """
    models, names = (whole, pruned), ("with all tokens", "with few")
    answers = []
    for model, name in zip(models, names):
        advance(f"compile, and answer {name}")
        answers.append(_answer(model, inputs, new_tokens))
    times: list[list[tuple[float, float | None]]] = [[], []]
    for turn in range(WARM_UP + repeats):
        advance("measure in turns" if turn >= WARM_UP else "warm up")
        for model, held in zip(models, times):
            one = _time(model, inputs, min(new_tokens, _TIMED_TOKENS))
            if turn >= WARM_UP:
                held.append(one)
    sides = []
    for model, ids, taken in zip(models, answers, times):
        first = Spread.of([first for first, _ in taken])
        assert first is not None, "it was timed at least once"
        step = Spread.of([step for _, step in taken if step is not None])
        sides.append(Side(text_of(ids), ids.tolist(), first, step, _peak(model, inputs)))
    return sides[0], sides[1]


def _answer(model: Any, inputs: dict[str, Any], new_tokens: int) -> torch.Tensor:
    """The ids that greedy decoding adds, [tokens]."""
    if not callable(getattr(model, "generate", None)):
        raise BadInput("the model has no generate")
    with because("the model cannot answer this prompt"):
        ids = model.generate(**inputs, **_greedy(new_tokens))[0]
        given = inputs["input_ids"][0]
        echoed = len(ids) >= len(given) and bool((ids[:len(given)] == given).all())  # some return the answer alone
    return ids[len(given):] if echoed else ids


def _greedy(new_tokens: int, least: int | None = None) -> dict[str, Any]:
    return dict(max_new_tokens=new_tokens, do_sample=False, num_beams=1) | (
        {} if least is None else {"min_new_tokens": least})


def _time(model: Any, inputs: dict[str, Any], new_tokens: int) -> tuple[float, float | None]:
    """Seconds to the first token, and of a step behind it: as many tokens from both, whatever they answer."""
    clock, device = _Clock(), inputs["input_ids"].device
    _synchronize(device)
    start = time.perf_counter()
    with because("the model cannot be timed"):
        model.generate(**inputs, **_greedy(new_tokens, new_tokens), streamer=clock)
    times = clock.times[-new_tokens:]  # in front of them stands the prompt, where it is streamed as well
    if len(times) < new_tokens:
        raise BadInput("the model's generate does not tell when its tokens are there (it takes no streamer)")
    return times[0] - start, (times[-1] - times[0]) / (new_tokens - 1) if new_tokens > 1 else None


def _peak(model: Any, inputs: dict[str, Any]) -> int | None:
    device = inputs["input_ids"].device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model.generate(**inputs, **_greedy(1))
    return torch.cuda.max_memory_allocated(device) - before


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _Reached(Exception):
    """The model is about to be called."""


def prefill_of(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What ``generate`` calls the model with for its first token: features that it has computed in front of it, positions, an
    empty cache. The inputs themselves where it calls a part of the model."""
    found: list[dict[str, Any]] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:
            found.append(kwargs)
        raise _Reached

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with because("the model cannot answer this prompt"):
            model.generate(**inputs, **_greedy(1))
    except BadInput as error:
        if not isinstance(error.__cause__, _Reached):
            raise
    finally:
        handle.remove()
    return found[0] if found else inputs


def count_flops(model: Any, inputs: dict[str, Any], report: Report | None) -> Flops | None:
    """FLOPs of the eager model up to its first token, and how many of them pruning leaves; None where no graph was rewritten.

    Args:
        report: of the call that ``generate`` begins with.
    """
    found = report.prefill if report is not None else None
    if found is None or not found.flops_before or not found.flops_after:
        return None
    total, _ = flops_of(lambda: model.generate(**inputs, **_greedy(1)))
    return Flops(total, total - found.flops_before + found.flops_after)
