"""Puts the decoder's anatomy together: merge, token axes, attention calls, and the layers between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from parvts_fx.analysis.attention import copies_of_joins, find_attentions
from parvts_fx.analysis.blocks import matrices_of
from parvts_fx.analysis.calls import attention_nodes
from parvts_fx.analysis.extents import SAMPLES
from parvts_fx.analysis.grids import find_grid
from parvts_fx.analysis.independence import find_meetings
from parvts_fx.analysis.last_rows import is_state, keeps_rows_apart, nodes_without_tokens, reads_tokens
from parvts_fx.analysis.layers import find_entry, find_layers
from parvts_fx.analysis.lengths import check_numbers, scales_scores
from parvts_fx.analysis.merge import find_merge
from parvts_fx.analysis.mixers import find_mixers
from parvts_fx.analysis.numbered import find_numbered
from parvts_fx.analysis.probe import Probe
from parvts_fx.analysis.records import Decoder, VisualMerge
from parvts_fx.analysis.small_runs import SmallRuns
from parvts_fx.analysis.tables import Tables
from parvts_fx.analysis.tokens import TokenMap
from parvts_fx.analysis.values import (
    SUMS,
    changed_in_place,
    descendants,
    has_target,
    hint,
    hint_shape,
    is_tensor,
    leaves,
    output_node,
    storage_of,
    value,
    writes_unseen,
)
from parvts_fx.errors import Refusal
from parvts_fx.torch_private import HigherOrderOperator

TOKEN, SAMPLE = "token", "sample"
_FRESH = (torch.empty, torch.zeros, torch.ones, torch.full)


NO_DECODER = (
    "visual features are merged in this graph, but no attention that is understood follows: the graph breaks between the merge "
    "and the decoder, or the model uses an attention that is neither scaled_dot_product_attention nor a softmax")


def attention_follows(graph: Graph, merge: VisualMerge) -> bool:
    """Whether any attention reads what has been merged: else the decoder is in another graph."""
    return not attention_nodes(graph).isdisjoint(descendants(graph, [merge.output]))


def find_decoder(
    module: GraphModule, window_caches_follow: bool = False, merge: VisualMerge | None = None,
    given: Sequence[object] = (),
) -> Decoder | None:
    """Find the multimodal decoder in a captured graph.

    Args:
        merge: where visual features enter, if that is known; None to look for it.
        window_caches_follow: the caller corrects the token counts of sliding-window caches after each prefill.
        given: the graph's inputs in order, for proofs about weights that noise cannot stand for (quantised ones).

    Returns:
        The anatomy, or None where no visual features are merged into embeddings (a text prompt, a decode step, a
        vision tower, a head): there is nothing to prune in such a graph.

    Raises:
        Refusal: there is a merge, but what follows it is not understood.
    """
    merge = merge or find_merge(module.graph, attention_nodes(module.graph))
    if merge is None:
        return None
    batch, size, _ = value(merge.output).shape
    if hint(size) == 1:
        return None
    if hint(size) is None or hint(batch) is None:
        raise Refusal("the prompt's length depends on data", merge.output)
    nodes = _with_buffers(module.graph, descendants(module.graph, [merge.output]), size)
    if not any(node in attention_nodes(module.graph) for node in nodes):
        apart = next((node for node in nodes if isinstance(node.target, HigherOrderOperator)), None)
        raise Refusal(NO_DECODER, merge.output) if apart is None else Refusal(
            f"no attention follows the merge but in subgraphs of '{apart.target}', such as gradient checkpointing makes, which "
            "inference has no use for (model.eval(), model.gradient_checkpointing_disable())", apart)
    unseen = next(filter(writes_unseen, nodes), None)
    if unseen is not None:
        raise Refusal("an operation of the model's own library writes into its arguments", unseen)
    tokens = _token_axes(module, nodes, merge.output, size)
    attentions = find_attentions(module, nodes, tokens)
    if not attentions:
        raise Refusal("no attention call reads the merged tokens as both queries and keys (a preallocated cache, say, "
                      "whose length the graph cannot change)", merge.output)
    samples = _sample_axes(module, nodes, merge.output, batch) if hint(batch) > 1 else None
    inputs = (node for node in module.graph.nodes if node.op == "placeholder")
    runs = SmallRuns(module, tokens, samples, dict(zip(inputs, given)))
    check_numbers(runs, nodes)
    sample_layouts = _apart(runs, nodes, merge.output)
    mixers, unordered = find_mixers(runs, nodes, merge.output, attentions)
    layers, final, output, period, kept = find_layers(module, nodes, mixers, tokens, merge.output)
    check_numbers(runs, nodes, float, _in_head(module.graph, nodes, tokens, final, output),
                  lambda node: scales_scores(node, attentions, tokens))
    meeting = {mixer.output for mixer in mixers if mixer.attention is None}
    tables = Tables(runs)
    tables.check(nodes, meeting, attentions, layers)
    numbered = find_numbered(tables, nodes, attentions, {final, *(layer.input for layer in layers)})
    decoder = Decoder(merge, tuple(nodes), tuple(layers), final, output, tokens, window_caches_follow, period, samples,
                      sample_layouts, find_entry(nodes, layers, merge.output), unordered,
                      find_grid(nodes, merge.output, layers[0].input), numbered, kept)
    _check(module, decoder)
    return decoder


def _token_axes(module: GraphModule, nodes: list[Node], start: Node, size: int | torch.SymInt) -> TokenMap:
    """Probe with a longer prompt, or where that does not work with a shorter one: what pads up to blocks has room then."""
    problems: list[Refusal] = []
    for shorter in (False, True):
        try:
            probe = Probe(module, size, Probe.lengths_for(module, size, [TOKEN], shorter))
            probe.seed(start, {1: TOKEN})
            probe.run([node for node in nodes if node is not start])
            return probe.found
        except Refusal as refusal:
            problems.append(refusal)
    raise next((problem for problem in problems if problem.names_tell), problems[0])


def _sample_axes(module: GraphModule, nodes: list[Node], start: Node, batch: int | torch.SymInt) -> TokenMap:
    """Probe with a larger batch."""
    probe = Probe(module, batch, Probe.lengths_for(module, hint(batch), [SAMPLE]), "batch size")
    probe.seed(start, {0: SAMPLE})
    probe.run([node for node in nodes if node is not start])
    return probe.found


def _apart(runs: SmallRuns, nodes: list[Node], start: Node) -> dict[Node, dict[int, int]]:
    """How the samples' entries lie in each tensor, where no sample's result depends on another.

    Raises:
        Refusal: samples meet, or it cannot be shown that they do not.
    """
    if runs.samples is None:
        return {}
    found = find_meetings(runs, SAMPLES, nodes, {start})
    if found.meeting:
        raise Refusal("the samples of a batch are not computed apart from one another here, or that cannot be shown",
                      found.meeting[0])
    return found.layouts


def _in_head(
    graph: Graph, nodes: Sequence[Node], tokens: TokenMap, final: Node, output: Node | None
) -> Callable[[Node, float], bool]:
    """Whether a fraction scales the head's logits, where no row is counted: it stands behind the head's matrix.

    Where the last layer's end is not known, the head's are those that stand behind all mixers and nowhere else.
    """
    behind = set(descendants(graph, [final if output is None else output]))
    head = set(descendants(graph, [node for node in nodes if node in behind and any(True for _ in matrices_of(node, tokens))]))
    others = {leaf for node in nodes if node not in head for leaf in leaves(node) if isinstance(leaf, float)}
    return lambda node, leaf: node in head and (output is not None or leaf >= 1 and leaf not in others)


def _with_buffers(graph: Graph, nodes: list[Node], size: int | torch.SymInt) -> list[Node]:
    """The nodes, and the fresh tensors that are as long as what the nodes do with them: those that they write into, and those
    with several entries a token (the rows of all samples, say)."""
    written = {storage_of(target) for node in nodes if (target := changed_in_place(node)) is not None}
    inside, buffers = set(nodes), set[Node]()
    for node in graph.nodes:
        if node in inside or not is_tensor(node):
            continue
        if storage_of(node) in written and (has_target(node, _FRESH) or buffers & set(node.all_input_nodes)):
            buffers.add(node)
        elif has_target(node, _FRESH) and not inside.isdisjoint(node.users) and any(
                entries and entries > hint(size) and entries % hint(size) == 0 for entries in hint_shape(value(node))):
            buffers.add(node)
    return [node for node in graph.nodes if node in inside or node in buffers]


def _check(module: GraphModule, decoder: Decoder) -> None:
    """What would make dropping rows wrong, wherever it stands in the decoder."""
    tokens = decoder.tokens
    joins = copies_of_joins(decoder.nodes, (call for layer in decoder.layers for call in layer.attentions), tokens)
    after_last = set(descendants(module.graph, [decoder.final]))
    inside = {*decoder.nodes, *(own for layer in decoder.layers for call in layer.attentions for own in call.nodes)}
    for node in decoder.nodes:
        target = changed_in_place(node)
        if target is not None and target not in inside:
            raise Refusal("the decoder writes into one of its inputs (a preallocated cache, say)", node)
    for node in output_node(module.graph).all_input_nodes:
        if node not in tokens.axes:
            continue
        odd = [kind for kind in tokens.axes[node].values() if not kind.is_plain and node not in joins]
        if odd:
            raise Refusal(f"an output counts its tokens as {odd}", node)
        for source in nodes_without_tokens(decoder.nodes, node, tokens):
            if not reads_tokens(source, tokens):
                continue
            if not keeps_rows_apart(source, tokens):
                if node in after_last:
                    raise Refusal("an output reduces over the prompt's tokens (a loss or a pooling, say)", source)
            elif source not in after_last and not decoder.window_caches_follow:
                raise Refusal("a layer caches its last tokens only, and counts them where a graph cannot reach (use "
                              "parvts_fx.compile(model), which corrects the count)", source)
    if all(_joins_residual(node, decoder) for node in _streams_that_leave(module, decoder)):
        raise Refusal("the graph breaks between the decoder's layers: what leaves it is the residual stream", decoder.final,
                      broken_off=True)
    for link in [*(layer.input for layer in decoder.layers), decoder.final]:
        if tokens.plain_axis(link) is None:
            raise Refusal("the residual stream has no plain token axis here", link)


def _streams_that_leave(module: GraphModule, decoder: Decoder) -> list[Node]:
    """What the graph returns of what the last token mixer has computed."""
    behind = {decoder.final, *descendants(module.graph, [decoder.final])}
    return [
        node for node in output_node(module.graph).all_input_nodes
        if node in behind and not is_state(node, decoder.nodes, decoder.tokens)
    ]


def _joins_residual(node: Node, decoder: Decoder) -> bool:
    """Whether a result is a sum as it stands between layers, not normalised and not projected to a vocabulary."""
    tokens = decoder.tokens
    summands = [source for source in node.all_input_nodes if tokens.plain_axis(source) is not None]
    return has_target(node, SUMS, ("add", "add_")) and len(summands) == 2 and all(
        value(source).shape == value(node).shape for source in summands)
