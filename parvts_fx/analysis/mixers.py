"""Finds every place where a decoder's tokens meet: attention calls, and whatever is not shown to work row by row."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from parvts_fx.analysis.attention import copies_of_joins
from parvts_fx.analysis.extents import TOKENS
from parvts_fx.analysis.independence import find_meetings
from parvts_fx.analysis.last_rows import keeps_rows_apart
from parvts_fx.analysis.records import Attention, Mixer
from parvts_fx.analysis.small_runs import SmallRuns
from parvts_fx.analysis.values import changed_in_place


def find_mixers(
    runs: SmallRuns, nodes: Sequence[Node], start: Node, attentions: Sequence[Attention]
) -> tuple[list[Mixer], frozenset[Node]]:
    """The decoder's token mixers in graph order: its attention calls, and all nodes that mix rows or may do so. And the nodes
    whose rows are not in order (:attr:`Decoder.unordered`).

    Args:
        start: the merged embeddings, whose rows are the prompt's tokens.
    """
    calls = {node for attention in attentions for node in attention.nodes}
    copies = copies_of_joins(nodes, attentions, runs.tokens)
    found = find_meetings(
        runs, TOKENS, nodes, {start, *calls, *copies}, harmless=lambda node: keeps_rows_apart(node, runs.tokens))
    mixers = [
        Mixer(tuple(operand.node for operand in attention.queries), attention.output, attention)
        for attention in attentions
    ]
    mixers += [Mixer(tuple(node.all_input_nodes), _result_of(node), None, node) for node in found.meeting]
    return sorted(mixers, key=lambda mixer: mixer.output), found.unordered


def _result_of(node: Node) -> Node:
    """The node, or for a write into a tensor what reads it next."""
    written = changed_in_place(node)
    later = [user for user in written.users if user > node] if written is not None and not node.users else []
    return min(later, default=node)
