"""Which operations of a graph a compiler runs as one kernel, and what that kernel reads and writes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch

Kind = Literal["product", "attention", "alone", "fused"]
"""Of a kernel: "alone" is one that multiplies nothing and is fused with nothing (a sort), "fused" what is between all others."""


@dataclasses.dataclass(frozen=True)
class Ran:
    """One operation, as it ran on fake tensors. Tensors have numbers; views of one, and nothing else, share its number."""

    name: str
    kind: Kind
    reads: Mapping[tuple[int, int], int]
    """Bytes, by tensor and where in it a view begins."""

    writes: Mapping[int, int]
    """Bytes, by tensor."""

    size: int
    """Elements of the largest tensor that it touches: what a kernel loops over."""

    dtype: torch.dtype
    flops: int = 0
    rows: int = 0
    columns: int = 0
    picks: bool = False
    """Whether it reads rows by an index."""

    sums: bool = False
    """Whether its result has fewer elements than what it reads."""

    causal: bool = False


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one kernel does."""

    name: str
    kind: Kind
    flops: int
    """Floating-point operations of a product or an attention call, as torch counts them: attention over all pairs."""

    read: int
    """Bytes, each tensor once."""

    weights: int
    """Bytes among them that are the model's parameters."""

    written: int
    """Bytes that a later kernel or the caller reads."""

    rows: int
    """Rows of a product's result, of each matrix of a batch; of attention the queries."""

    columns: int
    dtype: torch.dtype
    """What is multiplied; of a fused kernel that of its first result."""

    causal: bool = False
    """Whether it is an attention call that knows by itself who sees whom: a kernel leaves half of the pairs out."""

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


def fuse(ran: Sequence[Ran], whole: Mapping[int, int], weights: set[int], results: set[int]) -> tuple[Operation, ...]:
    """Kernels, in the order in which each begins.

    Operations that compute element by element, sum up or pick rows share a kernel with what they read, if no kernel of another
    kind stands between them on any way through the graph and both loop over the same elements.

    Args:
        whole: bytes of each tensor, views aside.
        weights: which tensors are the model's parameters.
        results: which tensors the graph returns.
    """
    groups = _groups(ran)
    readers: dict[int, set[int]] = defaultdict(set)
    members: dict[int, list[Ran]] = defaultdict(list)
    for one, group in zip(ran, groups):
        members[group].append(one)
        for tensor, _ in one.reads:
            readers[tensor].add(group)
    kernels = []
    for group, held in members.items():
        made = {tensor for one in held for tensor in one.writes}
        read = _bytes([one.reads for one in held], whole, made)
        written = {tensor: size for one in held for tensor, size in one.writes.items()
                   if tensor in results or readers[tensor] - {group}}
        if held[0].kind == "fused" and not (read and written):
            continue  # constants are written where they are read; what nobody reads is left out
        first = held[0]
        kernels.append(Operation(
            first.name, first.kind, first.flops, sum(read.values()), sum(read[tensor] for tensor in read if tensor in weights),
            sum(written.values()) if written else sum(first.writes.values()), first.rows, first.columns, first.dtype,
            first.causal))
    return tuple(kernels)


def _groups(ran: Sequence[Ran]) -> list[int]:
    """For each operation the number of the first one of its kernel."""
    makers: dict[int, int] = {}
    depths: list[int] = []
    parents, loops, summed = list(range(len(ran))), [one.size for one in ran], [one.sums for one in ran]

    def root(number: int) -> int:
        while parents[number] != number:
            number = parents[number]
        return number

    picked: dict[tuple[int, int, int], int] = {}
    for number, one in enumerate(ran):
        before = {makers[tensor] for tensor, _ in one.reads if tensor in makers}
        alone = one.kind != "fused"
        depths.append(max((depths[maker] for maker in before), default=0) + alone)
        siblings = [(depths[number], one.size, tensor) for tensor, _ in one.reads] if one.picks else []
        near = {picked[place] for place in siblings if place in picked} if one.picks else () if alone else before
        for other in map(root, near):
            own = root(number)
            if ran[other].kind == "fused" and depths[other] == depths[number] and own != other and (
                    one.size <= loops[other] or not summed[other]):
                first, second = sorted((own, other))
                parents[second] = first
                loops[first], summed[first] = max(loops[own], loops[other]), summed[own] or summed[other]
        picked.update(dict.fromkeys(siblings, number))
        makers.update(dict.fromkeys(one.writes, number))
    return [root(number) for number in range(len(ran))]


def _bytes(
    reads: Iterable[Mapping[tuple[int, int], int]], whole: Mapping[int, int], but: set[int]
) -> dict[int, int]:
    """Bytes read by several operations at once, of each tensor ``but`` some: what several read counts once."""
    most: dict[tuple[int, int], int] = defaultdict(int)
    for each in reads:
        for place, size in each.items():
            most[place] = max(most[place], size)
    read: dict[int, int] = defaultdict(int)
    for (tensor, _), size in most.items():
        if tensor not in but:
            read[tensor] = min(whole[tensor], read[tensor] + size)
    return dict(read)
