"""The checks that run between passes, each with broken passes that it catches; and pipelines that lack something."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import parvts_fx
from parvts_fx.analysis.values import output_node, value
from parvts_fx.capture.editing import Editor
from parvts_fx.passes import (
    DropDeadRows,
    DuplicateAttention,
    DuplicateLayers,
    Emit,
    InsertPartition,
    Pass,
    Plan,
    PlanError,
    PruneBranch,
    RemoveDeadCode,
    SharePrefix,
    Work,
    build_pipeline,
    run_pipeline,
)
from parvts_fx.passes.rows import live
from parvts_fx.passes.verify import ALL_CHECKS, VerificationError, returns_what_is_left
from parvts_fx.rewriting import rewrite_graph
from parvts_fx.runtime.garbage import no_collections
from parvts_fx.stages import Stage
from tests.plain import Plain, Row, Specification, prompt
from tests.plain_graphs import CHOICES, SPECIFICATIONS, Call, Refine, capture, captured, options
from tests.plain_reference import largest_error, reference
from tests.reference import relative_error
from tests.test_injected_bugs import BUGS

ONE: dict[str, Any] = dict(keep_tokens=2, migration_depth=1, merge=None)
JOINT: dict[str, Any] = dict(keep_tokens=2, migration_depth=2, paths="joint", merge=None)
TOLERANCE = 2e-5


# -- broken passes behind emit ----------------------------------------------------------------------------------------


def pruned_stream(work: Work) -> Node:
    """The [batch, path A, hidden] tensor in front of the last layer, which other nodes read."""
    node = work.written.held[work.plan.link(2)][live(work.plan.final)]
    assert node.users and value(node).dim() == 3
    return node


def replace_with(work: Work, node: Node, new: Node) -> None:
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def name_twice(work: Work) -> None:
    pruned_stream(work).name = work.written.held[work.plan.decoder.merge.output][live(0)].name


def close_a_cycle(work: Work) -> None:
    node = pruned_stream(work)
    reader = next(iter(node.users))
    node.args = (reader, *node.args[1:])


def leave_out_a_value(work: Work) -> None:
    node = pruned_stream(work)
    with work.module.graph.inserting_after(node):
        replace_with(work, node, work.module.graph.call_function(torch.clone, (node,)))


def write_a_wrong_value(work: Work) -> None:
    node = pruned_stream(work)
    with work.module.graph.inserting_after(node):
        new = Editor(work.module).call(torch.clone, node)
    replace_with(work, node, new)
    new.meta["example_value"] = value(new)[:, 1:]


def see_fewer_keys(work: Work) -> None:
    call = work.written.calls[-1].output
    key, count = call.args[1], value(call.args[1]).shape[2]
    with work.module.graph.inserting_before(call):
        call.replace_input_with(key, Editor(work.module).method("narrow", key, 2, 1, count - 1))


def change_outputs(edit: Callable[[Editor, list[Node]], Sequence[Node]]) -> Call:
    def action(work: Work) -> None:
        output = output_node(work.module.graph)
        with work.module.graph.inserting_before(output):
            output.args = (tuple(edit(Editor(work.module), list(output.args[0]))),)

    return Call(action)


def of_all_rows(editor: Editor, held: Node, axis: int) -> Node:
    """As many rows as the prompt has."""
    return editor.call(torch.cat, [held, editor.method("narrow", held, axis, 0, 3)], axis)


def add_an_input(work: Work) -> None:
    first = next(iter(work.module.graph.nodes))
    with work.module.graph.inserting_before(first):
        work.module.graph.placeholder("more").meta["example_value"] = value(first)


# -- broken plans -----------------------------------------------------------------------------------------------------


def levels_of_none_left_behind(plan: Plan) -> Plan:
    """More rows than are left."""
    return dataclasses.replace(plan, levels=dict.fromkeys(plan.levels, 0))


def rows_that_stay(first_behind: Callable[[Plan], Node]) -> Refine:
    """In layer 1 all rows stay, one layer more than they should, in front of some node."""

    def change(plan: Plan) -> Plan:
        live = {node: 0 if node < first_behind(plan) else level for node, level in plan.live.items()}
        return dataclasses.replace(plan, live=live, levels=live)

    return Refine(change)


def rows_that_leave_early(plan: Plan) -> Plan:
    """In front of layer 1, whose rows should see all."""
    live = {node: max(level, int(node > plan.link(1))) for node, level in plan.live.items()}
    return dataclasses.replace(plan, live=live, levels=live)


def groups_in_a_joint_layer(plan: Plan) -> Plan:
    (attention,) = plan.layers[0].attentions
    return dataclasses.replace(plan, groups={attention.output: 0})


BROKEN: dict[str, tuple[Pass, dict[str, Any], set[str]]] = {
    "two nodes of one name": (Call(name_twice), ONE, {"is_well_formed"}),
    # FX's lint sees every cycle too, as an argument that is used before it is defined, and no graph with one runs
    "a cycle": (Call(close_a_cycle), ONE, {"is_acyclic", "is_well_formed", "has_consistent_sizes"}),
    "a node without a value": (Call(leave_out_a_value), ONE, {"has_values"}),
    "an output less": (change_outputs(lambda editor, out: out[:-1]), ONE, {"has_same_interface"}),
    "an output's type": (
        change_outputs(lambda editor, out: [editor.method("double", out[0]), *out[1:]]), ONE, {"has_same_interface"}),
    "an output cut along its channels": (
        change_outputs(lambda editor, out: [*out[:-1], editor.method("narrow", out[-1], 3, 0, 2)]), ONE,
        {"has_same_interface"}),
    "logits of all rows": (
        change_outputs(lambda editor, out: [of_all_rows(editor, out[0], 1), *out[1:]]), ONE, {"returns_what_is_left"}),
    "a cache of all rows": (
        change_outputs(lambda editor, out: [*out[:-1], of_all_rows(editor, out[-1], 2)]), ONE, {"returns_what_is_left"}),
    "a wrong size": (Call(write_a_wrong_value), ONE, {"has_consistent_sizes"}),
    "a call that sees fewer keys": (Call(see_fewer_keys), ONE, {"sees_planned_keys", "has_consistent_sizes"}),
    "more rows than are left": (
        Refine(levels_of_none_left_behind), ONE, {"runs_on_planned_rows", "sees_planned_keys"}),
    "rows stay for one layer more": (
        rows_that_stay(lambda plan: plan.link(2).next), ONE, {"runs_on_planned_rows", "sees_planned_keys"}),
    "rows stay where they only cost": (
        rows_that_stay(lambda plan: plan.layers[1].attentions[0].output), ONE, {"runs_on_planned_rows"}),
    "rows leave a layer early": (Refine(rows_that_leave_early), JOINT, {"sees_planned_keys"}),
    "groups in a joint layer": (Refine(groups_in_a_joint_layer), JOINT, {"sees_planned_keys"}),
}


def with_broken(pipeline: Sequence[Pass], broken: Pass) -> list[Pass]:
    """A pass that refines the plan stands in front of emit, any other behind everything."""
    place = [given.name for given in pipeline].index("emit") if hasattr(broken, "plan") else len(pipeline)
    return [*pipeline[:place], broken, *pipeline[place:]]


def run_broken(
    broken: Pass, checks: tuple, choice: dict[str, Any], at_end: Callable[[Work], Any] = lambda work: None
) -> None:
    module, inputs = captured(SPECIFICATIONS["masked"])
    parsed = options(**choice)
    rewrite_graph(module, inputs, parsed, [*with_broken(build_pipeline(parsed), broken), Call(at_end)], checks)


@pytest.mark.parametrize("broken, choice, caught_by", BROKEN.values(), ids=BROKEN.keys())
def test_checks_catch(broken: Pass, choice: dict[str, Any], caught_by: set[str]) -> None:
    found: set[str] = set()

    def collect(work: Work) -> None:
        found.update(check.__name__ for check in ALL_CHECKS if check(work) is not None)

    run_broken(broken, (), choice, collect)
    assert found == caught_by
    where = "emit" if hasattr(broken, "plan") else "broken_pass"  # a plan is checked when it has been written
    for check in ALL_CHECKS:
        if check.__name__ in caught_by:
            with pytest.raises(VerificationError, match=f"^pass {where} broke {check.__name__}: "):
                run_broken(broken, (check,), choice)


def test_every_check_has_a_broken_pass() -> None:
    assert set().union(*(caught_by for *_, caught_by in BROKEN.values())) == {check.__name__ for check in ALL_CHECKS}


def test_rewrite_checks_a_pipeline_that_it_is_handed() -> None:
    module, inputs = captured(SPECIFICATIONS["causal"])
    passes = [*build_pipeline(options(**ONE)), Call(add_an_input)]
    with pytest.raises(VerificationError, match="^pass broken_pass broke has_same_interface: "):
        parvts_fx.rewrite(module, inputs, options(**ONE), passes)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_rows_that_stay_are_caught_whatever_is_chosen(choice: dict[str, Any]) -> None:
    def all_rows(editor: Editor, out: list[Node]) -> list[Node]:
        missing = 13 - value(out[0]).shape[1]
        return [editor.call(torch.cat, [out[0], editor.method("narrow", out[0], 1, 0, missing)], 1), *out[1:]]

    with pytest.raises(VerificationError, match="^pass broken_pass broke returns_what_is_left: "):
        run_broken(change_outputs(all_rows), (returns_what_is_left,), choice)


@pytest.mark.slow
@pytest.mark.parametrize("lean", [True, False], ids=["lean", "full"])
@pytest.mark.parametrize("name", SPECIFICATIONS)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_no_check_objects_to_what_the_passes_do(choice: dict[str, Any], name: str, lean: bool) -> None:
    """After each pass of the pipeline, the optional ones included."""
    module, inputs = captured(SPECIFICATIONS[name])
    given = parvts_fx.Options(**choice, skip_dead_rows=lean)
    assert rewrite_graph(module, inputs, given, checks=ALL_CHECKS).report.status == "rewritten"


WRITTEN_WRONG = {
    "rows leave one layer late": "sees_planned_keys", "rows leave one layer early, without dead rows": "sees_planned_keys",
    "text sees the subject group alone": "sees_planned_keys", "groups see each other": "sees_planned_keys",
    "non-subject rows see the subject group": "sees_planned_keys",
    "last text row sees the subject group alone": "sees_planned_keys",
    "last visual row sees both groups": "sees_planned_keys", "twin runs one layer more": "sees_planned_keys",
    "second stage: text sees the subject group alone": "sees_planned_keys",
    "second stage: groups see each other": "sees_planned_keys", "second stage: cache not shortened": "returns_what_is_left",
}


@pytest.mark.parametrize("name, check", WRITTEN_WRONG.items(), ids=WRITTEN_WRONG.keys())
def test_checks_catch_what_is_written_otherwise_than_planned(
    monkeypatch: pytest.MonkeyPatch, name: str, check: str
) -> None:
    """Of the bugs that are injected elsewhere, those that show in rows and keys; in a user's call."""
    patch, comparison = BUGS[name]
    patch(monkeypatch)
    with pytest.raises(parvts_fx.NotRewritten, match=f"pass emit broke {check}: "):
        comparison.error()


