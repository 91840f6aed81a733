"""Other options for what is called within a context, side by side with those that a model was compiled with."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from parvts_fx.errors import warn
from parvts_fx.options import Options
from parvts_fx.runtime.call import TensorTable
from parvts_fx.runtime.read_call import read_call

_OVERRIDES: contextvars.ContextVar[tuple[tuple[torch.nn.Module, Options], ...]] = contextvars.ContextVar(
    "parvts_fx_overrides", default=())


@contextlib.contextmanager
def overriding(model: torch.nn.Module, options: Options) -> Iterator[None]:
    """For what this thread calls inside."""
    token = _OVERRIDES.set((*_OVERRIDES.get(), (model, options)))
    try:
        yield
    finally:
        _OVERRIDES.reset(token)


@functools.partial(torch.compiler.disable, reason="it was compiled with parvts_fx.compile")
def _inside_another(model: torch.nn.Module, call: Forms, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where Dynamo captures code of somebody else's that calls the model: it runs as it was compiled."""
    _, has_pictures, _ = read_call(args, kwargs, TensorTable())
    if has_pictures and model not in _TOLD:  # generate compiles its own decode steps on static caches: of these nothing is said
        _TOLD.add(model)
        warn("parvts_fx: this model was compiled with parvts_fx.compile and is called inside of another torch.compile, which "
             "ends its graph there: the model runs by its own options, whatever the outer ones are. Compile it once: "
             "parvts_fx.uncompile(model) undoes the inner one")
    return call(*args, **kwargs)


_TOLD: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class Forms:
    """A module's compiled call, in a form for each choice of options that it has been called with.

    Args:
        owner: the model that was compiled; a part of it follows.
        part: how that part runs as it is, where Dynamo captures it as a piece of something else; None for the model itself.
        call: the form for the options that it was compiled with.
        make: compiles one for others.
    """

    def __init__(self, owner: torch.nn.Module, part: Callable[..., Any] | None, call: Callable[..., Any],
                 make: Callable[[Options], Callable[..., Any]]):
        self._owner, self._part, self._call, self._make = owner, part, call, make
        self._others: list[tuple[Options, Callable[..., Any]]] = []
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if self._part is not None:
                return self._part(*args, **kwargs)
            return _inside_another(self._owner, self, args, kwargs)
        options = next((options for model, options in reversed(_OVERRIDES.get()) if model is self._owner), None)
        return (self._call if options is None else self._form(options))(*args, **kwargs)

    def _form(self, options: Options) -> Callable[..., Any]:
        with self._lock:
            found = next((call for held, call in self._others if held == options), None)
            if found is None:
                found = self._make(options)
                self._others.append((options, found))
            return found
