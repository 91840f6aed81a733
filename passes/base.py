"""What a pass is, what passes share, and the runner."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from torch.fx import GraphModule, Node

from parvts_fx.analysis.records import Attention, Decoder, Mixer
from parvts_fx.analysis.tokens import AxisLabels
from parvts_fx.analysis.values import hint, output_node, value
from parvts_fx.errors import Refusal
from parvts_fx.options import Options
from parvts_fx.passes.editing import RowEditor, Rows, Samples, Size


@dataclasses.dataclass(frozen=True)
class Partition:
    """The nodes that the partition put into the graph."""

    subject: Rows
    """Path A: all text and the subject tokens."""

    non_subject: Rows
    """Path B: all text and the non-subject tokens."""

    text: Rows
    text_in_subject: Rows
    """Where the text rows stand among the rows of path A."""

    text_in_non_subject: Rows
    """Where the text rows stand among the rows of path B."""

    everything: Rows
    slots: Node
    """[batch, seq] int64: where each position's row stands in the rows of A, B and T, one behind the other."""

    is_text: Node
    """[batch, subject count] bool: which rows of path A are text."""

    partners: Node
    """[batch, subject count] int64: for a text row of path A, the same token's row in path B (0 for others)."""

    text_partners: Node
    """[batch, subject count] int64: for a text row of path A, its row among the text rows (0 for others)."""

    subject_slots: Node
    """[batch, subject count] int64: where each row of path A stands in the rows of A and T, one behind the other."""

    visual_count: Size
    subject_count: Size


@dataclasses.dataclass(frozen=True)
class Prefix:
    """With constant weights: the rows behind a text that both paths share, under the names of :class:`Partition`."""

    count: Node
    """int: how many leading positions both paths share; known when the graph runs."""

    non_subject: Rows
    text: Rows
    text_in_non_subject: Rows
    """Where these text rows stand among the rows of path B behind the prefix."""

    is_text: Node
    partners: Node
    text_partners: Node


