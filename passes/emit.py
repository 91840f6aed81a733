"""Writes the graph that a plan describes, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from parvts_fx.analysis.collectives import groups_of
from parvts_fx.analysis.last_rows import last_rows_of
from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.tokens import Count
from parvts_fx.analysis.values import (
    descendants,
    is_symbolic_int,
    is_tensor,
    leaves,
    needed_for,
    output_node,
    symbols,
    value,
    with_leaves,
)
from parvts_fx.capture.editing import Editor
from parvts_fx.errors import Refusal
from parvts_fx.passes.attend import write_attention
from parvts_fx.passes.choose import choose
from parvts_fx.passes.clusters import cached_values, mix, take_over
from parvts_fx.passes.paths import CachePath, Path
from parvts_fx.passes.plan import Plan, PlanError
from parvts_fx.passes.rows import LAST, RowSets, live
from parvts_fx.passes.twins import TwinPath, join, share_prefix
from parvts_fx.passes.writes import refuse_split_writes
from parvts_fx.passes.written import Call, Written
from parvts_fx.pipeline import PassResult, Work
from parvts_fx.torch_private import expression, takes_and_returns_as


@dataclasses.dataclass(frozen=True)
class Emit:
    """Write the planned graph in place of the captured one.

    Refuses where an operation does not work on fewer rows, or where the rows that it needs cannot be told apart.
    """

    name: ClassVar[str] = "emit"

    def run(self, work: Work) -> PassResult:
        if work.written is not None or work.plan is None:
            raise PlanError("parvts_fx: pass emit may stand in a pipeline once, and behind the analysis")
        missing = work.plan.missing_pass()
        if missing is not None:
            raise PlanError(f"parvts_fx: the pipeline lacks the pass {missing}, which this schedule needs in front of emit")
        emitter = Emitter(work.plan, work.module)
        work.written = emitter.write()
        work.module.graph = emitter.graph
        return PassResult(len(emitter.decoder.nodes), f"{len(emitter.calls)} attention calls")


class Emitter:
    """Goes through the captured graph once, in order."""

    def __init__(self, plan: Plan, module: GraphModule):
        self.plan, self.old = plan, module.graph
        self.decoder = self.plan.decoder
        self.graph = Graph(tracer_cls=getattr(self.old, "_tracer_cls", None))
        takes_and_returns_as(self.graph, self.old)
        self.editor = Editor(module, self.graph)
        self.inside = set(self.decoder.nodes)
        self.groups = groups_of(self.decoder.nodes)
        self.fresh = self.inside - set(descendants(self.old, [self.decoder.merge.output]))
        self.outside: dict[Node, Node] = {}
        self.calls: list[Call] = []
        self.partitions: dict[int, dict[str, Node]] = {}
        """By stage, what :func:`parvts_fx.passes.insert_partition.partition` returns."""

        self.kept: set[Node] = set()
        self.copied = 0
        self._sets: RowSets | None = None
        self.visual: Node | None = None
        """[batch, seq] bool, once a choice has needed it."""

        self.places: Node | None = None
        """[batch, seq, 3] int64: where in its picture each token stands, once that was needed."""

        self.clusters: dict[int, dict[str, Node]] = {}
        """By stage that merges, what :func:`parvts_fx.passes.clusters.clusters` returns."""

        self.sizes: dict[int, Node] = {}
        """By level: [batch, rows] float32, how many tokens each row stands for, behind the first stage that merges."""

        self.values: dict[Node, Node] = {}
        """By cached values: those that caches are to hold."""

        self.biases: dict[tuple, Node] = {}
        """What :func:`parvts_fx.passes.token_counts.biased` has written."""

        self.mixed: dict[int, Node] = {}
        """By stage: what its subject rows take over at the drop."""

        self._taken_over: set[int] = set()
        self.attentions = {
            node: attention for layer in self.decoder.layers for attention in layer.attentions for node in attention.nodes}
        self.main = Path(self, self.inside, self._rows_of, self._rows_left)
        self.twins = {
            number: TwinPath(self, twin, self.main) for number, twin in self.plan.twins.items()}

    @property
    def sets(self) -> RowSets:
        """The sets of rows that have been chosen so far."""
        if self._sets is None:
            raise Refusal("the decoder begins in front of the merged embeddings", self.decoder.merge.output)
        return self._sets

    def _rows_of(self, node: Node) -> str:
        level = self.plan.levels.get(node, 0)
        return LAST if level == self.plan.last else live(level)

    def level_read_by(self, user: Node, node: Node) -> int:
        """On which level one of the main path's nodes reads another."""
        plan, attention = self.plan, self.attentions.get(user)
        if user.op == "output":
            return plan.final
        if attention is None:
            return plan.last if user is plan.take else plan.levels.get(user, 0)
        asks = node in {operand.node for operand in attention.queries} - {operand.node for operand in attention.keys}
        return (plan.levels if asks else plan.live).get(attention.output, 0)

    def _rows_left(self, node: Node) -> str:
        return live(self.plan.live.get(node, 0))

    # -- the walk -----------------------------------------------------------------------------------------------------

    def write(self) -> Written:
        outputs = output_node(self.old).args[0]
        flat = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        needed = needed_for(self.old, [output_node(self.old), *(choice.link for choice in self.plan.choices)])
        refuse_split_writes(self, [node for node in self.decoder.nodes if node in needed])
        choices: dict[Node, list] = {}
        for choice in self.plan.choices:
            choices.setdefault(choice.behind, []).append(choice)
        for node in self.old.nodes:
            if node.op == "output":
                self.graph.output(map_aggregate(outputs, lambda leaf: self._result(leaf) if isinstance(leaf, Node) else leaf))
            elif node not in self.inside:
                self.copy_outside(node)
            elif node in needed:
                self._write(node)
            for choice in choices.get(node, ()):
                self._merge(node, choice.stage.number)  # it reads what the stages in front of it have left
                with self.editor.choosing():
                    choose(self, choice)
                if choice.stage.number in self.twins:
                    share_prefix(self.twins[choice.stage.number])
            self._merge(node, self.plan.final)
        axes, inside = self.decoder.tokens.axes, self.inside
        return Written(
            self.plan, {node: dict(held) for node, held in self.main.held.items()},
            {name: rows.count for name, rows in self.sets.by_name.items()}, tuple(self.calls), self.copied,
            frozenset(self.outside.values()) | frozenset(self.kept),
            tuple(node.name for node in self.old.nodes if node.op == "placeholder"),
            tuple(value(out) if isinstance(out, Node) else out for out in flat), self.sets[live(self.plan.final)].index,
            frozenset(place for place, out in enumerate(flat) if out in inside and (
                not axes.get(out) or self.decoder.tokens.is_behind_cached(out))))

    def _write(self, node: Node) -> None:
        attention = self.attentions.get(node)
        for path in (self.main, *self.twins.values()):
            if node not in path.nodes:
                continue
            if attention is None:
                path.write(node)
            elif node is attention.output:
                write_attention(path, attention)
            if node is self.decoder.merge.output and self._sets is None:
                self._sets = RowSets(self.editor, self.main.held[node][live(0)])
        for twin in self.twins.values():
            if node is twin.twin.end:
                join(twin)

    def _merge(self, node: Node, before: int) -> None:
        """What the first stages do that merge, once both what they have chosen and the residual stream are known."""
        for number, merging in self.plan.mergings.items():
            behind = self.plan.choices[number].behind
            if merging.drop is None or number >= before:
                continue
            if node is max(merging.source, behind) and number not in self.mixed:
                mix(self, merging)
            if node is max(merging.drop, behind) and number not in self._taken_over:
                take_over(self, merging)
                self._taken_over.add(number)

    def any(self, node: Node) -> Any:
        """A node as it was captured, on all rows."""
        return self.main.read(node, live(0)) if node in self.inside else self.outside[node]

    def copy_outside(self, node: Node) -> None:
        """A node outside the decoder as it is, once."""
        if node not in self.outside:
            self.outside[node] = self.copy_as_it_is(node, *map_aggregate(
                (node.args, node.kwargs), lambda leaf: self.any(leaf) if isinstance(leaf, Node) else leaf))

    def _result(self, node: Node) -> Any:
        """What leaves the graph: of the decoder's tensors, the rows that are left in the end."""
        if node not in self.inside:
            return self.outside[node]
        final, axes = live(self.plan.final), self.decoder.tokens.axes
        if is_symbolic_int(node):
            if symbols(value(node)) & symbols(self.decoder.tokens.size) and self.plan.live.get(node, 0) < self.plan.final:
                raise Refusal("a value that is no tensor crosses the point of pruning", node)
            return self.main.read(node, final)
        again = self.plan.caches.get(node, ())
        if not again and not axes.get(node) and any(name not in (final, LAST) for name in self.main.held.get(node, ())):
            again = tuple(last_rows_of(self.decoder, node))  # the last rows of a cache: those of the kept ones
        if not self.plan.caches.get(node):
            again = tuple(sorted({*again, *self._behind_cached([node, *again])}))
        path = CachePath(self, set(again), lambda _: final, self._rows_left, self.main)
        for member in again:
            path.write(member)
        return path.read(node, final)

    def _behind_cached(self, results: Sequence[Node]) -> set[Node]:
        """What puts the prompt's rows behind cached ones, as far as some results or what they read."""
        found = set[Node]()
        stack = [*results, *(source for node in results for source in node.all_input_nodes)]
        while stack:
            node = stack.pop()
            if node in self.inside and node not in found and self.decoder.tokens.is_behind_cached(node):
                found.add(node)
                stack.extend(node.all_input_nodes)
        return found

    def cached(self, node: Node) -> Node:
        """A tensor's rows that are left in the end, as caches hold them."""
        if any(node in merging.values for merging in self.plan.mergings.values()):
            if node not in self.values:
                self.values[node] = cached_values(self, node)
            return self.values[node]
        return self.main.read(node, live(self.plan.final))

    # -- what paths need ------------------------------------------------------------------------------------------------

    def copy_as_it_is(self, node: Node, args: tuple, kwargs: dict) -> Node:
        """The same operation with the same result: its example value stays."""
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name, type_expr=node.type)
        new.meta = dict(node.meta)
        self.copied += 1
        return new

    def mapped(self, leaf: Any) -> Any:
        """A leaf from outside the decoder, as it is."""
        return self.outside[leaf] if isinstance(leaf, Node) else leaf

    def resize(self, number: Node, name: str, path: Path) -> Any:
        """A number computed from the prompt's length, computed again for some rows."""
        held, size = value(number), self.decoder.tokens.size
        if isinstance(held, torch.SymInt) and isinstance(size, torch.SymInt) and expression(held) == expression(size):
            return self.sets[name].count
        if number.op == "placeholder":
            raise Refusal("a number that depends on the prompt's length comes from outside", number)
        key = (number, name)
        if key not in path.numbers:
            bindings = self.decoder.tokens.bindings.get(number, {})

            def leaf(index: int, given: Any) -> Any:
                if not isinstance(given, Node):
                    count = bindings.get(index)
                    return path.recounted(given, count, name) if isinstance(count, Count) else given
                if is_tensor(given) and given in self.inside:
                    return path.read(given, self._some_rows(path, given, name))
                return path.resized(given, name) if value(given) is not None and not is_tensor(given) else self.mapped(given)

            fresh = [leaf(index, given) for index, given in enumerate(leaves(number))]
            path.numbers[key] = self.editor.copy(number, *with_leaves(number, fresh))
        return path.numbers[key]

    def _some_rows(self, path: Path, node: Node, name: str) -> str:
        """For a size that does not follow the prompt: the rows on which the tensor is held, whichever they are."""
        held = path.held.get(node) or self.main.held.get(node, {})
        follows = symbols(self.decoder.tokens.size)
        return name if follows and name in held else next(iter(held), name)

    def note_call(self, attention: Attention, queries: str, keys: str, output: Node) -> None:
        self.calls.append(Call(attention, queries, keys, output))
