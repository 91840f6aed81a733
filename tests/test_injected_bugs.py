"""Mistakes that an implementation may contain, put in one at a time: the comparison with the reference finds each.

A tolerance, a prompt or a weight scale under which one of them went unnoticed would say nothing about the code. None of
them may raise: an error that a mistake in a patch causes would pass for a bug that was found. So the checks between passes
are off here: what they find is in test_graph_checks.py.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from parvts_fx import rewriting, stages
from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.values import ancestors, is_symbolic_int, value
from parvts_fx.capture.editing import Editor
from parvts_fx.options import Options
from parvts_fx.passes import (
    DuplicateLayers,
    InsertPartition,
    MergeClusters,
    Plan,
    attend,
    choose,
    clusters,
    emit,
    rows,
    token_counts,
    twins,
)
from parvts_fx.passes.emit import Emitter
from parvts_fx.passes.look_ahead import AheadPath
from parvts_fx.passes.paths import Path
from parvts_fx.passes.rows import LAST, TEXT, RowSet, RowSets, live, non_subject
from parvts_fx.passes.twins import TwinPath
from parvts_fx.scores import LookAhead
from parvts_fx.stages import PlacedStage, Stage
from tests.plain import Mixing, Plain, Row, Specification, prompt
from tests.plain_checking import answer
from tests.plain_reference import largest_error, reference

FOUND, TOLERANCE = 1e-3, 2e-5

ROWS = (Row(before=2), Row(padding=2, before=1, between=2))
MASKED = Specification(
    layers=3, heads=4, groups=2, attention="masked", scale=0.6, length=14, rows=ROWS, numbering="mask")
WRITTEN = dataclasses.replace(MASKED, attention="written", flat=True)
CAUSAL = dataclasses.replace(MASKED, attention="causal", numbering="index")
FULL = dataclasses.replace(MASKED, span="all")


def tied(hidden: Tensor, visual: Tensor) -> Tensor:
    return (visual.long().cumsum(1) % 2).float()


class PaidAhead(LookAhead):
    def __call__(self, hidden: Tensor, visual: Tensor, ahead: Tensor, places: Tensor) -> Tensor:
        return ahead.mean(1).sum(1)


def migrating(at: int = 0, keep: int | float = 2, rule: Any = "diverse", migrate: int = 1, **more: Any) -> Stage:
    return Stage(at=at, keep=keep, rule=rule, migrate=migrate, **more)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One model, prompt and schedule, compiled and held against the reference."""

    spec: Specification = MASKED
    stages: tuple[Stage, ...] = (migrating(),)
    skip_dead_rows: bool = False
    dynamic: bool | None = None

    def __str__(self) -> str:
        stages = "; ".join(f"{s.at}+{s.migrate} keep {s.keep} {s.paths if s.fusion == 'attention' else s.fusion}"
                           for s in self.stages)
        return f"{self.spec.attention} {self.spec.span}, {stages}, {'lean' if self.skip_dead_rows else 'full'}"

    def error(self) -> float:
        given, model = prompt(self.spec), Plain(self.spec)
        options = {"stages": self.stages, "skip_dead_rows": self.skip_dead_rows, "lowering": "eager", "strict": True}
        actual = answer(self.spec, options, self.dynamic)
        with torch.no_grad():
            return largest_error(actual, reference(model, given, stages=self.stages))


Patch = Callable[[pytest.MonkeyPatch], None]


def wrap(owner: Any, name: str, bug: Callable[..., Any]) -> Patch:
    """Replace ``owner.name`` by ``bug(original, ...)``."""
    original = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *args, **kwargs: bug(original, *args, **kwargs))


# -- attention calls --------------------------------------------------------------------------------------------------


def calls(where: Callable[[bool], bool] = lambda in_groups: True, **changed: Any) -> Patch:
    """In some of the fused calls that are written, other arguments."""

    def bug(original: Callable, path: Path, attention: Attention, *given: Any) -> dict[str, Any]:
        named = original(path, attention, *given)
        return named | changed if where(attention.output in path.emitter.plan.groups) else named

    return wrap(attend, "_fused_operands", bug)


