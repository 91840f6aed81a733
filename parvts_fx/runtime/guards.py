"""What must hold of a prompt, beyond the sizes that Dynamo guards, for the rewritten graph to be right.

The rewritten graph has a fixed number of visual tokens per sample. Which positions are visual is data, so that a batch
may put two images into one row and none into another without any size telling. That is checked at each call.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from parvts_fx.analysis.merge import flatten_mask
from parvts_fx.analysis.records import VisualMerge
from parvts_fx.analysis.values import ancestors, value
from parvts_fx.errors import Refusal
from parvts_fx.stages import Stage, weighs_nothing
from parvts_fx.torch_private import expression

PADDING = ("padding stands behind visual tokens: decode steps would read the prompt's mask at the wrong places, or the "
           "scoring rule reads text there (pad on the left; without a cache and such a rule it does not matter)")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What one call of a rewritten graph is given."""

    inputs: Sequence[Any]
    """Of the rewritten graph."""

    visual: torch.Tensor
    """[batch, seq] bool: true where a visual token stands."""

    count: int | None
    """Visual tokens per sample, as sizes tell it or else as counted; None where samples differ."""


Guard = Callable[[Prompt], str | None]
"""Says why the rewritten graph may not run for a prompt; None where it may, for all that this guard knows."""


def guards_for(
    precondition: Precondition | None, padding: Callable[..., bool] | None, stages: Sequence[Stage] | None
) -> tuple[Guard, ...]:
    """What is asked at each call, in order.

    Args:
        precondition: for a graph that reads the number of visual tokens off its sizes.
        padding: of the mask of visual tokens and the inputs, whether padding stands behind a visual token.
        stages: of a graph that is right for several numbers of visual tokens; None for one number.
    """

    def alike(prompt: Prompt) -> str | None:
        holds = prompt.count is not None and (precondition is None or precondition.holds(prompt.visual, prompt.inputs))
        return None if holds else uneven(prompt.visual)

    def padded(prompt: Prompt) -> str | None:
        return PADDING if padding is not None and padding(prompt.visual, *prompt.inputs) else None

    def weighed(prompt: Prompt) -> str | None:
        if stages is None or prompt.count is None or not weighs_nothing(stages, prompt.count):
            return None
        return "a stage with constant weights drops none of this prompt's tokens, so that there is nothing to weigh"

    def labelled(prompt: Prompt) -> str | None:
        return "labels are given, and a loss needs the logits of every position" if _has_labels() else None

    def chunked(prompt: Prompt) -> str | None:
        return "generate hands the prompt over in chunks, and a choice would know one of them alone" if _is_chunk() else None

    return labelled, chunked, alike, padded, weighed


class Precondition:
    """Callable on the graph's inputs: does every row hold the number of visual tokens that the graph assumes?"""

    def __init__(self, module: GraphModule, merge: VisualMerge, visual: Callable[..., torch.Tensor]):
        if merge.visual_tokens is None:
            raise ValueError("parvts_fx: no size tells the number of visual tokens")
        self._visual = visual
        self.visual_tokens: Callable[[Sequence[object]], int] = size_reader(module, merge.visual_tokens)
        """Visual tokens per sample, read from the sizes of actual inputs."""

        self.features: Callable[[Sequence[object]], int] = size_reader(module, merge.visual_features)
        """Visual features of all samples, read likewise."""

    def __call__(self, *inputs: object) -> bool:
        return self.holds(self._visual(*inputs), inputs)

    def holds(self, visual: torch.Tensor, inputs: Sequence[object]) -> bool:
        """The same, given the inputs' [batch, seq] bool mask of visual tokens."""
        return bool((visual.sum(1) == self.visual_tokens(inputs)).all())


def visual_mask(module: GraphModule, merge: VisualMerge) -> Callable[..., torch.Tensor]:
    """A function of the graph's inputs: [batch, seq] bool, true where a visual token stands."""
    if merge.masks:
        return _union(module, merge.masks)
    merged = merged_mask(module, merge)
    return lambda *inputs: torch.zeros_like(merged(*inputs))  # sound alone


def merged_mask(module: GraphModule, merge: VisualMerge) -> Callable[..., torch.Tensor]:
    """The same, true where a feature of any modality stands."""
    return _union(module, tuple(held.mask for held in merge.merges) or merge.masks)


def _union(module: GraphModule, wanted: Sequence[Node]) -> Callable[..., torch.Tensor]:
    needed = ancestors(wanted)
    graph, copies = Graph(), dict[Node, Node]()
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[mask] for mask in wanted))
    masks = GraphModule(module, graph)

    @torch.no_grad()
    def union(*inputs: object) -> torch.Tensor:
        return functools.reduce(torch.logical_or, (flatten_mask(mask) for mask in masks(*inputs)))

    return union


