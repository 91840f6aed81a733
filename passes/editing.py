"""Editing a graph with metadata: new nodes get example values at once, so a wrong shape fails where it is written."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_aggregate

from parvts_fx.analysis.memo import Memo
from parvts_fx.analysis.probe import quiet_trials
from parvts_fx.analysis.tokens import Count
from parvts_fx.analysis.values import call, changed_in_place, concrete, fake_mode_of, storage_of, symbols, value
from parvts_fx.errors import Refusal

Size = int | Node


@dataclasses.dataclass(frozen=True)
class Rows:
    """A choice of prompt positions per sample, in prompt order."""

    name: str
    index: Node | None
    """[batch, count] int64, ascending; None for all positions."""

    count: Size

    @property
    def ready(self) -> Node:
        """The node behind which both index and count exist."""
        return max(node for node in (self.index, self.count) if isinstance(node, Node))


@dataclasses.dataclass(frozen=True)
class Samples:
    """Where the samples of a batch lie in a tensor."""

    axis: int
    """-1 or less for "in front of the tensor", which all samples share; so they do where its axis has one entry."""

    each: int = 1
    """Entries per sample."""

    inner: int = 1
    """How many of these follow one another, before the next sample's."""

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """[batch, n] to [entries of the axis, n]."""
        if self.each == 1:
            return rows
        return rows.repeat_interleave(self.inner, 0).repeat(self.each // self.inner, 1)


def along(rows: torch.Tensor, samples: Samples | None, axis: int, rank: int) -> torch.Tensor:
    """[batch, n] as a tensor of some rank, for broadcasting with one that has its rows along ``axis``."""
    if samples is None:
        return rows[0][tuple(slice(None) if i == axis else None for i in range(rank))]
    rows = samples.spread(rows)
    rows = rows if samples.axis < axis else rows.t()
    return rows[tuple(slice(None) if i in (samples.axis, axis) else None for i in range(rank))]


class Editor:
    """Adds nodes to one graph."""

    def __init__(self, module: GraphModule):
        self.module = module
        self.graph = module.graph
        self.mode = fake_mode_of(module.graph)
        self._memo = Memo()
        self._gathered: dict[tuple, Node] = {}
        self._masks: dict[tuple, Node] = {}
        self._writes: dict[int, list[Node]] = {}
        for node in self.graph.nodes:
            self._note_write(node)

    def _note_write(self, node: Node) -> None:
        target = changed_in_place(node)
        if target is not None:
            self._writes.setdefault(storage_of(target), []).append(node)

    # -- single nodes -----------------------------------------------------------------------------------------------

    def _evaluate(self, node: Node) -> Node:
        args, kwargs = map_aggregate((node.args, node.kwargs), lambda leaf: value(leaf) if isinstance(leaf, Node) else leaf)
        try:
            with self.mode, torch.no_grad(), enable_python_dispatcher(), quiet_trials():
                node.meta["example_value"] = self._memo.evaluate(
                    node.op, node.target, args, kwargs, lambda: call(self.module, node.op, node.target, args, kwargs))
        except Refusal:
            raise
        except Exception as error:
            detail = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise Refusal(f"a rewritten operation does not work on its new sizes ({detail})", node) from error
        return node

    def call(self, target: Callable, *args: Any, **kwargs: Any) -> Node:
        """A call_function node with its example value."""
        return self._evaluate(self.graph.call_function(target, args, kwargs))

    def method(self, name: str, *args: Any, **kwargs: Any) -> Node:
        """A call_method node with its example value."""
        return self._evaluate(self.graph.call_method(name, args, kwargs))

    def copy(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """The same operation on other arguments, with its own example value."""
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        new.meta = {key: held for key, held in node.meta.items() if key not in ("example_value", "val")}
        if node.op == "get_attr":
            new.meta["example_value"] = value(node)
            return new
        self._evaluate(new)
        self._note_write(new)
        return new

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

    def rescaled(self, number: Node, size: int | torch.SymInt, count: Size) -> Any:
        """A number that is computed from the prompt's length ``size``, for so many rows in its place."""
        held = value(number)
        if not isinstance(held, (torch.SymInt, torch.SymFloat)) or not symbols(size) & symbols(held):
            return number
        if held.node.expr == size.node.expr:
            return count
        if number.op == "placeholder":
            raise Refusal("a number that depends on the prompt's length comes from outside", number)
        args, kwargs = map_aggregate(
            (number.args, number.kwargs),
            lambda leaf: self.rescaled(leaf, size, count) if isinstance(leaf, Node) else leaf)
        return self.copy(number, args, kwargs)

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

    def inline(self, function: Callable, *sources: Node) -> Any:
        """Trace a function of tensors and write its operations at the insertion point.

        Returns:
            What the function returns, with a node in place of every tensor and symbolic size.
        """
        with self.mode, torch.no_grad(), enable_python_dispatcher():
            traced = make_fx(function)(*(value(source) for source in sources))
        inputs = iter(sources)
        copies: dict[Node, Any] = {}
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
                copies[node] = self.graph.call_function(node.target, args, kwargs)
                copies[node].meta["example_value"] = node.meta.get("val")
        raise AssertionError("a traced graph has an output")

    # -- rows -------------------------------------------------------------------------------------------------------

    def gather(
        self, node: Node, axis: int, rows: Rows, samples: Samples | None, reader: Node | None = None
    ) -> Node:
        """The rows of a tensor along one axis, per sample.

        Args:
            reader: who reads them, for a tensor that may be written into in between; None if it is not.
            samples: where they lie in this tensor; None for a batch of one.
        """
        if rows.index is None:
            return node
        writes = self._writes.get(storage_of(node), ())
        if reader is None and any(write > node for write in writes):
            raise Refusal("a tensor whose rows are needed is changed in place later on", node)
        place = max([node, rows.ready, *(write for write in writes if write < reader)] if writes else [node, rows.ready])
        key = (node, axis, rows.name, samples, place)
        if key not in self._gathered:
            with self.graph.inserting_before(place.next):
                self._gathered[key] = self._gather(node, axis, rows, samples)
        return self._gathered[key]

    def _gather(self, node: Node, axis: int, rows: Rows, samples: Samples | None) -> Node:
        if samples is None:
            flat = self.call(operator.getitem, rows.index, 0)
            return self.call(torch.index_select, node, axis, flat)
        place = samples.axis
        while place < 0:  # a tensor that all samples share and that lacks the axis
            node, place, axis = self.method("unsqueeze", node, 0), place + 1, axis + 1
        rank = value(node).dim()
        index = rows.index
        if samples.each > 1:
            index = self.call(torch.repeat_interleave, index, samples.inner, 0)
            index = self.method("repeat", index, samples.each // samples.inner, 1)
        entries = self.size(index, 0)
        shape: list[Size] = [self.size(node, i) for i in range(rank)]
        if shape[place] == 1:
            shape[place] = entries
            node = self.method("expand", node, *(-1 if i != place else entries for i in range(rank)))
        if place > axis:
            index = self.method("t", index)
        view = tuple(slice(None) if i in (place, axis) else None for i in range(rank))
        index = self.call(operator.getitem, index, view)
        index = self.method("expand", index, *(rows.count if i == axis else shape[i] for i in range(rank)))
        return self.call(torch.gather, node, axis, index)

    def causal_mask(self, queries: Rows, keys: Rows, prompt: Node, rank: int, samples: Samples | None) -> Node:
        """Bool, broadcast with scores of some rank whose last axes are queries and keys: the query's position is not
        before the key's.

        Args:
            prompt: [batch, seq, ...].
            samples: where they lie among the scores' axes.
        """
        key = (queries.name, keys.name, rank, samples)
        if key not in self._masks:
            place = samples or Samples(0)

            def mask(query: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
                if keys.index is None:
                    other = torch.arange(other.shape[1], device=query.device)[None]
                    allowed = place.spread(query)[:, :, None] >= other[:, None, :]
                else:
                    allowed = place.spread(query)[:, :, None] >= place.spread(other)[:, None, :]
                allowed = allowed[0] if samples is None else allowed
                wanted = (rank - 2, rank - 1) if samples is None else (place.axis, rank - 2, rank - 1)
                return allowed[tuple(slice(None) if i in wanted else None for i in range(rank))]

            self._masks[key] = self.inline(mask, queries.index, prompt if keys.index is None else keys.index)
        return self._masks[key]