def attending(keys: Callable[[str, str], str]) -> Patch:
    """In the calls of layers in which both groups run, other keys: of the names of queries and keys."""

    def bug(original: Callable, path: Path, attention: Attention, queries: str, seen: str) -> Node:
        in_groups = attention.output in path.emitter.plan.groups
        return original(path, attention, queries, keys(queries, seen) if in_groups else seen)

    return wrap(attend, "attend", bug)


def mask_by_slot(original: Callable, self: RowSets, *given: Any) -> Node:
    """A causal mask over the compacted rows, as if both sides had the same positions."""
    return self._editor.inline(lambda mask: torch.ones_like(mask).tril(), original(self, *given))


def swapped_branches(original: Callable, self: Editor, target: Callable, *args: Any, **kwargs: Any) -> Node:
    if target is torch.cat and len(args[0]) == 3:
        args = ([args[0][1], args[0][0], args[0][2]], *args[1:])
    return original(self, target, *args, **kwargs)


# -- choices ----------------------------------------------------------------------------------------------------------


def partitioning(name: str, change: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Patch:
    """Change one of the partition's tensors, given all."""

    def bug(original: Callable, *args: Any) -> dict[str, Tensor]:
        tensors = original(*args)
        return tensors | {name: change(tensors[name], tensors)}

    return wrap(choose, "partition", bug)


def scoring(change: Callable[[Tensor], Tensor]) -> Patch:
    return wrap(choose, "partition", lambda original, given, *rest: original(change(given), *rest))


def one_less(held: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return (held - 1).clamp(min=0)


def of_the_first_sample(held: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return held[:1].expand_as(held).clone()


def one_more_within(name: str) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    """The next place among the rows of that name."""
    return lambda held, tensors: (held + 1).clamp(max=tensors[name].shape[1] - 1)


def laid_out(name: str, key: str) -> Patch:
    """The second stage's places, which are among the rows that the first has left, taken for positions of the prompt."""

    def bug(original: Callable, emitter: Emitter, number: int, tensors: dict[str, Node]) -> None:
        original(emitter, number, tensors)
        if number == 1:
            known = emitter.sets.by_name
            known[name] = dataclasses.replace(known[name], index=tensors[key])

    return wrap(choose, "_lay_out", bug)


def first_of_the_mask(original: Callable, emitter: Emitter, here: str) -> Node:
    """Where tokens are visual, of as many rows at the prompt's beginning as there are."""
    held = original(emitter, here)
    return held if here == live(0) else emitter.editor.method("narrow", emitter.visual, 1, 0, emitter.sets[here].count)


def of_the_embeddings(original: Callable, self: InsertPartition, plan: Plan, stage: PlacedStage) -> Any:
    return dataclasses.replace(original(self, plan, stage), link=plan.link(0))


# -- what rules see ahead ---------------------------------------------------------------------------------------------


def looking_less(original: Callable, self: InsertPartition, plan: Plan, stage: PlacedStage, layers: int) -> Any:
    return original(self, plan, stage, layers - 1)


def looking_from_the_layer_in_front(
    original: Callable, self: InsertPartition, plan: Plan, stage: PlacedStage, layers: int
) -> Any:
    return original(self, plan, dataclasses.replace(stage, at=stage.at - 1), layers)


def looking_from_the_embeddings(original: Callable, emitter: Emitter, choice: Any, *given: Any) -> Node:
    return original(emitter, dataclasses.replace(choice, link=emitter.plan.link(0)), *given)


def ahead_of_another_state(original: Callable, self: AheadPath, node: Node, name: str) -> Any:
    held = original(self, node, name)
    later = node in self.inputs and node is not self.source
    return self.emitter.editor.call(torch.sin, held) if later else held


# -- attention weights that rules read --------------------------------------------------------------------------------


def weights_of_row(place: slice) -> Patch:
    def bug(original: Callable, self: RowSets, given: RowSet, within: Any) -> None:
        if given.name == choose._ASKED:
            index = self._editor.call(operator.getitem, self[TEXT].index, (slice(None), place))
            given = dataclasses.replace(given, index=index)
        original(self, given, within)

    return wrap(RowSets, "add", bug)


def weights_of_a_layer_before(original: Callable, self: InsertPartition, plan: Plan, stage: PlacedStage) -> Attention:
    return original(self, plan, dataclasses.replace(stage, at=stage.at - 1))


def weights_without(name: str) -> Patch:
    """The mask (of bool), or the scale."""

    def bug(original: Callable, query: Tensor, key: Tensor, mask: Tensor, scale: float | None, causal: bool) -> Tensor:
        mask = torch.ones_like(mask) if name == "mask" else mask
        return original(query, key, mask, None if name == "scale" else scale, causal)

    return wrap(attend, "_weights", bug)


def weights_of_what_is_left(original: Callable, path: Path, attention: Attention, queries: str, keys: str) -> Node:
    """As shares of what the rows that are left receive, in place of all that the row saw."""
    weights, here = original(path, attention, queries, keys), live(1)
    assert keys == live(0)

    def shares(weights: Tensor, places: Tensor) -> Tensor:
        left = weights.gather(3, places[:, None, None, :].expand(-1, *weights.shape[1:3], -1))
        return weights / left.sum(-1, keepdim=True)

    return path.emitter.editor.inline(shares, weights, path.emitter.sets.places(here, keys))


def without(name: str) -> Patch:
    """Leave out a step that is written as a function of this name."""

    def bug(original: Callable, self: Editor, function: Callable, *sources: Node) -> Any:
        return sources[0] if function.__name__ == name else original(self, function, *sources)

    return wrap(Editor, "inline", bug)


# -- rows and paths ---------------------------------------------------------------------------------------------------


def placed_with(difference: int, only: int | None = None) -> Patch:
    """All that follows from where stages end, off by so many layers."""

    def bug(original: Callable, self: Options, layers: int) -> tuple[PlacedStage, ...]:
        return tuple(
            dataclasses.replace(stage, end=stage.end + difference) if only in (None, stage.number) else stage
            for stage in original(self, layers))

    return wrap(Options, "placed", bug)


def cut_with(difference: int, only: int = 0) -> Patch:
    """The level of what is left alone off by so many layers: attention is still written by group where it should be."""

    def bug(original: Callable, self: Plan, stage: PlacedStage) -> Node:
        return original(self, dataclasses.replace(stage, end=stage.end + difference) if stage.number == only else stage)

    return wrap(Plan, "cut_of", bug)


def kept_of_the_live(original: Callable, before: Sequence[Stage], stage: Stage, live: Any, visuals: Any) -> Any:
    return original(before, stage, live, live)


def whole_outputs(original: Callable, self: Emitter, node: Node) -> Any:
    """What leaves the graph has all rows that it is held on."""
    held = self.main.held.get(node)
    return next(iter(held.values())) if held else original(self, node)


def first_rows_of_outputs(original: Callable, self: Emitter, node: Node) -> Any:
    axis, held = self.decoder.tokens.plain_axis(node), self.main.held.get(node, {})
    if live(0) not in held or axis is None:
        return original(self, node)
    return self.editor.method("narrow", held[live(0)], axis, 0, self.sets[live(self.plan.final)].count)


def ungathered_positions(
    original: Callable, self: RowSets, node: Node, axis: int, name: str, other: str, samples: Any
) -> Node:
    """The first rows of what does not depend on the prompt's embeddings (rotary angles) in place of the chosen ones."""
    follows = any("masked_scatter" in str(source.target) for source in ancestors([node]))
    if follows or not value(node).is_floating_point() or name == other:
        return original(self, node, axis, name, other, samples)
    return self._editor.method("narrow", node, axis, 0, self[name].count)


def gathered_for_the_first_sample(original: Callable, editor: Editor, node: Node, axis: int, index: Node, *more: Any) -> Node:
    first = editor.inline(lambda index: index[:1].expand_as(index).clone(), index)
    return original(editor, node, axis, first, *more)


def by_positions_of_the_prompt(original: Callable, self: RowSets, name: str, other: str) -> Node:
    """The second stage's rows among those that the first has left, by where they stand in the prompt."""
    if (name, other) != (live(2), live(1)):
        return original(self, name, other)
    return self._editor.method("clamp", self[name].index, max=self[other].count - 1)


def places_counted_from_one(original: Callable, self: RowSets, name: str, other: str) -> Node:
    """Where no choice says where rows stand among others, and it is counted."""
    told = (name, other) in self._places or self[other].index is None
    held = original(self, name, other)
    return held if told else self._editor.inline(lambda places: (places - 1).clamp(min=0), held)


def length_of_the_prompt(original: Callable, self: Path, node: Node, index: int, leaf: Any, *more: Any) -> Any:
    """A number of rows that is a value, and not a size."""
    if node.target is operator.truediv and isinstance(leaf, Node) and is_symbolic_int(leaf):
        return self.emitter.sets[live(0)].count
    return original(self, node, index, leaf, *more)


# -- twins ------------------------------------------------------------------------------------------------------------


def joined_with(fusion: Callable[[float], float]) -> Patch:
    def bug(original: Callable, path: TwinPath) -> None:
        twin = path.twin
        other = dataclasses.replace(twin.stage.stage, fusion=fusion(twin.stage.stage.fusion))
        path.twin = dataclasses.replace(twin, stage=dataclasses.replace(twin.stage, stage=other))
        original(path)

    return wrap(emit, "join", bug)


def twin_from_the_embeddings(original: Callable, self: TwinPath, node: Node, name: str) -> Any:
    return original(self, self.emitter.decoder.merge.output if node is self.twin.start else node, name)


def twin_of_one_layer_more(original: Callable, self: DuplicateLayers, plan: Plan, stage: PlacedStage) -> Any:
    return dataclasses.replace(original(self, plan, dataclasses.replace(stage, end=stage.end + 1)), stage=stage)


def keys_of_the_subject_path(original: Callable, self: TwinPath, node: Node, axis: int, name: str) -> Node:
    return self.emitter.main.read(node, live(self.twin.stage.number + 1))


def keys_from_the_other_end(original: Callable, self: TwinPath, node: Node, axis: int, name: str) -> Node:
    """In front of path B's keys path A's last ones, in place of its first."""
    read, main = self.emitter.main.read, self.emitter.main
    main.read = lambda node, name: self.emitter.editor.method("flip", read(node, name), axis)
    try:
        return original(self, node, axis, name)
    finally:
        del main.read


def shared_text_fused(original: Callable, self: Editor, function: Callable, *sources: Node) -> Any:
    """The text that path A computes for both, weighed with path B's first text row."""
    given = original(self, function, *sources)
    return (sources[1], *given[1:]) if function.__name__ == "behind_it" else given


# -- merging ----------------------------------------------------------------------------------------------------------


def clustering(**changes: Callable[..., Tensor]) -> Patch:
    """Change what the assignment returns, or what it is given."""

    def bug(original: Callable, hidden: Tensor, visual: Tensor, kept: Tensor, pictures: Tensor, *more: Any) -> Any:
        pictures = changes["pictures"](pictures) if "pictures" in changes else pictures
        tensors = original(hidden, visual, kept, pictures, *more)
        return tensors | {name: change(tensors) for name, change in changes.items() if name in tensors}

    return wrap(clusters, "clusters", bug)


def unshifted(tensors: dict[str, Tensor]) -> Tensor:
    """The mixture alone: a row of it is what is added to a subject row, and that row itself."""
    itself = tensors["steps"] < 0
    return tensors["steps"] + (itself | (itself.sum(2, keepdim=True) == 0) & (tensors["values"] == tensors["values"].amax(
        2, keepdim=True))).float()


def sizes_of_dropped(tensors: dict[str, Tensor]) -> Tensor:
    """How many dropped tokens each stands for: without itself."""
    return torch.where(tensors["is_text"], 1.0, (tensors["sizes"] - 1).clamp(min=1))


def without_bias(original: Callable, emitter: Emitter, attention: Attention, *given: Any) -> Any:
    queries, keys, logits, *_ = given
    return logits


def bias_for_all_rows(original: Callable, emitter: Emitter, *given: Any) -> Node:
    visual = emitter.visual
    emitter.visual = emitter.editor.inline(torch.zeros_like, visual)
    try:
        return original(emitter, *given)
    finally:
        emitter.visual = visual


def merged_in_layer(difference: int) -> Patch:
    """Hidden states merged in front of another layer than that at which rows leave."""

    def bug(original: Callable, self: MergeClusters, plan: Plan, stage: PlacedStage, *given: Any) -> Any:
        done = original(self, plan, stage, *given)
        return dataclasses.replace(done, drop=plan.link(stage.end + difference))

    return wrap(MergeClusters, "_merging", bug)


def mixed_from_the_choice(original: Callable, self: MergeClusters, plan: Plan, stage: PlacedStage, *given: Any) -> Any:
    return dataclasses.replace(original(self, plan, stage, *given), source=plan.link(stage.at))


def without_values(original: Callable, self: MergeClusters, plan: Plan, stage: PlacedStage, *given: Any) -> Any:
    return dataclasses.replace(original(self, plan, stage, *given), values=frozenset())


def sizes_start_anew(original: Callable, emitter: Emitter, number: int) -> None:
    original(emitter, number)
    if number == 0:
        emitter.sizes.clear()


ONE = Comparison()
LEAN = Comparison(skip_dead_rows=True)
LIKE_GROUPS = Comparison(dataclasses.replace(MASKED, visual=6), (migrating(keep=3, migrate=2),))
DEAD = Comparison(stages=(migrating(migrate=2),), skip_dead_rows=True)
JOINT = Comparison(stages=(migrating(migrate=2, paths="joint"),))
WEIGHT = Comparison(stages=(migrating(fusion=0.25),))
LEAN_WEIGHT = dataclasses.replace(WEIGHT, skip_dead_rows=True)
LATE_WEIGHT = Comparison(stages=(migrating(at=1, fusion=0.25),), skip_dead_rows=True)
NO_FRONT = dataclasses.replace(WEIGHT, spec=dataclasses.replace(MASKED, rows=(Row(before=0), *ROWS[1:])))
LIKE_PATHS = Comparison(dataclasses.replace(MASKED, visual=6), (migrating(keep=3, fusion=0.25),))
FRONT = Comparison(dataclasses.replace(MASKED, rows=(Row(before=3), Row(before=4, between=2))),
                   (migrating(migrate=2, fusion=0.25),), skip_dead_rows=True)
AHEAD = dataclasses.replace(FRONT, spec=dataclasses.replace(FRONT.spec, span="all"))
LAST_ROW = Comparison(dataclasses.replace(MASKED, last_only=True), (migrating(migrate=3),), skip_dead_rows=True)
LAST_VISUAL = Comparison(dataclasses.replace(MASKED, last_only=True, scale=0.1, length=9, rows=(Row(before=4),)),
                         (migrating(migrate=3),), skip_dead_rows=True)
MEAN = Comparison(dataclasses.replace(MASKED, feed_mixing=Mixing("mean", 1, "add")), dynamic=True)
# several stages
TWICE = Comparison(stages=(migrating(keep=4), migrating(at=1)))
LEAN_TWICE = dataclasses.replace(TWICE, skip_dead_rows=True)
AT_ONCE = Comparison(stages=(migrating(keep=4, migrate=0), migrating(at=1)))
APART = Comparison(stages=(migrating(keep=4), migrating(at=2, migrate=0)))
THEN_JOINT = Comparison(stages=(migrating(keep=4), migrating(at=1, migrate=2, paths="joint")))
THEN_WEIGHT = Comparison(stages=(migrating(keep=4), migrating(at=1, fusion=0.25)), skip_dead_rows=True)
SHARES = Comparison(stages=(migrating(keep=0.6), migrating(at=1, keep=0.3)))
# rules that read attention
READ = Comparison(stages=(migrating(at=2, rule="last_row", migrate=0),))
READ_TEXT = Comparison(stages=(migrating(at=1, rule="text_rows"),), skip_dead_rows=True)
READ_ALL = dataclasses.replace(READ_TEXT, spec=FULL)
READ_WRITTEN = dataclasses.replace(READ, spec=WRITTEN)
MEETING = Comparison(stages=(migrating(keep=4), migrating(at=1, rule="last_row")), skip_dead_rows=True)
TEXT_MEETING = Comparison(
    dataclasses.replace(MASKED, length=17, visual=8), (migrating(keep=5), migrating(at=1, rule="text_rows")))
# rules that look ahead
MANY = dataclasses.replace(MASKED, scale=1.5, length=28, visual=18)
LOOKING = Comparison(MANY, stages=(migrating(at=1, keep=7, rule=PaidAhead(2), migrate=0),))
LOOKING_FULL = dataclasses.replace(LOOKING, spec=dataclasses.replace(MANY, span="all"))
LOOKING_TWICE = Comparison(MANY, stages=(migrating(keep=12), migrating(at=1, keep=5, rule=PaidAhead(2), migrate=0)))
# merging
PICTURES = dataclasses.replace(MASKED, visual=8, length=18, rows=(Row(before=2, between=2), Row(padding=2, before=1, between=3)))
MERGED = Comparison(PICTURES, (migrating(keep=3, migrate=2, merge="clusters"),), skip_dead_rows=True)
MERGED_WRITTEN = dataclasses.replace(MERGED, spec=dataclasses.replace(PICTURES, attention="written"))
MERGED_TWICE = Comparison(
    PICTURES, (migrating(keep=5, migrate=0, merge="clusters"), migrating(at=1, keep=2, merge="clusters")), skip_dead_rows=True)

BUGS: dict[str, tuple[Patch, Comparison]] = {
    "mask dropped in migration": (calls(lambda in_groups: in_groups, attn_mask=None), ONE),
    "mask dropped behind pruning": (calls(lambda in_groups: not in_groups, attn_mask=None), ONE),
    "causal mask by slot": (wrap(RowSets, "causal_mask", mask_by_slot), Comparison(CAUSAL)),
    "causal mask by slot, in two stages": (
        wrap(RowSets, "causal_mask", mask_by_slot), dataclasses.replace(LEAN_TWICE, spec=CAUSAL)),
    "scale dropped": (calls(scale=None), ONE),
    "rows off by one": (partitioning("subject", one_less), ONE),
    "rows off by one, written out": (partitioning("subject", one_less), Comparison(WRITTEN)),
    "rows of another sample": (partitioning("subject", of_the_first_sample), ONE),
    "rows taken as in another sample": (wrap(rows, "gather", gathered_for_the_first_sample), ONE),
    "branches swapped": (wrap(Editor, "call", swapped_branches), ONE),
    "pruned one layer late": (placed_with(1), ONE),
    "pruned one layer early": (placed_with(-1), ONE),
    "pruned one layer late, weights": (placed_with(1), WEIGHT),
    "rows leave one layer late": (cut_with(1), ONE),
    "rows leave one layer late, without dead rows": (cut_with(1), LEAN),
    "rows leave one layer early": (cut_with(-1), JOINT),
    "rows leave one layer early, without dead rows": (cut_with(-1), dataclasses.replace(JOINT, skip_dead_rows=True)),
    "lowest scores kept": (scoring(torch.neg), ONE),
    "ties to the later position": (
        scoring(lambda given: given + 1e-3 * torch.arange(given.shape[1])), Comparison(stages=(migrating(rule=tied),))),
    "cache not shortened": (wrap(Emitter, "_result", whole_outputs), ONE),
    "cache cut to its first rows": (wrap(Emitter, "_result", first_rows_of_outputs), ONE),
    "text sees the subject group alone": (attending(lambda queries, keys: live(1) if queries == TEXT else keys), ONE),
    "text sees the subject group alone, written out": (
        attending(lambda queries, keys: live(1) if queries == TEXT else keys), Comparison(WRITTEN)),
    "groups see each other": (attending(lambda queries, keys: live(0)), ONE),
    "text sees the subject group alone, without dead rows": (
        attending(lambda queries, keys: live(1) if queries == TEXT else keys), DEAD),
    "groups see each other, without dead rows": (attending(lambda queries, keys: live(0)), LEAN),
    "non-subject rows see the subject group": (
        attending(lambda queries, keys: live(1) if queries == non_subject(0) else keys), LIKE_GROUPS),
    "text rows misplaced": (partitioning("subject_slots", one_less), DEAD),
    "queries of other rows": (partitioning("text_in_subject", one_more_within("subject")), DEAD),
    "mask dropped, without dead rows": (calls(attn_mask=None), DEAD),
    "positions not gathered": (wrap(RowSets, "take", ungathered_positions), ONE),
    "positions not gathered, without dead rows": (wrap(RowSets, "take", ungathered_positions), DEAD),
    "mean over the whole prompt's length": (wrap(Path, "_leaf", length_of_the_prompt), MEAN),
    "last text row sees the subject group alone": (
        attending(lambda queries, keys: live(1) if queries == LAST else keys), LAST_ROW),
    "last visual row sees both groups": (
        attending(lambda queries, keys: live(0) if queries == LAST else keys), LAST_VISUAL),
    # constant weights
    "weight on the other path": (joined_with(lambda weight: 1 - weight), WEIGHT),
    "path B's text left out": (joined_with(lambda weight: 1.0), WEIGHT),
    "fused with the next token": (partitioning("partners", one_more_within("non_subject")), WEIGHT),
    "fused with the next token, without dead rows": (partitioning("text_partners", one_more_within("text")), LEAN_WEIGHT),
    "subject rows fused, too": (partitioning("is_text", lambda held, tensors: torch.ones_like(held)), NO_FRONT),
    "queries of other rows, weights": (partitioning("text_in_non_subject", one_more_within("non_subject")), LEAN_WEIGHT),
    "twin starts from the embeddings": (wrap(TwinPath, "read", twin_from_the_embeddings), LATE_WEIGHT),
    "twin runs one layer more": (wrap(DuplicateLayers, "_twin", twin_of_one_layer_more), WEIGHT),
    "path B sees path A": (wrap(TwinPath, "keys", keys_of_the_subject_path), LIKE_PATHS),
    "prefix one row too long": (wrap(twins, "leading", lambda original, text: original(text) + 1), FRONT),
    "prefix shared though it looks ahead": (
        wrap(twins, "see_themselves_alone", lambda original, masks, front: original(masks, front) | True), AHEAD),
    "prefix keys of other rows": (wrap(TwinPath, "keys", keys_from_the_other_end), FRONT),
    "shared text fused, too": (wrap(Editor, "inline", shared_text_fused), FRONT),
    # several stages
    "second choice's rows not followed to the prompt": (laid_out(live(2), "subject"), TWICE),
    "second choice's rows not followed to the prompt, without dead rows": (laid_out(live(2), "subject"), LEAN_TWICE),
    "text numbered by the second choice": (laid_out(TEXT, "text"), AT_ONCE),
    "second choice's rows by their positions": (wrap(RowSets, "places", by_positions_of_the_prompt), TWICE),
    "second choice reads the prompt's first rows as visual": (wrap(choose, "_visual", first_of_the_mask), TWICE),
    "second choice reads the embeddings": (wrap(InsertPartition, "_choice", of_the_embeddings), TWICE),
    "share of what is left": (wrap(stages, "_kept", kept_of_the_live), SHARES),
    "second stage: text sees the subject group alone": (
        attending(lambda queries, keys: live(2) if (queries, keys) == (TEXT, live(1)) else keys), TWICE),
    "second stage: groups see each other": (
        attending(lambda queries, keys: live(1) if keys == live(2) else keys), LEAN_TWICE),
    "second stage: cache not shortened": (wrap(Emitter, "_result", whole_outputs), TWICE),
    "first stage's rows leave one layer late": (cut_with(1), APART),
    "second stage's rows leave one layer early": (cut_with(-1, only=1), THEN_JOINT),
    "second stage: weight on the other path": (joined_with(lambda weight: 1 - weight), THEN_WEIGHT),
    "second stage: twin starts from the embeddings": (wrap(TwinPath, "read", twin_from_the_embeddings), THEN_WEIGHT),
    # rules that read attention
    "weights of the text row before": (weights_of_row(slice(-2, -1)), READ),
    "weights of the first text row": (weights_of_row(slice(0, 1)), dataclasses.replace(READ, spec=FULL)),
    "weights of a layer before": (wrap(InsertPartition, "_attention", weights_of_a_layer_before), READ),
    "weights of a layer before, written out": (
        wrap(InsertPartition, "_attention", weights_of_a_layer_before), READ_WRITTEN),
    "weights without a mask": (weights_without("mask"), READ_TEXT),
    "weights without the scale": (weights_without("scale"), READ_TEXT),
    "weights of padding": (without("behind_visual"), READ_ALL),
    "weights of what is left": (wrap(choose, "attention_weights", weights_of_what_is_left), TEXT_MEETING),
    "weights where other tokens stood": (wrap(RowSets, "places", places_counted_from_one), MEETING),
    # rules that look ahead
    "looks one layer less": (wrap(InsertPartition, "_ahead", looking_less), LOOKING),
    "looks from the layer in front": (wrap(InsertPartition, "_ahead", looking_from_the_layer_in_front), LOOKING),
    "looks from the embeddings": (wrap(choose, "look_ahead", looking_from_the_embeddings), LOOKING),
    "layers ahead take in what the one in front leaves": (wrap(AheadPath, "read", ahead_of_another_state), LOOKING),
    "padding looks ahead": (without("behind_visual"), LOOKING_FULL),
    "second stage: looks from the embeddings": (wrap(choose, "look_ahead", looking_from_the_embeddings), LOOKING_TWICE),
    # merging
    "no bias": (wrap(attend, "biased", without_bias), MERGED),
    "no bias, written out": (wrap(token_counts, "biased", without_bias), MERGED_WRITTEN),
    "bias for visual rows too": (wrap(token_counts, "_bias", bias_for_all_rows), MERGED),
    "sizes without the kept token": (clustering(sizes=sizes_of_dropped), MERGED),
    "sizes start anew": (wrap(choose, "note_sizes", sizes_start_anew), MERGED_TWICE),
    "merged across pictures": (clustering(pictures=torch.zeros_like), MERGED),
    "merged in front of another layer": (merged_in_layer(-1), MERGED),
    "mixed from the choosing layer": (wrap(MergeClusters, "_merging", mixed_from_the_choice), MERGED),
    "cached values as they are": (wrap(MergeClusters, "_merging", without_values), MERGED),
    "shift left out": (clustering(values=unshifted), MERGED),
    "hidden states as they are": (clustering(steps=lambda tensors: torch.zeros_like(tensors["steps"])), MERGED),
    "clusters of the first sample": (clustering(steps=lambda tensors: tensors["steps"][:1].expand_as(tensors["steps"])), MERGED),
}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks between passes."""
    monkeypatch.setattr(rewriting, "verifier", lambda checks: lambda record, work: None)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("patch, comparison", BUGS.values(), ids=BUGS.keys())
def test_bug_is_found(monkeypatch: pytest.MonkeyPatch, patch: Patch, comparison: Comparison) -> None:
    patch(monkeypatch)
    assert comparison.error() > FOUND


@pytest.mark.slow
@pytest.mark.parametrize("comparison", dict.fromkeys(comparison for _, comparison in BUGS.values()), ids=str)
def test_comparison_passes_without_the_bug(comparison: Comparison) -> None:
    assert comparison.error() < TOLERANCE
