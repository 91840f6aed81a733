"""Finds out which sizes follow the prompt, by evaluating the decoder at another prompt length.

Node by node, on fake tensors: what must change for a node to still work follows the prompt; everything else stays. No
operator is known by name here. A reading that works where it is taken may turn out wrong further on (a buffer of 30
entries works by itself, until 127 tokens are copied into it): then the search goes back to the nearest choice that
the failing node depends on.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.evaluation_cache import EvaluationCache
from parvts_fx.analysis.tokens import AtMost, Axis, Binding, Computed, Count, Filling, TokenMap, cached_in_front, readings_of
from parvts_fx.analysis.values import (
    ancestors,
    call,
    concrete,
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
from parvts_fx.errors import Refusal
from parvts_fx.torch_private import FAKE_TENSOR_LOG, FakeTensor, FakeTensorMode, is_traceable_wrapper_subclass

_MOST_RETREATS = 400
_FEW_READINGS = 4
"""So many are all tried before it is looked at what becomes of the tokens, which takes longer."""

_FAKE_LOG = logging.getLogger(FAKE_TENSOR_LOG)

Finding = tuple[dict[int, Binding], Any, dict[int, Axis] | None]
"""A reading of a node, what the node comes to under it, and the token axes of that."""


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


class Probe:
    """Evaluates nodes on fake tensors in which each label's tokens have another number than in the graph."""

    def __init__(
        self, module: GraphModule, size: int | torch.SymInt, lengths: Mapping[str, int], what: str = "prompt length",
        computes: bool = False,
    ):
        self.module, self.what = module, what
        self.size_hint = hint(size)
        self.lengths = dict(lengths)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        joined = filter(None, map(cached_in_front, module.graph.nodes))
        cached = frozenset(hint(value(tensor).shape[axis]) for tensor, axis in joined)
        self.found = TokenMap(concrete(size), length=max(lengths.values()), cached=cached, computes=computes)
        self._inner: dict[Node, dict[int, int]] = {}
        """For axes of several entries a token: how many of one token follow one another, where that is known."""

        self._moved: dict[tuple, int] = {}
        self._sides: dict[tuple[Node, tuple], torch.Tensor] = {}
        self._evaluated = EvaluationCache(sizes_alone=True)

    @staticmethod
    def lengths_for(
        module: GraphModule, size: int | torch.SymInt, labels: Sequence[str], shorter: bool = False
    ) -> dict[str, int]:
        """One prime per label, no factor of any size in the graph; larger than the prompt, or well below it.

        Where sizes have names no other number is taken for the prompt's length, and any prime will do if there is no such one.
        """
        sizes = {
            entry
            for node in module.graph.nodes if isinstance(value(node), torch.Tensor)
            for entry in hint_shape(value(node)) if entry
        }
        try:
            return _primes(hint(size), labels, shorter, sizes)
        except Refusal:
            if not symbols(size):
                raise
            return _primes(hint(size), labels, shorter, set())

    def seed(self, node: Node, axes: Mapping[int, str]) -> None:
        """Declare the axes of a node from which the probe starts."""
        self.found.probed[node] = self._side(node, tuple(axes.items()))
        self.found.axes[node] = {axis: Axis(label, 1, 0) for axis, label in axes.items()}

    def run(self, nodes: Sequence[Node]) -> None:
        """Evaluate nodes in graph order, and record what was found.

        Raises:
            Refusal: no way of reading a node's integers and side tensors, and those in front of it, lets it work at
                another prompt length.
        """
        found: dict[int, Iterator[Finding]] = {}
        conflicts: dict[int, set[Node]] = {}
        problems: list[Refusal] = []
        retreats = place = 0
        while place < len(nodes):
            if place not in found:
                found[place] = self._findings(nodes[place])
            try:
                self._record(nodes[place], next(found[place]))
                place += 1
                continue
            except StopIteration:
                pass
            except Refusal as refusal:
                problems.append(refusal)
            # go back to the nearest choice in front that this node depends on
            involved = ancestors([nodes[place]]) | conflicts.get(place, set())
            retreats += 1
            for earlier in range(place - 1, -1, -1):
                if retreats > _MOST_RETREATS or nodes[earlier] not in involved:
                    continue
                finding = next(found[earlier], None)
                if finding is not None:
                    break
            else:
                raise problems[0]
            for later in range(earlier + 1, place + 1):
                found.pop(later, None)
                conflicts.pop(later, None)
                self._forget(nodes[later])
            conflicts.setdefault(earlier, set()).update(involved)
            self._record(nodes[earlier], finding)
            place = earlier + 1

    def _record(self, node: Node, finding: Finding) -> None:
        choice, result, axes = finding
        self._forget(node)
        self.found.probed[node] = result
        if axes is not None:
            self.found.axes[node] = axes
        self.found.bindings[node] = choice
        if axes and any(kind.multiple > 1 for kind in axes.values()):
            self._inner[node] = self._layout(node, choice, axes)

    def _layout(self, node: Node, choice: Mapping[int, Binding], axes: Mapping[int, Axis]) -> dict[int, int]:
        """How the entries of each token lie in the result: as moved, or else as in an operand with such an axis."""
        current = leaves(node)
        moved = self._moved_axes(node, current, choice, dict(axes))
        if moved is not None:
            return moved
        return {
            axis: self._inner[source][axis] for axis, kind in axes.items() for source in node.all_input_nodes
            if axis in self._inner.get(source, {}) and self.found.axes[source].get(axis) == kind
        }

    def _forget(self, node: Node) -> None:
        for held in (self.found.probed, self.found.axes, self.found.bindings, self._inner):
            held.pop(node, None)

    def _findings(self, node: Node) -> Iterator[Finding]:
        """The readings under which a node works, in order of preference; a Refusal if there is none."""
        current = leaves(node)
        working: list[Finding] = []
        problem: Exception | None = None
        first, choices = True, list(readings_of(node, self.lengths, self.found))
        for choice in choices:
            try:
                result = self._evaluate(node, current, choice, self._fake_leaf)
            except Exception as error:  # a trial that fails is the normal case: this reading of the node is wrong
                problem = error
                continue
            axes = self._axes_of(node, result)
            if axes is False:
                continue
            if first and len(choices) > _FEW_READINGS and self._keeps_tokens_whole(node, current, choice, axes):
                yield choice, result, axes  # the best there can be: others are tried only if it turns out wrong later on
            else:
                working.append((choice, result, axes))
            first = False
        if first:
            detail = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}" if problem else "sizes do not fit"
            raise Refusal(f"an operation works only at the traced {self.what} ({detail})", node)
        if len(working) > 1:  # the stable sort leaves the fewest changes in front among equals
            working.sort(key=lambda entry: not self._keeps_tokens_whole(node, current, entry[0], entry[2]))
        yield from working

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self, node: Node, current: list[Any], choice: Mapping[int, Binding], leaf_value: Any) -> Any:
        args, kwargs = with_leaves(node, [leaf_value(leaf, choice.get(i)) for i, leaf in enumerate(current)])
        with self.mode, torch.no_grad(), quiet_trials():
            if node.target is operator.setitem and isinstance(args[2], torch.Tensor):  # fake tensors do not check this
                args[2].expand_as(args[0][args[1]])
            return self._evaluated.evaluate(
                node.op, node.target, args, kwargs, lambda: self._call(node, args, kwargs))

    def _call(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a node comes to; where a mask picks entries of an axis that are no tokens, as if it picked all of them."""
        if is_index(node) and isinstance(node.args[1], tuple):
            index = tuple(
                torch.empty(part.shape, dtype=torch.int64, device=part.device)
                if isinstance(place, Node) and isinstance(part, torch.Tensor) and part.dtype == torch.bool and part.dim() == 1
                and not self.found.axes.get(place) else part
                for place, part in zip(node.args[1], args[1]))
            args = (args[0], index)
        return call(self.module, node.op, node.target, args, kwargs)

    def _fake_leaf(self, leaf: Any, binding: Binding | None) -> Any:
        if isinstance(leaf, Node) and leaf in self.found.probed:
            return self.found.probed[leaf]
        if isinstance(binding, Count):
            return binding.of(self.lengths[binding.label])
        if isinstance(binding, Computed):
            return for_length(value(leaf), self.found.size, self.lengths[binding.label])
        if isinstance(binding, AtMost):
            return min(hint(value(leaf) if isinstance(leaf, Node) else leaf), self.lengths[binding.label])
        if isinstance(binding, Filling):
            return hint(value(leaf) if isinstance(leaf, Node) else leaf) + self.size_hint - self.lengths[binding.label]
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
        more = {axis: self.lengths[label] - self.size_hint for axis, label in axes.items()}
        shape = [size + more.get(axis, 0) for axis, size in enumerate(hint_shape(tensor))]
        with self.mode:
            if type(tensor) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
                return self._wrapper_like(tensor, axes)
            order = sorted(range(tensor.dim()), key=lambda i: -hint(tensor.stride()[i]))  # keep the memory layout
            dense = torch.empty([shape[i] for i in order], dtype=tensor.dtype, device=tensor.device)
            return dense.permute([order.index(i) for i in range(tensor.dim())]) if tensor.dim() else dense

    def _wrapper_like(self, tensor: torch.Tensor, axes: Mapping[int, str]) -> torch.Tensor:
        """The same for a tensor that wraps others, such as a quantised weight, which does not follow the prompt."""
        if axes or not is_traceable_wrapper_subclass(tensor):
            raise Refusal(f"a tensor of the subclass {type(tensor).__name__} is not understood")
        wrapper: Any = tensor
        names, context = wrapper.__tensor_flatten__()
        parts = {name: self._like(getattr(tensor, name), {}) for name in names}
        return type(wrapper).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())

    def _axes_of(self, node: Node, result: Any) -> dict[int, Axis] | Literal[False] | None:
        """Compare a result with the traced one; False if their sizes are not related through token counts."""
        example = value(node)
        if not isinstance(result, torch.Tensor) or not isinstance(example, torch.Tensor):
            return None
        if result.dim() != example.dim():
            return False
        axes: dict[int, Axis] = {}
        for axis, (now, then) in enumerate(zip(result.shape, hint_shape(example))):
            if now == then or then is None:
                continue
            for label, length in self.lengths.items():
                multiple, rest = divmod(now - then, length - self.size_hint)
                if rest == 0 and multiple > 0 and (now == length or self._is_linear(example.shape[axis], multiple)):
                    axes[axis] = Axis(label, multiple, then - multiple * self.size_hint)
                    break
            else:
                if not self._is_computed(example.shape[axis], now):
                    return False
        return axes

    def _is_linear(self, traced: int | torch.SymInt, multiple: int) -> bool:
        """Whether a size is so many times the prompt's length and others at any length, as it has to be where numbers are
        computed again. (As it was traced: what is cut to the prompt's length may have been no longer.)"""
        return not self.found.computes or not symbols(self.found.size) & symbols(traced - multiple * self.found.size)

    def _is_computed(self, traced: int | torch.SymInt, now: int) -> bool:
        """Whether a size is what its formula says for some label's tokens: of blocks of them, which are no tokens."""
        size = concrete(traced)
        return self.found.computes and isinstance(size, torch.SymInt) and any(
            for_length(size, self.found.size, length) == now for length in self.lengths.values())

    def _keeps_tokens_whole(
        self, node: Node, current: list[Any], choice: Mapping[int, Binding], axes: dict[int, Axis] | None
    ) -> bool:
        """Run a node that only moves data on the tokens' numbers: do they come out whole, along the axis found?

        Needed where sizes collide and several readings work, as in ``view(1, 64, -1)`` with S = hidden = 64.
        """
        return self._moved_axes(node, current, choice, axes) is not None

    def _moved_axes(
        self, node: Node, current: list[Any], choice: Mapping[int, Binding], axes: dict[int, Axis] | None
    ) -> dict[int, int] | None:
        """By axis, how many entries of one token follow one another behind a node that only moves data; None for others."""
        sources = [leaf for leaf in current if isinstance(leaf, Node) and leaf in self.found.probed]
        if len(sources) != 1 or axes is None:
            return None
        (source,) = sources
        origin = self.found.axes.get(source, {})
        if len(origin) != len(axes):
            return None
        found: dict[int, int] = {}
        for (source_axis, kind), (axis, out_kind) in zip(sorted(origin.items()), sorted(axes.items())):
            if kind.label != out_kind.label:
                return None
            known = self._inner.get(source, {}).get(source_axis)
            for inner in dict.fromkeys((kind.multiple, 1)) if known is None else (known,):
                key: tuple[Any, ...] = (
                    node.op, node.target, str(node.args), str(node.kwargs), tuple(choice.items()), source_axis, axis, inner)
                key = (*key[:2], key[2].replace(source.name, ""), *key[3:], tuple(self.found.probed[source].shape))
                if key not in self._moved:
                    self._moved[key] = self._moves_whole(node, current, choice, source, source_axis, axis, inner)
                each = self._moved[key]
                if each:
                    found[axis] = each
                    break
            else:
                return None
        return found

    def _moves_whole(
        self, node: Node, current: list[Any], choice: Mapping[int, Binding], source: Node, source_axis: int, axis: int,
        inner: int,
    ) -> int:
        """How many entries of each token, ``inner`` of which follow one another in the source, do so in the result; 0 if they
        do not lie in order there."""
        probed, length = self.found.probed[source], next(iter(self.lengths.values()))
        shape = [1] * probed.dim()
        shape[source_axis] = probed.shape[source_axis]
        numbers = torch.arange(probed.shape[source_axis], dtype=torch.int32) // inner % length
        numbers = numbers.view(shape).expand(probed.shape).contiguous()

        def real_leaf(leaf: Any, binding: Binding | None) -> Any:
            if leaf is source:
                return numbers
            if is_tensor(leaf):
                raise NotImplementedError("only nodes with one tensor are run on numbers")
            return self._fake_leaf(leaf, binding)

        try:
            args, kwargs = with_leaves(node, [real_leaf(leaf, choice.get(i)) for i, leaf in enumerate(current)])
            moved = call(self.module, node.op, node.target, args, kwargs)
        except Exception:  # no data movement (a product with weights, say): nothing to learn here
            return 0
        entries = moved.shape[axis]
        if entries % length:
            return 0
        view = [1] * moved.dim()
        view[axis] = entries
        for each in range(1, entries // length + 1):
            if entries // length % each == 0 and bool(
                    (moved == (torch.arange(entries, dtype=torch.int32) // each % length).view(view)).all()):
                return each
        return 0


def _primes(size_hint: int, labels: Sequence[str], shorter: bool, sizes: Collection[int]) -> dict[str, int]:
    chosen: dict[str, int] = {}
    candidate, step = (2 * size_hint // 3, -1) if shorter else (2 * size_hint + 61, 1)
    for label in labels:
        while (
            any(candidate % factor == 0 for factor in range(2, int(candidate**0.5) + 1))
            or any(entry % candidate == 0 for entry in sizes)
            or candidate in chosen.values()
        ):
            candidate += step
            if candidate < 3:
                raise Refusal("the prompt is too short to tell its length from other sizes", names_tell=True)
        chosen[label] = candidate
        candidate += 1 + size_hint  # far enough apart for (probe - S) differences not to divide one another
    return chosen
