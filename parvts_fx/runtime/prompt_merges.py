"""What is merged into the prompt of one graph: all of it, seen with what the graphs before it have told."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.merge import find_merge
from parvts_fx.analysis.modality import MODALITIES, UNKNOWN, content_before
from parvts_fx.analysis.records import Merge, VisualMerge
from parvts_fx.analysis.values import hint, is_tensor, value
from parvts_fx.capture.unify_merges import UnifyMerges
from parvts_fx.errors import Refusal
from parvts_fx.options import Options
from parvts_fx.pipeline import Work, run_pipeline
from parvts_fx.report import MergeReport
from parvts_fx.runtime.call import current_call
from parvts_fx.runtime.guards import merged_mask, same_count, visual_mask
from parvts_fx.runtime.input_origins import noted_origins
from parvts_fx.runtime.merged_embeddings import MergedInput, merged_in_front
from parvts_fx.torch_private import FakeTensor


def prompt_merge(
    job: Work, attentions: set[Node], example_inputs: Sequence[object], options: Options,
    handed: MergedInput | None = None,
) -> VisualMerge | None:
    """Where features enter, written as one kind of merge; with what has been handed over, if anything has."""
    work = job.module
    texts, origins = noted_origins(work, example_inputs)
    first = None if handed is None else handed.receive(work)
    if first is not None and handed is not None and not handed.by_graph:
        first = dataclasses.replace(first, prunable=options.prunes(UNKNOWN))
    run_pipeline([UnifyMerges(attentions, first and first.output, texts, origins)], job)
    merge = find_merge(work.graph, attentions, handed=first, texts=texts, origins=origins, prunes=options.prunes)
    if merge is not None and handed is not None and merge.merges == (first,):
        return dataclasses.replace(merge, count=int(handed.visual[0].sum()))
    return merge


def has_visuals(merge: VisualMerge, handed: MergedInput | None) -> bool:
    """Whether anything that may be dropped is merged, in this graph or in front of it."""
    own = [held for held in merge.merges if held.prunable and not (handed and held is merge.merges[0])]
    return bool(own) or handed is not None and merge.merges[0].prunable and bool(handed.visual.any())


def refuse_unseen_merges(
    work: GraphModule, merge: VisualMerge, example_inputs: Sequence[Any], handed: MergedInput | None, position: int | None
) -> None:
    """
    Raises:
        Refusal: the embeddings that this graph merges into hold rows that are no id's own and that no graph has merged.
    """
    if position is None or any(isinstance(given, FakeTensor) for given in example_inputs) or handed and len(merge.merges) == 1:
        return
    given = example_inputs[position]
    merged, foreign = merged_in_front(given)
    unseen = merged is None and current_call().has_lost(given)
    if foreign is not None and not unseen:
        own = merged_mask(work, merge)(*example_inputs, *((torch.zeros_like(foreign),) if handed else ()))
        rows = given[foreign & ~own if merged is None else foreign & ~own & ~merged]
        # if all are alike, they are yet to be filled
        unseen = len(rows) > 0 and not (len(rows) > 1 and bool((rows == rows[0]).all()))
    if unseen:
        raise Refusal("the prompt that this graph merges features into holds others that no captured graph handed on: the "
                      "model merges some of its features in code that Dynamo does not capture, or changes the merged "
                      "embeddings between two graphs", merge.output)


def stream_input(work: GraphModule, merge: VisualMerge) -> int | None:
    """Which input holds the embeddings that all is merged into; None where the graph looks them up itself."""
    node = merge.output
    merged = {source for held in merge.merges for source in (held.features, held.mask) if source is not node}
    behind, wide = content_before([node], without=merged), value(node).shape[2]
    for position, source in enumerate(node for node in work.graph.nodes if node.op == "placeholder"):
        if source in behind and is_tensor(source) and value(source).dim() == 3 and value(source).is_floating_point() and (
                value(source).shape[2] == wide) and not isinstance(value(source), torch.nn.Parameter):
            return position
    return None


def report_merges(
    module: GraphModule, merge: VisualMerge, inputs: Sequence[object], handed: MergedInput | None = None
) -> tuple[MergeReport, ...]:
    """What is merged in this graph, given its inputs; what has been handed over is told by the graph that merged it."""
    own = merge.merges[1:] if handed and handed.by_graph else merge.merges
    return tuple(_report_merge(module, merge, held, inputs) for held in own)


def _report_merge(module: GraphModule, merge: VisualMerge, held: Merge, inputs: Sequence[object]) -> MergeReport:
    one = dataclasses.replace(
        merge, masks=(held.mask,), features=(held.features,) if held.sized else (), count=None)
    tokens = None if one.visual_tokens is None else hint(one.visual_tokens)
    if tokens is None and not any(isinstance(given, FakeTensor) for given in inputs):
        with contextlib.suppress(RuntimeError, IndexError):  # sizes that no input has, say
            tokens = same_count(visual_mask(module, one)(*inputs))
    modality = " and ".join(name for name in MODALITIES if name in held.origin.modalities) or UNKNOWN
    return MergeReport(modality, tokens, ", ".join(held.origin.evidence), held.prunable)
