"""The checks that run between passes: for each of them, broken passes that it and no other catches."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch.fx import Node

import parvts_fx
from parvts_fx.analysis.values import output_node, value
from parvts_fx.passes import Pass, PassResult, PruneBranch, State, build_pipeline
from parvts_fx.passes.verify import ALL_CHECKS, VerificationError, drops_branch
from parvts_fx.rewriting import no_collections, rewrite_graph
from tests.plain_graphs import CHOICES, SPECIFICATIONS, Call, captured, options


def pruned_stream(state: State) -> Node:
    """The [batch, path A, hidden] tensor behind the pruning, which other nodes read."""
    node = state.prune_node
    assert node.users and value(node).dim() == 3
    return node


def replace_with(state: State, node: Node, new: Node) -> None:
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def name_twice(state: State) -> None:
    pruned_stream(state).name = state.decoder.merge.output.name


def close_a_cycle(state: State) -> None:
    node = pruned_stream(state)
    reader = next(iter(node.users))
    node.args = (reader, *node.args[1:])


def leave_out_a_value(state: State) -> None:
    node = pruned_stream(state)
    with state.module.graph.inserting_after(node):
        replace_with(state, node, state.module.graph.call_function(torch.clone, (node,)))


def write_a_wrong_value(state: State) -> None:
    node = pruned_stream(state)
    with state.module.graph.inserting_after(node):
        new = state.editor.call(torch.clone, node)
    replace_with(state, node, new)
    new.meta["example_value"] = value(new)[:, 1:]


def change_outputs(edit: Callable[[State, list[Node]], Sequence[Node]]) -> Callable[[State], None]:
    def action(state: State) -> None:
        output = output_node(state.module.graph)
        with state.module.graph.inserting_before(output):
            output.args = (tuple(edit(state, list(output.args[0]))),)

    return action


def add_an_input(state: State) -> None:
    first = next(iter(state.module.graph.nodes))
    with state.module.graph.inserting_before(first):
        state.module.graph.placeholder("more").meta["example_value"] = value(first)


@dataclasses.dataclass(frozen=True)
class PruneAllButLogits(PruneBranch):
    name: ClassVar[str] = "broken_pass"

    def run(self, state: State) -> PassResult:
        output = output_node(state.module.graph)
        logits = output.args[0][0]
        result = super().run(state)
        output.args = ((logits, *output.args[0][1:]),)
        return result


BROKEN: dict[str, tuple[Pass | Callable[[State], None], set[str]]] = {
    "two nodes of one name": (name_twice, {"is_well_formed"}),
    # FX's lint sees every cycle too, as an argument that is used before it is defined, and no graph with one runs
    "a cycle": (close_a_cycle, {"is_acyclic", "is_well_formed", "has_consistent_sizes"}),
    "a node without a value": (leave_out_a_value, {"has_values"}),
    "an output less": (change_outputs(lambda state, out: out[:-1]), {"has_same_interface"}),
    "an output's type": (
        change_outputs(lambda state, out: [state.editor.method("double", out[0]), *out[1:]]), {"has_same_interface"}),
    "an output cut along its channels": (
        change_outputs(lambda state, out: [*out[:-1], state.editor.method("narrow", out[-1], 3, 0, 2)]),
        {"has_same_interface"}),
    "logits of all rows": (PruneAllButLogits("attention"), {"drops_branch"}),
    "a wrong size": (write_a_wrong_value, {"has_consistent_sizes"}),
}


def run_broken(
    broken: Pass | Callable[[State], None],
    checks: tuple,
    at_end: Callable[[State], Any] = lambda state: None,
    migration_depth: int = 1,
) -> None:
    module, inputs = captured(SPECIFICATIONS["masked"])
    parsed = options(migration_depth=migration_depth)
    passes = list(build_pipeline(parsed))
    if isinstance(broken, PruneBranch):
        passes = [broken if isinstance(known, PruneBranch) else known for known in passes]
    else:
        passes.append(Call(broken))
    rewrite_graph(module, inputs, parsed, [*passes, Call(at_end)], checks)


@pytest.mark.parametrize("broken, caught_by", BROKEN.values(), ids=BROKEN.keys())
def test_checks_catch(broken: Pass | Callable[[State], None], caught_by: set[str]) -> None:
    found: set[str] = set()

    def collect(state: State) -> None:
        found.update(check.__name__ for check in ALL_CHECKS if check(state) is not None)

    run_broken(broken, (), collect)
    assert found == caught_by
    for check in ALL_CHECKS:
        if check.__name__ in caught_by:
            with pytest.raises(VerificationError, match=f"^pass broken_pass broke {check.__name__}: "):
                run_broken(broken, (check,))


def test_every_check_has_a_broken_pass() -> None:
    assert set().union(*(caught_by for _, caught_by in BROKEN.values())) == {check.__name__ for check in ALL_CHECKS}


def test_rewrite_checks_a_pipeline_that_it_is_handed() -> None:
    module, inputs = captured(SPECIFICATIONS["causal"])
    passes = [*build_pipeline(options(migration_depth=1)), Call(add_an_input)]
    with pytest.raises(VerificationError, match="^pass broken_pass broke has_same_interface: "):
        parvts_fx.rewrite(module, inputs, options(migration_depth=1), passes)


@pytest.mark.parametrize("depth", [0, 2, 3])
def test_rows_that_stay_are_caught_at_any_depth(depth: int) -> None:
    with pytest.raises(VerificationError, match="^pass broken_pass broke drops_branch: "):
        run_broken(PruneAllButLogits("attention"), (drops_branch,), migration_depth=depth)


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_no_check_objects_to_what_the_passes_do(choice: dict[str, Any]) -> None:
    """After each pass of the pipeline, the optional ones included."""
    module, inputs = captured(SPECIFICATIONS["masked"])
    given = parvts_fx.Options(keep_tokens=2, **choice)
    assert rewrite_graph(module, inputs, given, checks=ALL_CHECKS).report.status == "rewritten"


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
