"""What goes in front of a model class of lm-eval or lmms-eval: it compiles the model that the class loads, and counts prompts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import parvts_fx
from parvts_fx.errors import NotRewritten
from parvts_fx.runtime.record import KEPT_ALL, NO_VISUALS, CallRecord

_NOT_WORDS = ("extra_passes", "lowering_options")
"""Options that no command line can give: they are objects."""


class Pruned:
    """A base in front of a class that holds a model of transformers as ``model`` and has the method ``generate_until``.

    Options of parvts_fx stand among the arguments of the model (``keep_ratio=1/9``); all others are the class's own.

    A package of this kind may ignore all warnings, and may take any exception of ``generate`` for an empty answer, so that
    neither tells that a model has run whole. The records do: behind the requests they are printed in short, and with
    ``strict=True`` the first prompt that runs whole ends the process, by an exception that nobody takes for an answer.
    """

    model: Any
    batch_size: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = take_options(kwargs)
        super().__init__(*args, **kwargs)
        self.tally = Tally(bool(options.get("strict")))
        parvts_fx.compile(self.model, on_call=self.tally, **options)

    def generate_until(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """As the class answers, and a summary.

        Raises:
            SystemExit: no request has reached the model; with ``strict=True``, one has not, or its prompt has run whole.
        """
        before = self.tally.prompts
        answers = super().generate_until(requests, *args, **kwargs)  # type: ignore[misc]  # of the class behind
        lost = len(requests) - (self.tally.prompts - before) if self.batch_size == 1 else 0  # a record may be of a whole batch
        if lost > 0:
            self.tally.lose(lost)
        print(f"\n{self.tally}", flush=True)  # on a line of its own, behind a bar of progress
        return answers


class Tally:
    """Counts what became of prompts; given to :func:`parvts_fx.compile` as ``on_call``."""

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self.pruned = self.visual_tokens = self.kept_tokens = self.lost = 0
        self.reasons: Counter[str] = Counter()
        """Of the prompts that were not pruned."""

    @property
    def prompts(self) -> int:
        return self.pruned + self.reasons.total()

    def __call__(self, record: CallRecord) -> None:
        rows = len(record.visual_tokens) or 1  # where no graph has told, a batch counts as one
        if record.pruned:
            self.pruned += rows
            self.visual_tokens += sum(record.visual_tokens)
            self.kept_tokens += sum(record.kept_tokens)
            return
        self.reasons[record.reason] += rows
        if self._strict and record.reason not in (KEPT_ALL, NO_VISUALS):
            raise SystemExit(str(NotRewritten.because(record.reason)))

    def lose(self, count: int) -> None:
        """Requests that made no call with a prompt: ``generate`` has raised, and the package has gone on."""
        self.lost += count
        if self._strict or not self.prompts:
            raise SystemExit(f"parvts_fx: {_lost(self.lost)}")

    def __str__(self) -> str:
        kept = f", with {self.kept_tokens} of their {self.visual_tokens} visual tokens kept" if self.pruned else ""
        lines = [f"{self.pruned} of {self.prompts} prompts pruned{kept}"]
        lines += [f"{count} not pruned: {reason}" for reason, count in self.reasons.most_common()]
        lines += [_lost(self.lost)] if self.lost else []
        return "\n".join(f"parvts_fx: {line}" for line in lines)


def _lost(count: int) -> str:
    return f"{count} requests have not reached the model: an error in generate counts as an empty answer, see the log above"


def take_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take what belongs to :class:`parvts_fx.Options` out of a model's arguments, with numbers and None read from their words."""
    names = [field.name for field in dataclasses.fields(parvts_fx.Options) if field.name not in _NOT_WORDS]
    return {name: _read(arguments.pop(name)) for name in names if name in arguments}


def _read(value: Any) -> Any:
    """Both packages have read True, False and numbers, but leave 1/9 (and one of them None) as text."""
    if not isinstance(value, str):
        return value
    if value.lower() == "none":
        return None
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError):
        return value
