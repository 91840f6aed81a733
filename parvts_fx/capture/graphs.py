"""Takes the graph that Dynamo (or a user) hands over and gives every node an example value, on a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from parvts_fx.analysis.values import fake_mode_of, hint, value
from parvts_fx.torch_private import FakeTensor, FakeTensorMode, graph_module_like, keep_sources


def copy_graph_module(module: GraphModule) -> GraphModule:
    """A copy with its own graph; parameters and submodules are shared, so no weight is duplicated."""
    graph = Graph()
    mapping: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, mapping))
    copy = graph_module_like(module, graph)
    copy.meta = dict(module.meta)
    keep_sources(module, copy, mapping)
    return copy


def capture(module: GraphModule, example_inputs: Sequence[object]) -> GraphModule:
    """Copy a graph and fill in missing example values; the argument stays as it is.

    Args:
        module: a torch-level (Dynamo, symbolic_trace) or aten-level graph.
        example_inputs: one per placeholder; real or fake tensors, ints.
    """
    copy = copy_graph_module(module)
    if len({id(held.fake_mode) for node in copy.graph.nodes if isinstance(held := value(node), FakeTensor)}) > 1:
        for node in copy.graph.nodes:  # make_fx gives each value a mode of its own; operations take one
            node.meta = {name: held for name, held in node.meta.items() if name not in ("example_value", "val")}
    if all(value(node) is not None or node.op in ("output", "get_attr") for node in copy.graph.nodes if node.op == "placeholder"):
        missing = any(value(node) is None and node.users and node.op.startswith("call") for node in copy.graph.nodes)
        if not missing:
            return _with_devices_named(copy)
    mode = next((x.fake_mode for x in example_inputs if isinstance(x, FakeTensor)), None) or (
        fake_mode_of(copy.graph) if any(isinstance(value(n), FakeTensor) for n in copy.graph.nodes)
        else FakeTensorMode(allow_non_fake_inputs=True)
    )
    fakes = [
        mode.from_tensor(x, static_shapes=True) if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) else x
        for x in example_inputs
    ]

    class Fill(Interpreter):
        def run_node(self, node: Node) -> object:
            if value(node) is not None and node.op != "output":
                return value(node)
            result = super().run_node(node)
            if value(node) is None and node.op != "output":
                node.meta["example_value"] = result
            return result

    with mode, torch.no_grad():
        Fill(copy).run(*fakes)
    return _with_devices_named(copy)


def _with_devices_named(module: GraphModule) -> GraphModule:
    """``to(1)``, which means another device on each machine, as ``to(device)``."""
    for node in module.graph.find_nodes(op="call_method", target="to"):
        if len(node.args) > 1 and type(node.args[1]) is int:
            node.update_arg(1, value(node).device)
    return module


class WithPrefix(Interpreter):
    """Evaluates a rewritten graph as if its paths shared a given number of leading positions.

    With constant weights the graph reads that number from its tensors (:class:`~parvts_fx.passes.SharePrefix`), which
    fake ones do not tell.
    """

    def __init__(self, module: GraphModule, shared_prefix: int):
        super().__init__(module)
        self._shared_prefix = shared_prefix

    def run_node(self, node: Node) -> object:
        made = value(node)
        if node.target == "item" and isinstance(made, torch.SymInt) and hint(made) is None:
            return self._shared_prefix
        return super().run_node(node)
