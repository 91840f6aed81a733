"""A captured batch's graph in two parts: what runs for all samples at once, and the decoder for one sample at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from parvts_fx.analysis.masks import Mask
from parvts_fx.analysis.records import Decoder
from parvts_fx.analysis.values import ancestors, hint, hint_shape, is_symbolic_int, is_tensor, reads_sizes_alone, value
from parvts_fx.errors import Refusal
from parvts_fx.torch_private import expression, is_functorch_wrapped_tensor


@dataclasses.dataclass(frozen=True)
class Side:
    """A tensor that the decoder reads, and where one sample's rows lie in it."""

    node: Node
    samples: int | None
    """The axis of the samples; None for what all samples share."""

    axes: tuple[int, ...]
    """Those along which the prompt's rows lie, behind cached ones or none."""

    is_number: bool = False
    """Whether the decoder reads the number that is all there is in the tensor."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One of the graph's results."""

    place: int
    """Among those of the part that makes it."""

    samples: int | None = None
    """For a result of the decoder's: the axis of its samples; None for a batch of one."""

    is_decoders: bool = False

    behind_cached: int | None = None
    """The axis along which the prompt's rows stand behind cached ones, if any does."""


@dataclasses.dataclass(frozen=True)
class Parted:
    """A captured graph in two parts."""

    front: GraphModule
    """Of the graph's inputs: merged embeddings [batch, seq, hidden], the tensors of ``sides``, and results."""

    decoder: GraphModule
    """Of merged embeddings [1, rows, hidden], visual [1, rows] bool, features [visual tokens, hidden] and one sample's ``sides``:
    its results."""

    sides: tuple[Side, ...]
    masks: tuple[tuple[int, Mask], ...]
    """Which sides are masks of attention, and how they are read."""

    results: tuple[Any, ...]
    """Of the graph, in order: a :class:`Result`, or what is no node. What is to be written into ``states`` stands at the end."""

    states: tuple[int, ...]
    """Inputs of the graph that its decoder overwrites."""

    picks_rows: bool
    """Whether what stands in front of the decoder may take single rows of the prompt out of what the decoder reads: its last
    ones, say, which are padding in some samples."""

    returns_one: bool
    """Whether the graph returned its only result by itself."""


def front_of(module: GraphModule, decoder: Decoder, results: Sequence[Node]) -> GraphModule:
    """The graph as far as the decoder's inputs. Sizes of the decoder's own tensors are those of the merged embeddings.

    Raises:
        Refusal: something in front of the decoder cannot be computed without it.
    """
    graph, copies, inside = Graph(tracer_cls=getattr(module.graph, "_tracer_cls", None)), dict[Node, Node](), set(decoder.nodes)
    merged = decoder.merge.output
    sizes = value(merged).shape[:2]
    for node in module.graph.nodes:
        held = value(node)
        if node in inside and isinstance(held, torch.SymInt) and merged in copies:
            axis = next((axis for axis, size in enumerate(sizes) if isinstance(size, torch.SymInt)
                         and expression(size) == expression(held)), None)
            if axis is not None:
                copies[node] = graph.call_method("size", (copies[merged], axis))
                continue
        if node.op != "output" and (node not in inside or node is merged or is_symbolic_int(node)) and all(
                source in copies for source in node.all_input_nodes):
            copies[node] = graph.node_copy(node, copies.__getitem__)
    missing = next((node for node in results if node not in copies), None)
    if missing is not None:
        raise Refusal("what stands in front of the decoder cannot be computed without it", missing)
    graph.output(tuple(copies[node] for node in results))
    return GraphModule(module, graph)


def picks_rows(decoder: Decoder, sides: Sequence[Node]) -> bool:
    """Whether anything that the sides are computed from has fewer axes as long as the prompt than what it is taken from."""
    length = hint(decoder.tokens.size)

    def axes(node: Node) -> int:
        return hint_shape(value(node)).count(length)

    def tensors(nodes: Iterable[Node]) -> list[Node]:
        return [node for node in nodes if is_tensor(node) and not is_functorch_wrapped_tensor(value(node))]

    return any(axes(node) < max(map(axes, sources)) for node in tensors(ancestors(sides) - set(decoder.nodes))
               if (sources := tensors(node.all_input_nodes)) and not reads_sizes_alone(node))
