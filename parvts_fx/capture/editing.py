"""Editing a graph with metadata: new nodes get example values at once, so a wrong shape fails where it is written."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from parvts_fx.analysis.evaluation_cache import EvaluationCache
from parvts_fx.analysis.other_lengths import quiet_trials
from parvts_fx.analysis.tokens import Count
from parvts_fx.analysis.values import call, concrete, fake_mode_of, value
from parvts_fx.errors import Refusal
from parvts_fx.torch_private import (
    OpOverload,
    enable_python_dispatcher,
    make_fx,
    settle_sizes,
    unsafe_view,
    writes_into_arguments,
)

Size: TypeAlias = "int | Node"

CHOOSES = "parvts_chooses"
"""In the ``meta`` of nodes that choose among tokens: no number that the model computes goes through them."""

COUNTS = "parvts_counts"
"""In the ``meta`` of a rewritten graph: a sample's rows of text, and its visual tokens in front of the first stage and behind
each."""

_OF_ANY_LAYOUT = dict.fromkeys((torch.ops.aten.view.default, unsafe_view), torch.ops.aten.reshape.default)
"""Operations that work where a tensor lies in memory as it did while tracing, and what else gives the same numbers. Whoever
compiles the graph may lay out tensors otherwise."""


class Editor:
    """Adds nodes to one graph.

    Args:
        module: what holds the graph's parameters and submodules.
        graph: the graph to write, in place of the module's own.
    """

    def __init__(self, module: GraphModule, graph: Graph | None = None):
        self.module = module
        self.graph = module.graph if graph is None else graph
        self.mode = fake_mode_of(module.graph)
        self._evaluated = EvaluationCache()
        self._chooses = False

    @contextlib.contextmanager
    def choosing(self) -> Iterator[None]:
        """What is called and inlined meanwhile chooses among tokens, or says which may see which."""
        before, self._chooses = self._chooses, True
        try:
            yield
        finally:
            self._chooses = before

    # -- single nodes -----------------------------------------------------------------------------------------------

    def _evaluate(self, node: Node) -> Node:
        args, kwargs = map_aggregate((node.args, node.kwargs), lambda leaf: value(leaf) if isinstance(leaf, Node) else leaf)
        try:
            with self.mode, torch.no_grad(), enable_python_dispatcher(), quiet_trials():
                node.meta["example_value"] = self._evaluated.evaluate(
                    node.op, node.target, args, kwargs, lambda: call(self.module, node.op, node.target, args, kwargs))
        except Refusal:
            raise
        except Exception as error:
            detail = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise Refusal(f"a rewritten operation does not work on its new sizes ({detail})", node) from error
        settle_sizes(self.mode)
        return node

    def call(self, target: Callable, *args: Any, **kwargs: Any) -> Node:
        """A call_function node with its example value, on the device of its first numbers."""
        return self._noted(self._evaluate(self.graph.call_function(target, *self._on_one_device(args, kwargs))))

    def _noted(self, node: Node) -> Node:
        if self._chooses:
            node.meta[CHOOSES] = True
        return node

    def method(self, name: str, *args: Any, **kwargs: Any) -> Node:
        """A call_method node with its example value, on the device of its first numbers."""
        return self._evaluate(self.graph.call_method(name, *self._on_one_device(args, kwargs)))

    def _on_one_device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Layers may lie on several devices: what is read goes to that of the first floating-point tensor, or of the first."""
        devices = _devices(args, kwargs)
        if len(devices) < 2:
            return args, kwargs
        device = next((device for device, holds_numbers in devices.items() if holds_numbers), next(iter(devices)))

        def moved(leaf: Any) -> Any:
            held = value(leaf) if isinstance(leaf, Node) else None
            stays = not isinstance(held, torch.Tensor) or not held.dim() or held.device == device
            return leaf if stays else self._evaluate(self.graph.call_method("to", (leaf, device)))

        return map_aggregate((args, kwargs), moved)

    def copy(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """The same operation on other arguments, with its own example value."""
        if len(_devices(node.args, node.kwargs)) < 2:
            args, kwargs = self._on_one_device(args, kwargs)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta = {key: held for key, held in node.meta.items() if key not in ("example_value", "val")}
        if node.op == "get_attr":
            new.meta["example_value"] = value(node)
            return new
        return self._evaluate(new)

    def size(self, node: Node, axis: int) -> Size:
        """The size of an axis: an int where it is one, else a node."""
        size = concrete(value(node).shape[axis])
        return size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, node, axis)

    def times(self, count: Size, multiple: Size) -> Size:
        if multiple == 1:
            return count
        if isinstance(count, int) and isinstance(multiple, int):
            return count * multiple
        return self.call(operator.mul, count, multiple)

    def counted(self, count: Size, binding: Count) -> Size:
        """What an integer that counts tokens is for so many of them."""
        number = self.times(count, binding.multiple)
        return self.plus(number, binding.offset) if binding.offset else number

    def plus(self, one: Size, other: Size, sign: int = 1) -> Size:
        """``one + other``, or with a sign of -1 ``one - other``."""
        if isinstance(one, int) and isinstance(other, int):
            return one + sign * other
        return self.call(operator.add if sign > 0 else operator.sub, one, other)

    def least(self, one: Size, other: Size) -> Size:
        """The smaller of two sizes."""
        if isinstance(one, int) and isinstance(other, int):
            return min(one, other)
        return self.call(torch.sym_min, one, other)

    def check(self, condition: Node) -> Node:
        """Assume a comparison of sizes to be true: ``torch._check``, for sizes that depend on data."""
        torch._check(value(condition))
        return self.graph.call_function(torch._check, (condition,))

    # -- whole functions --------------------------------------------------------------------------------------------

    def inline(self, function: Callable, *sources: Node, whole: bool = False) -> Any:
        """Trace a function of tensors and write its operations at the insertion point.

        Args:
            whole: keep operations that torch makes of others (attention, linear layers) as they are called.

        Returns:
            What the function returns, with a node in place of every tensor and symbolic size.
        """
        sources, _ = self._on_one_device(sources, {})
        with self.mode, torch.no_grad(), enable_python_dispatcher():
            traced = make_fx(function, pre_dispatch=whole)(*(value(source) for source in sources))
        inputs = iter(sources)
        copies: dict[Node, Any] = {}
        writes = any(isinstance(node.target, OpOverload) and writes_into_arguments(node.target) for node in traced.graph.nodes)
        shapes = {} if writes else _OF_ANY_LAYOUT  # what is written into a view is to be seen in what it views
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(inputs)
            elif node.op == "output":
                return map_aggregate(node.args[0], lambda leaf: copies[leaf] if isinstance(leaf, Node) else leaf)
            elif node.op == "get_attr":
                raise Refusal(f"a constant tensor ({node.target}) is made inside a traced function")
            else:
                args, kwargs = map_aggregate(
                    (node.args, node.kwargs), lambda leaf: copies[leaf] if isinstance(leaf, Node) else leaf)
                copies[node] = self.graph.call_function(shapes.get(node.target, node.target), args, kwargs)
                copies[node].meta["example_value"] = node.meta.get("val")
                self._noted(copies[node])
        raise AssertionError("a traced graph has an output")


def _devices(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[torch.device, bool]:
    """Where the tensors lie that are read, in order, and whether any there is of floating point; scalars may lie anywhere."""
    found: dict[torch.device, bool] = {}

    def note(node: Node) -> None:
        held = value(node)
        if isinstance(held, torch.Tensor) and held.dim():
            found[held.device] = found.get(held.device, False) or held.is_floating_point()

    map_arg((args, kwargs), note)
    return found
