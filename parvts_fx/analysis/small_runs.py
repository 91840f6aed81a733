"""Runs operations of a decoder on small real tensors, with all or some of the tokens (or samples).

What an operation does with tokens is told by running it: :mod:`parvts_fx.analysis.independence` compares a run on some
rows with the same rows of a run on all. This module makes the operands: as many tokens and samples as asked for, where
the token maps say that an axis or an integer follows them, and everything else as in the graph.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.collectives import without_others
from parvts_fx.analysis.extents import Extent, Scale
from parvts_fx.analysis.tokens import AtMost, AxisLabels, Count, Filling, TokenMap
from parvts_fx.analysis.values import (
    ancestors,
    call,
    for_length,
    hint,
    hint_shape,
    is_index,
    is_tensor,
    leaves,
    symbols,
    value,
    with_leaves,
)
from parvts_fx.torch_private import FakeTensor, disable_current_modes

NOISES = ("any", "positive", "first index")
"""Kinds of numbers, each for where the one before does not do: of any sign; positive ones, for what is undefined else;
integers that are all 0, for axes of one entry."""

_LARGE, _LARGEST, _SMALL = 1 << 18, 1 << 29, 32
_BUFFER = 1 << 20
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)


class Unproven(Exception):
    """An operation cannot be run on small tensors, or nothing follows from what it does with them."""


@functools.cache
def _noise() -> torch.Tensor:
    return torch.randn(_BUFFER, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@functools.cache
def _coins() -> torch.Tensor:
    return torch.randint(0, 2, (_BUFFER,), generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def really() -> Iterator[None]:
    """Real tensors, no gradients, and torch's random state as it was."""
    with disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]), without_others():
        yield


