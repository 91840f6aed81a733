"""Compute only the rows that something reads: the one liveness analysis, along the token axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

from torch.fx import Node

from parvts_fx.analysis.last_rows import takes_last_rows
from parvts_fx.analysis.records import Attention, Decoder
from parvts_fx.analysis.values import (
    changed_in_place,
    descendants,
    hint,
    is_symbolic_int,
    is_tensor,
    needed_for,
    output_node,
    storage_of,
    value,
)
from parvts_fx.passes.plan import Choice, Plan, PlanError, Twin
from parvts_fx.pipeline import PassResult

_ALL, _TEXT = 0, 1
"""Levels of a twin's nodes: all of its rows, or its text rows alone."""


@dataclasses.dataclass(frozen=True)
class DropDeadRows:
    """Move every operation to the fewest rows that its readers need.

    An attention call needs its keys and values for all rows that are left in its layer, and its queries for the rows that
    its own result is needed for; other places where tokens meet need all; everything else needs the rows that its readers
    do. So behind the keys and values of the last layer in which both groups run only path A's rows are computed, in the
    last layer those whose logits are asked for, and in a twin's last layer the text rows. Nothing that leaves the graph
    changes.
    """

    name: ClassVar[str] = "drop_dead_rows"

    def plan(self, plan: Plan) -> tuple[Plan, PassResult]:
        missing = plan.missing_pass()
        if missing is not None:
            raise PlanError(f"parvts_fx: pass drop_dead_rows needs the pass {missing} in front of it")
        take = _last_rows_taken(plan)
        found = _Levels(plan.decoder, plan.decoder.nodes, plan.live, _ready(plan), _results(plan, take), take).find()
        earlier = sum(found[node] > plan.live[node] for node in found)
        twins = {number: self._fewer(plan, twin) for number, twin in plan.twins.items()}
        texts = sum(len(twin.text_alone) for twin in twins.values())
        count = 0 if take is None else _count(take)
        done = dataclasses.replace(plan, levels={**plan.live, **found}, twins=twins, take=take, take_count=count)
        notes = f"{earlier} operations on fewer rows" + (f", {texts} on text rows alone" if texts else "")
        return done, PassResult(earlier + texts, notes)

    def _fewer(self, plan: Plan, twin: Twin) -> Twin:
        if plan.text_count == 0:  # operations on no rows at all may not know their sizes
            return twin
        live = dict.fromkeys(twin.nodes, _ALL)
        found = _Levels(plan.decoder, twin.nodes, live, lambda node: _TEXT, {twin.end: _TEXT}).find()
        return dataclasses.replace(twin, text_alone=frozenset(node for node in found if found[node] == _TEXT))


def _count(take: Node) -> int:
    """How many rows it takes."""
    return hint(value(take).shape[1]) if value(take).dim() == value(take.args[0]).dim() else 1


def _last_rows_taken(plan: Plan) -> Node | None:
    """What takes the last rows of the stream behind the last attention, if it is one node and takes fewer than there are."""
    decoder, graph = plan.decoder, plan.decoder.merge.output.graph
    last = decoder.layers[-1].mixers[-1].attention
    if last is None or plan.stages and plan.stages[-1].is_weighed and plan.stages[-1].end == len(plan.layers):
        return None
    alive, behind = needed_for(graph, [output_node(graph)]), set(descendants(graph, [last.output]))
    takes = [node for node in decoder.nodes if node in alive and node in behind and takes_last_rows(node, decoder.tokens)]
    if len(takes) != 1 or decoder.tokens.plain_axis(takes[0].args[0]) is None:
        return None
    count, kept = _count(takes[0]), plan.row_count(plan.final)
    return takes[0] if (count < kept if isinstance(kept, int) else count == 1) else None


def _ready(plan: Plan) -> Callable[[Node], int]:
    """For a node, the highest level whose rows are known where it stands."""
    behind = [choice.behind for choice in plan.choices]

    def ready(node: Node) -> int:
        known = next((level for level, place in enumerate(behind) if not place < node), len(behind))
        return plan.last if known == plan.final else known

    return ready


def _results(plan: Plan, take: Node | None) -> dict[Node, int]:
    """By node: the level on which something that is no operation of the decoder reads it."""
    inside = set(plan.decoder.nodes)
    read = {node: plan.final for node in output_node(plan.decoder.merge.output.graph).all_input_nodes if node in inside}
    if take is not None:
        read[take.args[0]] = min(plan.last, read.get(take.args[0], plan.last))
    for level, choice in enumerate(plan.choices):
        read |= _read_by(choice, level, read)
        if choice.stage.is_weighed:  # where its end is reached, the text rows of both paths are joined
            end = plan.end_of(choice.stage)
            read[end] = min(level + 1, read.get(end, level + 1))
    for number, merging in plan.mergings.items():
        read[merging.source] = min(number, read.get(merging.source, number))
        if merging.drop is not None:
            read[merging.drop] = min(number + 1, read.get(merging.drop, number + 1))
        for node in merging.values:  # on all rows that are left in its layer
            read[node] = min(plan.live[node], read.get(node, plan.live[node]))
    for number, twin in plan.twins.items():  # which reads rows of the non-subject path
        nodes = set(twin.nodes)
        for source in {source for node in nodes for source in node.all_input_nodes if source in inside} - nodes:
            read[source] = min(number, read.get(source, number))
    return read


