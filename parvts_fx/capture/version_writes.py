"""Give a tensor that was written into a new name, so that before and after are two nodes."""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar

from torch.fx import Node

from parvts_fx.analysis.values import descendants, is_tensor, storage_of, value
from parvts_fx.capture.editing import Editor
from parvts_fx.pipeline import PassResult, Work


@dataclasses.dataclass(frozen=True)
class VersionWrites:
    """``h[part] = x; read(h)``  ==>  ``h[part] = x; h' = h.clone(); read(h')``

    A residual stream that a layer updates in place has its cut behind the update, and only a node can be cut at. Leaves a
    tensor alone of which views are still read after the write. The values computed stay the same.
    """

    name: ClassVar[str] = "version_writes"
    merged: Node
    """Only what depends on these embeddings is rewritten."""

    def run(self, work: Work) -> PassResult:
        editor, count = Editor(work.module), 0
        for node in descendants(work.module.graph, [self.merged]):
            if node.op == "call_function" and node.target is operator.setitem:
                count += _version(editor, node)
        return PassResult(count)


def _version(editor: Editor, write: Node) -> bool:
    target = write.args[0]
    later = [user for user in target.users if write < user]
    if not later or value(target).dim() < 3:
        return False
    views = [node for node in editor.graph.nodes if node is not target and is_tensor(node) and node < write
             and storage_of(node) == storage_of(target)]
    if any(user > write for view in views for user in view.users):
        return False
    with editor.graph.inserting_before(write.next):
        version = editor.method("clone", target)
    for user in later:
        user.replace_input_with(target, version)
    return True
