"""Why a prompt with pictures was not pruned, where no graph has told: what happened in its call, as far as that is known."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from parvts_fx.runtime.call import Call
from parvts_fx.torch_private import GraphBreak, count_graph_breaks, graph_breaks, why_nothing_is_compiled

NOT_MERGED = ("no captured graph merges visual features into a decoder's embeddings: the model has no decoder that reads them "
              "(it only compares pictures with text, say), they enter by cross-attention or an encoder, or they are merged in "
              "code that Dynamo does not capture")
_NOT_TAKEN = ("a graph merges visual features, and none with attention takes the merged embeddings as they were: ")
_CHANGED = "the model changes them between two graphs, or its attention is neither scaled_dot_product_attention nor a softmax"
_MOST = 2
"""So many causes are named."""


class Unseen:
    """One model's calls in which no graph has told what became of its pictures.

    What is compiled is compiled once: what a call's compiling has shown holds for later calls that run the same graphs. Where
    several things have been shown, nobody knows which of them holds for a later call.
    """

    def __init__(self, disabled: bool) -> None:
        self._disabled = disabled
        self._known: set[str] = set()

    def reason(self, told: Call, breaks_before: int) -> str:
        """Args: ``breaks_before``, how often Dynamo had broken graphs when the call began."""
        off = "disable=True was given" if self._disabled else why_nothing_is_compiled()
        if off is not None:
            return f"nothing is compiled: {off}"
        if told.merges_behind is None:
            return NOT_MERGED
        if count_graph_breaks() > breaks_before:
            self._known.add(_causes(graph_breaks(told.merges_behind)))
        causes, = self._known if len(self._known) == 1 else ("",)
        return _NOT_TAKEN + (causes or _CHANGED)


def _causes(breaks: Sequence[GraphBreak]) -> str:
    """What has broken graphs most often; empty for no breaks."""
    counts = collections.Counter(breaks)
    listed = [f"{cause.what}, in {cause.where}" + (f" ({count} times)" if count > 1 else "")
              for cause, count in counts.most_common(_MOST)]
    more = len(counts) - len(listed)
    return f"Dynamo breaks the graph behind the merge: {'; '.join(listed)}" + (
        f"; and {more} more" if more else "") if listed else ""
