"""What Dynamo captures once, and "parvts" compiles anew for every set of options: capturing is most of what a test takes.

:func:`capture` is for one call of a function that is one graph, :func:`compiled` for calls of a model of any kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from parvts_fx.backends.parvts import parvts
from parvts_fx.capture import copy_graph_module


@dataclasses.dataclass(frozen=True)
class Capture:
    """A call of a function, as Dynamo hands it to a backend."""

    graph: GraphModule
    examples: Sequence[Any]
    """What stands for the graph's inputs when it is compiled: where sizes have names, these."""

    inputs: Sequence[Any]
    results: Any
    """What the function returns, with the number of the graph's output in place of each tensor."""

    context: Any

    def under(self, options: Mapping[str, Any]) -> Any:
        """What the call gives when "parvts" has compiled it under some options."""
        with tracing(self.context):
            compiled = parvts(copy_graph_module(self.graph), self.examples, options=options)
        given = compiled(*self.inputs)
        return tree_map(lambda place: given[place], self.results)


@dataclasses.dataclass(frozen=True)
class _Traced:
    """One graph of a call, and what it was given and gave."""

    graph: GraphModule
    examples: Sequence[Any]
    context: Any
    ran: list[tuple[Sequence[Any], Sequence[Any]]]


def trace(
    function: Callable[..., Any], arguments: Sequence[Any], dynamic: bool | None = None, fullgraph: bool = False
) -> tuple[list[_Traced], Any]:
    """The graphs that Dynamo makes of a call, with their metadata (it clears that of its own when it is done), and its results.
    """
    seen: list[_Traced] = []

    def keep(module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seen.append(traced := _Traced(copy_graph_module(module), list(example_inputs), TracingContext.try_get(), []))

        def run(*inputs: Any) -> Any:
            traced.ran.append((inputs, module.forward(*inputs)))
            return traced.ran[-1][1]

        return run

    forget()
    results = torch.compile(function, backend=keep, dynamic=dynamic, fullgraph=fullgraph)(*arguments)
    forget()
    return seen, results


def capture(function: Callable[..., Any], arguments: Sequence[Any], dynamic: bool | None = None) -> Capture | None:
    """None where a call is not one graph, changes what it is given, or returns what is no tensor."""
    tensors = [given for given in tree_leaves(arguments) if isinstance(given, torch.Tensor)]
    versions = [given._version for given in tensors]
    seen, results = trace(function, arguments, dynamic)
    if len(seen) != 1 or len(seen[0].ran) != 1 or versions != [given._version for given in tensors]:
        return None
    (inputs, given), = seen[0].ran
    places = {id(held): place for place, held in enumerate(given)}
    if not all(id(leaf) in places and isinstance(leaf, torch.Tensor) for leaf in tree_leaves(results)):
        return None
    return Capture(seen[0].graph, seen[0].examples, inputs, tree_map(lambda leaf: places[id(leaf)], results), seen[0].context)


class Replay:
    """A backend that hands each captured graph to "parvts" as often as its options are set.

    The first time it does so when Dynamo does, later on when the graph is called, which is the same order: a model's second
    graph is captured when its first one has run.
    """

    def __init__(self) -> None:
        self._options: Mapping[str, Any] = {}
        self._turn = 0

    def set(self, options: Mapping[str, Any]) -> None:
        self._options, self._turn = options, self._turn + 1

    def __call__(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured, examples, context = copy_graph_module(module), list(example_inputs), TracingContext.try_get()
        turn, compiled = self._turn, parvts(module, example_inputs, options=self._options)

        @torch.compiler.disable(recursive=False)
        def run(*inputs: Any) -> Any:
            nonlocal turn, compiled
            if turn != self._turn:
                given = [new if isinstance(new, torch.Tensor) else old for new, old in zip(inputs, examples)]
                with tracing(context):
                    compiled = parvts(copy_graph_module(captured), given, options=self._options)
                turn = self._turn
            return compiled(*inputs)

        return run


@dataclasses.dataclass(frozen=True)
class _Compiled:
    key: Hashable
    function: Callable[..., Any]
    replay: Replay


_last: list[_Compiled] = []


def compiled(
    key: Hashable, function: Callable[..., Any], options: Mapping[str, Any], dynamic: bool | None = None
) -> Callable[..., Any]:
    """What ``torch.compile(function, backend="parvts", options=options, dynamic=dynamic)`` is.

    Captured only where the call before had another ``key``. Tests that use it are marked ``captures_once``; in front of all
    others Dynamo forgets what it has captured.
    """
    key = key, dynamic
    if not _last or _last[0].key != key:
        forget()
        replay = Replay()
        _last.append(_Compiled(key, torch.compile(function, backend=replay, dynamic=dynamic), replay))
    _last[0].replay.set(options)
    return _last[0].function


def forget() -> None:
    """Resets Dynamo."""
    _last.clear()
    torch._dynamo.reset()
