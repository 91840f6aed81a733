"""Modules that Dynamo cannot capture, as one operation of the graph each.

A loop over those experts that were chosen, or a branch on what a tensor holds, ends the graph in the middle of the decoder. Where
that happens in the forward of a module that makes tensors of tensors, the call is begun again with such modules closed: each is
an operation that is given its tensors and its weights. What it does with rows is proven as for any other operation, by running
it. How its results' sizes follow those of what it is given is found out in a call of the model as it is. A module in which rows
meet (a layer, with its attention) stays open: what is to be found out about that is inside.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from parvts_fx.runtime.close_module import close, state_of
from parvts_fx.runtime.module_operation import Closed, parameter, takes
from parvts_fx.torch_private import frames_of_breaks

Forward = Callable[..., Any]


class ClosedModules:
    """Of one model: which of its modules are closed, in this context and nowhere else."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._tried: set[Any] = set()
        self._asked: list[type] = []
        self._forwards: dict[torch.nn.Module, Forward] = {}
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
                       if kind is not type(self._model) and self._as_it_is(kind) not in self._tried]
        return bool(self._asked)

    def _of_kind(self, kind: type) -> list[torch.nn.Module]:
        return [module for module in self._model.modules() if type(module) is kind]

    def _as_it_is(self, kind: type) -> Any:
        """What is new when somebody changes the numbers that such modules hold."""
        return kind, tuple(map(state_of, self._of_kind(kind)))

    def close(self, call: Callable[[], Any]) -> bool:
        """Close what is asked for, as far as that can be; whether anything is.

        Args:
            call: calls the model as it is.
        """
        modules = [module for kind in self._asked for module in self._of_kind(kind) if "forward" not in vars(module)]
        self._tried.update(map(self._as_it_is, self._asked))
        known: dict[Any, Closed | None] = {}
        made = {module: closed for module, (args, kwargs) in _calls(modules, call).items()
                if (closed := close(module, args, kwargs, known)) is not None}
        with self._lock:
            self._forwards.update({module: _closed_forward(module, closed) for module, closed in made.items()})
            if self._inside:  # another thread is in a call
                self._put()
        return bool(made)


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
                signature, module, len(args), tuple(kwargs), given):
            return own(*args, **kwargs)
        tensors = [held for held in given if isinstance(held, torch.Tensor)]
        made = torch.ops.parvts_fx.module.default(key, tensors, [parameter(module, path) for path in weights])
        return made[0] if one else tuple(made)

    return forward
