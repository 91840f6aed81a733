"""The decoder of a captured batch for one sample at a time, and without padding.

A rewritten graph has as many visual tokens in every sample, and rows that stand where the prompt's mask expects them. A batch
whose samples differ, or have padding behind pictures, has neither. So the graph is parted where the decoder begins: what stands
in front of it runs for the whole batch, and the decoder's own operations become a graph of their own for any one sample's rows,
which is compiled as a prompt of its own. Its sizes are the prompt's length and nothing else; the analysis knows of each
number and each axis what it has to do with that length and with the batch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from parvts_fx.analysis.last_rows import nodes_without_tokens
from parvts_fx.analysis.lengths import may_count
from parvts_fx.analysis.masks import all_masks
from parvts_fx.analysis.records import Decoder
from parvts_fx.analysis.samples import samples_of
from parvts_fx.analysis.tokens import AtMost, AxisLabels, Count, Filling, cached_in_front
from parvts_fx.analysis.values import (
    ancestors,
    changed_in_place,
    concrete,
    hint,
    is_input_number,
    is_symbolic_int,
    is_tensor,
    leaves,
    output_node,
    symbols,
    value,
    with_leaves,
)
from parvts_fx.capture.return_states import returned_states
from parvts_fx.errors import Refusal
from parvts_fx.passes.parted import Parted, Result, Side, front_of, picks_rows
from parvts_fx.torch_private import expression

FEATURES = "image_features"
"""What the decoder's graph calls the rows that are merged into its embeddings: a name that tells what they are."""

_ENTERS, _LEAVES = "_enter_autocast", "_exit_autocast"


def part(module: GraphModule, decoder: Decoder) -> Parted:
    """
    Raises:
        Refusal: the decoder cannot be written for one sample by itself.
    """
    writer = _Writer(module, decoder)
    for node in decoder.nodes:
        if node is not decoder.merge.output:
            writer.write(node)
    if decoder.grid is not None:
        writer.hand_on(decoder.grid)
    end, inputs = output_node(module.graph), module.graph.find_nodes(op="placeholder")
    returned, (names, returns_several) = end.args[0], returned_states(end)
    states = {node.name: node for node in inputs if node.name in names}
    results = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    own = [node for node in dict.fromkeys(results) if isinstance(node, Node) and node in writer.inside]
    others = [node for node in dict.fromkeys(results) if isinstance(node, Node) and node not in writer.inside]
    sides = tuple(writer.sides)
    known = [(place, mask) for mask in all_masks(decoder.layers) for place, side in enumerate(sides) if side.node is mask.node]
    front = front_of(module, decoder, [decoder.merge.output, *(side.node for side in sides), *others])
    overwritten = {node: states[name] for node, name in zip(results[len(results) - len(names):], names, strict=True)}
    placed = [
        node if not isinstance(node, Node) else writer.result(node, own.index(node), overwritten.get(node))
        if node in writer.inside else Result(1 + len(sides) + others.index(node)) for node in results]
    return Parted(
        front, writer.finish(own), sides, tuple(known), tuple(placed),
        tuple(inputs.index(states[name]) for name in names), picks_rows(decoder, [side.node for side in sides]),
        not returns_several)


