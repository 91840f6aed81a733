"""What was found in a graph and what was done to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from parvts_fx.cost import Comparison
from parvts_fx.cost.telling import table
from parvts_fx.picture import draw
from parvts_fx.pipeline import PassRecord


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One decoder layer of a rewritten prefill."""

    index: int
    attention: str
    rows: dict[str, int]
    """Rows that run through the layer, by path."""

    other_mixers: tuple[str, ...] = ()
    """Graph nodes at which tokens meet other than by attention, or may do so: what is not shown to work row by row."""

    sees: str = ""
    """Which rows see each other."""

    leaving: int = 0
    """Rows per sample that have left at the layer's input."""

    chooses: str = ""
    """The rule by which tokens are chosen at the layer's input, if any are."""


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """One merge of features into the prompt's embeddings."""

    modality: str
    """"image", "video", "audio", several of them, or "unknown"."""

    tokens: int | None
    """Per sample; None where samples differ, or where a graph without data was given."""

    evidence: str
    """The inputs that tell what the features are; empty where nothing tells."""

    prunable: bool


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """One graph that the backend received."""

    status: str
    """One of "rewritten", "unrewritten" (a multimodal prefill that was left as it is) or "untouched" (nothing to prune)."""

    reason: str = ""
    nodes: int = 0
    prompt_tokens: int = 0
    batch: int = 0
    visual_tokens: int = 0
    subject_tokens: int = 0
    migration_depth: int = 0
    layers: tuple[LayerReport, ...] = ()
    layers_told_by: str = ""
    """What one layer was taken to be: ``migration_depth`` counts these."""

    merging: tuple[str, ...] = ()
    """For each stage that merges dropped tokens into kept ones: what takes part in it in this model."""

    passes: tuple[PassRecord, ...] = ()
    merges: tuple[MergeReport, ...] = ()
    """Everything that this graph merges into a prompt's embeddings, visual or not; what earlier graphs merged is theirs."""

    analysis_milliseconds: float = 0.0
    flops_before: int | None = None
    """Floating-point operations of this graph as it came, by torch's FlopCounterMode; only in explain()."""

    flops_after: int | None = None
    costs: tuple[Comparison, ...] = ()
    """What is predicted for this graph as it came and as it was rewritten, by processor; only in explain()."""

    @property
    def tokens_kept(self) -> int:
        """Rows per sample after pruning."""
        return self.prompt_tokens - self.visual_tokens + self.subject_tokens


@dataclasses.dataclass(frozen=True)
class Report:
    """All graphs of one call, in the order in which they were compiled. Prints as tables."""

    graphs: tuple[GraphReport, ...]

    @property
    def prefill(self) -> GraphReport | None:
        """The multimodal prefill's graph, if there is one: a rewritten one before an unrewritten one."""
        for status in ("rewritten", "unrewritten"):
            for graph in self.graphs:
                if graph.status == status:
                    return graph
        return None

    @property
    def merges(self) -> tuple[MergeReport, ...]:
        """Everything that is merged into the prompt, in the order of the graphs."""
        return tuple(merge for graph in self.graphs for merge in graph.merges)

    def show(self, path: str | Path | None = None) -> Any:
        """Draw the prefill's plan, layers against rows; see :func:`parvts_fx.picture.draw`.

        Raises:
            ValueError: nothing was rewritten.
        """
        if self.prefill is None:
            raise ValueError("parvts_fx: there is no plan to draw: no graph merges visual features into a prompt")
        return draw(self.prefill, path)

    def __str__(self) -> str:
        console = Console(width=110, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __rich__(self) -> Group:
        parts: list[RenderableType] = []
        prefill = self.prefill
        untouched = sum(graph.status == "untouched" for graph in self.graphs)
        parts.append(Text(f"{len(self.graphs)} graphs, of which {untouched} have nothing to prune"))
        if self.merges:
            parts.append(_merges(self.merges))
        if prefill is None:
            parts.append(Text("No graph merges visual features into a decoder's prompt."))
        elif prefill.status == "unrewritten":
            parts.append(Text(f"The multimodal prefill runs unrewritten: {prefill.reason}"))
        else:
            parts += _tables(prefill)
        return Group(*parts)


def _merges(merges: tuple[MergeReport, ...]) -> Table:
    table = Table(title="Merged into the prompt", title_justify="left")
    for heading in ("modality", "tokens (per sample)", "pruned", "told by"):
        table.add_column(heading)
    for merge in merges:
        told = merge.evidence or ("nothing tells; taken for visual" if merge.prunable else "nothing tells")
        table.add_row(merge.modality, "differ" if merge.tokens is None else str(merge.tokens),
                      "yes" if merge.prunable else "no, like text", told)
    return table


def _tables(graph: GraphReport) -> list[RenderableType]:
    facts = Table(show_header=False, title="Prefill", title_justify="left")
    facts.add_row("prompt tokens (per sample)", f"{graph.prompt_tokens}, of which {graph.visual_tokens} visual")
    facts.add_row("kept after pruning", f"{graph.tokens_kept}, of which {graph.subject_tokens} visual")
    facts.add_row("batch", str(graph.batch))
    facts.add_row("decoder layers", f"{len(graph.layers)}, in {graph.migration_depth} of which two groups run")
    facts.add_row("caches of all layers", f"{graph.tokens_kept} rows")
    for steps in graph.merging:
        facts.add_row("dropped tokens are merged", steps)
    if graph.flops_before and graph.flops_after:
        facts.add_row("FLOPs before", f"{graph.flops_before:.4g}")
        facts.add_row("FLOPs after", f"{graph.flops_after:.4g} ({graph.flops_after / graph.flops_before:.1%}, "
                                     f"a bound of {graph.flops_before / graph.flops_after:.2f}x)")
    layers = Table(title=f"Layers: {graph.layers_told_by}", title_justify="left")
    for heading in ("layer", "attention", "tokens also meet at", "rows", "left", "chosen by", "who sees whom"):
        layers.add_column(heading)
    for layer in graph.layers:
        others = ", ".join(layer.other_mixers[:3]) + (" ..." if len(layer.other_mixers) > 3 else "")
        layers.add_row(str(layer.index), layer.attention, others, ", ".join(f"{k} {n}" for k, n in layer.rows.items()),
                       str(layer.leaving or ""), layer.chooses, layer.sees)
    passes = Table(title="Passes", title_justify="left")
    for heading in ("", "pass", "matches", "nodes added", "removed", "ms", "notes"):
        passes.add_column(heading)
    passes.add_row("", "analysis", "", "", "", f"{graph.analysis_milliseconds:.1f}", "")
    for record in graph.passes:
        passes.add_row(str(record.position), record.name, str(record.matches), str(record.nodes_added),
                       str(record.nodes_removed), f"{record.milliseconds:.1f}", record.notes)
    return [facts, *([table(graph.costs)] if graph.costs else []), layers, passes]
