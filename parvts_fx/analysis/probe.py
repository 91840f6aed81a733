"""Finds out which sizes follow the prompt, by evaluating the decoder at another prompt length.

Node by node, on fake tensors: what must change for a node to still work follows the prompt; everything else stays. No
operator is known by name here. A reading that works where it is taken may turn out wrong further on (a buffer of 30
entries works by itself, until 127 tokens are copied into it): then the search goes back to the nearest choice that
the failing node depends on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.moved_tokens import MovedTokens
from parvts_fx.analysis.other_lengths import OtherLengths
from parvts_fx.analysis.tokens import Axis, Binding, TokenMap, cached_in_front, is_multiple, readings_of
from parvts_fx.analysis.values import ancestors, concrete, for_length, hint, hint_shape, leaves, symbols, value
from parvts_fx.errors import Refusal

_MOST_RETREATS = 400
_FEW_READINGS = 4
"""So many are all tried before it is looked at what becomes of the tokens, which takes longer."""

Finding = tuple[dict[int, Binding], Any, dict[int, Axis] | None]
"""A reading of a node, what the node comes to under it, and the token axes of that."""


class Probe:
    """Evaluates nodes on fake tensors in which each label's tokens have another number than in the graph."""

    def __init__(
        self, module: GraphModule, size: int | torch.SymInt, lengths: Mapping[str, int], what: str = "prompt length",
        computes: bool = False,
    ):
        self.what, self.size_hint, self.lengths = what, hint(size), dict(lengths)
        joined = filter(None, map(cached_in_front, module.graph.nodes))
        cached = frozenset(hint(value(tensor).shape[axis]) for tensor, axis in joined)
        self.found = TokenMap(concrete(size), length=max(lengths.values()), cached=cached, computes=computes)
        self._others = OtherLengths(module, self.size_hint, self.lengths, self.found)
        self._moved = MovedTokens(self._others)

    @staticmethod
    def lengths_for(
        module: GraphModule, size: int | torch.SymInt, labels: Sequence[str], shorter: bool = False
    ) -> dict[str, int]:
        """One prime per label, no factor of any size in the graph; larger than the prompt, or well below it.

        Where sizes have names no other number is taken for the prompt's length, and any prime will do if there is no such one.
        """
        sizes = {
            entry
            for node in module.graph.nodes if isinstance(value(node), torch.Tensor)
            for entry in hint_shape(value(node)) if entry
        }
        try:
            return _primes(hint(size), labels, shorter, sizes)
        except Refusal:
            if not symbols(size):
                raise
            return _primes(hint(size), labels, shorter, set())

    def seed(self, node: Node, axes: Mapping[int, str]) -> None:
        """Declare the axes of a node from which the probe starts."""
        self.found.probed[node] = self._others.side(node, tuple(axes.items()))
        self.found.axes[node] = {axis: Axis(label, 1, 0) for axis, label in axes.items()}

    def run(self, nodes: Sequence[Node]) -> None:
        """Evaluate nodes in graph order, and record what was found.

        Raises:
            Refusal: no way of reading a node's integers and side tensors, and those in front of it, lets it work at
                another prompt length.
        """
        found: dict[int, Iterator[Finding]] = {}
        conflicts: dict[int, set[Node]] = {}
        problems: list[Refusal] = []
        retreats = place = 0
        while place < len(nodes):
            if place not in found:
                found[place] = self._findings(nodes[place])
            try:
                self._record(nodes[place], next(found[place]))
                place += 1
                continue
            except StopIteration:
                pass
            except Refusal as refusal:
                problems.append(refusal)
            # go back to the nearest choice in front that this node depends on
            involved = ancestors([nodes[place]]) | conflicts.get(place, set())
            retreats += 1
            for earlier in range(place - 1, -1, -1):
                if retreats > _MOST_RETREATS or nodes[earlier] not in involved:
                    continue
                finding = next(found[earlier], None)
                if finding is not None:
                    break
            else:
                raise problems[0]
            for later in range(earlier + 1, place + 1):
                found.pop(later, None)
                conflicts.pop(later, None)
                self._forget(nodes[later])
            conflicts.setdefault(earlier, set()).update(involved)
            self._record(nodes[earlier], finding)
            place = earlier + 1

    def _record(self, node: Node, finding: Finding) -> None:
        choice, result, axes = finding
        self._forget(node)
        self.found.probed[node] = result
        if axes is not None:
            self.found.axes[node] = axes
        self.found.bindings[node] = choice
        self._moved.note(node, choice, axes)

    def _forget(self, node: Node) -> None:
        for held in (self.found.probed, self.found.axes, self.found.bindings):
            held.pop(node, None)
        self._moved.forget(node)

    def _findings(self, node: Node) -> Iterator[Finding]:
        """The readings under which a node works, in order of preference; a Refusal if there is none."""
        current = leaves(node)
        working: list[Finding] = []
        problem: Exception | None = None
        first, choices = True, list(readings_of(node, self.lengths, self.found))
        for choice in choices:
            try:
                result = self._others.evaluate(node, current, choice)
            except Exception as error:  # a trial that fails is the normal case: this reading of the node is wrong
                problem = error
                continue
            axes = self._axes_of(node, result)
            if axes is False:
                continue
            if first and len(choices) > _FEW_READINGS and self._keeps_tokens_whole(node, current, choice, axes):
                yield choice, result, axes  # the best there can be: others are tried only if it turns out wrong later on
            else:
                working.append((choice, result, axes))
            first = False
        if first:
            raise self._only_here(node, current, problem)
        if len(working) > 1:  # the stable sort leaves the fewest changes in front among equals
            working.sort(key=lambda entry: not self._keeps_tokens_whole(node, current, entry[0], entry[2]))
        yield from working

    def _only_here(self, node: Node, current: Sequence[Any], problem: Exception | None) -> Refusal:
        """Why a node works under no reading."""
        size = self.found.size
        for number in (value(leaf) if isinstance(leaf, Node) else leaf for leaf in current):
            follows = isinstance(number, torch.SymInt) and symbols(number) & symbols(size)
            if follows and hint(number) and not is_multiple(number, size):
                return Refusal(
                    f"an operation works on blocks of rows, {number} for {size}: fewer rows would be in other ones", node)
        detail = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}" if problem else "sizes do not fit"
        return Refusal(f"an operation works only at the traced {self.what} ({detail})", node, names_tell=not symbols(size))

    def _axes_of(self, node: Node, result: Any) -> dict[int, Axis] | Literal[False] | None:
        """Compare a result with the traced one; False if their sizes are not related through token counts."""
        example = value(node)
        if not isinstance(result, torch.Tensor) or not isinstance(example, torch.Tensor):
            return None
        if result.dim() != example.dim():
            return False
        axes: dict[int, Axis] = {}
        for axis, (now, then) in enumerate(zip(result.shape, hint_shape(example))):
            if now == then or then is None:
                continue
            for label, length in self.lengths.items():
                multiple, rest = divmod(now - then, length - self.size_hint)
                if rest == 0 and multiple > 0 and (now == length or self._is_linear(example.shape[axis], multiple)):
                    axes[axis] = Axis(label, multiple, then - multiple * self.size_hint)
                    break
            else:
                if not self._is_computed(example.shape[axis], now):
                    return False
        return axes

    def _is_linear(self, traced: int | torch.SymInt, multiple: int) -> bool:
        """Whether a size is so many times the prompt's length and others at any length, as it has to be where numbers are
        computed again. (As it was traced: what is cut to the prompt's length may have been no longer.)"""
        return not self.found.computes or not symbols(self.found.size) & symbols(traced - multiple * self.found.size)

    def _is_computed(self, traced: int | torch.SymInt, now: int) -> bool:
        """Whether a size is what its formula says for some label's tokens: of blocks of them, which are no tokens."""
        size = concrete(traced)
        return self.found.computes and isinstance(size, torch.SymInt) and any(
            for_length(size, self.found.size, length) == now for length in self.lengths.values())

    def _keeps_tokens_whole(
        self, node: Node, current: list[Any], choice: Mapping[int, Binding], axes: dict[int, Axis] | None
    ) -> bool:
        """Run a node that only moves data on the tokens' numbers: do they come out whole, along the axis found?

        Needed where sizes collide and several readings work, as in ``view(1, 64, -1)`` with S = hidden = 64.
        """
        return self._moved.axes(node, current, choice, axes) is not None


def _primes(size_hint: int, labels: Sequence[str], shorter: bool, sizes: Collection[int]) -> dict[str, int]:
    chosen: dict[str, int] = {}
    candidate, step = (2 * size_hint // 3, -1) if shorter else (2 * size_hint + 61, 1)
    for label in labels:
        while (
            any(candidate % factor == 0 for factor in range(2, int(candidate**0.5) + 1))
            or any(entry % candidate == 0 for entry in sizes)
            or candidate in chosen.values()
        ):
            candidate += step
            if candidate < 3:
                raise Refusal("the prompt is too short to tell its length from other sizes", names_tell=True)
        chosen[label] = candidate
        candidate += 1 + size_hint  # far enough apart for (probe - S) differences not to divide one another
    return chosen
