"""Invariants of a graph, checked after every pass; once it is written, it is held against the plan."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import networkx as nx
import torch
from torch.fx import Graph, Interpreter, Node

from parvts_fx.analysis.calls import fused_arguments, is_fused_attention
from parvts_fx.analysis.values import concrete, fake_mode_of, hint, output_node, value
from parvts_fx.passes.plan import Plan
from parvts_fx.passes.prune_branch import rows_left
from parvts_fx.passes.rows import LAST, TEXT, live, non_subject
from parvts_fx.pipeline import PassRecord, Work


class VerificationError(RuntimeError):
    """A pass broke an invariant; the message names the pass, the check and the node."""


def graph_of(graph: Graph) -> nx.DiGraph:
    """The data flow as a networkx graph."""
    flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return flow


def is_well_formed(work: Work) -> str | None:
    """FX's own lint: every argument is defined before it is used, names are unique."""
    try:
        work.module.graph.lint()
    except Exception as error:
        return str(error)
    return None


def is_acyclic(work: Work) -> str | None:
    return None if nx.is_directed_acyclic_graph(graph_of(work.module.graph)) else "the data flow has a cycle"


def has_values(work: Work) -> str | None:
    """Every node that is read carries an example value."""
    for node in work.module.graph.nodes:
        if node.op not in ("output", "get_attr") and node.users and "example_value" not in node.meta and value(node) is None:
            if node.op == "call_function" or node.op == "call_method":
                return f"node '{node.name}' has no example value"
    return None


def has_same_interface(work: Work) -> str | None:
    """Inputs are untouched; outputs have the same number, types and ranks, and differ in size along tokens alone."""
    written = work.written
    if written is None:
        return None
    inputs = tuple(node.name for node in work.module.graph.nodes if node.op == "placeholder")
    if inputs != written.original_inputs:
        return "the graph's inputs have changed"
    flat = _outputs(work)
    if len(flat) != len(written.original_outputs):
        return f"{len(flat)} outputs instead of {len(written.original_outputs)}"
    size = hint(written.plan.decoder.tokens.size)
    for position, (now, then) in enumerate(zip(flat, written.original_outputs)):
        now = value(now) if isinstance(now, Node) else now
        if not (isinstance(now, torch.Tensor) and isinstance(then, torch.Tensor)):
            continue
        if now.dtype != then.dtype or now.dim() != then.dim() or now.device != then.device:
            return f"output {position} was {then.dtype} of rank {then.dim()} and is {now.dtype} of rank {now.dim()}"
        for entry, before in zip(now.shape, then.shape):
            shortened = hint(before) == size or position in written.shortened and hint(entry) < hint(before)
            if hint(entry) != hint(before) and not shortened:
                return f"output {position} changed from {tuple(then.shape)} to {tuple(now.shape)}"
    return None


def _outputs(work: Work) -> list[object]:
    outputs = output_node(work.module.graph).args[0]
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _planned(plan: Plan, name: str) -> int | None:
    """How many rows of a set a sample has by the plan; None for a number that is known when the graph runs."""
    counts = {live(level): plan.row_count(level) for level in range(plan.final + 1)}
    counts[TEXT], counts[LAST] = plan.text_count, plan.take_count
    for stage in plan.stages:
        left, kept = plan.visual_counts[stage.number], plan.visual_counts[stage.number + 1]
        counts[non_subject(stage.number)] = plan.text_count + left - kept
    return hint(counts[name]) if name in counts else None


def runs_on_planned_rows(work: Work) -> str | None:
    """Every operation of the decoder has as many rows as the plan says, and none has rows that have left in front of it."""
    if work.written is None:
        return None
    plan, here = work.written.plan, set(work.module.graph.nodes)
    left = rows_left(plan)
    for node, held in work.written.held.items():
        axis = plan.decoder.tokens.plain_axis(node)
        for name, copy in held.items():
            if axis is None or copy not in here:
                continue
            level = plan.last if name == LAST else int(name.rpartition(" ")[2])
            if level < left[node] and any(user in here for user in copy.users):
                return f"node '{node.name}' runs on rows that have left in front of it"
            rows, planned = hint(value(copy).shape[axis]), _planned(plan, name)
            if rows != planned:
                return f"node '{node.name}' has {rows} rows where the plan has {planned}"
    return None


def sees_planned_keys(work: Work) -> str | None:
    """Every attention call asks for the queries and sees the keys that the schedule gives it."""
    if work.written is None:
        return None
    plan = work.written.plan
    asked: dict[Node, set[tuple[str, str]]] = {}
    for call in work.written.calls:
        attention, planned = call.attention, _planned(plan, call.queries)
        if planned is not None and hint(value(call.output).shape[attention.output_axis]) != planned:
            return f"a call in place of '{attention.output.name}' does not answer {planned} rows"
        if is_fused_attention(call.output):
            original = fused_arguments(attention.output)["key"]  # what biases the scores has keys along another axis
            ((axis, kind),) = plan.decoder.tokens.axes[original].items()
            rows = hint(value(fused_arguments(call.output)["key"]).shape[axis])
            if rows is not None and rows - kind.offset != _planned(plan, call.keys):
                return f"a call in place of '{attention.output.name}' sees {rows} rows where the plan has \"{call.keys}\""
        asked.setdefault(attention.output, set()).add((call.queries, call.keys))
    for layer in plan.layers:
        for attention in layer.attentions:
            problem = _sees_others(plan, layer.index, asked.get(attention.output, set()))
            if problem is not None:
                return f"a call in place of '{attention.output.name}' {problem}"
    return None


