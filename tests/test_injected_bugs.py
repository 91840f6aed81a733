"""Mistakes that an implementation may contain, put in one at a time: the comparison with the reference finds each.

A tolerance, a prompt or a weight scale under which one of them went unnoticed would say nothing about the code. None of
them may raise: an error that a mistake in a patch causes would pass for a bug that was found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parvts_fx import scores
from parvts_fx.analysis.values import ancestors, value
from parvts_fx.passes import (
    DuplicateLayers,
    PruneBranch,
    State,
    duplicate_attention,
    insert_partition,
    keep_last_rows,
    prune_branch,
    share_prefix,
    skip_dead_rows,
)
from parvts_fx.passes.editing import RowEditor
from tests.plain import Plain, Row, Specification, prompt
from tests.plain_reference import largest_error, reference

FOUND, TOLERANCE = 1e-3, 2e-5

ROWS = (Row(before=2), Row(padding=2, before=1, between=2))
MASKED = Specification(
    layers=3, heads=4, groups=2, attention="masked", scale=0.6, length=14, rows=ROWS, numbering="mask")
WRITTEN = dataclasses.replace(MASKED, attention="written", flat=True)
CAUSAL = dataclasses.replace(MASKED, attention="causal", numbering="index")


def tied(hidden: Tensor, visual: Tensor) -> Tensor:
    return (visual.long().cumsum(1) % 2).float()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One model, prompt and choice of options, compiled and held against the reference."""

    spec: Specification = MASKED
    migration_depth: int = 1
    fusion: str | float = "attention"
    score: Callable[[Tensor, Tensor], Tensor] = scores.diverse
    skip_dead_rows: bool = False

    def error(self) -> float:
        given = prompt(self.spec)
        options = {"keep_tokens": 2, "migration_depth": self.migration_depth, "fusion": self.fusion}
        ours = {"score": self.score, "skip_dead_rows": self.skip_dead_rows, "lowering": "eager", "strict": True}
        torch._dynamo.reset()
        model = Plain(self.spec)
        compiled = torch.compile(model, backend="parvts", options={**options, **ours})
        with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
            return largest_error(compiled(*given.arguments), reference(model, given, self.score, **options))


Patch = Callable[[pytest.MonkeyPatch], None]


def wrap(owner: Any, name: str, bug: Callable[..., Any]) -> Patch:
    """Replace ``owner.name`` by ``bug(original, ...)``."""
    original = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *args, **kwargs: bug(original, *args, **kwargs))