def uneven(visual: torch.Tensor) -> str:
    """Why a batch is not pruned whose samples have other numbers of visual tokens than its sizes say."""
    counts = visual.sum(1).tolist()
    if len(set(counts)) > 1:
        return f"the samples of this batch have different numbers of visual tokens: {', '.join(map(str, counts))}"
    return f"there are {counts[0]} placeholders of visual tokens a sample, and another number of visual features"


def same_count(visual: torch.Tensor) -> int | None:
    """How many visual tokens every sample has; None if they differ."""
    counts = visual.sum(1).tolist()
    return counts[0] if len(set(counts)) == 1 else None


def size_reader(module: GraphModule, size: int | torch.SymInt) -> Callable[[Sequence[object]], int]:
    """A function that computes a traced size from the graph's actual inputs.

    Raises:
        Refusal: no input tells it. Said here, where the prefill can still run as it came, and not in a call of the user's.
    """
    if isinstance(size, int):
        return lambda inputs: size
    wanted = expression(size)
    named = _Named(module, wanted.free_symbols)
    if named.missing:
        raise Refusal(f"each call needs a size, {wanted}, that the sizes of the graph's inputs do not tell "
                      f"(nothing says what {', '.join(named.missing)} is: it depends on data)")

    @functools.lru_cache(maxsize=1024)  # a formula of sympy's takes longer than many an operation, and prompts are often alike
    def read(*numbers: int) -> int:
        return int(wanted.xreplace(named.given(numbers)))

    return lambda inputs: read(*named.numbers(inputs))


def sizes_fit(module: GraphModule, conditions: Sequence[sympy.Basic]) -> Callable[[Sequence[object]], bool]:
    """A function of the graph's actual inputs: do conditions on its sizes hold? Those that no input tells do not."""
    named = _Named(module, frozenset().union(*(condition.free_symbols for condition in conditions)))
    if named.missing:
        return lambda inputs: False

    @functools.lru_cache(maxsize=1024)
    def hold(*numbers: int) -> bool:
        return all(condition.xreplace(named.given(numbers)) == sympy.true for condition in conditions)

    return lambda inputs: hold(*named.numbers(inputs))


class _Named:
    """Sizes that have names, and which of a graph's inputs tell them."""

    def __init__(self, module: GraphModule, symbols: Iterable[sympy.Basic]):
        sources: dict[sympy.Basic, tuple[int, int | None]] = {}
        for position, node in enumerate(node for node in module.graph.nodes if node.op == "placeholder"):
            for axis, entry in _sizes(node):
                if isinstance(entry, torch.SymInt) and isinstance(expression(entry), sympy.Symbol):
                    sources.setdefault(expression(entry), (position, axis))
        self.missing = sorted(map(str, set(symbols) - sources.keys()))
        self._sources = {symbol: sources[symbol] for symbol in symbols if symbol in sources}

    def numbers(self, inputs: Sequence[Any]) -> list[int]:
        """What they are for actual inputs."""
        return [int(inputs[position] if axis is None else inputs[position].shape[axis])
                for position, axis in self._sources.values()]

    def given(self, numbers: Sequence[int]) -> dict[sympy.Basic, sympy.Integer]:
        """Each symbol's number."""
        return dict(zip(self._sources, map(sympy.Integer, numbers)))


def _sizes(node: Node) -> list[tuple[int | None, object]]:
    example = value(node)
    if isinstance(example, torch.Tensor):
        return list(enumerate(example.shape))
    return [(None, example)]


def _callers() -> Iterator[FrameType]:
    """The frames that a graph is called from, inside out: of what surrounds it, all that some of them say."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _has_labels() -> bool:
    """Whether a forward() that is running was called with labels.

    Where the graph breaks behind the decoder, the loss is not in the graph, and no guard of it sees the labels.
    """
    return any(
        isinstance(frame.f_locals.get("self"), torch.nn.Module) and isinstance(frame.f_locals.get("labels"), torch.Tensor)
        for frame in _callers() if "forward" in frame.f_code.co_name and "labels" in frame.f_code.co_varnames)


def _is_chunk() -> bool:
    """Whether a generate() that is running hands its prompt over in several pieces."""
    return any(
        getattr(frame.f_locals.get("generation_config"), "prefill_chunk_size", None) is not None
        and len(frame.f_locals.get("input_chunks", ())) > 1
        for frame in _callers() if "input_chunks" in frame.f_code.co_varnames)
