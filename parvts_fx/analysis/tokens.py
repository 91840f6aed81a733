"""Which axes run along the prompt, and which integers count its positions.

A prompt of S positions leaves the number S all over a graph: in sizes of tensors and in literals such as
``view(1, 640, -1, 128)``. A literal 640 may as well be a hidden size. This module lists the possible *readings* of a
node's integers and side tensors; :mod:`parvts_fx.analysis.probe` finds out which of them is true.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from parvts_fx.analysis.values import (
    concrete,
    has_target,
    hint,
    is_indexing,
    is_symbolic_int,
    is_tensor,
    leaves,
    symbols,
    value,
)
from parvts_fx.torch_private import native_pad

_MOST_READINGS = 64
_OFFSETS = (-1, -2, 1)
"""Of positions in an index that may be counted from the end."""

_TOPKS = (torch.topk, torch.ops.aten.topk.default)
CATS = (torch.cat, torch.concat, torch.ops.aten.cat.default)
_PADS = (F.pad, native_pad, torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default)


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of ``multiple * tokens + offset`` entries, the tokens being those counted by ``label``."""

    label: str
    multiple: int
    offset: int

    @property
    def is_plain(self) -> bool:
        """One entry per token and no others."""
        return self.multiple == 1 and self.offset == 0

    @property
    def has_rows_in_front(self) -> bool:
        """One entry per token, behind others: a cache's rows in front of the prompt's."""
        return self.multiple == 1 and self.offset > 0


@dataclasses.dataclass(frozen=True)
class Count:
    """An integer leaf that equals ``multiple`` times the number of tokens (-1 for "the last so many"), plus ``offset``."""

    label: str
    multiple: int
    offset: int = 0

    def of(self, tokens: int) -> int:
        return self.multiple * tokens + self.offset


@dataclasses.dataclass(frozen=True)
class AxisLabels:
    """A side tensor's leaf: the axes (as (axis, label) pairs) that run along tokens, which are the last of their entries."""

    axes: tuple[tuple[int, str], ...]


@dataclasses.dataclass(frozen=True)
class Filling:
    """An integer leaf that shrinks as the tokens become more: what they are padded with up to a fixed size.

    A scan in blocks works on such a size, and its loop over blocks has been unrolled into the graph.
    """

    label: str


@dataclasses.dataclass(frozen=True)
class AtMost:
    """An integer leaf that says how many of the tokens to choose: all of them where there are fewer."""

    label: str


@dataclasses.dataclass(frozen=True)
class Computed:
    """An integer leaf that is computed from the number of tokens in another way: how many blocks they make up, the last one's
    place. It is computed again for as many as there are."""

    label: str


Binding = Count | AxisLabels | Filling | AtMost | Computed


@dataclasses.dataclass
class TokenMap:
    """The probe's findings for a set of nodes."""

    size: int | torch.SymInt
    """Prompt length S as the graph has it."""

    axes: dict[Node, dict[int, Axis]] = dataclasses.field(default_factory=dict)
    """For each probed tensor, the axes that run along tokens."""

    bindings: dict[Node, dict[int, Binding]] = dataclasses.field(default_factory=dict)
    """For each probed node, what its argument leaves (by position) have to do with tokens."""

    probed: dict[Node, Any] = dataclasses.field(default_factory=dict)
    """What each node came to at the probe's prompt length."""

    length: int = 0
    """That length."""

    cached: frozenset[int] = frozenset()
    """How many rows caches hold that the graph is given, to be put in front of the prompt's."""

    computes: bool = False
    """Whether numbers that are computed from the prompt's length, as no multiple of it, are computed again for other lengths. If
    not they stay: right where the tokens are padded up to them."""

    def plain_axis(self, node: Node) -> int | None:
        """The one axis with one entry per token, or None."""
        axes = self.axes.get(node, {})
        if len(axes) == 1:
            (axis, kind), = axes.items()
            return axis if kind.is_plain else None
        return None

    def is_behind_cached(self, node: Node) -> bool:
        """Whether the prompt's rows stand behind cached ones in a node's result, along one axis."""
        axes = self.axes.get(node) or {}
        return len(axes) == 1 and all(kind.has_rows_in_front for kind in axes.values())

    def axis_of_rows(self, node: Node) -> int | None:
        """The one axis with one entry per token, behind cached rows or none; or None."""
        axes = self.axes.get(node, {})
        if len(axes) == 1:
            (axis, kind), = axes.items()
            return axis if kind.is_plain or kind.has_rows_in_front else None
        return None



def readings_of(node: Node, labels: Iterable[str], tokens: TokenMap) -> Iterator[dict[int, Binding]]:
    """All readings of a node's argument leaves (by position), those that change least first.

    Args:
        labels: whose tokens may be counted.
        tokens: what is known of the nodes in front; tensors in there follow the prompt by themselves.
    """
    variables = _variables(node, tuple(labels), tokens)

    def changes(choice: tuple[Binding | None, ...]) -> int:
        return sum(len(b.axes) if isinstance(b, AxisLabels) else b is not None for b in choice)

    combinations = itertools.islice(itertools.product(*variables.values()), 8 * _MOST_READINGS)
    for choice in sorted(combinations, key=changes)[:_MOST_READINGS]:
        yield {index: binding for index, binding in zip(variables, choice) if binding is not None}


