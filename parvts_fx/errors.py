"""What can go wrong, by name."""

from __future__ import annotations

import torch


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


class ParvtsWarning(UserWarning):
    """A multimodal prefill runs unrewritten; the message names the reason."""