def _sees_others(plan: Plan, layer: int, calls: set[tuple[str, str]]) -> str | None:
    """What is wrong with the (queries, keys) of one attention call in a layer, if anything is."""
    level = sum((stage.at if stage.is_weighed else stage.end) <= layer for stage in plan.stages)
    running = next((stage for stage in plan.stages if stage.runs_both(layer)), None)
    everything, fewer = live(level), {LAST, *(live(further) for further in range(level, plan.final + 1))}
    if running is not None and running.is_weighed:
        calls = {(queries, keys) for queries, keys in calls if keys != non_subject(running.number)}
    if running is None or not running.is_parallel:
        wrong = next(((queries, keys) for queries, keys in calls if keys != everything or queries not in fewer), None)
        return None if wrong is None else f"lets the rows \"{wrong[0]}\" see \"{wrong[1]}\""
    subject, other = live(level + 1), non_subject(level)
    # few rows ask twice, and each takes its group's answer
    twice = {queries for queries, keys in calls if keys == everything and (queries, subject) in calls} - {everything}
    if calls and not twice and (TEXT, everything) not in calls:
        return "does not let the text see both groups"
    known = {(subject, subject), (other, other), (TEXT, everything)}
    known |= {(queries, keys) for queries in twice for keys in (everything, subject)}
    return next((f"lets the rows \"{queries}\" see \"{keys}\"" for queries, keys in sorted(calls - known)), None)


def returns_what_is_left(work: Work) -> str | None:
    """What leaves the graph has a row for every token that is left in the end, or for each of those asked for."""
    if work.written is None:
        return None
    plan = work.written.plan
    final = _planned(plan, live(plan.final))
    originals = output_node(plan.decoder.merge.output.graph).args[0]
    originals = originals if isinstance(originals, (tuple, list)) else [originals]
    for position, (now, then) in enumerate(zip(_outputs(work), originals)):
        axes = (plan.decoder.tokens.axes.get(then) or {}) if isinstance(then, Node) and then in plan.live else {}
        for axis, kind in axes.items():
            if len(axes) == 1 and isinstance(now, Node) and hint(value(now).shape[axis]) - kind.offset != final:
                return f"output {position} has {hint(value(now).shape[axis]) - kind.offset} rows of {final} that are left"
    return None


def has_consistent_sizes(work: Work) -> str | None:
    """Evaluate the whole graph again on fake tensors; slower, so on request and in tests."""
    placeholders = [node for node in work.module.graph.nodes if node.op == "placeholder"]

    class Check(Interpreter):
        def run_node(self, node: Node) -> object:
            result = super().run_node(node)
            expected = value(node)
            if isinstance(result, torch.Tensor) and isinstance(expected, torch.Tensor):
                if [hint(concrete(s)) for s in result.shape] != [hint(concrete(s)) for s in expected.shape]:
                    raise VerificationError(f"node '{node.name}' is {tuple(result.shape)}, its metadata says "
                                            f"{tuple(expected.shape)}")
            return result

    shapes = fake_mode_of(work.module.graph).shape_env  # numbers that depend on data get new symbols here, which nobody binds
    unbound = contextlib.nullcontext() if shapes is None else shapes.ignore_fresh_unbacked_symbols()
    try:
        with fake_mode_of(work.module.graph), torch.no_grad(), unbound:
            Check(work.module).run(*(value(node) for node in placeholders))
    except VerificationError as error:
        return str(error)
    except Exception as error:
        return f"does not run on fake tensors: {error}"
    return None


Check = Callable[[Work], str | None]

CHEAP_CHECKS: tuple[Check, ...] = (
    is_well_formed, is_acyclic, has_values, has_same_interface, runs_on_planned_rows, sees_planned_keys, returns_what_is_left)
ALL_CHECKS: tuple[Check, ...] = (*CHEAP_CHECKS, has_consistent_sizes)


def verifier(checks: tuple[Check, ...] = CHEAP_CHECKS) -> Callable[[PassRecord, Work], None]:
    """A pipeline hook that runs the checks after every pass that may have changed the graph.

    Raises (the hook):
        VerificationError: names the pass and the check.
    """

    def verify(record: PassRecord, work: Work) -> None:
        for check in checks if record.changes_graph else ():
            problem = check(work)
            if problem is not None:
                raise VerificationError(f"pass {record.name} broke {check.__name__}: {problem}")

    return verify