def _variables(node: Node, labels: tuple[str, ...], tokens: TokenMap) -> dict[int, list[Binding | None]]:
    """For each leaf that might follow the prompt, its readings; None means that it does not."""
    variables: dict[int, list[Binding | None]] = {}
    fillings = _fillings(node, tokens)
    chosen = _choice(node, tokens)
    of_prompt = symbols(tokens.size)
    in_front = _in_front(node, tokens)
    for index, leaf in enumerate(leaves(node)):
        if isinstance(leaf, Node) and leaf in tokens.probed:
            continue
        if is_symbolic_int(leaf) or (isinstance(leaf, int) and not isinstance(leaf, bool)):
            size = concrete(value(leaf) if isinstance(leaf, Node) else leaf)
            follows = bool(of_prompt & symbols(size))
            number = hint(size)
            if index == chosen[0]:
                variables[index] = [AtMost(chosen[1])]
                continue
            if index in fillings and not (follows and tokens.computes):
                variables[index] = [None, *(Filling(label) for label in labels)]
                continue
            if of_prompt and not follows:
                continue
            length = hint(tokens.size)
            offsets = (*in_front, *(_OFFSETS if is_indexing(node) else ()))
            offset = next((o for o in offsets if number == length + o), 0)
            offset = offset or next((-o for o in in_front if number == -length - o), 0)  # the last so many
            if follows and tokens.computes and number is not None and not is_multiple(size, tokens.size):
                variables[index] = [Computed(label) for label in labels]
                continue
            if not number or not offset and number % length:
                continue  # no multiple: right as it is, where the tokens are padded up to it
            counts: list[Binding | None] = [Count(label, (number - offset) // length, offset) for label in labels]
            variables[index] = counts if follows else [None, *counts]
        elif is_tensor(leaf):
            sides = _side_readings(value(leaf), labels[::-1] if tokens.computes else labels, tokens, in_front)
            if sides:
                variables[index] = sides
    return variables


def is_multiple(number: int | torch.SymInt, size: int | torch.SymInt) -> bool:
    """Whether a number is so many times the prompt's length at any length, not just at the traced one."""
    return not symbols(size) & symbols(number - hint(number) // hint(size) * size)


def _in_front(node: Node, tokens: TokenMap) -> tuple[int, ...]:
    """How many rows may stand in front of the tokens in what a node reads: cached ones, which a convolution pads further, or the
    padding alone."""
    kinds = (kind for source in node.all_input_nodes for kind in tokens.axes.get(source, {}).values())
    offsets = {kind.offset for kind in kinds if kind.has_rows_in_front}
    return tuple(sorted(offsets | tokens.cached)) if offsets else ()


def cached_in_front(node: Node) -> tuple[Node, int] | None:
    """The tensor that the graph is given and whose rows a node puts in front of others, those of a filled cache, and along which
    axis; None for any other node."""
    if not has_target(node, CATS) or not node.args or not isinstance(node.args[0], (list, tuple)) or len(node.args[0]) < 2:
        return None
    first, axis = node.args[0][0], node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(first, Node) or first.op != "placeholder" or not isinstance(axis, int):
        return None
    if isinstance(value(first), torch.nn.Parameter) or value(first).dim() < 2:
        return None  # a class token, say; an empty cache has one axis
    return (first, axis % value(first).dim()) if hint(value(first).shape[axis]) else None


def _choice(node: Node, tokens: TokenMap) -> tuple[int, str] | tuple[None, None]:
    """Where among the leaves of a ``topk`` over tokens its k stands, and the label of those tokens."""
    if not has_target(node, _TOPKS, ("topk",)) or not node.args or not isinstance(node.args[0], Node):
        return None, None
    named = {**dict(zip(("input", "k", "dim"), node.args)), **node.kwargs}
    axis = named.get("dim", -1)
    kind = tokens.axes.get(node.args[0], {}).get(axis % value(node.args[0]).dim()) if isinstance(axis, int) else None
    if kind is None or not kind.is_plain:
        return None, None
    place = 1 if len(node.args) > 1 else len(node.args) + list(node.kwargs).index("k")
    return place, kind.label


def _fillings(node: Node, tokens: TokenMap) -> set[int]:
    """Where among a padding's leaves stands how much is put behind (or else in front of) the tokens."""
    if not has_target(node, _PADS) or len(node.args) < 2 or not isinstance(node.args[1], (list, tuple)):
        return set()
    axis = tokens.plain_axis(node.args[0]) if isinstance(node.args[0], Node) else None
    if axis is None:
        return set()
    amounts = node.args[1]
    front = 2 * (value(node.args[0]).dim() - 1 - axis)
    if front + 1 >= len(amounts):
        return set()

    def number(amount: Any) -> int:
        return hint(value(amount) if isinstance(amount, Node) else amount)

    at_front = number(amounts[front]) > 0 and number(amounts[front + 1]) == 0
    return {1 + front + (not at_front)}  # the padded tensor is leaf 0


def _side_readings(
    tensor: torch.Tensor, labels: tuple[str, ...], tokens: TokenMap, in_front: tuple[int, ...]
) -> list[Binding | None]:
    per_axis: list[list[tuple[int, str] | None]] = []
    of_prompt = symbols(tokens.size)
    counts = [hint(tokens.size) + others for others in (0, *in_front)]
    for axis, entries in enumerate(tensor.shape):
        size = concrete(entries)
        if of_prompt:
            if of_prompt & symbols(size) and hint(size) in counts and not of_prompt & symbols(size - tokens.size):
                per_axis.append([(axis, label) for label in labels])
        elif hint(size) in counts:
            per_axis.append([None, *((axis, label) for label in labels)])
    if not per_axis:
        return []
    options = sorted(itertools.product(*per_axis), key=lambda axes: sum(a is not None for a in axes))
    readings: list[Binding | None] = [
        AxisLabels(kept) if (kept := tuple(a for a in axes if a is not None)) else None for axes in options]
    if not tokens.computes:
        return readings
    # an index takes entries of a table: it says nothing of an axis that is larger, and pairs are of a query and a key
    return [one for one in readings if not isinstance(one, AxisLabels) or len({label for _, label in one.axes}) == len(one.axes)]
