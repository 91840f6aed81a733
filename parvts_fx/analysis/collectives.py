"""Collective operations in runs on small tensors: as if every process held what this one holds, and without talking to any.

What is to be shown is which rows an operation reads, which does not depend on what other processes hold. And to talk to them
would hang the job as soon as one process takes another way through its proofs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed
from torch.fx import Node

from parvts_fx.torch_private import (
    OpOverload,
    OpOverloadPacket,
    TorchDispatchMode,
    named_arguments,
    operation_name,
    process_group,
)

_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd")


class EveryProcessAlike(TorchDispatchMode):
    """
    Raises (where such an operation runs):
        NotImplementedError: it is one whose result is not known.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "namespace", "") not in _NAMESPACES:
            return func(*args, **(kwargs or {}))
        arguments, name = named_arguments(func, args, kwargs or {}), operation_name(func).partition("::")[2]
        result = _result(name.rstrip("_"), arguments)
        return arguments["input"].copy_(result) if name.endswith("_") else result


def _result(name: str, given: dict[str, Any]) -> Any:
    if name.endswith("_coalesced"):
        return [_result(name.removesuffix("_coalesced"), {**given, "input": held}) for held in given["inputs"]]
    held: Any = given.get("input", given.get("tensor"))
    match name:
        case "wait_tensor" | "broadcast" | "_wrap_tensor_autograd":
            return held
        case "all_reduce":
            return _reduced(held, given["reduce_op"], given["group_name"])
        case "all_gather_into_tensor":
            return torch.cat([held] * given["group_size"])
        case "reduce_scatter_tensor":
            part = held.chunk(given["group_size"])[_rank(given["group_name"])]
            return _reduced(part, given["reduce_op"], given["group_name"])
    raise NotImplementedError(f"the collective operation {name}")


def _reduced(held: torch.Tensor, operation: str, group: str) -> torch.Tensor:
    if operation not in ("sum", "avg", "max", "min"):
        raise NotImplementedError(f"a reduction by {operation}")
    return held * torch.distributed.get_world_size(_group(group)) if operation == "sum" else held.clone()


def _rank(group: str) -> int:
    return torch.distributed.get_rank(_group(group))


def _group(name: Any) -> Any:
    return process_group(name) if isinstance(name, str) else name


def groups_of(nodes: Iterable[Node]) -> list[Any]:
    """The groups of processes that a graph's operations talk to, as they name them."""
    found: dict[Any, None] = {}
    for node in nodes:
        packet = isinstance(node.target, OpOverloadPacket)
        overload = getattr(node.target, "default", None) if packet else node.target
        if isinstance(overload, OpOverload) and overload.namespace in _NAMESPACES:
            given = named_arguments(overload, node.args, node.kwargs)
            if "group_name" in given:
                found[given["group_name"]] = None
    return list(found)


def without_others() -> contextlib.AbstractContextManager[Any]:
    """For runs on small tensors in one of several processes; nothing elsewhere, since it costs time."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return EveryProcessAlike() if several else contextlib.nullcontext()
