"""Give everybody who reads a filled cache with the prompt's rows behind it one of their own."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch.fx import Node

from parvts_fx.analysis.tokens import cached_in_front
from parvts_fx.analysis.values import descendants
from parvts_fx.capture.editing import Editor
from parvts_fx.pipeline import PassResult, Work


@dataclasses.dataclass(frozen=True)
class SeparateCaches:
    """``k = cat([cached, new]); attend(q, k); return k``  ==>  ``attend(q, cat([cached, new])); return cat([cached, new])``

    Attention asks all rows that are left in its layer, keys that layers share are asked in several, and a cache holds those
    that are left in the end.
    """

    name: ClassVar[str] = "separate_caches"
    merged: Node
    """Only what depends on these embeddings is rewritten."""

    def run(self, work: Work) -> PassResult:
        graph, editor, count = work.module.graph, Editor(work.module), 0
        new = set(descendants(graph, [self.merged]))
        for node in list(graph.nodes):
            if node not in new or not cached_in_front(node):
                continue
            for user in list(node.users)[1:]:
                with graph.inserting_after(node):
                    user.replace_input_with(node, editor.copy(node, node.args, node.kwargs))
                count += 1
        return PassResult(count)
