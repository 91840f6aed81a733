"""Invariants of a rewritten graph, checked after every pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import networkx as nx
import torch
from torch.fx import Graph, Interpreter, Node

from parvts_fx.analysis.values import concrete, hint, output_node, value
from parvts_fx.passes.base import PassRecord, State


class VerificationError(RuntimeError):
    """A pass broke an invariant; the message names the pass, the check and the node."""


def graph_of(graph: Graph) -> nx.DiGraph:
    """The data flow as a networkx graph."""
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return flow


def is_well_formed(state: State) -> str | None:
    """FX's own lint: every argument is defined before it is used, names are unique."""
    try:
        state.module.graph.lint()
    except Exception as error:
        return str(error)
    return None


def is_acyclic(state: State) -> str | None:
    return None if nx.is_directed_acyclic_graph(graph_of(state.module.graph)) else "the data flow has a cycle"


def has_values(state: State) -> str | None:
    """Every node that is read carries an example value."""
    for node in state.module.graph.nodes:
        if node.op not in ("output", "get_attr") and node.users and "example_value" not in node.meta and value(node) is None:
            if node.op == "call_function" or node.op == "call_method":
                return f"node '{node.name}' has no example value"
    return None


def has_same_interface(state: State) -> str | None:
    """Inputs are untouched; outputs have the same number, types and ranks, and differ in size along tokens alone."""
    inputs = [node.name for node in state.module.graph.nodes if node.op == "placeholder"]
    if inputs != state.original_inputs:
        return "the graph's inputs have changed"
    outputs = output_node(state.module.graph).args[0]
    flat = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if len(flat) != len(state.original_outputs):
        return f"{len(flat)} outputs instead of {len(state.original_outputs)}"
    size = hint(state.decoder.tokens.size)
    for position, (now, then) in enumerate(zip(flat, state.original_outputs)):
        now = value(now) if isinstance(now, Node) else now
        if not (isinstance(now, torch.Tensor) and isinstance(then, torch.Tensor)):
            continue
        if now.dtype != then.dtype or now.dim() != then.dim() or now.device != then.device:
            return f"output {position} was {then.dtype} of rank {then.dim()} and is {now.dtype} of rank {now.dim()}"
        for entry, before in zip(now.shape, then.shape):
            shortened = hint(before) == size or position in state.last_rows and hint(entry) < hint(before)
            if hint(entry) != hint(before) and not shortened:
                return f"output {position} changed from {tuple(then.shape)} to {tuple(now.shape)}"
    return None


def drops_branch(state: State) -> str | None:
    """After pruning, what the outputs read of layer K's input they read through the pruned rows."""
    if state.prune_node is None:
        return None
    late = state.decoder.nodes[state.decoder.nodes.index(state.cut) + 1:]
    full = hint(state.decoder.tokens.size)
    kept = hint(value(state.prune_node).shape[1])
    if kept == full:
        return None
    flow = graph_of(state.module.graph)
    alive = nx.ancestors(flow, output_node(state.module.graph))
    if state.prune_node not in flow:
        return "the pruned residual stream has left the graph"
    behind = nx.descendants(flow, state.cut) if state.cut in flow else set()
    for node in late:
        if node in alive and node in behind:
            return f"node '{node.name}' behind the cut still runs on all rows"
    return None


def has_consistent_sizes(state: State) -> str | None:
    """Evaluate the whole graph again on fake tensors; slower, so on request and in tests."""
    placeholders = [node for node in state.module.graph.nodes if node.op == "placeholder"]

    class Check(Interpreter):
        def run_node(self, node: Node) -> object:
            result = super().run_node(node)
            expected = value(node)
            if isinstance(result, torch.Tensor) and isinstance(expected, torch.Tensor):
                if [hint(concrete(s)) for s in result.shape] != [hint(concrete(s)) for s in expected.shape]:
                    raise VerificationError(f"node '{node.name}' is {tuple(result.shape)}, its metadata says "
                                            f"{tuple(expected.shape)}")
            return result

    shapes = state.editor.mode.shape_env  # numbers that depend on data get new symbols here, which nobody binds
    unbound = contextlib.nullcontext() if shapes is None else shapes.ignore_fresh_unbacked_symbols()
    try:
        with state.editor.mode, torch.no_grad(), unbound:
            Check(state.module).run(*(value(node) for node in placeholders))
    except VerificationError as error:
        return str(error)
    except Exception as error:
        return f"does not run on fake tensors: {error}"
    return None


Check = Callable[[State], str | None]

CHEAP_CHECKS: tuple[Check, ...] = (is_well_formed, is_acyclic, has_values, has_same_interface, drops_branch)
ALL_CHECKS: tuple[Check, ...] = (*CHEAP_CHECKS, has_consistent_sizes)


def verifier(checks: tuple[Check, ...] = CHEAP_CHECKS) -> Callable[[PassRecord, State], None]:
    """A pipeline hook that runs the checks after every pass.

    Raises (the hook):
        VerificationError: names the pass and the check.
    """

    def verify(record: PassRecord, state: State) -> None:
        for check in checks:
            problem = check(state)
            if problem is not None:
                raise VerificationError(f"pass {record.name} broke {check.__name__}: {problem}")

    return verify