# -- pipelines that lack something, or have it elsewhere --------------------------------------------------------------

FRONT = (Row(before=3), Row(before=4, between=2))
MODELS = {
    "masked": Specification(layers=3, length=14, heads=4, groups=2, attention="masked", rows=FRONT),
    "causal, last row": Specification(layers=3, length=14, rows=FRONT, last_only=True),
}
SCHEDULES: dict[str, tuple[Stage, ...]] = {
    "attention": (Stage(keep=2, rule="diverse", migrate=2),),
    "joint": (Stage(at=1, keep=2, rule="diverse", migrate=1, paths="joint"),),
    "weight": (Stage(keep=2, rule="diverse", migrate=2, fusion=0.4),),
    "two": (Stage(keep=4, rule="diverse", migrate=1), Stage(at=1, keep=2, rule="last_row", migrate=1)),
    "weight, then attention": (
        Stage(keep=4, rule="diverse", migrate=1, fusion=0.4), Stage(at=1, keep=2, rule="diverse", migrate=1)),
    "attention, then weight": (
        Stage(keep=4, rule="diverse", migrate=1), Stage(at=1, keep=2, rule="last_row", migrate=2, fusion=0.4)),
}
SAVINGS = ("drop_dead_rows", "share_prefix")
EACH = pytest.mark.parametrize("model, schedule", [
    *(("masked", name) for name in SCHEDULES), ("causal, last row", "attention"), ("causal, last row", "two")])


