"""Make what a graph returns as a filled cache apart from what its attention reads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch.fx import Node

from parvts_fx.analysis.values import descendants, has_target, hint, is_tensor, output_node, value
from parvts_fx.capture.editing import Editor
from parvts_fx.pipeline import PassResult, Work


@dataclasses.dataclass(frozen=True)
class SeparateCaches:
    """``k = cat([cached, new]); attend(q, k); return k``  ==>  ``attend(q, cat([cached, new])); return cat([cached, new])``

    Attention asks all rows that are left in its layer, and a cache holds those that are left in the end.
    """

    name: ClassVar[str] = "separate_caches"
    merged: Node
    """Only what depends on these embeddings is rewritten."""

    def run(self, work: Work) -> PassResult:
        graph, editor, count = work.module.graph, Editor(work.module), 0
        result, new = output_node(graph), set(descendants(work.module.graph, [self.merged]))
        for node in list(graph.nodes):
            if node not in new or result not in node.users or len(node.users) < 2 or not _joins_with_cached(node, new):
                continue
            with graph.inserting_after(node):
                copy = editor.copy(node, node.args, node.kwargs)
            result.replace_input_with(node, copy)
            count += 1
        return PassResult(count)


def _joins_with_cached(node: Node, new: set[Node]) -> bool:
    """Whether rows of the prompt are put behind others that the graph is given."""
    if not has_target(node, (torch.cat, torch.concat, torch.ops.aten.cat.default)):
        return False
    cached = [source for source in node.all_input_nodes if source not in new and is_tensor(source)]
    return any(value(source).dim() == value(node).dim() and hint(value(source).numel()) != 0 for source in cached)
