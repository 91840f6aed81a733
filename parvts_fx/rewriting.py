"""From a graph to its rewritten form: capture, analyse, run the passes, verify."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from parvts_fx.analysis import Decoder, VisualMerge, find_decoder
from parvts_fx.analysis.calls import attention_nodes
from parvts_fx.analysis.decoder import NoDecoder
from parvts_fx.analysis.merge import find_merge
from parvts_fx.analysis.modality import MODALITIES, UNKNOWN, content_before
from parvts_fx.analysis.records import Merge
from parvts_fx.analysis.values import descendants, hint, is_tensor, value
from parvts_fx.capture import capture, copy_graph_module
from parvts_fx.errors import NotRewritten, Refusal
from parvts_fx.handover import MergedInput, can_hand_on, lost_merges, merged_in_front
from parvts_fx.observe import dump_hook, log_hook
from parvts_fx.options import Options, parse_options
from parvts_fx.origins import noted_origins
from parvts_fx.padding import padding_check
from parvts_fx.passes import Pass, State, build_pipeline, run_pipeline
from parvts_fx.passes.invert_permutations import InvertPermutations
from parvts_fx.passes.spread_masked_updates import SpreadMaskedUpdates
from parvts_fx.passes.unify_merges import UnifyMerges
from parvts_fx.passes.version_writes import VersionWrites
from parvts_fx.passes.write_out_sizes import WriteOutSizes
from parvts_fx.precondition import Precondition, merged_mask, same_count, visual_mask
from parvts_fx.report import GraphReport, LayerReport, MergeReport
from parvts_fx.scores import reads_text
from parvts_fx.verify import CHEAP_CHECKS, Check, verifier


@dataclasses.dataclass(frozen=True)
class Rewriting:
    """A graph's rewritten form, what must hold of its inputs, and what was done. ``module`` is None if untouched."""

    report: GraphReport
    module: GraphModule | None = None
    precondition: Precondition | None = None
    """None where the graph is rewritten for one number of visual tokens."""

    merge: VisualMerge | None = None
    visual_mask: Callable[..., torch.Tensor] | None = None
    """Of the rewritten graph's inputs: [batch, seq] bool, true where a visual token stands."""

    merged_mask: Callable[..., torch.Tensor] | None = None
    """The same, true where a feature of any modality stands; for a graph whose decoder is in another one."""

    stream: int | None = None
    """Which input holds the embeddings that all is merged into; None where the graph looks them up itself."""

    padding: Callable[..., bool] | None = None
    """Of that mask and the rewritten graph's inputs: whether padding stands behind a visual token, where that matters."""


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Without Python's search for cyclic garbage: beside a captured model of 32 layers one takes half a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_collections()
def rewrite_graph(
    module: GraphModule,
    example_inputs: Sequence[object],
    options: Options,
    passes: Sequence[Pass] | None = None,
    checks: tuple[Check, ...] = CHEAP_CHECKS,
    window_caches_follow: bool = False,
    handed: MergedInput | None = None,
) -> Rewriting:
    """Rewrite a copy of the graph.

    Args:
        handed: an input that holds embeddings with visual features merged in, which happened in an earlier graph. The
            rewritten graph takes one input more, the [batch, seq] bool mask of visual tokens.

    Raises:
        Refusal: it is a multimodal prefill, and rewriting it might give a wrong answer.
        ValueError: an option does not fit this model.
    """
    start = time.perf_counter()
    nodes = len(module.graph.nodes)
    work = capture(module, example_inputs)
    attentions = attention_nodes(work.graph)
    merge = _find_merge(work, attentions, example_inputs, options, handed)
    given = (*example_inputs, handed.visual) if handed else tuple(example_inputs)
    merges = report_merges(work, merge, given, handed) if merge else ()
    if merge is None or _is_without_visuals(work, merge, attentions, handed):
        reason = "all that is merged into embeddings is sound" if merges else "no visual features are merged into embeddings"
        return Rewriting(GraphReport("untouched", reason, nodes, merges=merges))
    stream = stream_input(work, merge)
    _refuse_unseen_merges(work, merge, example_inputs, handed, stream)
    normalise(work, merge)
    decoder = find_decoder(work, window_caches_follow, merge)
    if decoder is None:
        return Rewriting(GraphReport("untouched", "no visual features are merged into embeddings", nodes, merges=merges))
    analysis = 1e3 * (time.perf_counter() - start)
    options = options.for_layers(len(decoder.layers))
    _check_fit(options, decoder, example_inputs, module)
    batch, size, _ = value(merge.output).shape
    if merge.visual_tokens is None or hint(merge.visual_tokens) is None:  # it depends on data: rewrite for the prompt at hand
        merge = dataclasses.replace(merge, count=_count(work, merge, given))
        decoder = dataclasses.replace(decoder, merge=merge)
    visuals = merge.visual_tokens
    subjects = options.subject_count(hint(visuals))
    facts = {
        "nodes": nodes, "prompt_tokens": hint(size), "batch": hint(batch), "visual_tokens": hint(visuals),
        "subject_tokens": subjects, "merges": merges, "migration_depth": options.migration_depth, "analysis_milliseconds": analysis,
    }
    if options.keeps_all or hint(visuals) == subjects and isinstance(visuals, int):
        return Rewriting(GraphReport("untouched", "all visual tokens are kept", **facts))
    if hint(visuals) == 0:
        raise Refusal("there are fewer visual tokens than samples", merge.output)
    mask = visual_mask(work, merge)
    precondition = Precondition(work, merge, mask) if merge.count is None else None
    padding = padding_check(work, decoder, reads_text(options.score))
    state = State(work, decoder, options)
    hooks = [verifier(checks), log_hook, dump_hook(work, merge, hint(visuals))]
    records = run_pipeline(build_pipeline(options) if passes is None else passes, state, hooks)
    work.recompile()
    layers = tuple(_layer_report(layer, options, facts) for layer in decoder.layers)
    return Rewriting(GraphReport("rewritten", layers=layers, passes=tuple(records), **facts), work, precondition, merge, mask,
                     stream=stream, padding=padding)


