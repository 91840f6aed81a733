"""The operation that stands for a module: of tensors and of the module's weights.

Weights are inputs, so that the module may be run on any others, as the analysis does. What is left of the module is the same for
all layers that differ in nothing else, and so is the operation.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

TENSOR = "a tensor"


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a module may be given for what is known of it to hold."""

    positional: int
    names: tuple[str, ...]
    given: tuple[Any, ...]
    """:data:`TENSOR`, or another argument itself."""

    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[tuple[int, ...], ...]
    """Of each tensor: a size that must be as it is; or -1, -2, ... for one that may be any, the same wherever that number is."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Of an axis of a result: a number times sizes of what is given."""

    constant: int
    factors: tuple[tuple[int, int], ...]
    """Each as the place among tensors and weights, and the axis."""

    def of(self, given: Sequence[torch.Tensor]) -> Any:
        size: Any = self.constant
        for place, axis in self.factors:
            size = given[place].shape[axis] if size == 1 else size * given[place].shape[axis]
        return size


@dataclasses.dataclass(frozen=True)
class Result:
    dtype: torch.dtype
    sizes: tuple[Size, ...]


@dataclasses.dataclass(frozen=True)
class Closed:
    """A module without its weights."""

    key: str
    weights: tuple[str, ...]
    signature: Signature
    results: tuple[Result, ...]
    returns_one: bool
    module: torch.nn.Module
    lock: Any = dataclasses.field(default_factory=threading.RLock)
    """Held while the weights are in place."""

    def run(self, tensors: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with self.lock:
            made = call_without_weights(self.module, self.signature, tensors, dict(zip(self.weights, weights)))
        return [held.clone(memory_format=torch.contiguous_format) for held in ([made] if self.returns_one else made)]


_closed: dict[str, Closed] = {}
"""By what they are, so that a compiled graph out of Inductor's cache finds them in another process."""

_library = torch.library.Library("parvts_fx", "FRAGMENT")
_library.define("module(str key, Tensor[] tensors, Tensor[] weights) -> Tensor[]", tags=(torch.Tag.cudagraph_unsafe,))


def _run(key: str, tensors: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    held, given = _closed[key], (*tensors, *weights)
    made = held.run(tensors, weights)
    for result, tensor in zip(held.results, made, strict=True):
        wanted = tuple(size.of(given) for size in result.sizes)
        if tuple(tensor.shape) != wanted:
            raise RuntimeError(f"parvts_fx: {type(held.module).__name__} makes a tensor of sizes {tuple(tensor.shape)}, where "
                               f"{wanted} was expected for what it is given")
    return made


def _sizes_of(key: str, tensors: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    given = (*tensors, *weights)
    if not _fit(_closed[key].signature, tensors):
        raise RuntimeError("parvts_fx: a module is given tensors of sizes that do not belong together")
    return [tensors[0].new_empty([size.of(given) for size in result.sizes], dtype=result.dtype)
            for result in _closed[key].results]


_library.impl("module", _run, "CompositeExplicitAutograd")
torch.library.register_fake("parvts_fx::module", _sizes_of, lib=_library)


def register(closed: Closed) -> Closed:
    """The operation for such a module."""
    key = closed.key
    while key in _closed and type(_closed[key].module) is not type(closed.module):  # a class that was written anew
        key += "'"
    return _closed.setdefault(key, dataclasses.replace(closed, key=key))


def parameter(module: torch.nn.Module, path: str) -> Any:
    held: Any = module
    for name in path.split("."):
        held = getattr(held, name)
    return held


def takes(signature: Signature, positional: int, names: tuple[str, ...], given: tuple[Any, ...]) -> bool:
    """Whether what is known of a module holds for these arguments. Dynamo captures this, and guards what it asks."""
    if (positional, names, len(given)) != (signature.positional, signature.names, len(signature.given)):
        return False
    tensors = [held for held in given if isinstance(held, torch.Tensor)]
    for held, wanted in zip(given, signature.given):
        if isinstance(held, torch.Tensor) != (wanted == TENSOR) or not isinstance(held, torch.Tensor) and held != wanted:
            return False
    return all(held.dtype == dtype for held, dtype in zip(tensors, signature.dtypes)) and _fit(signature, tensors)


def _fit(signature: Signature, tensors: Sequence[torch.Tensor]) -> bool:
    varying: dict[int, Any] = {}
    for tensor, sizes in zip(tensors, signature.sizes):
        if tensor.dim() != len(sizes):
            return False
        for size, wanted in zip(tensor.shape, sizes):
            if size != (wanted if wanted >= 0 else varying.setdefault(wanted, size)):
                return False
    return True


def call_without_weights(
    module: torch.nn.Module, signature: Signature, tensors: Sequence[torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> Any:
    supply = iter(tensors)
    given = [next(supply) if held == TENSOR else held for held in signature.given]
    named = dict(zip(signature.names, given[signature.positional:]))
    return torch.func.functional_call(module, dict(weights), tuple(given[:signature.positional]), named)
