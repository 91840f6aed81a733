"""Finds out whether a module can be an operation (:mod:`parvts_fx.runtime.module_operation`), by running it.

It must be a function of tensors and of its weights, in which rows stay apart, and whose results' sizes are products of sizes that
it is given.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import hashlib
import math
import pickle
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from parvts_fx.runtime.module_operation import TENSOR, Closed, Result, Signature, Size, call_without_weights, register
from parvts_fx.torch_private import changes_of, hook_tables

_CONSTANTS = (int, float, bool, str, type(None))
_CLOSE = 1e-2
"""Of the largest number: how far results may be apart by rounding alone, where numbers have half precision."""

Run = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def close(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], known: MutableMapping[Any, Closed | None]
) -> Closed | None:
    """A module as an operation; None for one that is no function of tensors and of its weights.

    Args:
        args, kwargs: of a call of it.
        known: what has been found out of others.
    """
    given = (*args, *kwargs.values())
    tensors = [held for held in given if isinstance(held, torch.Tensor)]
    if not tensors or not all(isinstance(held, (torch.Tensor, *_CONSTANTS)) for held in given) or TENSOR in [
            held for held in given if isinstance(held, str)]:
        return None
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    try:
        bare = _without_weights(module, weights)
        written = pickle.dumps(bare)
    except Exception:  # what it holds cannot be copied
        return None
    signature = Signature(
        len(args), tuple(kwargs), tuple(TENSOR if isinstance(held, torch.Tensor) else held for held in given),
        tuple(held.dtype for held in tensors), tuple(tuple(held.shape) for held in tensors))
    kind = type(module), written, signature
    if kind not in known:
        known[kind] = _close(bare, written, signature, tensors, weights) if bare is not None else None
    return known[kind]


def _close(
    bare: torch.nn.Module, written: bytes, signature: Signature, tensors: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
) -> Closed | None:
    kinds: set[type] = set()

    def run(given: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        with torch.no_grad():
            made = call_without_weights(bare, signature, given, weights)
        kinds.add(type(made))
        return [made] if isinstance(made, torch.Tensor) else made

    try:
        before = [changes_of(held) for held in (*tensors, *weights.values())]
        made = run(tensors)
        unchanged = before == [changes_of(held) for held in (*tensors, *weights.values())] and pickle.dumps(bare) == written
    except Exception:
        return None
    if not unchanged or not kinds <= {torch.Tensor, tuple} or not made or not all(
            isinstance(held, torch.Tensor) and held.device == tensors[0].device for held in made):
        return None
    found = _results(run, tensors, made, list(weights.values()))
    if found is None:
        return None
    results, varying = found
    if not _keeps_rows_apart(run, tensors, made, varying):
        return None
    sizes = tuple(tuple(-1 - varying.index(size) if size in varying else size for size in held.shape) for held in tensors)
    signature = dataclasses.replace(signature, sizes=sizes)
    said = (written, tuple(weights), repr((signature, results)))
    key = hashlib.sha256(pickle.dumps(said)).hexdigest()
    return register(Closed(key, tuple(weights), signature, results, kinds == {torch.Tensor}, bare))


def _results(
    run: Run, tensors: Sequence[torch.Tensor], made: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[tuple[Result, ...], list[int]] | None:
    """How the sizes of what a module makes follow those of what it is given, and which of these may be any: it is run on tensors
    of which all axes of one size are twice as long. None where they follow in another way than as a product."""
    varying: dict[int, list[list[bool]]] = {}
    for size in sorted({size for held in tensors for size in held.shape}):
        try:
            longer = run([_doubled(held, size) for held in tensors])
        except Exception:  # weights are for this size alone
            continue
        ratios = [[(long, short) for long, short in zip(more.shape, held.shape)] for more, held in zip(longer, made)]
        if [held.dim() for held in longer] != [held.dim() for held in made] or any(
                long not in (short, 2 * short) for each in ratios for long, short in each):
            return None
        varying[size] = [[long != short for long, short in each] for each in ratios]
    given = (*tensors, *weights)
    places: dict[int, tuple[int, int]] = {}
    for place, held in enumerate(given):
        for axis, size in enumerate(held.shape):
            places.setdefault(size, (place, axis))
    results = []
    for place, held in enumerate(made):
        sizes = []
        for axis, size in enumerate(held.shape):
            follows = [number for number, doubled in varying.items() if doubled[place][axis]]
            rest, over = divmod(size, math.prod(follows))
            if over:
                return None
            fixed = rest != 1 and rest in places and rest not in varying
            factors = [places[number] for number in follows] + ([places[rest]] if fixed else [])
            sizes.append(Size(1 if fixed else rest, tuple(factors)))
        results.append(Result(held.dtype, tuple(sizes)))
    return tuple(results), list(varying)


def _keeps_rows_apart(run: Run, tensors: Sequence[torch.Tensor], made: Sequence[torch.Tensor], varying: Sequence[int]) -> bool:
    """Whether half of the entries of any axis but the last come to what they come to among all of them."""
    compared = []
    for size in (size for size in varying if size > 1 and any(size in held.shape[:-1] for held in made)):
        for half in range(size // 2), range(size // 2, size):
            some = run([_chosen(held, size, half) for held in tensors])
            compared += [(part, wanted) for part, whole in zip(some, made, strict=True) if size in whole.shape[:-1]
                         for wanted in (_chosen(whole, size, half),) if part.shape == wanted.shape]
    return bool(compared) and all(
        torch.allclose(part, wanted, rtol=0, atol=_CLOSE * float(wanted.abs().max()) if wanted.is_floating_point() else 0)
        for part, wanted in compared)


def _chosen(tensor: torch.Tensor, size: int, entries: range) -> torch.Tensor:
    for axis, own in enumerate(tensor.shape):
        if own == size:
            tensor = tensor.narrow(axis, entries.start, len(entries))
    return tensor


def _doubled(tensor: torch.Tensor, size: int) -> torch.Tensor:
    for axis, own in enumerate(tensor.shape):
        if own == size:
            tensor = torch.cat([tensor, tensor], axis)
    return tensor


def _without_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module | None:
    """A copy that holds no numbers; None where something of it is neither weights nor plain.

    Hooks of its own are called around the operation; of those inside nobody would know.
    """
    inner = [part for part in module.modules() if part is not module]
    if any(table for part in inner for table in hook_tables(part)) or any(
            isinstance(held, torch.Tensor) for part in module.modules() for held in vars(part).values()):
        return None
    if any(type(held) not in (torch.Tensor, torch.nn.Parameter) for held in weights.values()):
        return None
    memo: dict[int, Any] = {id(table): collections.OrderedDict() for table in hook_tables(module)}
    for held in weights.values():
        bare = torch.empty_like(held, device="meta", requires_grad=False)
        memo[id(held)] = torch.nn.Parameter(bare, requires_grad=False) if isinstance(held, torch.nn.Parameter) else bare
    return copy.deepcopy(module, memo)
