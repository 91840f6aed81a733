"""Remembers what operations come to on fake tensors: a decoder's layers are alike, and fake tensors are slow."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from parvts_fx.torch_private import (
    FakeTensor,
    expression,
    free_unbacked_symbols,
    is_functorch_wrapped_tensor,
    memory_of,
    tree_leaves,
)


class EvaluationCache:
    """Results (and failures) of operations by their arguments' sizes, strides and types, within one fake mode.

    A result that has no memory of its own (a view, a tensor changed in place) is evaluated each time, and so is anything
    with arguments that cannot be compared, and a result whose size is data: two calls of ``nonzero`` on tensors alike
    find different numbers of entries, and one symbol for both would say that they are equal.
    """

    def __init__(self) -> None:
        self._results: dict[Hashable, Any] = {}

    def evaluate(
        self, op: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[[], Any]
    ) -> Any:
        """What ``run()`` returns, or a tensor like it."""
        if op not in ("call_function", "call_method"):
            return run()
        try:
            key = (op, target, _description(args), _description(kwargs))
            held = self._results.get(key)
        except TypeError:
            return run()
        if isinstance(held, Exception):
            raise held.with_traceback(None)
        if held is not None:
            return torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device=held.device)
        try:
            result = run()
        except Exception as error:
            self._results[key] = error
            raise
        if _may_stand_for_others(result, (args, kwargs)):
            self._results[key] = result
        return result


def _description(leaf: Any) -> Hashable:
    """Equal for arguments with which an operation comes to equal sizes.

    Raises:
        TypeError: nothing is known about such an argument.
    """
    kind = type(leaf)
    if kind is FakeTensor or kind is torch.nn.Parameter or kind is torch.Tensor:
        return (kind is FakeTensor, _sizes(leaf.shape), _sizes(leaf.stride()), leaf.dtype, leaf.device)
    if isinstance(leaf, torch.Tensor):
        raise TypeError
    if isinstance(leaf, (tuple, list)):
        return (kind, *map(_description, leaf))
    if kind is slice:
        return (kind, _description(leaf.start), _description(leaf.stop), _description(leaf.step))
    if isinstance(leaf, Mapping):
        return tuple((name, _description(held)) for name, held in leaf.items())
    return _size(leaf) if isinstance(leaf, torch.SymInt) else (kind, leaf)


def _sizes(sizes: Sequence[int | torch.SymInt]) -> tuple[Hashable, ...]:
    return tuple(size if isinstance(size, int) else _size(size) for size in sizes)


def _size(size: torch.SymInt) -> Hashable:
    return (torch.SymInt, expression(size))


def _may_stand_for_others(result: Any, given: Any) -> bool:
    """Whether an equal operation comes to a tensor like this one, with nothing that is this result's alone."""
    if type(result) is not FakeTensor or result.requires_grad or not _has_own_memory(result, given):
        return False
    found = free_unbacked_symbols(result)
    return not found or found <= free_unbacked_symbols(
        [leaf for leaf in tree_leaves(given) if isinstance(leaf, (torch.Tensor, torch.SymInt))])


def _has_own_memory(result: torch.Tensor, given: Any) -> bool:
    if is_functorch_wrapped_tensor(result):
        return False
    memory = memory_of(result)
    for leaf in tree_leaves(given):
        if isinstance(leaf, torch.Tensor):
            if is_functorch_wrapped_tensor(leaf) or memory_of(leaf) == memory:
                return False
    return True
