"""Evaluates nodes on fake tensors in which tokens have another number than in the graph."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.evaluation_cache import EvaluationCache
from parvts_fx.analysis.tokens import AtMost, Binding, Computed, Count, Filling, TokenMap
from parvts_fx.analysis.values import call, for_length, hint, hint_shape, is_index, is_tensor, value, with_leaves
from parvts_fx.errors import Refusal
from parvts_fx.torch_private import FAKE_TENSOR_LOG, FakeTensor, FakeTensorMode, is_traceable_wrapper_subclass

_FAKE_LOG = logging.getLogger(FAKE_TENSOR_LOG)


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


class OtherLengths:
    """What a graph's nodes come to where each label's tokens have another number.

    Args:
        size: of the axis that the tokens run along, as it was traced.
        lengths: by label, the other number.
        found: what is known of the graph's nodes; read, as it grows.
    """

    def __init__(self, module: GraphModule, size: int, lengths: Mapping[str, int], found: TokenMap):
        self.module, self.size_hint, self.lengths, self.found = module, size, lengths, found
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._sides: dict[tuple[Node, tuple], torch.Tensor] = {}
        self._evaluated = EvaluationCache()

    def evaluate(self, node: Node, current: Sequence[Any], choice: Mapping[int, Binding]) -> Any:
        """A node under a reading of its argument leaves."""
        args, kwargs = with_leaves(node, [self.leaf(leaf, choice.get(i)) for i, leaf in enumerate(current)])
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

    def leaf(self, leaf: Any, binding: Binding | None) -> Any:
        """What stands for an argument leaf."""
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
            return self.side(leaf, binding.axes if binding else ())
        if isinstance(leaf, Node):
            example = value(leaf)
            return hint(example) if isinstance(example, torch.SymInt) else example
        return leaf

    def side(self, node: Node, axes: tuple[tuple[int, str], ...]) -> torch.Tensor:
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