class SmallRuns:
    """Makes operands for one decoder.

    Args:
        tokens, samples: which axes and integers follow the prompt and the batch; ``samples`` is None for a batch of one.
        given: real tensors by placeholder, for weights that nothing else can stand for.
    """

    def __init__(
        self, module: GraphModule, tokens: TokenMap, samples: TokenMap | None, given: Mapping[Node, Any] | None = None
    ):
        self.module, self.tokens, self.samples = module, tokens, samples
        self.batch = 1 if samples is None else hint(samples.size)
        self.length = hint(tokens.size)
        self._given = given or {}
        self._extents: dict[Node, tuple[Extent, ...]] = {}
        self._constants: dict[Node, torch.Tensor | None] = {}
        self._identities: dict[Node, Hashable] = {}

    # -- what follows tokens and samples ------------------------------------------------------------------------------

    def extents(self, node: Node) -> tuple[Extent, ...]:
        """Of one of the decoder's own tensors."""
        if node not in self._extents:
            mine = self.tokens.axes.get(node, {})
            others = self.samples.axes.get(node, {}) if self.samples is not None else {}
            self._extents[node] = tuple(
                self._extent(size, mine.get(axis), others.get(axis)) for axis, size in enumerate(hint_shape(value(node))))
        return self._extents[node]

    def _extent(self, size: int | None, mine: Any, others: Any) -> Extent:
        if size is None:
            raise Unproven("a size depends on data")
        if mine is None or others is None:
            kind = mine or others
            if kind is None:
                return Extent(size)
            tokens, samples = (kind.multiple, 0) if others is None else (0, kind.multiple)
            return Extent(size, tokens, samples, kind.offset)
        each, rest = divmod(mine.multiple, self.batch)
        if rest or mine.offset or others.offset or others.multiple != each * self.length:
            raise Unproven("an axis of samples and tokens is not understood")
        return Extent(size, each, each)

    def side_extents(self, reader: Node, index: int, side: Node) -> tuple[Extent, ...]:
        """Of a tensor from outside the decoder, as one of the decoder's nodes reads it at a leaf."""
        def labelled(found: TokenMap | None) -> set[int]:
            binding = found.bindings.get(reader, {}).get(index) if found is not None else None
            return {axis for axis, _ in binding.axes} if isinstance(binding, AxisLabels) else set()

        mine, others = labelled(self.tokens), labelled(self.samples)
        if mine & others:
            raise Unproven("an axis of samples and tokens is not understood")
        shape = hint_shape(value(side))
        if None in shape:
            raise Unproven("a size depends on data")
        return tuple(
            Extent(size, 1, 0, size - self.length) if axis in mine else Extent(size, 0, int(axis in others))
            for axis, size in enumerate(shape))

    def number(self, reader: Node, index: int, leaf: Any, scale: Scale) -> Any:
        """An integer leaf for so many tokens and samples; an object that is no number (a mesh of devices) as it is."""
        own = value(leaf) if isinstance(leaf, Node) else leaf
        if isinstance(leaf, Node) and leaf.op == "placeholder" and not isinstance(own, _NUMBERS):
            return real_object(own)
        if isinstance(own, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            follows = isinstance(own, torch.SymFloat) and leaf not in self.tokens.probed
            own = self.scalar(leaf, scale.tokens) if follows else hint(own)
        if not isinstance(own, (int, float)):
            raise Unproven("a number depends on data")
        if isinstance(leaf, Node) and leaf in self.tokens.probed:
            return self._counted(leaf, own).at(scale.tokens, scale.samples)
        mine = self.tokens.bindings.get(reader, {}).get(index)
        others = self.samples.bindings.get(reader, {}).get(index) if self.samples is not None else None
        if isinstance(mine, AtMost):
            return min(own, scale.tokens)
        if isinstance(mine, Filling):
            return own + self.length - scale.tokens
        if isinstance(mine, Count) and isinstance(others, Count):
            each, rest = divmod(mine.multiple, self.batch)
            if rest or mine.offset or others.offset or others.multiple != each * self.length:
                raise Unproven("a number of samples and tokens is not understood")
            return each * scale.tokens * scale.samples
        if isinstance(mine, Count):
            return mine.of(scale.tokens)
        return others.of(scale.samples) if isinstance(others, Count) else own

    def numbers(self, reader: Node, index: int, leaf: Any) -> tuple[Any, ...]:
        """What an integer leaf is with two numbers of tokens and samples."""
        return tuple(self.number(reader, index, leaf, scale) for scale in (Scale(7, 2), Scale(11, 3)))

    def _counted(self, node: Node, own: Any) -> Extent:
        """An integer that the decoder computes from sizes."""
        def per(found: TokenMap | None) -> int:
            if found is None or not isinstance(found.probed.get(node), int):
                return 0
            return (found.probed[node] - own) // (found.length - hint(found.size))

        mine, others = per(self.tokens), per(self.samples)
        if mine and others:
            return Extent(own, mine // self.batch, mine // self.batch)
        return Extent(own, mine, others, own - mine * self.length - others * self.batch)

    def scalar(self, leaf: Any, tokens: int) -> Any:
        """A number that is computed from sizes, for so many tokens."""
        held = value(leaf) if isinstance(leaf, Node) else leaf
        of_prompt = symbols(self.tokens.size)
        if not isinstance(held, (torch.SymInt, torch.SymFloat)) or not of_prompt & symbols(held):
            return hint(held) if isinstance(held, (torch.SymInt, torch.SymFloat, torch.SymBool)) else held
        found = for_length(held, self.tokens.size, tokens)
        if found is None:
            raise Unproven("a number is computed from the prompt's length")
        return found

    # -- operands -----------------------------------------------------------------------------------------------------

    def draw(self, dtype: torch.dtype, shape: tuple[int, ...], scale: Scale, turn: int, noise: str = "any") -> torch.Tensor:
        """A tensor of noise, another one each turn; integers are 0 and 1, so that they may be indices of anything.

        Large ones repeat themselves in memory: no run should wait for noise.
        """
        count = math.prod(shape)
        if count > _LARGEST:
            raise Unproven("an operand is too large")
        source = _coins() if not (dtype.is_floating_point or dtype.is_complex) else _noise()
        start = (7919 * turn) % (_BUFFER // 2)
        if count <= _BUFFER // 2:
            held = source[start:start + count].view(shape)
        else:  # rows overlap, in steps that no axis shares
            steps = [1 if axis == len(shape) - 1 else 17 + 12 * axis for axis in range(len(shape))]
            while sum(step * (size - 1) for step, size in zip(steps, shape)) >= _BUFFER // 2:
                longest = max(range(len(shape)), key=lambda axis: steps[axis] * shape[axis])
                steps[longest] = max(1, steps[longest] // 2) if steps[longest] > 1 else 0
            held = torch.as_strided(source, shape, steps, start)
        if noise == "positive" and source is _noise():
            held = held.abs() + 0.05
        if noise == "first index" and source is not _noise() and dtype != torch.bool:
            held = torch.zeros_like(held)
        return held.to(scale.dtype(dtype))

    def constant(self, node: Node) -> torch.Tensor | None:
        """The value of a tensor that no input and no weight enters (a table of positions, say); None for any other."""
        if node not in self._constants:
            before = ancestors([node])
            known = all(source.op.startswith("call") or not is_tensor(source) for source in before)
            self._constants[node] = self._evaluate_constant(node, before) if known else None
        return self._constants[node]

    def _evaluate_constant(self, node: Node, before: set[Node]) -> torch.Tensor | None:
        if value(node).numel() > _LARGEST:
            return None
        held: dict[Node, Any] = {}
        try:
            for source in sorted(before):
                if not is_tensor(source) and not isinstance(value(source), (tuple, list)):
                    held[source] = hint(value(source)) if isinstance(value(source), torch.SymInt) else value(source)
                    continue
                given = [held[leaf] if isinstance(leaf, Node) else local_argument(leaf, None) for leaf in leaves(source)]
                held[source] = call(self.module, source.op, source.target, *with_leaves(source, given))
        except Exception:  # not to be had here (vmap, a device): noise will do
            return None
        return held[node] if isinstance(held[node], torch.Tensor) else None

    def identity(self, node: Node) -> Hashable:
        """What tells a side tensor from others of its size: nothing, unless its content is known."""
        if node not in self._identities:
            held = self.constant(node)
            if held is None:
                held = self.given(node)  # quantised alike, weights of equal sizes are alike
                kind = None if held is None else (type(held), str(getattr(held, "__tensor_flatten__", lambda: None)()))
                self._identities[node] = kind
            else:
                self._identities[node] = hashlib.sha1(held.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
        return self._identities[node]

    def given(self, node: Node) -> torch.Tensor | None:
        """The real tensor behind a placeholder that is no plain tensor (a quantised weight)."""
        if is_plain(value(node)):
            return None
        real = self._given.get(node)
        if not isinstance(real, torch.Tensor) or isinstance(real, FakeTensor):
            raise Unproven(f"a tensor of the subclass {type(value(node)).__name__} is not at hand")
        return real.to("cpu")


def real_object(held: Any) -> Any:
    """What a graph's input that is neither tensor nor number stands for."""
    real = getattr(held, "real_obj", None)
    if real is None:
        raise Unproven(f"an object of the class {type(held).__name__} is not at hand")
    return real


def shrunk(shapes: list[tuple[int, ...]], numbers: list[int]) -> dict[int, int]:
    """Smaller sizes for large ones that nothing but a size of theirs depends on; equal ones stay equal."""
    sizes = sorted({size for shape in shapes for size in shape if size > _SMALL})
    taken = {size for shape in shapes for size in shape} | set(numbers)
    made: dict[int, int] = {}
    candidate = 5
    for size in sizes:
        while candidate in taken:
            candidate += 2
        made[size] = candidate
        candidate += 2
    return made


def is_large(shapes: list[tuple[int, ...]]) -> bool:
    return sum(math.prod(shape) for shape in shapes) > _LARGE


def local_argument(leaf: Any, scale: Scale | None) -> Any:
    """An argument that is no tensor, for a run on this machine's processor."""
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if isinstance(leaf, str) and leaf.split(":")[0] in ("cuda", "xpu", "mps", "meta"):
        return "cpu"
    if isinstance(leaf, torch.dtype) and scale is not None:
        return scale.dtype(leaf)
    return leaf


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is no subclass of somebody's, whose content noise cannot stand for."""
    return type(tensor) in _PLAIN


def is_part_of_tuple(node: Node) -> bool:
    return is_index(node) and isinstance(node.args[0], Node) and isinstance(value(node.args[0]), (tuple, list))
