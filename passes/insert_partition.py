"""Insert the token-partition node: where each stage chooses, and what the choice reads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node

from parvts_fx.analysis.records import Attention
from parvts_fx.passes.plan import Choice, Plan
from parvts_fx.pipeline import PassResult
from parvts_fx.scores import layers_ahead, reads_attention, reads_hidden, reads_places
from parvts_fx.stages import PlacedStage


def partition(
    scores: torch.Tensor, visual: torch.Tensor, subjects: int, visuals: int
) -> dict[str, torch.Tensor]:
    """Split every sample's rows into the paths of ParVTS (arXiv 2511.18875; README, "What it does").

    Args:
        scores: [batch, rows] float; only visual rows count. NaN ranks last; ties go to the earlier row.
        visual: [batch, rows] bool with ``visuals`` true entries per sample.
        subjects: how many visual rows per sample form the subject group.

    Returns:
        int64, places among the rows, ascending: "subject", of path A (all text and the subject tokens) [batch, rows -
        visuals + subjects]; "non_subject", of path B [batch, rows - subjects]; "text" [batch, rows - visuals]; and
        "text_in_subject", "text_in_non_subject", the text's places among those of the paths.
        "slots" [batch, rows]: each row's place in A, B and T, one behind the other; "subject_slots": of each row of A in A
        and T. For rows of A also "is_text" (bool), and of those that are text (0 for others) "partners", the same row's
        place in B, and "text_partners", its place in T.
    """
    length = visual.shape[1]
    scores = torch.where(torch.isnan(scores), -torch.inf, scores.float())
    by_score = torch.sort(scores, dim=1, descending=True, stable=True).indices
    visual_first = torch.sort(visual.gather(1, by_score).int(), dim=1, descending=True, stable=True).indices
    top = by_score.gather(1, visual_first)[:, :subjects]
    subject = torch.zeros_like(visual).scatter(1, top, True)
    in_a, in_b = ~visual | subject, ~subject

    def positions(members: torch.Tensor, count: int) -> torch.Tensor:
        return torch.sort(members.int(), dim=1, descending=True, stable=True).indices[:, :count]

    def ranks(members: torch.Tensor) -> torch.Tensor:
        return members.long().cumsum(1) - 1

    size_a, size_b = length - visuals + subjects, length - subjects
    rows_a = positions(in_a, size_a)
    visual_slots = torch.where(subject, ranks(in_a), size_a + ranks(in_b))
    slots = torch.where(visual, visual_slots, size_a + size_b + ranks(~visual))
    is_text = ~visual.gather(1, rows_a)
    partners = torch.where(is_text, ranks(in_b).gather(1, rows_a), 0)
    text_partners = torch.where(is_text, ranks(is_text), 0)
    subject_slots = torch.where(is_text, size_a + text_partners, ranks(torch.ones_like(is_text)))
    texts = length - visuals
    rows_b = positions(in_b, size_b)
    return {
        "subject": rows_a, "non_subject": rows_b, "text": positions(~visual, texts),
        "text_in_subject": positions(is_text, texts), "text_in_non_subject": positions(~visual.gather(1, rows_b), texts),
        "slots": slots, "is_text": is_text, "partners": partners, "text_partners": text_partners,
        "subject_slots": subject_slots,
    }


@dataclasses.dataclass(frozen=True)
class InsertPartition:
    """For every stage, score the visual tokens that are left and lay out the rows of each path.

    ``h = layers(h0)``  ==>  the same, followed by scores, a stable sort, and index tensors

    A choice stands where all that its rule reads has been computed: the residual stream at the layer's input, or in front
    of that the queries and keys of the attention whose weights it reads.
    """

    name: ClassVar[str] = "insert_partition"

    def plan(self, plan: Plan) -> tuple[Plan, PassResult]:
        choices: list[Choice] = []
        for stage in plan.stages:
            choice = self._choice(plan, stage)
            if choices and choice.behind < choices[-1].behind:  # it chooses among what the one before has left
                choice = dataclasses.replace(choice, behind=choices[-1].behind)
            choices.append(choice)
        notes = "tokens are chosen at the input of " + ", ".join(
            f"layer {choice.stage.at}" + (f" (looking ahead to {len(choice.ahead)} layers)" if choice.ahead else "")
            for choice in choices)
        return dataclasses.replace(plan, choices=tuple(choices)), PassResult(len(choices), notes)

    def _choice(self, plan: Plan, stage: PlacedStage) -> Choice:
        link, rule = plan.link(stage.at), stage.stage.rule
        attention = self._attention(plan, stage) if reads_attention(rule) else None
        reads_link = stage.at == 0 or stage.stage.merge is not None or reads_hidden(rule)
        ahead = self._ahead(plan, stage, layers_ahead(rule))
        read: list[Node] = [link, *plan.decoder.merge.masks] if stage.at == 0 else [link] if reads_link else []
        if plan.decoder.grid is not None and (reads_places(rule) or stage.stage.merge is not None):
            read.append(plan.decoder.grid)
        if attention is not None:  # in front of the call: its keys may be a buffer that is written into until then
            read.append(attention.output.prev)
        return Choice(stage, link, attention, reads_link, max(read), ahead)

    def _attention(self, plan: Plan, stage: PlacedStage) -> Attention:
        calls = plan.layers[stage.at - 1].attentions if stage.at else ()
        if not calls:
            where = f"layer {stage.at - 1} of this model has no softmax attention" if stage.at else "there is no layer in front"
            raise ValueError(
                f"parvts_fx: option stages[{stage.written_as}].rule={stage.stage.rule!r}: expected a layer with attention in "
                f"front of layer {stage.at}, where it chooses: it reads attention weights, and {where}. Choose at another layer "
                "(at=2, say), or use a rule that reads the hidden states.")
        return calls[-1]

    def _ahead(self, plan: Plan, stage: PlacedStage, layers: int) -> tuple[Attention, ...]:
        """The last call of each of so many layers behind the choice."""
        calls = tuple(layer.attentions[-1] for layer in plan.layers[stage.at:stage.at + layers] if layer.attentions)
        if layers and not calls:
            raise ValueError(
                f"parvts_fx: option stages[{stage.written_as}].rule={stage.stage.rule!r}: expected a layer with attention among "
                f"the {layers} from layer {stage.at} on: it reads what they would attend to, and none of them has softmax "
                "attention. Choose at another layer, or use a rule that reads the hidden states.")
        return calls
