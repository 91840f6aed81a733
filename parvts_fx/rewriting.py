"""From a graph to its rewritten form: capture, analyse, run the passes, verify."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.fx import GraphModule

from parvts_fx.analysis import Decoder, VisualMerge, find_decoder
from parvts_fx.analysis.calls import attention_nodes, composed
from parvts_fx.analysis.decoder import attention_follows
from parvts_fx.analysis.values import concrete, hint, output_node, value
from parvts_fx.capture import capture, copy_graph_module
from parvts_fx.capture.editing import COUNTS
from parvts_fx.capture.invert_permutations import InvertPermutations
from parvts_fx.capture.name_attention import NameAttention, kernels
from parvts_fx.capture.return_states import ReturnStates, write_states
from parvts_fx.capture.separate_caches import SeparateCaches
from parvts_fx.capture.spread_masked_updates import SpreadMaskedUpdates
from parvts_fx.capture.version_writes import VersionWrites
from parvts_fx.capture.write_out_attention import WriteOutAttention
from parvts_fx.capture.write_out_sizes import WriteOutSizes
from parvts_fx.errors import NotRewritten, Refusal
from parvts_fx.options import Options, parse_options
from parvts_fx.passes import Pass, Plan, PlanError, build_pipeline
from parvts_fx.passes.describe import layer_reports, merging
from parvts_fx.passes.dumps import Dump, log_hook
from parvts_fx.passes.parted import Parted
from parvts_fx.passes.single_sample import part
from parvts_fx.passes.verify import CHEAP_CHECKS, Check, verifier
from parvts_fx.pipeline import Work, run_pipeline
from parvts_fx.report import GraphReport
from parvts_fx.rewritten import Rewriting, as_traced
from parvts_fx.runtime.garbage import no_collections
from parvts_fx.runtime.guards import Precondition, guards_for, merged_mask, same_count, uneven, visual_mask
from parvts_fx.runtime.merged_embeddings import MergedInput, can_hand_on
from parvts_fx.runtime.padding import padding_check
from parvts_fx.runtime.prompt_merges import has_visuals, prompt_merge, refuse_unseen_merges, report_merges, stream_input
from parvts_fx.runtime.record import KEPT_ALL
from parvts_fx.scores import reads_text
from parvts_fx.stages import dropping
from parvts_fx.torch_private import FakeTensor

FEWER = "there are fewer visual tokens than samples in the prompt that this graph was captured for"
_UNSEEN = "no visual features are merged into embeddings"


@no_collections()
def rewrite_graph(
    module: GraphModule,
    example_inputs: Sequence[object],
    options: Options,
    passes: Sequence[Pass] | None = None,
    checks: tuple[Check, ...] = CHEAP_CHECKS,
    window_caches_follow: bool = False,
    handed: MergedInput | None = None,
    may_wait: bool = False,
) -> Rewriting:
    """Rewrite a copy of the graph.

    Args:
        may_wait: whether a batch whose samples differ, for which what is written would not be used, leaves it unwritten; the
            result tells what is needed to write it when one comes that it is for.
        handed: an input that holds embeddings with visual features merged in, which happened in an earlier graph. The
            rewritten graph takes one input more, the [batch, seq] bool mask of visual tokens.

    Raises:
        Refusal: it is a multimodal prefill, and rewriting it might give a wrong answer.
        ValueError: an option does not fit this model.
    """
    start, nodes = time.perf_counter(), len(module.graph.nodes)
    work = capture(module, example_inputs)
    dump = Dump(work)
    job = Work(work, hooks=(verifier(checks), log_hook, dump))
    _name_attention(job)
    attentions = attention_nodes(work.graph)
    merge = prompt_merge(job, attentions, example_inputs, options, handed)
    if merge is None:
        return Rewriting(GraphReport("untouched", _UNSEEN, nodes))
    given = (*example_inputs, handed.visual) if handed else tuple(example_inputs)
    facts: dict[str, Any] = {"nodes": nodes, "merges": report_merges(work, merge, given, handed)}
    follows = attention_follows(work.graph, merge)
    if not has_visuals(merge, handed) and (follows or not can_hand_on(merge.output)):
        return Rewriting(GraphReport("untouched", _UNSEEN, **facts))
    stream = stream_input(work, merge)
    if has_visuals(merge, handed):
        refuse_unseen_merges(work, merge, example_inputs, handed, stream)
    if not follows and can_hand_on(merge.output):
        report = GraphReport("untouched", "visual features are merged here, for a decoder in another graph", **facts)
        return Rewriting(
            report, merge=merge, visual_mask=visual_mask(work, merge), merged_mask=merged_mask(work, merge))
    _canonicalise(job, merge)
    decoder = find_decoder(work, window_caches_follow, merge, given)
    if decoder is None:
        return Rewriting(GraphReport("untouched", _UNSEEN, **facts))
    facts["analysis_milliseconds"] = 1e3 * (time.perf_counter() - start)
    _refuse_gradients(example_inputs, module)
    tokens, count = merge.visual_tokens, None
    if tokens is None or hint(tokens) is None:  # rewrite for the prompt at hand
        visual = _visual(work, merge, given)
        count = same_count(visual)
        if count is None:
            return _for_no_batch(uneven(visual), work, merge, stream, facts)
    elif isinstance(tokens, torch.SymInt) and isinstance(concrete(value(merge.output).shape[1]), int):
        count = hint(tokens)  # prompts of one length have one number of them, as a rule: nothing need be symbolic
    if count is not None:
        merge = dataclasses.replace(merge, count=count)
        decoder = dataclasses.replace(decoder, merge=merge)
    if may_wait and (differ := _how_samples_differ(work, merge, given)):
        return _for_no_batch(differ, work, merge, stream, facts)
    if hint(decoder.visual_tokens) == 0:
        return _for_no_batch(FEWER, work, merge, stream, facts)
    if _keeps_mean(decoder, options):
        return _for_no_batch(KEPT_ALL, work, merge, stream, facts, "untouched")
    done = _write(job, decoder, options, passes, facts, dump)
    return done if done.module is None else dataclasses.replace(done, stream=stream, handed=handed is not None)


def _name_attention(job: Work) -> None:
    """Write every attention call as one that the analysis knows."""
    if kernels(job.module.graph):
        run_pipeline([NameAttention()], job)
    if composed(job.module.graph):
        run_pipeline([WriteOutAttention()], job)


def _canonicalise(job: Work, merge: VisualMerge) -> None:
    attentions, merged = attention_nodes(job.module.graph), merge.output
    run_pipeline([WriteOutSizes(), InvertPermutations(), SpreadMaskedUpdates(merged, attentions), VersionWrites(merged),
                  ReturnStates(merged), SeparateCaches(merged)], job)


@no_collections()
def part_graph(
    module: GraphModule, example_inputs: Sequence[object], options: Options, window_caches_follow: bool = False,
    handed: MergedInput | None = None,
) -> Parted:
    """The two parts of a graph that :func:`rewrite_graph` takes, for batches for which its result is not meant. Args as there.

    Raises:
        Refusal: it cannot be parted.
    """
    work = capture(module, example_inputs)
    job = Work(work)
    _name_attention(job)
    merge = prompt_merge(job, attention_nodes(work.graph), example_inputs, options, handed)
    if merge is None:
        raise Refusal(_UNSEEN)
    _canonicalise(job, merge)
    decoder = find_decoder(work, window_caches_follow, merge, (*example_inputs, handed.visual) if handed else example_inputs)
    if decoder is None:
        raise Refusal(_UNSEEN)
    return part(work, decoder)


def _write(
    job: Work, decoder: Decoder, options: Options, passes: Sequence[Pass] | None, facts: dict[str, Any], dump: Dump
) -> Rewriting:
    """Plan what runs on which rows, and write it."""
    work, merge, visuals = job.module, decoder.merge, decoder.visual_tokens
    batch, size, _ = value(merge.output).shape
    stages = options.placed(len(decoder.layers))
    subjects = options.subject_count(hint(visuals))
    facts |= {
        "prompt_tokens": hint(size), "batch": hint(batch), "visual_tokens": hint(visuals), "subject_tokens": subjects,
        "migration_depth": sum(stage.end - stage.at for stage in stages),
    }
    if options.keeps_all or hint(visuals) == subjects and isinstance(visuals, int):
        return Rewriting(GraphReport("untouched", KEPT_ALL, **facts))
    stages, mask = dropping(stages, visuals), visual_mask(work, merge)
    precondition = Precondition(work, merge, mask) if merge.count is None else None
    padding = padding_check(work, decoder, any(reads_text(stage.stage.rule) for stage in stages))
    guards = guards_for(precondition, padding, None if isinstance(visuals, int) else options.schedule)
    dump.tell(merge, hint(visuals))
    job.plan, end = Plan(decoder, options, stages), output_node(work.graph)
    run_pipeline(build_pipeline(options) if passes is None else passes, job)
    if job.written is None:
        raise PlanError("parvts_fx: the pipeline lacks the pass emit, without which no graph is written")
    write_states(job, end)
    work.meta[COUNTS] = job.plan.text_count, job.plan.visual_counts
    work.recompile()
    told_by = "" if decoder.period is None else decoder.period.told_by
    report = GraphReport(
        "rewritten", layers=layer_reports(job.plan), layers_told_by=told_by, merging=merging(job.plan),
        passes=tuple(job.records), **facts)
    rows = job.written.rows if job.written.rows in set(work.graph.nodes) else None
    return Rewriting(report, work, precondition, merge, mask, guards=guards, rows=rows)


def _keeps_mean(decoder: Decoder, options: Options) -> bool:
    """Whether as many visual tokens are kept as samples have in the mean: one may have more, and so may a prompt of the same
    sizes where these do not tell their number."""
    visuals, batch = decoder.visual_tokens, hint(value(decoder.merge.output).shape[0])
    varies = batch > 1 or decoder.merge.count is not None
    return varies and not options.keeps_all and isinstance(visuals, int) and options.subject_count(visuals) == visuals


def _for_no_batch(
    reason: str, work: GraphModule, merge: VisualMerge, stream: int | None, facts: Mapping[str, Any],
    status: Literal["unrewritten", "untouched"] = "unrewritten",
) -> Rewriting:
    """What is known of a graph that has been compiled for samples with different numbers of visual tokens."""
    mask = visual_mask(work, merge)
    precondition = Precondition(work, merge, mask) if merge.count is None and merge.visual_tokens is not None and (
        hint(merge.visual_tokens) is not None) else None
    return Rewriting(
        GraphReport(status, reason, **facts), precondition=precondition, merge=merge, visual_mask=mask, stream=stream)


def _visual(module: GraphModule, merge: VisualMerge, example_inputs: Sequence[object]) -> torch.Tensor:
    """[batch, seq] bool: the visual tokens of the prompt that is being compiled."""
    reason = Refusal("the number of visual tokens depends on data", merge.output)
    if any(isinstance(given, FakeTensor) for given in example_inputs):
        raise reason
    try:
        return visual_mask(module, merge)(*example_inputs)
    except Exception as error:  # sizes that no input has, say
        raise reason from error


def _how_samples_differ(module: GraphModule, merge: VisualMerge, example_inputs: Sequence[object]) -> str:
    """Of the prompt that is being compiled, in words; empty where they do not, and where its tokens are not told."""
    if hint(value(merge.output).shape[0]) == 1 or any(isinstance(given, FakeTensor) for given in example_inputs):
        return ""
    visual = visual_mask(module, merge)(*as_traced(example_inputs))
    return uneven(visual) if same_count(visual) is None else ""


def _refuse_gradients(example_inputs: Sequence[object], module: GraphModule) -> None:
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad
        for x in (*example_inputs, *(value(n) for n in module.graph.nodes if n.op == "placeholder"))
    ):
        raise Refusal("gradients are recorded; pruning is for inference (use torch.no_grad() or torch.inference_mode())")


def rewrite(
    module: GraphModule,
    example_inputs: Sequence[object],
    options: Options | Mapping[str, Any] | None = None,
    passes: Sequence[Pass] | None = None,
) -> GraphModule:
    """Rewrite an FX graph of a multimodal prefill, for those who hold one.

    Args:
        module: a graph from Dynamo, ``torch.export`` or ``symbolic_trace``; it stays as it is.
        example_inputs: one per placeholder.
        options: as for ``torch.compile(..., options=...)``.
        passes: a pipeline of your own; None for the one that the options ask for.

    Returns:
        A new module. ``result.meta["parvts_fx"]`` holds the :class:`~parvts_fx.report.GraphReport`, and
        ``result.meta["parvts_fx_precondition"]`` a function of the inputs that tells whether the rewritten graph may
        be used for them (every sample has as many visual tokens as the sizes imply), or None. A graph that cannot be
        rewritten comes back as an unchanged copy whose report gives the reason.

    Raises:
        NotRewritten: with ``strict=True``, in place of the unchanged copy.
        ValueError: bad options.
    """
    parsed = parse_options(options)
    try:
        done = rewrite_graph(module, example_inputs, parsed, passes)
    except Refusal as refusal:
        if parsed.strict:
            raise NotRewritten(str(refusal)) from refusal
        done = Rewriting(GraphReport("unrewritten", str(refusal), len(module.graph.nodes)))
    if done.report.status == "unrewritten" and parsed.strict:
        raise NotRewritten(done.report.reason)
    result = copy_graph_module(module) if done.module is None else done.module
    result.meta["parvts_fx"] = done.report
    result.meta["parvts_fx_precondition"] = done.precondition
    str(result.code)  # written now: torch.export reads the signature of forward, which a lazy module does not have yet
    return result
