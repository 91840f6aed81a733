"""Which axes run along the prompt, and which integers count its positions.

A prompt of S positions leaves the number S all over a graph: in sizes of tensors and in literals such as
``view(1, 640, -1, 128)``. A literal 640 may as well be a hidden size. To tell them apart, the decoder is evaluated a
second time on fake tensors with another prompt length (the *probe*), node by node. What must change for a node to
still work follows the prompt; everything else stays. No operator is known by name here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node

from parvts_fx.analysis.values import (
    call, concrete, hint, hint_shape, is_symbolic_int, is_tensor, leaves, symbols, value, with_leaves,
)
from parvts_fx.errors import Refusal

_MOST_TRIALS = 64
_FAKE_LOG = logging.getLogger("torch._subclasses.fake_tensor")


@contextlib.contextmanager
def quiet_trials() -> Iterator[None]:
    """A trial that fails is the normal case here; fake tensors would log each with its traceback."""

    def drop(_: logging.LogRecord) -> bool:
        return False

    _FAKE_LOG.addFilter(drop)
    try:
        yield
    finally:
        _FAKE_LOG.removeFilter(drop)


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


@dataclasses.dataclass(frozen=True)
class Count:
    """An integer leaf that equals ``multiple`` times the number of tokens."""

    label: str
    multiple: int


@dataclasses.dataclass(frozen=True)
class AxisLabels:
    """A side tensor's leaf: the axes (as (axis, label) pairs) that run along tokens."""

    axes: tuple[tuple[int, str], ...]


Binding = Count | AxisLabels


@dataclasses.dataclass
class TokenMap:
    """The probe's findings for a set of nodes."""

    size: int | torch.SymInt
    """Prompt length S as the graph has it."""

    axes: dict[Node, dict[int, Axis]] = dataclasses.field(default_factory=dict)
    """For each probed tensor, the axes that run along tokens."""

    bindings: dict[Node, dict[int, Binding]] = dataclasses.field(default_factory=dict)
    """For each probed node, what its argument leaves (by position) have to do with tokens."""

    def plain_axis(self, node: Node) -> int | None:
        """The one axis with one entry per token, or None."""
        axes = self.axes.get(node, {})
        if len(axes) == 1:
            (axis, kind), = axes.items()
            return axis if kind.is_plain else None
        return None