def _read_by(choice: Choice, level: int, read: Mapping[Node, int]) -> dict[Node, int]:
    nodes = [choice.link] if choice.reads_link else []
    operands = [] if choice.attention is None else [*choice.attention.queries, *choice.attention.keys]
    nodes += [operand.node for operand in operands]
    return {node: min(level, read.get(node, level)) for node in nodes}


class _Levels:
    """The highest level on whose rows each node can run.

    Args:
        nodes: in graph order; what they read of other nodes is read on any level.
        live: by node, the level of the rows that are left there.
        ready: the highest level whose rows are known where a node stands.
        results: by node, the level on which results need it.
        take: what takes the last rows; on which level it reads them stands among the results.
    """

    def __init__(
        self, decoder: Decoder, nodes: Sequence[Node], live: Mapping[Node, int], ready: Callable[[Node], int],
        results: Mapping[Node, int], take: Node | None = None,
    ):
        self.decoder, self.live, self.ready, self.results, self.take = decoder, live, ready, results, take
        graph = decoder.merge.output.graph
        inside = set(nodes)
        roots = [node for node in results if node in inside]
        alive = needed_for(graph, roots)
        self.nodes = [node for node in nodes if node in alive]
        self.inside = set(self.nodes)
        self.calls: dict[Node, Attention] = {
            node: attention for layer in decoder.layers for attention in layer.attentions for node in attention.nodes}
        self.meeting = {mixer.node for layer in decoder.layers for mixer in layer.mixers if mixer.attention is None}
        self.caps: dict[Node, int] = {}
        self.levels: dict[Node, int] = {}

    def find(self) -> dict[Node, int]:
        for _ in range(len(self.nodes) + 1):
            self._assign()
            if not self._lower():
                return self.levels
        raise AssertionError("every round lowers a level")

    def _assign(self) -> None:
        needed: dict[Node, int] = {node: level for node, level in self.results.items() if node in self.inside}
        self.levels = {}
        for node in reversed(self.nodes):
            call = self.calls.get(node)
            owner = node if call is None else call.output
            if call is not None and node is not owner:
                level = self.levels[owner]  # written with the call
            elif node in self.meeting:
                level = self.live[node]
            else:
                unread = self._level_of_memory(node, needed)
                fewest = min(needed.get(node, unread), self.caps.get(node, self.ready(node)), self.ready(node))
                level = max(self.live[node], fewest)
            self.levels[node] = level
            for source, read in self._reads(node):
                needed[source] = min(needed.get(source, read), read)

    def _level_of_memory(self, node: Node, needed: Mapping[Node, int]) -> int:
        """For a node whose result nobody reads: the level on which the memory that it writes into is read behind it."""
        target = changed_in_place(node)
        if target is None:
            return self.live[node]
        shared = storage_of(target)
        read = [level for other, level in needed.items() if is_tensor(other) and storage_of(other) == shared]
        return min(read, default=self.live[node])

    def _reads(self, node: Node) -> Iterator[tuple[Node, int]]:
        """What a node reads, and on which level."""
        call, level = self.calls.get(node), self.levels[node]
        if call is not None:
            queries = {operand.node for operand in call.queries} - {operand.node for operand in call.keys}
            for source in node.all_input_nodes:
                if source in self.inside:
                    yield source, level if source in queries or source in call.nodes else self.live[call.output]
            return
        if node is not self.take and not is_symbolic_int(node):
            yield from ((source, level) for source in node.all_input_nodes if source in self.inside)

    def _lower(self) -> bool:
        """Lower what cannot run on so few rows after all; False if there is nothing."""
        before = dict(self.caps)
        for node in self.nodes:
            for source, read in self._reads(node):
                if self.levels[source] < read and not self._can_be_cut(source):
                    self._cap(node, self.levels[source])
            target = changed_in_place(node)
            if target is not None:
                self._equalise([
                    node, *(m for m in self.nodes if is_tensor(m) and storage_of(m) == storage_of(target)),
                    *(user for user in target.users if user in self.inside)])
        return before != self.caps

    def _equalise(self, members: list[Node]) -> None:
        """All that shares memory which is written to runs on the same rows, as long as none has left."""
        for live in {self.live[member] for member in members}:
            same = [member for member in members if self.live[member] == live]
            least = min(self.levels[member] for member in same)
            for member in same:
                self._cap(member, least)

    def _cap(self, node: Node, level: int) -> None:
        call = self.calls.get(node)
        node = node if call is None else call.output
        if self.levels[node] > level:
            self.caps[node] = max(level, self.live[node])

    def _can_be_cut(self, source: Node) -> bool:
        """Whether rows of a node can be taken by themselves."""
        axes = self.decoder.tokens.axes.get(source, {})
        return is_symbolic_int(source) or is_tensor(source) and source not in self.decoder.unordered and all(
            kind.is_plain for kind in axes.values())
