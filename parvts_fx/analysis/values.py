"""Reading FX nodes: their example values, their argument leaves, and how to evaluate one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from parvts_fx.torch_private import (
    FakeTensor,
    FakeTensorMode,
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    expression,
    is_functorch_wrapped_tensor,
    memory_of,
    traced_number,
    traced_numbers,
    writes_into_arguments,
)


def value(node: Node) -> Any:
    """The node's example value (Dynamo's ``example_value``, AOTAutograd's ``val``), or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def is_tensor(node: object) -> bool:
    return isinstance(node, Node) and isinstance(value(node), torch.Tensor)


def is_symbolic_int(node: object) -> bool:
    return isinstance(node, Node) and isinstance(value(node), (int, torch.SymInt)) and not isinstance(value(node), bool)


def is_input_number(node: Node) -> bool:
    """Whether a node reads the number that is all there is in an input: a float, where Dynamo takes everything for dynamic."""
    return node.op == "call_method" and node.target == "item" and isinstance(value(node), torch.SymFloat) and (
        isinstance(node.args[0], Node) and node.args[0].op == "placeholder")


def hint(size: int | torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
    """The concrete size (or number) seen when the graph was traced; None for one that depends on data."""
    if isinstance(size, int):
        return size
    return traced_number(size)


def symbols(size: int | torch.SymInt | torch.SymFloat) -> frozenset:
    return frozenset() if isinstance(size, int) else frozenset(expression(size).free_symbols)


def for_length(number: torch.SymInt | torch.SymFloat, length: int | torch.SymInt, tokens: int) -> int | float | None:
    """A number that is computed from the prompt's length, for a prompt of so many tokens; None where that length is no symbol of
    its own, or the number depends on data as well."""
    if isinstance(length, int):
        return None
    symbol, known = expression(length), traced_numbers(number)
    others = expression(number).free_symbols - {symbol}
    if not symbol.is_Symbol or not others <= set(known):
        return None
    found = expression(number).xreplace({
        symbol: sympy.Integer(tokens), **{other: sympy.Integer(known[other]) for other in others}})
    return int(found) if isinstance(number, torch.SymInt) else float(found)


def concrete(size: int | torch.SymInt) -> int | torch.SymInt:
    """A SymInt that is a constant becomes that int."""
    constant = None if isinstance(size, int) else size.node.maybe_as_int()
    return size if constant is None else constant


def hint_shape(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The same of every axis."""
    return tuple(hint(size) for size in tensor.shape)


def leaves(node: Node) -> list[Any]:
    """All argument leaves of a node, in a fixed order, those inside lists, dicts and slices included."""
    found: list[Any] = []
    map_aggregate((node.args, node.kwargs), found.append)
    return found


def with_leaves(node: Node, new: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's (args, kwargs) with its leaves replaced, in the order of :func:`leaves`."""
    supply = iter(new)
    return map_aggregate((node.args, node.kwargs), lambda _: next(supply))


def call(module: GraphModule, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run what a node says on the given values."""
    if op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if op == "call_module":
        return module.get_submodule(target)(*args, **kwargs)
    return target(*args, **kwargs)


def has_target(node: Node, functions: Iterable[Callable], methods: Iterable[str] = ()) -> bool:
    if node.op == "call_function":
        return node.target in functions
    return node.op == "call_method" and node.target in methods


def is_index(node: Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def is_indexing(node: Node) -> bool:
    """Whether a node reads or writes by an index."""
    return is_index(node) or node.op == "call_function" and node.target is operator.setitem


_SHAPE_ONLY = (torch.ones_like, torch.zeros_like, torch.full_like, torch.empty_like, getattr)
_SHAPE_ONLY_METHODS = ("size", "new_ones", "new_zeros", "new_full", "new_empty", "dim")


def reads_sizes_alone(node: Node) -> bool:
    """Whether no content of the tensors that a node reads enters its result."""
    return has_target(node, _SHAPE_ONLY, _SHAPE_ONLY_METHODS)


def is_equality(node: Node) -> bool:
    return has_target(node, (operator.eq, torch.eq, torch.ops.aten.eq.Scalar), ("eq", "__eq__"))


SUMS = (operator.add, operator.iadd, torch.add, torch.ops.aten.add.Tensor)

_IN_PLACE = (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior,
)


def changed_in_place(node: Node) -> Node | None:
    """The tensor that a node writes into, or None for a node that only makes new values."""
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        writes = node.target in _IN_PLACE or (
            name.endswith("_") and not name.endswith("__") and node.target not in (operator.and_, operator.or_, operator.not_))
    else:
        writes = node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__")
    return node.args[0] if writes and node.args and is_tensor(node.args[0]) else None


def writes_unseen(node: Node) -> bool:
    """Whether an operation of somebody's library writes into its arguments, of which a graph shows nothing."""
    if node.op != "call_function" or changed_in_place(node) is not None:
        return False
    if isinstance(node.target, HigherOrderOperator):
        return value(node) is None
    overloads = [node.target] if isinstance(node.target, OpOverload) else []
    if isinstance(node.target, OpOverloadPacket):
        overloads = [getattr(node.target, name) for name in node.target.overloads()]
    return any(writes_into_arguments(overload) for overload in overloads)


def storage_of(node: Node) -> int:
    """Equal for tensors that are views of one another."""
    tensor = value(node)
    if is_functorch_wrapped_tensor(tensor):  # inside vmap a tensor has no storage of its own
        return id(tensor)
    return memory_of(tensor)


def needed_for(graph: Graph, roots: Iterable[Node]) -> set[Node]:
    """The nodes, all that they depend on, and every write into memory that any of these has a view of."""
    needed = ancestors(roots)
    writes = {node: storage_of(target) for node in graph.nodes if (target := changed_in_place(node)) is not None}
    while writes:
        memory = {storage_of(node) for node in needed if is_tensor(node)}
        more = ancestors(node for node, storage in writes.items() if storage in memory) - needed
        if not more:
            break
        needed |= more
    return needed


def fake_mode_of(graph: Graph) -> FakeTensorMode:
    """The mode that the graph's own metadata carries; Dynamo has changed modes by the time a backend runs."""
    for node in graph.nodes:
        if isinstance(value(node), FakeTensor):
            return value(node).fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def ancestors(roots: Iterable[Node]) -> set[Node]:
    """The nodes and all that they depend on."""
    seen: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def descendants(graph: Graph, roots: Iterable[Node]) -> list[Node]:
    """The nodes and all that depends on their content, in graph order, without the output node; what is read from memory that
    any of them has written into included.

    Of what depends on their sizes alone the integers are among them, tensors are not: a mask made for as many positions
    as there are embeddings, say.
    """
    reached, sizes = set(roots), set()
    written: set[int] = set()
    for node in graph.nodes:
        if node.op == "output":
            continue
        if _is_known_size(node):
            if any(source in reached or source in sizes for source in node.all_input_nodes):
                sizes.add(node)
        elif any(source in reached or written and is_tensor(source) and storage_of(source) in written
                 for source in node.all_input_nodes):
            reached.add(node)
            if (target := changed_in_place(node)) is not None:
                written.add(storage_of(target))
    reached |= sizes
    return [node for node in graph.nodes if node in reached]


def _is_known_size(node: Node) -> bool:
    """Whether a node is an integer that the sizes of the graph's inputs tell."""
    return node.op != "placeholder" and is_symbolic_int(node) and hint(value(node)) is not None


def output_node(graph: Graph) -> Node:
    return next(iter(reversed(graph.nodes)))
