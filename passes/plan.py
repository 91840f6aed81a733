"""What is to run on which rows: written down before anything is rewritten.

Rows live on *levels*: on level 0 are all positions of the prompt, on level i those that are left when i stages have dropped
theirs, and on the last one the rows whose logits are asked for. Passes refine a plan; the emitter
(:mod:`parvts_fx.passes.emit`) writes the graph that it describes, once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch.fx import Node

from parvts_fx.analysis.records import Attention, Decoder, Layer
from parvts_fx.analysis.values import concrete, value
from parvts_fx.errors import Refusal
from parvts_fx.options import Options
from parvts_fx.stages import PlacedStage, counts_left


class PlanError(RuntimeError):
    """A pipeline lacks a pass that it needs, or has its passes in an order that means nothing."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Where one stage chooses among the visual tokens that are left."""

    stage: PlacedStage
    link: Node
    """The residual stream at the layer's input, whose rows a rule may read."""

    attention: Attention | None
    """Whose weights the rule reads, in the layer in front; None for a rule that reads none."""

    reads_link: bool
    behind: Node
    """The node behind which everything that the choice reads has been computed."""

    ahead: tuple[Attention, ...] = ()
    """Whose weights the rule wants as the states at hand would give them, one in each layer that follows."""


@dataclasses.dataclass(frozen=True)
class Twin:
    """With constant weights: the non-subject path's own copy of the layers in which both groups run."""

    stage: PlacedStage
    start: Node
    end: Node
    """The links of the residual stream between which it runs; at the second one its text rows join the subject path's."""

    nodes: tuple[Node, ...]
    text_alone: frozenset[Node] = frozenset()
    """Those that run on its text rows alone, since nothing reads what comes of the others."""

    prefix: tuple[tuple, ...] | None = None
    """The masks of its attention calls, for a twin that takes from the subject path the text that both compute alike."""


@dataclasses.dataclass(frozen=True)
class Merging:
    """What one stage's kept tokens take over of those that it drops (:mod:`parvts_fx.passes.clusters`)."""

    stage: PlacedStage
    source: Node
    """The link of the residual stream at which all rows run for the last time, and whose rows are mixed."""

    drop: Node | None
    """The link at which the kept rows take over the mixture; None behind the last layer."""

    values: frozenset[Node]
    """Cached values of the layers in front of it."""

    biased: frozenset[Node]
    """Attention calls behind it, by output, in which the text asks keys that stand for several."""

    asking: frozenset[Node]
    """The same of calls by which the prompt's last rows alone ask: their softmax or fused call."""

    unbiased: frozenset[Node]
    """Those that have no place for that."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The decoder's anatomy, the schedule, and what passes have decided so far."""

    decoder: Decoder
    options: Options
    stages: tuple[PlacedStage, ...]
    choices: tuple[Choice, ...] = ()
    groups: Mapping[Node, int] = dataclasses.field(default_factory=dict)
    """Attention calls (by output) in which subject and non-subject rows do not see each other: the number of their stage."""

    twins: Mapping[int, Twin] = dataclasses.field(default_factory=dict)
    """By number of the stage."""

    mergings: Mapping[int, Merging] = dataclasses.field(default_factory=dict)
    """By number of the stage."""

    caches: Mapping[Node, tuple[Node, ...]] = dataclasses.field(default_factory=dict)
    """By output that holds values which a stage mixes: the operations between them and the output."""

    live: Mapping[Node, int] = dataclasses.field(default_factory=dict)
    """By node: on which level the rows are that are left where it stands. Empty until rows are dropped."""

    levels: Mapping[Node, int] = dataclasses.field(default_factory=dict)
    """By node: the level on whose rows it runs; never more rows than are left."""

    take: Node | None = None
    """What takes the last rows out of the stream, in front of the head; None where more rows are asked for."""

    take_count: int = 0

    @property
    def final(self) -> int:
        """The level of what is left in the end: what caches hold."""
        return len(self.stages)

    @property
    def last(self) -> int:
        """The level of the rows whose logits are asked for."""
        return len(self.stages) + 1

    @functools.cached_property
    def visual_counts(self) -> list[int | torch.SymInt]:
        """How many visual tokens a sample has on each level, but for that of the last rows."""
        return [concrete(left) for left in counts_left([stage.stage for stage in self.stages], self.decoder.visual_tokens)]

    @property
    def text_count(self) -> int | torch.SymInt:
        """How many rows a sample has that are not visual."""
        return concrete(value(self.decoder.merge.output).shape[1] - self.decoder.visual_tokens)

    def row_count(self, level: int) -> int | torch.SymInt:
        """How many rows a sample has on a level."""
        if level == self.last:
            return self.take_count
        return concrete(self.text_count + self.visual_counts[level])

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.decoder.layers

    def link(self, layer: int) -> Node:
        """The residual stream at a layer's input."""
        return self.layers[layer].input if layer else self.decoder.merge.output

    def entering(self, stage: PlacedStage) -> Node:
        """The residual stream that enters the last layer that all rows of a stage run through, or where they leave at once."""
        last = max(stage.at, stage.end - 1)
        return self.decoder.entry or self.link(0) if last == 0 < stage.end else self.link(last)

    def end_of(self, stage: PlacedStage) -> Node:
        """The link of the residual stream behind which the non-subject rows are gone.

        Raises:
            Refusal: it cannot be told.
        """
        if stage.end < len(self.layers):
            return self.link(stage.end)
        period = self.decoder.period
        if period is not None and not period.end_is_known:
            raise Refusal("tokens meet behind the last layer's matrices: whether that is the layer's or the final norm's cannot "
                          f"be told (use migration_depth < {len(self.layers)})", self.decoder.final)
        if not stage.is_weighed:
            return self.decoder.final  # rows do not mix any more: dropping them before the MLP is the same
        if self.decoder.output is None:
            raise Refusal("the end of the last layer cannot be told from its final norm, so constant weights cannot be "
                          f"applied there (use migration_depth < {len(self.layers)} or fusion=\"attention\")")
        return self.decoder.output

    def cut_of(self, stage: PlacedStage) -> Node:
        """Where the rows of the subject path go on alone. With constant weights they do from the start."""
        return self.link(stage.at) if stage.is_weighed else self.end_of(stage)

    def attentions(self, stage: PlacedStage) -> list[Attention]:
        """The attention calls of the layers in which both groups run."""
        return [attention for layer in self.layers[stage.at:stage.end] for attention in layer.attentions]

    def missing_pass(self) -> str | None:
        """The name of a pass without which this plan describes no schedule; None if it is complete."""
        if len(self.choices) < len(self.stages):
            return "insert_partition"
        for stage in self.stages:
            if stage.is_parallel and any(attention.output not in self.groups for attention in self.attentions(stage)):
                return "duplicate_attention"
            if stage.is_weighed and stage.number not in self.twins:
                return "duplicate_layers"
            if stage.stage.merge is not None and stage.number not in self.mergings:
                return "merge_clusters"
        return None if self.live or not self.stages else "prune_branch"