@dataclasses.dataclass
class State:
    """What the passes of one pipeline work on."""

    module: GraphModule
    decoder: Decoder
    options: Options
    editor: RowEditor = dataclasses.field(init=False)
    partition: Partition | None = None
    prefix: Prefix | None = None
    """With constant weights: what path B leaves to path A."""

    lent: dict[Node, Node] = dataclasses.field(default_factory=dict)
    """With it: nodes that read path A's rows, and what they read, written on all rows until the pruning restricts it."""

    non_subject_link: Node | None = None
    """With constant weights: path B's residual stream at the input of the layer where it ends."""

    non_subject_rows: Rows | None = None
    """The rows that it has there: path B's, or the text's alone."""

    pruned: dict[Node, Node] = dataclasses.field(default_factory=dict)
    """Where rows were dropped before layer K's input: nodes of the decoder, and what holds their path A rows."""

    behind_cut: list[Node] | None = None
    """With it: the decoder's nodes that are to run on path A's rows."""

    copies: dict[Node, Node] = dataclasses.field(default_factory=dict)
    """Behind the pruning: nodes of the decoder, and what holds their path A rows."""

    prune_node: Node | None = None
    """The residual stream after pruning: path A's rows alone."""

    side_nodes: frozenset[Node] = dataclasses.field(init=False)
    """What stood in the graph outside the decoder, and what checks something there."""

    original_inputs: list[str] = dataclasses.field(init=False)
    original_outputs: list[object] = dataclasses.field(init=False)
    last_rows: set[int] = dataclasses.field(init=False)
    """Outputs that hold the prompt's last rows, or as many as there are: the caches of sliding windows."""


    def __post_init__(self) -> None:
        self.editor = RowEditor(self.module)
        self.side_nodes = frozenset(self.module.graph.nodes) - frozenset(self.decoder.nodes)
        self.original_inputs = [node.name for node in self.module.graph.nodes if node.op == "placeholder"]
        outputs = output_node(self.module.graph).args[0]
        flat = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        self.original_outputs = [value(out) if isinstance(out, Node) else out for out in flat]
        inside, axes = set(self.decoder.nodes), self.decoder.tokens.axes
        self.last_rows = {position for position, out in enumerate(flat) if out in inside and not axes.get(out)}

    def samples_of(self, node: Node) -> Samples | None:
        """Where the samples lie in one of the decoder's tensors, or in what a pass has made of one; None for a batch of one.

        Raises:
            Refusal: they cannot be told apart there.
        """
        found = self.decoder.samples
        if found is None:
            return None
        axes = found.axes.get(node, {})
        if len(axes) != 1:
            raise Refusal("no axis of a tensor holds the samples", node)
        ((axis, kind),) = axes.items()
        if kind.is_plain:
            return Samples(axis)
        inner = self.decoder.sample_layouts.get(node, {}).get(axis)
        if kind.offset or inner is None or kind.multiple % inner:
            raise Refusal(f"a tensor holds its samples as {kind}, which is not understood", node)
        return Samples(axis, kind.multiple, inner)

    def samples_of_side(self, side: Node, reader: Node, index: int, like: Node | None) -> Samples | None:
        """The same for a tensor from outside the decoder, as leaf number ``index`` of one of its nodes.

        Args:
            like: the prompt's tensor that it is combined with; their axes are aligned from the right, as broadcasting does.
        """
        found = self.decoder.samples
        if found is None:
            return None
        binding = found.bindings.get(reader, {}).get(index)
        if isinstance(binding, AxisLabels):
            ((axis, _),) = binding.axes
            return Samples(axis)
        if like is None:
            raise Refusal("a side input's samples cannot be told apart", side)
        there = self.samples_of(like)
        axis = there.axis - (value(like).dim() - value(side).dim())
        if axis >= 0 and hint(value(side).shape[axis]) != 1:
            raise Refusal("a side input's samples cannot be told apart", side)
        return dataclasses.replace(there, axis=axis)

    def alike(self, new: Node, old: Node) -> Node:
        """Note that a new node holds its tokens and samples along the same axes as an old one; returns the new one."""
        tokens, samples = self.decoder.tokens, self.decoder.samples
        if old in tokens.axes:
            tokens.axes[new] = tokens.axes[old]
        if samples is not None and old in samples.axes:
            samples.axes[new] = samples.axes[old]
            self.decoder.sample_layouts[new] = self.decoder.sample_layouts.get(old, {})
        return new

    def keep(self, node: Node) -> None:
        """Leave a node in the graph though nothing reads it."""
        self.side_nodes |= {node}

    @property
    def depth(self) -> int:
        return self.options.migration_depth

    @property
    def cut(self) -> Node:
        """The link of the residual stream at which the non-subject branch ends."""
        if self.depth == 0:
            return self.decoder.merge.output
        layers = self.decoder.layers
        if self.depth < len(layers):
            return layers[self.depth].input
        if self.decoder.period is not None and not self.decoder.period.end_is_known:
            raise Refusal("tokens meet behind the last layer's matrices: whether that is the layer's or the final norm's cannot "
                          f"be told (use migration_depth < {len(layers)})", self.decoder.final)
        if self.options.fusion == "attention":
            return self.decoder.final  # rows do not mix any more: dropping them before the MLP is the same
        if self.decoder.output is None:
            raise Refusal("the end of the last layer cannot be told from its final norm, so constant weights cannot be "
                          f"applied there (use migration_depth < {len(layers)} or fusion=\"attention\")")
        return self.decoder.output

    @property
    def migration_mixers(self) -> list[Mixer]:
        return [mixer for layer in self.decoder.layers[: self.depth] for mixer in layer.mixers]

    @property
    def migration_attentions(self) -> list[Attention]:
        return [attention for layer in self.decoder.layers[: self.depth] for attention in layer.attentions]


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass did: how often its pattern was found, and anything worth telling."""

    matches: int
    notes: str = ""


class Pass(Protocol):
    """A rewriting of the graph in ``state.module``; its fields are its options.

    A third party's pass is any object with a ``name`` and a ``run``; name it in the option ``extra_passes``, or hand a
    whole pipeline to :func:`parvts_fx.rewrite`. The graph is valid before and after a pass, and every node that it adds
    carries ``meta["example_value"]``.
    """

    name: ClassVar[str]

    def run(self, state: State) -> PassResult: ...


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """One line of the pipeline's log."""

    position: int
    name: str
    matches: int
    nodes_added: int
    nodes_removed: int
    milliseconds: float
    notes: str

    def __str__(self) -> str:
        line = (f"{self.position:2d} {self.name}: {self.matches} matches, +{self.nodes_added} -{self.nodes_removed} nodes, "
                f"{self.milliseconds:.1f} ms")
        return f"{line} ({self.notes})" if self.notes else line


Hook = Callable[[PassRecord, State], None]


def run_pipeline(passes: Sequence[Pass], state: State, hooks: Sequence[Hook] = ()) -> list[PassRecord]:
    """Run passes in order; after each one, call every hook (verification, logging, dumps)."""
    records: list[PassRecord] = []
    for position, graph_pass in enumerate(passes, start=1):
        before = set(state.module.graph.nodes)
        start = time.perf_counter()
        result = graph_pass.run(state)
        elapsed = 1e3 * (time.perf_counter() - start)
        after = set(state.module.graph.nodes)
        record = PassRecord(position, graph_pass.name, result.matches, len(after - before), len(before - after),
                            elapsed, result.notes)
        records.append(record)
        for hook in hooks:
            hook(record, state)
    return records