def attention_calls(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Patch:
    """In the attention calls that the passes write, change the keyword arguments."""

    def bug(original: Callable, self: RowEditor, target: Callable, *args: Any, **kwargs: Any) -> Any:
        return original(self, target, *args, **(change(kwargs) if target is F.scaled_dot_product_attention else kwargs))

    return wrap(RowEditor, "call", bug)


def copied_attention_without_mask(original: Callable, self: RowEditor, node: Any, args: tuple, kwargs: dict) -> Any:
    return original(self, node, args, {name: held for name, held in kwargs.items() if name != "attn_mask"})


def partitioning(name: str, change: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Patch:
    """Change one of the partition's tensors, given all."""

    def bug(original: Callable, *args: Any) -> dict[str, Tensor]:
        tensors = original(*args)
        return tensors | {name: change(tensors[name], tensors)}

    return wrap(insert_partition, "partition", bug)


def scoring(change: Callable[[Tensor], Tensor]) -> Patch:
    return wrap(insert_partition, "partition", lambda original, given, *rest: original(change(given), *rest))


def one_less(held: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return (held - 1).clamp(min=0)


def of_the_first_sample(held: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return held[:1].expand_as(held).clone()


def one_more_within(rows: str) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """The next place among the rows of that name."""
    return lambda held, tensors: (held + 1).clamp(max=tensors[rows].shape[1] - 1)


def swapped_branches(original: Callable, self: RowEditor, target: Callable, *args: Any, **kwargs: Any) -> Any:
    if target is torch.cat and len(args[0]) == 3:
        args = ([args[0][1], args[0][0], args[0][2]], *args[1:])
    return original(self, target, *args, **kwargs)


def attending(
    change: Callable[[State, Any, Any], Any], owners: tuple[Any, ...] = (duplicate_attention, skip_dead_rows)
) -> Patch:
    """Change which keys a group of queries attends to, in the calls that some passes write."""

    def bug(original: Callable, state: State, attention: Any, queries: Any, keys: Any, *rest: Any) -> Any:
        return original(state, attention, queries, change(state, queries, keys), *rest)

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        for owner in owners:
            wrap(owner, "attend", bug)(monkeypatch)

    return patch


def depth_off_by(difference: int) -> Patch:
    return lambda patch: patch.setattr(State, "depth", property(lambda self: self.options.migration_depth + difference))


def whole_outputs(original: Callable, state: State, node: Any, *rest: Any) -> Any:
    return node if any(user.op == "output" for user in node.users) else original(state, node, *rest)


def ungathered_positions(original: Callable, self: RowEditor, node: Any, axis: int, rows: Any, batch: Any, *more: Any) -> Any:
    """The first rows of what does not depend on the prompt's embeddings (rotary angles) in place of the chosen ones."""
    follows = any("masked_scatter" in str(source.target) for source in ancestors([node]))
    if follows or not value(node).is_floating_point():
        return original(self, node, axis, rows, batch, *more)
    with self.graph.inserting_before(max(node, rows.ready).next):
        return self.method("narrow", node, axis, 0, rows.count)


def mask_by_slot(original: Callable, self: RowEditor, *given: Any) -> Any:
    """A causal mask over the compacted rows, as if both sides had the same positions."""
    node = original(self, *given)
    with self.graph.inserting_before(node.next):
        return self.inline(lambda mask: torch.ones_like(mask).tril(), node)


def keys_of_its_own(original: Callable, self: DuplicateLayers, state: State, attention: Any, ready: Any) -> Any:
    """In front of path B's keys its own first ones, in place of path A's."""
    full = original(self, state, attention, ready)
    for reader, node in list(state.lent.items()):
        if node in ready and reader in full[node].all_input_nodes:
            reader.replace_input_with(node, ready[node])
            del state.lent[reader]
    return full


def weight_on_the_other_path(original: Callable, self: PruneBranch, *args: Any) -> Any:
    return original(dataclasses.replace(self, fusion=1 - self.fusion), *args)


WEIGHT, DEAD = Comparison(fusion=0.25), Comparison(migration_depth=2, skip_dead_rows=True)
LEAN_WEIGHT = Comparison(fusion=0.25, skip_dead_rows=True)
FRONT = Comparison(dataclasses.replace(MASKED, rows=(Row(before=3), Row(before=4, between=2))), migration_depth=2,
                   fusion=0.25, skip_dead_rows=True)
AHEAD = dataclasses.replace(FRONT, spec=dataclasses.replace(FRONT.spec, span="all"))
LAST = Comparison(dataclasses.replace(MASKED, last_only=True), migration_depth=3, skip_dead_rows=True)
LAST_VISUAL = Comparison(dataclasses.replace(MASKED, last_only=True, scale=0.1, length=9, rows=(Row(before=4),)),
                         migration_depth=3, skip_dead_rows=True)
BUGS: dict[str, tuple[Patch, Comparison]] = {
    "mask dropped in migration": (attention_calls(lambda named: {**named, "attn_mask": None}), Comparison()),
    "mask dropped behind pruning": (wrap(RowEditor, "copy", copied_attention_without_mask), Comparison()),
    "causal mask by slot": (wrap(RowEditor, "causal_mask", mask_by_slot), Comparison(CAUSAL)),
    "scale dropped": (attention_calls(lambda named: {**named, "scale": None}), Comparison()),
    "rows off by one": (partitioning("subject", one_less), Comparison()),
    "rows off by one, written out": (partitioning("subject", one_less), Comparison(WRITTEN)),
    "rows of another sample": (partitioning("subject", of_the_first_sample), Comparison()),
    "branches swapped": (wrap(RowEditor, "call", swapped_branches), Comparison()),
    "pruned one layer late": (depth_off_by(1), Comparison()),
    "pruned one layer early": (depth_off_by(-1), Comparison()),
    "pruned one layer late, weights": (depth_off_by(1), WEIGHT),
    "lowest scores kept": (scoring(torch.neg), Comparison()),
    "ties to the later position": (
        scoring(lambda given: given + 1e-3 * torch.arange(given.shape[1])), Comparison(score=tied)),
    "cache not shortened": (wrap(prune_branch, "gather_rows", whole_outputs), Comparison()),
    "text sees the subject group alone": (
        attending(lambda state, queries, keys: state.partition.subject if queries.name == "text" else keys),
        Comparison()),
    "groups see each other": (attending(lambda state, queries, keys: state.partition.everything), Comparison()),
    "text sees the subject group alone, without dead rows": (
        attending(lambda state, queries, keys: state.partition.subject if queries.name == "text" else keys), DEAD),
    "groups see each other, without dead rows": (
        attending(lambda state, queries, keys: state.partition.everything), Comparison(skip_dead_rows=True)),
    "text rows misplaced": (partitioning("subject_slots", one_less), DEAD),
    "queries of other rows": (partitioning("text_in_subject", one_more_within("subject")), DEAD),
    "mask dropped, without dead rows": (attention_calls(lambda named: {**named, "attn_mask": None}), DEAD),
    "positions not gathered, without dead rows": (wrap(RowEditor, "gather", ungathered_positions), DEAD),
    "positions not gathered": (wrap(RowEditor, "gather", ungathered_positions), Comparison()),
    "weight on the other path": (wrap(PruneBranch, "_fuse", weight_on_the_other_path), WEIGHT),
    "fused with the next token, without dead rows": (
        partitioning("text_partners", one_more_within("text")), LEAN_WEIGHT),
    "prefix one row too long": (wrap(share_prefix, "_leading", lambda original, text: original(text) + 1), FRONT),
    "prefix shared though it looks ahead": (
        wrap(share_prefix, "_see_themselves_alone", lambda original, masks, front: original(masks, front) | True), AHEAD),
    "prefix keys of the other path": (wrap(DuplicateLayers, "_lend", keys_of_its_own), FRONT),
    "queries of other rows, weights": (
        partitioning("text_in_non_subject", one_more_within("non_subject")), LEAN_WEIGHT),
    "last text row sees the subject group alone": (
        attending(lambda state, queries, keys: state.partition.subject, (keep_last_rows,)), LAST),
    "last visual row sees both groups": (
        attending(lambda state, queries, keys: state.partition.everything, (keep_last_rows,)), LAST_VISUAL),
    "fused with the next token": (partitioning("partners", one_more_within("non_subject")), WEIGHT),
}


@pytest.mark.parametrize("patch, comparison", BUGS.values(), ids=BUGS.keys())
def test_bug_is_found(monkeypatch: pytest.MonkeyPatch, patch: Patch, comparison: Comparison) -> None:
    patch(monkeypatch)
    assert comparison.error() > FOUND


@pytest.mark.parametrize("comparison", dict.fromkeys(comparison for _, comparison in BUGS.values()),
                         ids=lambda held: f"{held.spec.attention}, K={held.migration_depth}, {held.fusion}")
def test_comparison_passes_without_the_bug(comparison: Comparison) -> None:
    assert comparison.error() < TOLERANCE
