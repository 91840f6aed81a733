"""What became of a model's last prompt: the one truth that warnings, :func:`parvts_fx.last_call` and callbacks share."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable

import torch

KEPT_ALL = "all visual tokens are kept"
NO_VISUALS = "no visual features are merged in this call"


@dataclasses.dataclass(frozen=True)
class CallRecord:
    """One call of a compiled model with a prompt. Decode steps make none."""

    pruned: bool
    reason: str = ""
    """Why nothing was pruned; empty where something was."""

    prompt_tokens: int | None = None
    """Rows of each sample, padding included; None where no graph has told."""

    subject_tokens: int | tuple[int, ...] | None = None
    """Visual tokens that each sample is left with, one number for each where they differ; None where nothing was pruned."""

    visual: torch.Tensor | None = dataclasses.field(default=None, repr=False, compare=False)
    """[batch, prompt_tokens] bool: where visual tokens stand; None where no graph has told."""

    kept: torch.Tensor | None = dataclasses.field(default=None, repr=False, compare=False)
    """The same: those of them that are left in the end, all of them where nothing was pruned."""

    @property
    def graph(self) -> str:
        """Which graph ran: "rewritten", or "unrewritten", the model as it is."""
        return "rewritten" if self.pruned else "unrewritten"

    @property
    def visual_tokens(self) -> tuple[int, ...]:
        """Of each sample, in the prompt; empty where no graph has told."""
        return () if self.visual is None else tuple(self.visual.sum(1).tolist())

    @property
    def kept_tokens(self) -> tuple[int, ...]:
        """Visual tokens of each sample that are left in the end."""
        counts, left = self.visual_tokens, self.subject_tokens
        if left is None or isinstance(left, tuple):
            return counts if left is None else left
        return tuple(min(count, left) for count in counts)


OnCall = Callable[[CallRecord], object]

_LAST: weakref.WeakKeyDictionary[torch.nn.Module, CallRecord] = weakref.WeakKeyDictionary()


def last_call(model: torch.nn.Module) -> CallRecord | None:
    """What became of the last prompt that a model was called with, by ``generate`` or directly.

    Args:
        model: compiled with :func:`parvts_fx.compile`.

    Returns:
        the record of its last call with a prompt, whether that ran pruned or not and why; None before the first one. A call
        that raises leaves one where its reason was known by then. Decode steps leave the prompt's record as it is.
    """
    return _LAST.get(model)


def keep_record(model: torch.nn.Module, record: CallRecord, on_call: OnCall | None) -> None:
    """Remember what became of a model's prompt, and tell whoever wants to know."""
    _LAST[model] = record
    if on_call is not None:
        on_call(record)