class Probe:
    """Evaluates nodes on fake tensors in which each label's tokens have another number than in the graph."""

    def __init__(self, module: GraphModule, size: int | torch.SymInt, lengths: Mapping[str, int]):
        self.module = module
        self.size = concrete(size)
        self.size_hint = hint(size)
        self.symbols = symbols(self.size)
        self.lengths = dict(lengths)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.found = TokenMap(self.size)
        self._probed: dict[Node, Any] = {}
        self._sides: dict[tuple[Node, tuple], torch.Tensor] = {}

    @staticmethod
    def lengths_for(module: GraphModule, size_hint: int, labels: Iterable[str]) -> dict[str, int]:
        """One prime per label, larger than the prompt and no factor of any size in the graph."""
        sizes = {
            entry
            for node in module.graph.nodes if isinstance(value(node), torch.Tensor)
            for entry in hint_shape(value(node)) if entry
        }
        chosen: dict[str, int] = {}
        candidate = 2 * size_hint + 61
        for label in labels:
            while (
                any(candidate % factor == 0 for factor in range(2, int(candidate**0.5) + 1))
                or any(entry % candidate == 0 for entry in sizes)
                or candidate in chosen.values()
            ):
                candidate += 1
            chosen[label] = candidate
            candidate += 1 + size_hint  # far enough apart for (probe - S) differences not to divide one another
        return chosen

    def seed(self, node: Node, axes: Mapping[int, str]) -> None:
        """Declare the axes of a node from which the probe starts."""
        self._probed[node] = self._side(node, tuple(axes.items()))
        self.found.axes[node] = {axis: Axis(label, 1, 0) for axis, label in axes.items()}

    def run(self, node: Node) -> None:
        """Evaluate one node whose probed inputs have been run, and record what was found.

        Raises:
            Refusal: no way of reading the node's integers and side tensors lets it work at another prompt length.
        """
        current = leaves(node)
        variables = self._variables(node, current)
        counts = [index for index, choices in variables.items() if any(isinstance(c, Count) for c in choices)]
        working: list[tuple[dict[int, Binding], Any, dict[int, Axis] | None]] = []
        problem: Exception | None = None
        for choice in self._choices(variables):
            try:
                result = self._evaluate(node, current, choice, self._fake_leaf)
            except Exception as error:  # a trial that fails is the normal case: this reading of the node is wrong
                problem = error
                continue
            axes = self._axes_of(node, result)
            if axes is False:
                continue
            working.append((choice, result, axes))
            if not counts:
                break
        if not working:
            detail = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}" if problem else "sizes do not fit"
            raise Refusal(f"an operation works only at the traced prompt length ({detail})", node)
        if len(working) > 1:
            whole = [entry for entry in working if self._keeps_tokens_whole(node, current, entry[0], entry[2])]
            working = whole or working
        choice, result, axes = working[0]
        self._probed[node] = result
        if axes is not None:
            self.found.axes[node] = axes
        self.found.bindings[node] = choice

    # -- the readings of a node -------------------------------------------------------------------------------------

    def _variables(self, node: Node, current: list[Any]) -> dict[int, list[Binding | None]]:
        """For each leaf that might follow the prompt, its readings; None means that it does not."""
        variables: dict[int, list[Binding | None]] = {}
        for index, leaf in enumerate(current):
            if isinstance(leaf, Node) and leaf in self._probed:
                continue
            if is_symbolic_int(leaf) or (isinstance(leaf, int) and not isinstance(leaf, bool)):
                size = concrete(value(leaf) if isinstance(leaf, Node) else leaf)
                follows = bool(self.symbols & symbols(size))
                if self.symbols and not follows:
                    continue
                number = hint(size)
                if number is None or number <= 0 or number % self.size_hint:
                    if follows:
                        raise Refusal(f"a size ({size}) depends on the prompt length in a way that is not a multiple", node)
                    continue
                readings = [Count(label, number // self.size_hint) for label in self.lengths]
                variables[index] = readings if follows else [None, *readings]
            elif is_tensor(leaf):
                variables.update(self._side_variable(index, value(leaf)))
        return variables

    def _side_variable(self, index: int, tensor: torch.Tensor) -> dict[int, list[Binding | None]]:
        per_axis: list[list[tuple[int, str] | None]] = []
        for axis, size in enumerate(tensor.shape):
            size = concrete(size)
            if self.symbols:
                if self.symbols & symbols(size) and hint(size) == self.size_hint:
                    per_axis.append([(axis, label) for label in self.lengths])
            elif hint(size) == self.size_hint:
                per_axis.append([None, *((axis, label) for label in self.lengths)])
        if not per_axis:
            return {}
        options = sorted(itertools.product(*per_axis), key=lambda axes: sum(a is not None for a in axes))
        readings = [AxisLabels(kept) if (kept := tuple(a for a in axes if a is not None)) else None for axes in options]
        return {index: readings}

    def _choices(self, variables: Mapping[int, list[Binding | None]]) -> Iterable[dict[int, Binding]]:
        """All combinations of readings, those that change least first."""
        def changes(choice: tuple[Binding | None, ...]) -> int:
            return sum(len(b.axes) if isinstance(b, AxisLabels) else b is not None for b in choice)

        combinations = itertools.islice(itertools.product(*variables.values()), 8 * _MOST_TRIALS)
        for choice in sorted(combinations, key=changes)[:_MOST_TRIALS]:
            yield {index: binding for index, binding in zip(variables, choice) if binding is not None}

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self, node: Node, current: list[Any], choice: Mapping[int, Binding], leaf_value: Any) -> Any:
        args, kwargs = with_leaves(node, [leaf_value(leaf, choice.get(i)) for i, leaf in enumerate(current)])
        with self.mode, torch.no_grad(), quiet_trials():
            if node.target is operator.setitem and isinstance(args[2], torch.Tensor):  # fake tensors do not check this
                args[2].expand_as(args[0][args[1]])
            return call(self.module, node.op, node.target, args, kwargs)

    def _fake_leaf(self, leaf: Any, binding: Binding | None) -> Any:
        if isinstance(leaf, Node) and leaf in self._probed:
            return self._probed[leaf]
        if isinstance(binding, Count):
            return binding.multiple * self.lengths[binding.label]
        if is_tensor(leaf):
            return self._side(leaf, binding.axes if binding else ())
        if isinstance(leaf, Node):
            example = value(leaf)
            return hint(example) if isinstance(example, torch.SymInt) else example
        return leaf

    def _side(self, node: Node, axes: tuple[tuple[int, str], ...]) -> torch.Tensor:
        key = (node, axes)
        if key not in self._sides:
            self._sides[key] = self._like(value(node), dict(axes))
        return self._sides[key]

    def _like(self, tensor: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
        if any(size is None for size in hint_shape(tensor)):
            raise Refusal("a tensor's size depends on data")
        shape = [self.lengths[axes[i]] if i in axes else size for i, size in enumerate(hint_shape(tensor))]
        with self.mode:
            if not axes and type(tensor) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
                raise Refusal(f"a tensor of the subclass {type(tensor).__name__} is not understood")
            order = sorted(range(tensor.dim()), key=lambda i: -hint(tensor.stride(i)))  # keep the memory layout
            dense = torch.empty([shape[i] for i in order], dtype=tensor.dtype, device=tensor.device)
            return dense.permute([order.index(i) for i in range(tensor.dim())]) if tensor.dim() else dense

    def _axes_of(self, node: Node, result: Any) -> dict[int, Axis] | bool | None:
        """Compare a result with the traced one; False if their sizes are not related through token counts."""
        example = value(node)
        if not isinstance(result, torch.Tensor) or not isinstance(example, torch.Tensor):
            return None
        if result.dim() != example.dim():
            return False
        axes: dict[int, Axis] = {}
        for axis, (now, then) in enumerate(zip(result.shape, hint_shape(example))):
            if now == then:
                continue
            for label, length in self.lengths.items():
                multiple, rest = divmod(now - then, length - self.size_hint)
                if rest == 0 and multiple > 0:
                    axes[axis] = Axis(label, multiple, then - multiple * self.size_hint)
                    break
            else:
                return False
        return axes

    def _keeps_tokens_whole(
        self, node: Node, current: list[Any], choice: Mapping[int, Binding], axes: dict[int, Axis] | None
    ) -> bool:
        """Run a node that only moves data on the tokens' numbers: do they come out whole, along the axis found?

        Needed where sizes collide and several readings work, as in ``view(1, 64, -1)`` with S = hidden = 64.
        """
        sources = [leaf for leaf in current if isinstance(leaf, Node) and leaf in self._probed]
        if len(sources) != 1 or axes is None:
            return False
        origin = self.found.axes.get(sources[0], {})
        if len(origin) != len(axes):
            return False
        for (source_axis, kind), (axis, out_kind) in zip(sorted(origin.items()), sorted(axes.items())):
            if kind.label != out_kind.label:
                return False
            probed = self._probed[sources[0]]
            shape = [1] * probed.dim()
            shape[source_axis] = probed.shape[source_axis]
            numbers = torch.arange(probed.shape[source_axis]).view(shape).expand(probed.shape).contiguous()

            def real_leaf(leaf: Any, binding: Binding | None) -> Any:
                if leaf is sources[0]:
                    return numbers
                if is_tensor(leaf):
                    raise NotImplementedError("only nodes with one tensor are run on numbers")
                return self._fake_leaf(leaf, binding)

            args, kwargs = with_leaves(node, [real_leaf(leaf, choice.get(i)) for i, leaf in enumerate(current)])
            try:
                moved = call(self.module, node.op, node.target, args, kwargs)
            except Exception:  # no data movement (a product with weights, say): nothing to learn here
                return False
            expected_shape = [1] * moved.dim()
            expected_shape[axis] = moved.shape[axis]
            expected = torch.arange(moved.shape[axis]).view(expected_shape)
            if moved.shape[axis] != probed.shape[source_axis] or not bool((moved == expected).all()):
                return False
        return True
