"""What can go wrong, by name."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

import torch

_LIBRARIES = {"parvts_fx", "torch", "transformers", "accelerate", "peft", "contextlib", "functools"}
REMEDY = "compile with dynamic=True, where sizes have names: then it can be told"
"""What stands in a refusal because of numbers that may be the prompt's length or a constant."""

_CANNOT = "parvts_fx: this multimodal prefill cannot be rewritten: "


class Refusal(Exception):
    """A graph cannot be rewritten without risking a wrong answer.

    The backend turns it into a :class:`ParvtsWarning` and lowers the graph as it is; with ``strict=True`` it becomes
    a :class:`NotRewritten` error.

    Args:
        reason: one sentence that says what was found and, where there is one, the remedy.
        node: the graph node at which the analysis stopped.
        names_tell: whether a graph in which sizes have names may tell what this one does not.
        broken_off: whether the reason is that the graph ends where it does.
    """

    def __init__(
        self, reason: str, node: torch.fx.Node | None = None, names_tell: bool = False, broken_off: bool = False
    ):
        self.reason = reason
        self.node = node
        self.names_tell = names_tell
        self.broken_off = broken_off
        super().__init__(f"{reason} (at node '{node.name}')" if node is not None else reason)


class NotRewritten(RuntimeError):
    """``strict=True`` and a multimodal prefill could not be rewritten; the message names the reason."""

    @classmethod
    def because(cls, reason: str) -> NotRewritten:
        return cls(_CANNOT + reason)

    @property
    def reason(self) -> str:
        return str(self).removeprefix(_CANNOT)


class BeginAgain(Exception):
    """The call can be captured better than it was, and nothing has been run yet that would not be run again."""


class NamesAreNeeded(Exception):
    """A prefill is to be captured again, with names for its sizes: raised where somebody does that."""


class ParvtsWarning(UserWarning):
    """A multimodal prefill runs unrewritten; the message names the reason."""


def tell_unrewritten(reason: str, strict: bool = False) -> None:
    """Say that a multimodal prefill runs as it came, and why.

    Raises:
        NotRewritten: with ``strict``, in place of the warning.
    """
    if strict:
        raise NotRewritten.because(reason)
    warn(f"parvts_fx: this multimodal prefill runs unrewritten: {reason}")


def does_not_compile(error: Exception) -> str:
    """The reason where the compiler behind fails on a rewritten graph."""
    own = getattr(error, "inner_exception", error)  # Dynamo wraps what its backends raise
    return f"the rewritten graph does not compile: {type(own).__name__}: {str(own).partition(chr(10))[0]}"


def warn(text: str) -> None:
    """A :class:`ParvtsWarning` that points at the line from which the model was called, however deep it comes up."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_back is not None and _is_between(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, ParvtsWarning, stacklevel=level)


def _is_between(frame: FrameType) -> bool:
    """Whether a frame is of a library between a user and what happens, or generated."""
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package in _LIBRARIES or frame.f_code.co_filename.startswith("<")