class Planned(Exception):
    """The analysis has been done."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A graph that has been analysed, for any number of pipelines."""

    module: GraphModule
    inputs: list[Any]
    plan: Plan

    @property
    def planners(self) -> list[Pass]:
        return [given for given in build_pipeline(self.plan.options) if hasattr(given, "plan")]

    def planned(self, passes: Sequence[Pass]) -> Plan:
        plan = self.plan
        for given in passes:
            plan, _ = given.plan(plan)
        return plan

    def results(self, *passes: Pass, plan: Plan | None = None) -> list[Tensor]:
        """What the graph gives that a pipeline writes."""
        graph = self.module.graph
        work = Work(self.module, self.plan if plan is None else plan)
        try:
            run_pipeline(passes, work)
            work.module.recompile()
            with torch.no_grad():
                return torch.utils._pytree.tree_leaves(work.module(*self.inputs))
        finally:
            self.module.graph = graph


    @functools.cached_property
    def wanted(self) -> list[Tensor]:
        """What it gives with the whole pipeline."""
        return self.results(*build_pipeline(self.plan.options))


@functools.cache
def prepared(model: str, schedule: str) -> Prepared:
    spec, stages = MODELS[model], SCHEDULES[schedule]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        module, inputs = capture(Plain(spec), *prompt(spec).arguments)
    parsed, held = parvts_fx.Options(stages=stages, lowering="eager"), []

    def stop(work: Work) -> None:
        held.append(Prepared(work.module, inputs, work.plan))
        raise Planned

    with pytest.raises(Planned):
        rewrite_graph(module, inputs, parsed, [Call(stop)])
    return held[0]


