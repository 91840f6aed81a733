"""What holds of the rewritten graph itself, told with networkx."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import networkx as nx
import pytest
import torch
from torch.fx import Graph, GraphModule, Node

import parvts_fx
from parvts_fx.analysis.calls import is_fused_attention, is_softmax
from parvts_fx.analysis.values import hint_shape, is_tensor, output_node, value
from parvts_fx.passes import State, build_pipeline
from parvts_fx.passes.verify import graph_of
from parvts_fx.rewriting import rewrite_graph
from tests.plain import Plain, Specification
from tests.plain_graphs import CHOICES, SPECIFICATIONS, Call, capture, captured, options

every_model = pytest.mark.parametrize("spec", SPECIFICATIONS.values(), ids=SPECIFICATIONS.keys())
every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())


@dataclasses.dataclass
class Rewritten:
    before: nx.DiGraph
    after: nx.DiGraph
    state: State

    @property
    def graph(self) -> Graph:
        return self.state.module.graph


def rewritten(spec: Specification, choice: dict[str, Any]) -> Rewritten:
    return _rewritten(spec, tuple(choice.items()))


@functools.cache
def _rewritten(spec: Specification, choice: tuple) -> Rewritten:
    module, inputs = captured(spec)
    parsed, seen = options(**dict(choice)), []
    passes = [Call(lambda state: seen.append(graph_of(state.module.graph))), *build_pipeline(parsed), Call(seen.append)]
    done = rewrite_graph(module, inputs, parsed, passes)
    before, state = seen
    assert done.report.status == "rewritten" and done.module is state.module
    return Rewritten(before, graph_of(state.module.graph), state)


def spelled(module: GraphModule) -> list[tuple]:
    """A graph as plain data, metadata included (the values by identity)."""
    return [
        (node.op, node.name, str(node.target), str(node.args), str(node.kwargs), sorted(node.meta), id(value(node)))
        for node in module.graph.nodes
    ]


def attention_layers(found: Rewritten) -> dict[Node, int]:
    """Each attention call's layer: how many calls lie in front of it on the longest path, as in one layer none does."""
    in_front: dict[Node, int] = {}
    calls = {node for node in found.graph.nodes if is_fused_attention(node) or is_softmax(node)}
    for node in nx.topological_sort(found.after):
        sources = found.after.predecessors(node)
        in_front[node] = max((in_front[source] + (source in calls) for source in sources), default=0)
    return {node: in_front[node] for node in calls}


@every_model
@every_choice
def test_order_and_data_flow_agree(spec: Specification, choice: dict[str, Any]) -> None:
    found = rewritten(spec, choice)
    place = {node: index for index, node in enumerate(found.graph.nodes)}
    assert nx.is_directed_acyclic_graph(found.after)
    assert all(place[source] < place[node] for source, node in found.after.edges)
    checks = {node for node in found.graph.nodes if node.target is torch._check}  # of numbers that depend on data
    alive = checks.union(*(nx.ancestors(found.after, node) for node in {output_node(found.graph), *checks}))
    assert {node for node in found.graph.nodes if node.op.startswith("call")} <= alive  # nothing is computed in vain


@every_model
@every_choice
def test_attention_calls_per_layer(spec: Specification, choice: dict[str, Any]) -> None:
    layers = list(attention_layers(rewritten(spec, choice)).values())
    depth = choice["migration_depth"]
    migrating = 1 if choice.get("paths") == "joint" else 2 if "fusion" in choice else 3
    assert [layers.count(layer) for layer in range(spec.layers)] == [migrating] * depth + [1] * (spec.layers - depth)
    assert max(layers) < spec.layers


