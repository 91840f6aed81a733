"""accelerate's hooks, by which ``device_map`` spreads a model over several devices, where Dynamo may capture them.

accelerate excludes its hooks from compiling, so that a graph ends at each layer. Where all that they do is to move what a module
is given to the device of its weights, that can be captured as any other operation. Hooks that fetch weights as well (CPU and disk
offload) change the module for the duration of its call, which no graph can hold: they stay excluded.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

_METHODS = ("pre_forward", "post_forward")


def open_hooks(model: torch.nn.Module) -> None:
    """Let Dynamo capture the hooks of a model's modules, as far as that is sound."""
    for hook in _hooks_of(model):
        if _only_moves(hook):
            vars(hook).update({name: types.MethodType(inspect.unwrap(getattr(type(hook), name)), hook) for name in _METHODS})


def close_hooks(model: torch.nn.Module) -> None:
    """Undo :func:`open_hooks`."""
    for hook in _hooks_of(model):
        for name in _METHODS:
            vars(hook).pop(name, None)


@contextlib.contextmanager
def hooks_opened(model: torch.nn.Module) -> Iterator[None]:
    """Open hooks for a call, and leave them as they were."""
    were_open = any(_METHODS[0] in vars(hook) for hook in _hooks_of(model))
    open_hooks(model)
    try:
        yield
    finally:
        if not were_open:
            close_hooks(model)


def _hooks_of(model: torch.nn.Module) -> list[Any]:
    """Those of all modules, and what chains of them are made of."""
    if "accelerate.hooks" not in sys.modules or not isinstance(model, torch.nn.Module):
        return []
    outer = [vars(module)["_hf_hook"] for module in model.modules() if "_hf_hook" in vars(module)]
    return [held for hook in outer for held in (hook, *getattr(hook, "hooks", ()))]


def _only_moves(hook: Any) -> bool:
    hooks = sys.modules["accelerate.hooks"]
    if type(hook) is hooks.SequentialHook:
        return all(map(_only_moves, hook.hooks))
    return type(hook) is hooks.AlignDevicesHook and not hook.offload