class _Writer:
    """Writes the decoder's operations for one sample."""

    def __init__(self, module: GraphModule, decoder: Decoder):
        self.module, self.decoder = module, decoder
        self.inside = set(decoder.nodes)
        self.graph = Graph(tracer_cls=getattr(module.graph, "_tracer_cls", None))
        embeddings, visual, features = map(self.graph.placeholder, ("merged_embeddings", "visual_tokens", FEATURES))
        self._visual = visual
        self.length = self.graph.call_method("size", (embeddings, 1))
        # the embeddings hold these features already: this says where, and how many they are
        everywhere = self.graph.call_method("unsqueeze", (visual, -1))
        merged = self.graph.call_method("masked_scatter", (embeddings, everywhere, features))
        self.new: dict[Node, Any] = {decoder.merge.output: merged}
        self.sides: dict[Side, Node] = {}
        self._tables: dict[Node, Node] = {}
        self._first = self.length
        self._handed_on: list[Node] = []
        self._numbers: dict[tuple[int, int | Node], Any] = {}
        self._joins = [(node, *found) for node in decoder.nodes if (found := cached_in_front(node)) is not None]
        self._cached: dict[Any, Node | None] = {}
        self._of_attention = {
            node: attention.bindings.get(node, {}) for layer in decoder.layers for attention in layer.attentions
            for node in attention.nodes}
        self._refuse_regions()

    def _refuse_regions(self) -> None:
        """What is entered outside of the decoder and left behind some of its operations would be gone there."""
        depth = 0
        for node in self.module.graph.nodes:
            name = getattr(node.target, "__name__", "")
            depth += (name == _ENTERS) - (name == _LEAVES)
            if depth and node in self.inside:
                raise Refusal("an operation of the decoder stands within a region of another precision", node)

    def write(self, node: Node) -> None:
        target = changed_in_place(node)
        if target is not None and target not in self.inside:
            raise Refusal("the decoder writes into one of its inputs", node)
        given = [self._leaf(node, index, leaf) for index, leaf in enumerate(leaves(node))]
        args, kwargs = with_leaves(node, given)
        self.new[node] = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)

    def _leaf(self, node: Node, index: int, leaf: Any) -> Any:
        if isinstance(leaf, Node) and leaf in self.inside:
            return self.new[leaf]
        tokens, samples = self.decoder.tokens, self.decoder.samples
        of_tokens = self._of_attention.get(node, {}).get(index) or tokens.bindings.get(node, {}).get(index)
        of_samples = None if samples is None else samples.bindings.get(node, {}).get(index)
        if isinstance(leaf, Node) and is_tensor(leaf):
            return self._side(leaf, of_tokens, of_samples)
        if isinstance(of_tokens, Filling) and of_samples is None and isinstance(leaf, int) and isinstance(tokens.size, int):
            return self.graph.call_function(operator.sub, (leaf + tokens.size, self.length))  # up to the same blocks
        if of_tokens is not None and not isinstance(of_tokens, (Count, AtMost)) or (
                of_samples is not None and not isinstance(of_samples, Count)):
            raise Refusal("a number that depends on the prompt's length or the batch cannot be told for one sample", node)
        if isinstance(of_tokens, AtMost):
            return self.graph.call_function(torch.sym_min, (self._constant(node, leaf), self.length))
        if of_tokens is None and of_samples is None:
            return self._constant(node, leaf)
        return self._number(node, leaf, of_tokens, of_samples)

    def _side(self, leaf: Node, of_tokens: object, of_samples: object) -> Node:
        axes = tuple(axis for axis, _ in of_tokens.axes) if isinstance(of_tokens, AxisLabels) else ()
        samples = None
        if isinstance(of_samples, AxisLabels):
            ((samples, _),) = of_samples.axes
        if leaf in self.decoder.numbered:
            table = self._table(leaf)
            return table if samples is None else self.graph.call_function(torch.narrow, (table, samples, 0, 1))
        return self._side_of(Side(leaf, samples, axes))

    def _table(self, table: Node) -> Node:
        """What numbers the rows that are there, made anew for those of a sample."""
        size = self.decoder.tokens.size
        for node in sorted(ancestors([table])):
            if node in self._tables or not node.op.startswith("call"):
                continue
            args, kwargs = with_leaves(node, [self._of_table(node, leaf, size) for leaf in leaves(node)])
            self._tables[node] = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        return self._tables[table]

    def _of_table(self, node: Node, leaf: Any, size: int | torch.SymInt) -> Any:
        if isinstance(leaf, Node) and leaf in self._tables:
            return self._tables[leaf]
        if isinstance(size, int) and may_count(leaf, size):
            if isinstance(leaf, float):
                raise Refusal("a number that depends on the prompt's length cannot be told for one sample", node)
            return self._number(node, leaf, Count("", leaf // size), None)
        own = value(leaf) if isinstance(leaf, Node) else None
        if isinstance(own, torch.SymInt) and isinstance(size, torch.SymInt) and expression(own) == expression(size):
            return self.length
        return self._constant(node, leaf)

    def _side_of(self, side: Side) -> Node:
        if side not in self.sides:
            with self.graph.inserting_before(self._first):
                self.sides[side] = self.graph.placeholder(f"side_{len(self.sides)}")
        return self.sides[side]

    def _number(self, node: Node, leaf: Any, of_tokens: Count | None, of_samples: Count | None) -> Any:
        """A number that counts rows, samples, or the rows of all samples, for one sample of ``length`` rows."""
        if of_tokens is None:
            assert of_samples is not None, "one of them is known"
            return of_samples.of(1)
        multiple, offset = of_tokens.multiple, self._offset(node, leaf, of_tokens)
        if of_samples is not None:
            batch = hint(value(self.decoder.merge.output).shape[0])
            if of_tokens.offset or multiple % batch:
                raise Refusal("a number counts the rows of all samples in a way that is not understood", node)
            multiple //= batch
        key = multiple, offset
        if key not in self._numbers:
            number = self.length if multiple == 1 else self.graph.call_function(operator.mul, (self.length, multiple))
            self._numbers[key] = self.graph.call_function(operator.add, (number, offset)) if of_tokens.offset else number
        return self._numbers[key]

    def _offset(self, node: Node, leaf: Any, count: Count) -> int | Node:
        """How many rows a number counts beside the prompt's."""
        number, size = value(leaf) if isinstance(leaf, Node) else leaf, self.decoder.tokens.size
        if not count.offset or not isinstance(number, torch.SymInt):
            return count.offset
        return self._cached_rows(node, number - count.multiple * size)

    def _cached_rows(self, node: Node, number: torch.SymInt | int) -> int | Node:
        """A number that counts the rows of a filled cache, read off what holds them."""
        if isinstance(number := concrete(number), int):
            return number
        wanted = expression(number)
        if wanted not in self._cached:
            self._cached[wanted] = next((
                self.graph.call_method("size", (self._leaf(join, 0, tensor), axis)) for join, tensor, axis in self._joins
                if isinstance(held := value(tensor).shape[axis], torch.SymInt) and expression(held) == wanted), None)
        if self._cached[wanted] is None:
            raise Refusal("the decoder reads a number that is neither known nor the length of the prompt or a cache", node)
        return self._cached[wanted]

    def _constant(self, node: Node, leaf: Any) -> Any:
        """What is the same for any sample."""
        held = value(leaf) if isinstance(leaf, Node) else leaf
        if not isinstance(leaf, Node):
            return leaf
        if leaf.op == "get_attr":
            return self.graph.get_attr(leaf.target)
        if isinstance(held, (int, float, bool, str, torch.dtype, torch.device)) and not isinstance(held, torch.SymInt):
            return held
        if is_symbolic_int(leaf):
            return self._cached_rows(node, held) if symbols(held) else hint(held)
        if is_input_number(leaf):
            return self._side_of(Side(leaf.args[0], None, (), is_number=True))
        raise Refusal("the decoder reads something that is neither a tensor nor a number that is known", node)

    def result(self, node: Node, place: int, state: Node | None = None) -> Result:
        """
        Args:
            state: the input that it is to be written into, if any.

        Raises:
            Refusal: its samples or its rows cannot be told apart, or those of the prompt from cached ones.
        """
        if not is_tensor(node):
            raise Refusal("the graph returns a value of the decoder's that is no tensor", node)
        tokens, axes = self.decoder.tokens, self.decoder.tokens.axes.get(node, {})
        behind = tokens.is_behind_cached(node)
        if any(not kind.is_plain for kind in axes.values()) and not behind:
            raise Refusal("a result counts its tokens in a way that is not understood", node)
        if any(tokens.is_behind_cached(source) and not self._is_state_alone(source, state)
               for held in nodes_without_tokens(self.decoder.nodes, node, tokens) for source in held.all_input_nodes):
            raise Refusal("a result holds the last rows of a filled cache: as many of its old ones as a sample's own leave", node)
        samples = samples_of(self.decoder, node)
        if samples is not None and samples.each != 1:
            raise Refusal("a result holds several entries for each sample", node)
        return Result(place, None if samples is None else samples.axis, True, next(iter(axes)) if behind else None)

    def _is_state_alone(self, node: Node, state: Node | None) -> bool:
        """Whether what stands in front of the prompt's rows is a state, which no attention asks (a convolution's last inputs), or
        padding. The rows of a window of keys are counted by later calls' masks, from its end."""
        tokens, seen, stack = self.decoder.tokens, {node}, [node]
        while stack:
            held = stack.pop()
            before = [source for source in held.all_input_nodes if tokens.is_behind_cached(source)]
            stack += [source for source in before if source not in seen]
            seen.update(before)
            is_padded = all(source in self.inside for source in held.all_input_nodes if is_tensor(source))
            if not before and not is_padded and not self._begins_with(held, state):
                return False
        return True

    def _begins_with(self, joined: Node, state: Node | None) -> bool:
        """Whether rows are put behind those of a state, and attention asks none of them."""
        stack = [join for join, tensor, _ in self._joins if join is joined and tensor is state]
        alone = bool(stack)
        while stack and alone:
            users = stack.pop().users
            alone = not any(user in self._of_attention for user in users)
            stack += [user for user in users if self.decoder.tokens.is_behind_cached(user)]
        return alone

    def hand_on(self, grid: Node) -> None:
        """Let the graph have what tells the places of tokens [3 or 4, batch, seq], which no operation of the decoder need read:
        as one result more, since inputs that nobody reads are left out of what is captured, and next to what tells visual tokens,
        so that both are known to have the same length."""
        held = self._side_of(Side(grid, 1, (2,)))
        self._handed_on.append(self.graph.call_function(torch.where, (self._visual, held, 0)))

    def finish(self, results: Sequence[Node]) -> GraphModule:
        self.graph.output((*(self.new[node] for node in results), *self._handed_on))
        return GraphModule(self.module, self.graph)