@every_model
@every_choice
def test_prune_node_dominates_what_follows(spec: Specification, choice: dict[str, Any]) -> None:
    """From the merge to every later attention call and to the logits there is no way around it but the row numbers."""
    found = rewritten(spec, choice)
    merge, parts = found.state.decoder.merge.output, found.state.partition
    numbers = {rows.index for rows in (parts.subject, parts.non_subject, parts.text)}
    numbers |= {parts.slots, parts.is_text, parts.partners}
    flow = found.after.subgraph(({merge} | nx.descendants(found.after, merge)) - numbers)
    dominator = nx.immediate_dominators(flow, merge)

    def is_dominated(node: Node) -> bool:
        while node not in (merge, found.state.prune_node):
            node = dominator[node]
        return node is found.state.prune_node

    dominated = {node: is_dominated(node) for node in attention_layers(found)}
    assert dominated == {node: layer >= choice["migration_depth"] for node, layer in attention_layers(found).items()}
    assert is_dominated(output_node(found.graph).args[0][0])


@every_model
@every_choice
def test_nothing_late_runs_on_all_rows(spec: Specification, choice: dict[str, Any]) -> None:
    found = rewritten(spec, choice)
    late = nx.descendants(found.before, found.state.cut)
    assert late
    outputs = output_node(found.graph).all_input_nodes
    needed = set(outputs).union(*(nx.ancestors(found.after, node) for node in outputs))
    assert not late & needed
    kept = {found.state.prune_node} | nx.descendants(found.after, found.state.prune_node)
    assert all(spec.length not in hint_shape(value(node)) for node in kept & needed if is_tensor(node))
    assert all(spec.length not in hint_shape(value(node)) for node in outputs)


@every_model
@every_choice
def test_inputs_stay(spec: Specification, choice: dict[str, Any]) -> None:
    module, _ = captured(spec)
    graphs = module.graph, rewritten(spec, choice).graph
    old, new = ([node for node in graph.nodes if node.op == "placeholder"] for graph in graphs)
    assert [(n.name, n.target, n.type) for n in old] == [(n.name, n.target, n.type) for n in new]
    assert all(value(ours) is value(theirs) for ours, theirs in zip(new, old))


@every_choice
def test_original_stays(choice: dict[str, Any]) -> None:
    module, inputs = captured(SPECIFICATIONS["masked"])
    before, code = spelled(module), module.code
    result = parvts_fx.rewrite(module, inputs, {"keep_tokens": 2, **choice})
    assert result.meta["parvts_fx"].status == "rewritten"
    assert spelled(module) == before and module.code == code and "parvts_fx" not in module.meta


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@every_choice
def test_second_rewrite_changes_nothing(choice: dict[str, Any], dynamic: bool | None) -> None:
    module, inputs = captured(SPECIFICATIONS["masked"], dynamic)
    given = {"keep_tokens": 2, **choice}
    once = parvts_fx.rewrite(module, inputs, given)
    assert once.meta["parvts_fx"].status == "rewritten"
    again = parvts_fx.rewrite(once, inputs, given)
    assert again.meta["parvts_fx"].status != "rewritten"
    assert spelled(again) == spelled(once)


@pytest.mark.parametrize("given", [{"keep_ratio": 1}, {"keep_tokens": 5}, {"keep_tokens": 99}], ids=str)
def test_keeping_all_leaves_the_graph_alone(given: dict[str, Any]) -> None:
    module, inputs = captured(SPECIFICATIONS["causal"])
    result = parvts_fx.rewrite(module, inputs, {"migration_depth": 1, **given})
    assert result.meta["parvts_fx"].status == "untouched"
    assert result is not module and spelled(result) == spelled(module)


def test_a_graph_without_a_merge_is_left_alone() -> None:
    model = Plain(SPECIFICATIONS["causal"])

    def text_only(ids: torch.Tensor) -> torch.Tensor:
        x = model.tokens(ids)
        for layer in model.layers:
            x, _, _ = layer(x, None, None, None)
        return model.head(x)

    module, inputs = capture(text_only, torch.arange(2, 15)[None])
    result = parvts_fx.rewrite(module, inputs, {"keep_tokens": 2, "strict": True})
    assert result.meta["parvts_fx"].status == "untouched"
    assert spelled(result) == spelled(module)
