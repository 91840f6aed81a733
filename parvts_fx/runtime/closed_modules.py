"""Modules that Dynamo cannot capture, as one operation of the graph each.

A loop over those experts that were chosen, or a branch on what a tensor holds, ends the graph in the middle of the decoder. Where
that happens in the forward of a module that makes tensors of tensors, the call is begun again with such modules closed: each is
an operation that is given its tensors and its weights. What it does with rows is proven as for any other operation, by running
it. How its results' sizes follow those of what it is given is found out in a call of the model as it is. A module in which rows
meet (a layer, with its attention) stays open: what is to be found out about that is inside.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from parvts_fx.runtime.close_module import close
from parvts_fx.runtime.module_operation import Closed, parameter, takes
from parvts_fx.torch_private import frames_of_breaks, hook_tables, weight_tables

Forward = Callable[..., Any]


class ClosedModules:
    """Of one model: which of its modules are closed, in this context and nowhere else."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._tried: set[type] = set()
        self._asked: list[type] = []
        self._forwards: dict[torch.nn.Module, Forward] = {}
        self._states: dict[torch.nn.Module, list[_State]] = {}
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._put()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for module in self._forwards:
                    vars(module).pop("forward", None)

    def _put(self) -> None:
        for module, forward in self._forwards.items():
            vars(module)["forward"] = forward

    def can_close(self, breaks_before: int) -> bool:
        """Whether graphs ended in the forward of modules that it has not been tried to close, which the next call of
        :meth:`close` does. Others end for these to be captured by themselves: which break was the cause, nobody knows.

        Args:
            breaks_before: how often Dynamo had broken graphs when the call began.
        """
        kinds = {type(module): None for module in self._model.modules()}
        ended = (next((kind for frame in frames for kind in kinds if _has_line(kind, *frame)), type(self._model))
                 for frames in frames_of_breaks(breaks_before))
        self._asked = [kind for kind in dict.fromkeys(ended)
                       if kind is not type(self._model) and kind not in self._tried]
        return bool(self._asked)

    def open_changed(self) -> bool:
        """Open what has been changed since it was closed, by other parts or adapters, say; whether there is any.

        Dynamo does not look into the operation, and so guards nothing of what is in there but the weights.
        """
        with self._lock:
            changed = [module for module, states in self._states.items() if any(state.has_changed() for state in states)]
            for module in changed:
                del self._forwards[module], self._states[module]
                vars(module).pop("forward", None)
            self._tried.difference_update(map(type, changed))
        return bool(changed)

    def close(self, call: Callable[[], Any]) -> bool:
        """Close what is asked for, as far as that can be; whether anything is.

        Args:
            call: calls the model as it is.
        """
        modules = [module for module in self._model.modules() if type(module) in self._asked and "forward" not in vars(module)]
        self._tried.update(self._asked)
        known: dict[Any, Closed | None] = {}
        made = {module: closed for module, (args, kwargs) in _calls(modules, call).items()
                if (closed := close(module, args, kwargs, known)) is not None}
        with self._lock:
            self._states.update({module: [_State(part, part is module) for part in module.modules()] for module in made})
            self._forwards.update({module: _closed_forward(module, closed) for module, closed in made.items()})
            if self._inside:  # another thread is in a call
                self._put()
        return bool(made)


class _State:
    """What a module holds beside its weights' numbers, to be compared with later on.

    Args:
        outer: whether it is a closed module itself, which may have hooks.
    """

    def __init__(self, module: torch.nn.Module, outer: bool):
        self._module, self._outer = module, outer
        left_out = {id(table) for table in (*weight_tables(module), *(hook_tables(module) if outer else ()))}
        self._held = [(name, held, copy.copy(held) if isinstance(held, (list, dict, set)) else held)
                      for name, held in vars(module).items() if id(held) not in left_out]
        self._count, self._weights = len(vars(module)), self._kinds()

    def has_changed(self) -> bool:
        now = vars(self._module)
        return len(now) != self._count + (self._outer and "forward" in now) or self._weights != self._kinds() or any(
            (now.get(name, self) is not held or held is not wanted) and now.get(name, self) != wanted
            for name, held, wanted in self._held)

    def _kinds(self) -> list[Any]:
        return [(name, getattr(held, "dtype", None)) for table in weight_tables(self._module) for name, held in table.items()]


def _has_line(kind: type, file: str, line: int, name: str) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)  # type: ignore[attr-defined]
    if code is None or (code.co_filename, code.co_name) != (file, name):
        return False
    return code.co_firstlineno <= line <= max(held for _, _, held in code.co_lines() if held is not None)


def _calls(
    modules: Sequence[torch.nn.Module], call: Callable[[], Any]
) -> dict[torch.nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each module is given first in a call."""
    found: dict[torch.nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in found:
            found[module] = _copied(args), dict(zip(kwargs, _copied(tuple(kwargs.values()))))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            call()
    except Exception:  # a cache that cannot be copied, say: the model runs as it came
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _copied(given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(held.clone() if isinstance(held, torch.Tensor) else held for held in given)


def _closed_forward(module: torch.nn.Module, closed: Closed) -> Forward:
    """What stands in for a module's forward while a call is compiled or run."""
    own, key, weights, signature, one = module.forward, closed.key, closed.weights, closed.signature, closed.returns_one

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        if torch.is_grad_enabled() or torch.is_autocast_enabled() or not takes(
                signature, len(args), tuple(kwargs), given):
            return own(*args, **kwargs)
        tensors = [held for held in given if isinstance(held, torch.Tensor)]
        made = torch.ops.parvts_fx.module.default(key, tensors, [parameter(module, path) for path in weights])
        return made[0] if one else tuple(made)

    return forward