def _find_merge(
    work: GraphModule, attentions: set[Node], example_inputs: Sequence[object], options: Options, handed: MergedInput | None
) -> VisualMerge | None:
    """Where features enter, written as one kind of merge; with what has been handed over, if anything has."""
    texts, origins = noted_origins(work, example_inputs)
    first = handed and handed.receive(work)
    if first is not None and not handed.by_graph:
        first = dataclasses.replace(first, prunable=options.prunes(UNKNOWN))
    UnifyMerges().run(work, attentions, first and first.output, texts, origins)
    merge = find_merge(work.graph, attentions, handed=first, texts=texts, origins=origins, prunes=options.prunes)
    if first is not None and merge.merges == (first,):
        return dataclasses.replace(merge, count=int(handed.visual[0].sum()))
    return merge


def _is_without_visuals(work: GraphModule, merge: VisualMerge, attentions: set[Node], handed: MergedInput | None) -> bool:
    """Whether nothing that may be dropped is merged in front of a decoder.

    Raises:
        NoDecoder: nothing so far, and the decoder is in another graph, for which more may be merged.
    """
    own = [held for held in merge.merges if held.prunable and not (handed and held is merge.merges[0])]
    if own or handed and merge.merges[0].prunable and handed.visual.any():
        return False
    if attentions.isdisjoint(descendants(work.graph, [merge.output])) and can_hand_on(merge.output):
        raise NoDecoder(work, merge)
    return True


def _refuse_unseen_merges(
    work: GraphModule, merge: VisualMerge, example_inputs: Sequence[object], handed: MergedInput | None, position: int | None
) -> None:
    """
    Raises:
        Refusal: the embeddings that this graph merges into hold rows that are no id's own and that no graph has merged.
    """
    if position is None or any(isinstance(given, FakeTensor) for given in example_inputs) or handed and len(merge.merges) == 1:
        return
    given = example_inputs[position]
    merged, foreign = merged_in_front(example_inputs, position)
    unseen = merged is None and lost_merges(given)
    if foreign is not None and not unseen:
        own = merged_mask(work, merge)(*example_inputs, *((torch.zeros_like(foreign),) if handed else ()))
        rows = given[foreign & ~own if merged is None else foreign & ~own & ~merged]
        # if all are alike, they are yet to be filled
        unseen = len(rows) > 0 and not (len(rows) > 1 and bool((rows == rows[0]).all()))
    if unseen:
        raise Refusal("the prompt that this graph merges features into holds others that no captured graph handed on: the model "
                      "merges some of its features in code that Dynamo does not capture, or changes the merged embeddings "
                      "between two graphs", merge.output)


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


def normalise(module: GraphModule, merge: VisualMerge) -> None:
    """Write what follows the merge in forms whose sizes follow the number of rows, so that the analysis can follow."""
    WriteOutSizes().run(module)
    InvertPermutations().run(module)
    SpreadMaskedUpdates().run(module, merge.output, attention_nodes(module.graph))
    VersionWrites().run(module, merge.output)


def _count(module: GraphModule, merge: VisualMerge, example_inputs: Sequence[object]) -> int:
    """Visual tokens per sample of the prompt that is being compiled."""
    reason = Refusal("the number of visual tokens depends on data", merge.output)
    if any(isinstance(given, FakeTensor) for given in example_inputs):
        raise reason
    try:
        count = same_count(visual_mask(module, merge)(*example_inputs))
    except Exception as error:  # sizes that no input has, say
        raise reason from error
    if count is None:
        raise Refusal("the samples of this batch have different numbers of visual tokens", merge.output)
    return count


def _check_fit(options: Options, decoder: Decoder, example_inputs: Sequence[object], module: GraphModule) -> None:
    count = len(decoder.layers)
    if options.migration_depth > count:
        raise ValueError(f"parvts_fx: option migration_depth={options.migration_depth!r}: expected at most the model's "
                         f"{count} decoder layers. Use a value from 0 to {count}.")
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad
        for x in (*example_inputs, *(value(n) for n in module.graph.nodes if n.op == "placeholder"))
    ):
        raise Refusal("gradients are recorded; pruning is for inference (use torch.no_grad() or torch.inference_mode())")


def _layer_report(layer: Any, options: Options, facts: Mapping[str, int]) -> LayerReport:
    kinds = ", ".join(dict.fromkeys(attention.kind for attention in layer.attentions)) or "no attention"
    size, visuals, subjects = facts["prompt_tokens"], facts["visual_tokens"], facts["subject_tokens"]
    kept = size - visuals + subjects
    if layer.index >= options.migration_depth:
        rows = {"kept": kept}
    elif options.paths == "joint":
        rows = {"all": size}
    elif options.fusion == "attention":
        rows = {"text": size - visuals, "subject": subjects, "non-subject": visuals - subjects}
    else:
        rows = {"subject path": kept, "non-subject path": size - subjects}
    return LayerReport(layer.index, kinds, rows)


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
    result = copy_graph_module(module) if done.module is None else done.module
    result.meta["parvts_fx"] = done.report
    result.meta["parvts_fx_precondition"] = done.precondition
    return result
