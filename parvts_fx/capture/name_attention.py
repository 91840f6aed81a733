"""Write the kernel that a device has chosen for an attention call as the call that it was chosen for."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar

import torch.nn.functional as F
from torch.fx import Graph, Node

from parvts_fx.analysis.values import value
from parvts_fx.capture.editing import Editor
from parvts_fx.pipeline import PassResult, Work
from parvts_fx.torch_private import OpOverload, named_arguments, operation_name

_KERNELS = "aten::_scaled_dot_product_"
_NAMES = {"query": "query", "key": "key", "value": "value", "attn_mask": "attn_mask", "attn_bias": "attn_mask",
          "dropout_p": "dropout_p", "is_causal": "is_causal", "scale": "scale"}
"""What kernels call their arguments, and what the call they stand for does; others say what else they return."""


@dataclasses.dataclass(frozen=True)
class NameAttention:
    """``out, *rest = _scaled_dot_product_flash_attention(q, k, v)``  ==>  ``out = scaled_dot_product_attention(q, k, v)``

    Graphs that were traced below autograd (make_fx) hold kernels, one of which may not suit the sizes that are left. Kernels
    whose other results are read (for a backward pass) stay.
    """

    name: ClassVar[str] = "name_attention"

    def run(self, work: Work) -> PassResult:
        graph, editor, count = work.module.graph, Editor(work.module), 0
        for node in kernels(graph):
            arguments = _arguments(node)
            query, key, values = (arguments.pop(name) for name in ("query", "key", "value"))
            if value(query).dim() == 4 and value(query).shape[1] != value(key).shape[1]:
                arguments["enable_gqa"] = True
            with graph.inserting_before(node):
                called = editor.call(F.scaled_dot_product_attention, query, key, values, **arguments)
                if value(query).dim() == 4 and value(node)[0].transpose(1, 2).is_contiguous():  # views behind it rely on that
                    rows_first = editor.method("contiguous", editor.method("transpose", called, 1, 2))
                    called = editor.method("transpose", rows_first, 1, 2)
            for user in list(node.users):
                user.replace_all_uses_with(called)
                graph.erase_node(user)
            graph.erase_node(node)
            count += 1
        return PassResult(count)


def kernels(graph: Graph) -> list[Node]:
    """The kernels of which nothing but the attention's result is read."""
    return [
        node for node in graph.nodes
        if isinstance(node.target, OpOverload) and operation_name(node.target).startswith(_KERNELS)
        and all(user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users)
    ]


def _arguments(node: Node) -> dict[str, Any]:
    """By the names of the call that a kernel stands for; those that are not given have its defaults."""
    given = named_arguments(node.target, node.args, node.kwargs)
    return {_NAMES[name]: held for name, held in given.items() if name in _NAMES}