def distance(actual: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(relative_error(*pair) for pair in zip(actual, wanted, strict=True))


@pytest.mark.slow
@EACH
def test_the_whole_pipeline_is_right(model: str, schedule: str) -> None:
    found, spec, stages = prepared(model, schedule), MODELS[model], SCHEDULES[schedule]
    logits, *caches = found.wanted
    wanted = reference(Plain(spec), prompt(spec), stages=stages)
    assert largest_error((logits, list(zip(caches[::2], caches[1::2]))), wanted) < TOLERANCE
    shared = [twin.prefix for twin in found.planned(found.planners).twins.values()]
    assert all(shared) and len(shared) == sum(stage.fusion != "attention" for stage in stages)


@pytest.mark.slow
@EACH
def test_any_order_gives_the_same_or_an_error(model: str, schedule: str) -> None:
    found = prepared(model, schedule)
    refused, plans = 0, []
    for passes in itertools.permutations(found.planners):
        try:
            plan = found.planned(passes)
        except PlanError:
            refused += 1
            continue
        if plan not in plans:
            plans.append(plan)
    assert refused and plans
    for plan in plans:
        assert distance(found.results(Emit(), RemoveDeadCode(), plan=plan), found.wanted) < TOLERANCE


@pytest.mark.slow
@EACH
def test_savings_change_nothing_and_any_other_pass_is_missed(model: str, schedule: str) -> None:
    """Of all subsets in order: those without one that is needed say which."""
    found = prepared(model, schedule)
    needed = {given.name for given in found.planners} - set(SAVINGS)
    for chosen in itertools.product([True, False], repeat=len(found.planners)):
        passes = list(itertools.compress(found.planners, chosen))
        missing = needed - {given.name for given in passes}
        if missing:
            with pytest.raises(PlanError) as error:
                found.results(*passes, Emit(), RemoveDeadCode())
            assert any(name in str(error.value) for name in missing), error.value
        else:
            assert distance(found.results(*passes, Emit(), RemoveDeadCode()), found.wanted) < TOLERANCE


@pytest.mark.parametrize("lacking, schedule", [
    (InsertPartition, "joint"), (DuplicateAttention, "two"), (DuplicateLayers, "weight"), (PruneBranch, "attention")])
def test_a_pipeline_without_a_pass_that_it_needs(lacking: type, schedule: str) -> None:
    module, inputs = captured(MODELS["masked"])
    parsed = parvts_fx.Options(stages=SCHEDULES[schedule])
    passes = [given for given in build_pipeline(parsed) if not isinstance(given, (lacking, DropDeadRows))]
    with pytest.raises(PlanError, match=f"lacks the pass {lacking.name}"):
        parvts_fx.rewrite(module, inputs, parsed, passes)
    (saving,) = (given for given in build_pipeline(parsed) if isinstance(given, DropDeadRows))
    with pytest.raises(PlanError, match=lacking.name):
        parvts_fx.rewrite(module, inputs, parsed, [*passes[:-2], saving, *passes[-2:]])


def test_a_pipeline_without_emit() -> None:
    module, inputs = captured(MODELS["masked"])
    parsed = parvts_fx.Options(stages=SCHEDULES["joint"])
    passes = [given for given in build_pipeline(parsed) if not isinstance(given, Emit)]
    with pytest.raises(PlanError, match="lacks the pass emit"):
        parvts_fx.rewrite(module, inputs, parsed, passes)


@pytest.mark.parametrize("again", [Emit(), DropDeadRows(), SharePrefix()], ids=lambda again: again.name)
def test_what_cannot_stand_behind_emit(again: Pass) -> None:
    module, inputs = captured(MODELS["masked"])
    parsed = parvts_fx.Options(stages=SCHEDULES["joint"])
    with pytest.raises(RuntimeError, match=f"parvts_fx: pass {again.name} "):
        parvts_fx.rewrite(module, inputs, parsed, [*build_pipeline(parsed), again])


@pytest.mark.slow
def test_passes_twice() -> None:
    """All but emit may be."""
    for schedule in SCHEDULES:
        found = prepared("masked", schedule)
        twice = [again for given in found.planners for again in (given, given)]
        for passes in (twice, found.planners * 2):
            results = found.results(*passes, Emit(), RemoveDeadCode(), RemoveDeadCode())
            assert distance(results, found.wanted) < TOLERANCE


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_comes_back_as_it_was(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="a pass failed"), no_collections():
            assert not gc.isenabled()
            raise RuntimeError("a pass failed")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
