"""What holds of the rewritten graph itself, told with networkx."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

import parvts_fx
from parvts_fx.analysis.calls import is_fused_attention, is_softmax
from parvts_fx.analysis.values import hint_shape, is_tensor, output_node, value
from parvts_fx.passes import Plan, build_pipeline
from parvts_fx.passes.rows import live
from parvts_fx.passes.verify import graph_of
from parvts_fx.passes.written import Written
from parvts_fx.rewriting import rewrite_graph
from parvts_fx.scores import reads_attention
from parvts_fx.stages import PlacedStage
from tests.plain import Plain, Specification
from tests.plain_graphs import CHOICES, SPECIFICATIONS, Call, capture, captured, options, stages_of

every_model = pytest.mark.parametrize("spec", SPECIFICATIONS.values(), ids=SPECIFICATIONS.keys())
every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())


@dataclasses.dataclass
class Rewritten:
    before: nx.DiGraph
    after: nx.DiGraph
    module: GraphModule
    inputs: list[Any]
    plan: Plan
    written: Written

    @property
    def graph(self) -> Graph:
        return self.module.graph

    @property
    def merge(self) -> Node:
        return self.written.held[self.plan.decoder.merge.output][live(0)]

    @functools.cached_property
    def flow(self) -> nx.DiGraph:
        """How the merged embeddings get on, row numbers and all that is chosen by them alone left out."""
        reached = nx.descendants(self.after, self.merge)
        numbers = {node for node in reached if is_tensor(node) and not value(node).is_floating_point()}
        flow = self.after.subgraph(({self.merge} | reached) - numbers)
        return flow.subgraph({self.merge} | nx.descendants(flow, self.merge))

    def pruned(self, stage: PlacedStage) -> Node:
        """Where the stage's non-subject rows are gone: what takes the others out of the residual stream, or joins paths; with
        merging, behind what these take over."""
        held = self.written.held
        if stage.is_weighed or stage.number in self.plan.mergings:
            return held[self.plan.end_of(stage)][live(stage.number + 1)]
        cut = self.plan.end_of(stage)
        (took,) = (node for node in held[cut][live(stage.number)].users if node.target in (torch.gather, torch.index_select))
        return took


def rewritten(spec: Specification, choice: dict[str, Any], **more: Any) -> Rewritten:
    return _rewritten(spec, tuple({**choice, **more}.items()))


@functools.cache
def _rewritten(spec: Specification, choice: tuple) -> Rewritten:
    module, inputs = captured(spec)
    parsed, seen = options(**dict(choice)), []
    passes = [Call(lambda work: seen.append(graph_of(work.module.graph))), *build_pipeline(parsed), Call(seen.append)]
    done = rewrite_graph(module, inputs, parsed, passes)
    before, work = seen
    assert done.report.status == "rewritten" and done.module is work.module
    return Rewritten(before, graph_of(work.module.graph), work.module, inputs, work.plan, work.written)


def spelled(module: GraphModule) -> list[tuple]:
    """A graph as plain data, metadata included (the values by identity)."""
    return [
        (node.op, node.name, str(node.target), str(node.args), str(node.kwargs), sorted(node.meta), id(value(node)))
        for node in module.graph.nodes
    ]


def attention_layers(found: Rewritten) -> tuple[dict[Node, int], dict[Node, int]]:
    """Each attention call's layer: how many calls lie in front of it on the longest path, as in one layer none does.

    Apart from these, those whose weights are read for a choice alone.
    """
    in_front: dict[Node, int] = {}
    calls = {node for node in found.flow if is_fused_attention(node) or is_softmax(node)}
    for node in nx.topological_sort(found.flow):
        in_front[node] = max(
            (in_front[source] + (source in calls) for source in found.flow.predecessors(node)), default=0)
    answering = nx.ancestors(found.flow, output_node(found.graph))
    return ({node: in_front[node] for node in calls & answering}, {node: in_front[node] for node in calls - answering})


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
    calls, readings = (list(layers.values()) for layers in attention_layers(rewritten(spec, choice)))
    wanted, read, stages = [1] * spec.layers, [0] * spec.layers, stages_of(choice)
    for stage in stages:
        wanted[stage.at:stage.end] = [3 if stage.is_parallel else 2 if stage.is_weighed else 1] * (stage.end - stage.at)
        read[stage.at - 1] += reads_attention(stage.stage.rule)
    assert [calls.count(layer) for layer in range(spec.layers)] == wanted
    assert [readings.count(layer) for layer in range(spec.layers)] == read
    assert max(calls) < spec.layers


@every_model
@every_choice
def test_prune_node_dominates_what_follows(spec: Specification, choice: dict[str, Any]) -> None:
    """From the merge to every later attention call and to the logits there is no way around it but the row numbers."""
    found = rewritten(spec, choice)
    dominator = nx.immediate_dominators(found.flow, found.merge)

    def is_dominated(node: Node, pruned: Node) -> bool:
        while node not in (found.merge, pruned):
            node = dominator[node]
        return node is pruned

    layers = {node: layer for held in attention_layers(found) for node, layer in held.items()}
    for stage in stages_of(choice):
        pruned = found.pruned(stage)
        assert {node: is_dominated(node, pruned) for node in layers} == {
            node: layer >= stage.end for node, layer in layers.items()}
        assert is_dominated(output_node(found.graph).args[0][0], pruned)


@every_model
@every_choice
def test_nothing_late_runs_on_all_rows(spec: Specification, choice: dict[str, Any]) -> None:
    found = rewritten(spec, choice)
    outputs = output_node(found.graph).all_input_nodes
    needed = set(outputs).union(*(nx.ancestors(found.after, node) for node in outputs))
    stages = stages_of(choice)
    for stage in stages:
        more = [int(found.plan.row_count(level)) for level in range(stage.number + 1)]
        late = nx.descendants(found.before, found.plan.cut_of(stage))
        allowed = {live(level) for level in range(stage.number + 1, len(stages) + 1)}
        assert late and all(set(found.written.held.get(node, ())) <= allowed for node in late)
        kept = {found.pruned(stage)} | nx.descendants(found.flow, found.pruned(stage))
        for node in {node for node in kept & needed if is_tensor(node)} | set(outputs):
            assert not set(more) & set(hint_shape(value(node)))


@pytest.mark.slow
@pytest.mark.parametrize("last_only", [False, True])
@every_model
@every_choice
def test_every_row_that_is_computed_is_read(spec: Specification, choice: dict[str, Any], last_only: bool) -> None:
    """Told by gradients: without dead rows, something that leaves the graph depends on every row of every operation."""
    spec, stages = dataclasses.replace(spec, last_only=last_only), stages_of(choice)
    lean, full = (rows_that_nothing_reads(rewritten(spec, choice, skip_dead_rows=skipped)) for skipped in (True, False))
    joins_at_the_end = stages[-1].is_weighed and stages[-1].end == spec.layers  # its last rows are not taken in front
    assert bool(lean) == (last_only and joins_at_the_end), lean
    assert bool(full) == (last_only or any(stage.end > stage.at and not stage.is_weighed for stage in stages))


def rows_that_nothing_reads(found: Rewritten) -> list[str]:
    """Of what nothing but scores are computed from there is no gradient where a row sees one key: left out.

    Queries are to have the rows of what comes of them.
    """
    results: dict[Node, Tensor] = {}

    class Watching(Interpreter):
        def run_node(self, node: Node) -> Any:
            result = super().run_node(node)
            if isinstance(result, Tensor) and result.is_floating_point() and node in found.flow:
                if not result.requires_grad:
                    result.requires_grad_()
                result.retain_grad()
                results[node] = result
            return result

    with torch.enable_grad():
        outputs = torch.utils._pytree.tree_leaves(Watching(found.module).run(*found.inputs))
        generator = torch.Generator().manual_seed(0)
        sum((torch.randn(out.shape, generator=generator) * out).sum() for out in outputs).backward()
    held, attentions = found.written.held, [attention for layer in found.plan.layers for attention in layer.attentions]
    asking = {operand.node: attention.output for attention in attentions for operand in attention.queries}
    operands = {operand.node for attention in attentions for operand in (*attention.queries, *attention.keys)}
    inside = {copy for node in operands for copy in held[node].values()}
    unread = [node.name for node, output in asking.items() if set(held[node]) != set(held[output])]
    read = nx.ancestors(found.flow.subgraph(set(found.flow) - inside), output_node(found.graph)) - {found.merge}
    for node, copies in held.items():
        axis = found.plan.decoder.tokens.plain_axis(node)
        for name, copy in copies.items():
            if axis is not None and copy in results and copy in read:
                gradient = results[copy].grad
                if gradient is None or not bool(gradient.movedim(axis, 1).flatten(2).any(-1).all()):
                    unread.append(f"{node.name} on {name}")
    return unread


@every_model
@every_choice
def test_inputs_stay(spec: Specification, choice: dict[str, Any]) -> None:
    module, _ = captured(spec)
    graphs = module.graph, rewritten(spec, choice).graph
    old, new = ([node for node in graph.nodes if node.op == "placeholder"] for graph in graphs)
    assert [(n.name, n.target, n.type) for n in old] == [(n.name, n.target, n.type) for n in new]
    assert all(value(ours) is value(theirs) for ours, theirs in zip(new, old))


@pytest.mark.slow
@every_choice
def test_original_stays(choice: dict[str, Any]) -> None:
    module, inputs = captured(SPECIFICATIONS["masked"])
    before, code = spelled(module), module.code
    result = parvts_fx.rewrite(module, inputs, choice)
    assert result.meta["parvts_fx"].status == "rewritten"
    assert spelled(module) == before and module.code == code and "parvts_fx" not in module.meta


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@every_choice
def test_second_rewrite_changes_nothing(choice: dict[str, Any], dynamic: bool | None) -> None:
    module, inputs = captured(SPECIFICATIONS["masked"], dynamic)
    once = parvts_fx.rewrite(module, inputs, choice)
    assert once.meta["parvts_fx"].status == "rewritten"
    again = parvts_fx.rewrite(once, inputs, choice)
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
