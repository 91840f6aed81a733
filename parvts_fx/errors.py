"""What can go wrong, by name."""

from __future__ import annotations

import warnings

import torch

_CANNOT = "parvts_fx: this multimodal prefill cannot be rewritten: "


class Refusal(Exception):
    """A graph cannot be rewritten without risking a wrong answer.

    The backend turns it into a :class:`ParvtsWarning` and lowers the graph as it is; with ``strict=True`` it becomes
    a :class:`NotRewritten` error.

    Args:
        reason: one sentence that says what was found and, where there is one, the remedy.
        node: the graph node at which the analysis stopped.
    """

    def __init__(self, reason: str, node: torch.fx.Node | None = None):
        self.reason = reason
        self.node = node
        super().__init__(f"{reason} (at node '{node.name}')" if node is not None else reason)


class NotRewritten(RuntimeError):
    """``strict=True`` and a multimodal prefill could not be rewritten; the message names the reason."""

    @classmethod
    def because(cls, reason: str) -> NotRewritten:
        return cls(_CANNOT + reason)

    @property
    def reason(self) -> str:
        return str(self).removeprefix(_CANNOT)


class ParvtsWarning(UserWarning):
    """A multimodal prefill runs unrewritten; the message names the reason."""


def tell_unrewritten(reason: str, strict: bool = False, stacklevel: int = 3) -> None:
    """Say that a multimodal prefill runs as it came, and why.

    Args:
        stacklevel: as the caller would give it to ``warnings.warn``.

    Raises:
        NotRewritten: with ``strict``, in place of the warning.
    """
    if strict:
        raise NotRewritten.because(reason)
    warnings.warn(f"parvts_fx: this multimodal prefill runs unrewritten: {reason}", ParvtsWarning, stacklevel=stacklevel + 1)
