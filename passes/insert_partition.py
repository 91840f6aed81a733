"""Insert the token-partition node."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from parvts_fx.options import Options
from parvts_fx.passes.base import Partition, PassResult, State
from parvts_fx.passes.editing import Rows
from parvts_fx.scores import trace_rule


def flatten_mask(mask: torch.Tensor) -> torch.Tensor:
    """[batch, seq, anything] or [batch, seq] bool to [batch, seq]."""
    return mask[..., 0] if mask.dim() == 3 else mask


def partition(
    scores: torch.Tensor, visual: torch.Tensor, subjects: int, visuals: int
) -> dict[str, torch.Tensor]:
    """Split every sample's positions into the paths of ParVTS (arXiv 2511.18875; README, "What it does").

    Args:
        scores: [batch, seq] float; only visual positions count. NaN ranks last; ties go to the earlier position.
        visual: [batch, seq] bool with ``visuals`` true entries per row.
        subjects: how many visual positions per row form the subject group.

    Returns:
        subject, non_subject and text: positions of path A [batch, seq - visuals + subjects], of path B [batch, seq -
        subjects] and of the text [batch, seq - visuals], ascending; and the index tensors of :class:`Partition` by name.
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
    """Score the visual tokens after the merge and lay out the rows of each path.

    ``h0 = merge(embeddings, features)``  ==>  the same, followed by scores, a stable sort, and index tensors

    Refuses when the number of visual tokens per sample is not known from the sizes of the features.
    """

    name: ClassVar[str] = "insert_partition"
    options: Options

    def run(self, state: State) -> PassResult:
        merge, editor = state.decoder.merge, state.editor
        count = len(merge.masks)
        last = max((merge.output, *merge.masks))

        def union(*masks: torch.Tensor) -> torch.Tensor:
            visual = flatten_mask(masks[0])
            for mask in masks[1:]:
                visual = visual | flatten_mask(mask)
            return visual

        def split(hidden: torch.Tensor, scores: torch.Tensor, visual: torch.Tensor, *features: torch.Tensor) -> tuple:
            visuals = merge.count
            if visuals is None:
                visuals = sum(feature.numel() // hidden.shape[2] for feature in features) // hidden.shape[0]
            subjects = self.options.subject_count(visuals)
            visual = visual.expand(hidden.shape[0], -1)
            return partition(scores, visual, subjects, visuals), subjects, visuals

        with editor.graph.inserting_before(last.next):
            visual = editor.inline(union, *merge.masks)
            scores = trace_rule(editor, self.options.score, merge, visual)
            features = merge.features if merge.count is None else ()
            tensors, subjects, visuals = editor.inline(split, merge.output, scores, visual, *features)
            choices = ("subject", "non_subject", "text", "text_in_subject", "text_in_non_subject")
            rows = {name: Rows(name, tensors[name], editor.size(tensors[name], 1)) for name in choices}
            everything = Rows("everything", None, editor.size(merge.output, 1))
        state.partition = Partition(
            **(dict(tensors) | rows), everything=everything, visual_count=visuals, subject_count=subjects)
        return PassResult(count, f"{_show(subjects)} of {_show(visuals)} visual tokens in the subject group")


def _show(count: object) -> str:
    return str(count) if isinstance(count, int) else str(count.meta["example_value"])
