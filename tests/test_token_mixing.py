"""Tokens that meet outside attention, and layouts beyond (batch, heads, rows): compiled prefills equal the reference.

Wherever the design says what a prefill gives, the model is to be rewritten; a refusal is right only where it does not.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import parvts_fx
from tests.plain import Mixing, Row, Specification, build, prompt
from tests.plain_checking import TOLERANCE, Choice, outcome, wanted
from tests.plain_reference import error_of
from tests.token_mixers import CODES

ROWS = (Row(before=2, between=1), Row(padding=2, before=1))
BASE = dict(layers=3, length=13, rows=ROWS, attention="masked")
MEAN, SHIFT = Mixing("mean", combine="add"), Mixing("previous", combine="add")
LENGTH = {("mean", 1), ("mean", 2), ("count", 0), ("count", 1)}
"""Forms in which the number of rows is a value or a position: a graph with static sizes does not tell it from a constant."""
COUNTED = {("rolled", 2), ("flipped", 1), ("flipped", 2)}
"""Forms with an arange over rows within a layer: a graph does not tell whether it counts rows or prompt positions."""


def rewritten(choice: Choice = Choice(), **features) -> None:
    spec = Specification(**{**BASE, **features})
    result = outcome(spec, choice)
    assert result.kind == "rewritten", result


def never_wrong(choice: Choice = Choice(), **features) -> None:
    result = outcome(Specification(**{**BASE, **features}), choice)
    assert result.kind != "wrong", result


FORMS = [(kind, code) for kind, codes in CODES.items() for code in range(len(codes)) if kind != "positions"]


@pytest.mark.slow
@pytest.mark.parametrize("kind, code", FORMS, ids=[f"{kind}-{code}" for kind, code in FORMS])
def test_every_form_in_a_feed_forward(kind: str, code: int) -> None:
    check = never_wrong if (kind, code) in COUNTED | {("running mean", 0), ("mean", 5), ("last", 1)} else rewritten
    check(Choice(dynamic=True if (kind, code) in LENGTH else None), feed_mixing=Mixing(kind, code, "add"))


@pytest.mark.parametrize("kind, code", sorted(LENGTH))
def test_the_number_of_rows_as_a_value_is_refused_where_sizes_are_static(kind: str, code: int) -> None:
    result = outcome(Specification(**BASE, feed_mixing=Mixing(kind, code, "add")), Choice())
    assert result.kind == "refused" and "may be the prompt's length or a constant" in result.reason


@pytest.mark.slow
@pytest.mark.parametrize("kind, code", sorted(LENGTH)[::2])
def test_the_number_of_rows_as_a_value_is_told_by_names(kind: str, code: int) -> None:
    """parvts_fx.compile has the prefill captured again, with names for sizes, where static ones cannot tell."""
    choice, spec = Choice(), Specification(**BASE, feed_mixing=Mixing(kind, code, "add"))
    model, given = parvts_fx.compile(build(spec), **choice.options), prompt(spec)
    with torch.no_grad():
        assert error_of(spec, model(*given.arguments), wanted(build(spec), given, choice)) < TOLERANCE
    assert parvts_fx.last_call(model).pruned


CHOICES = {
    "before layer 0": Choice(depth=0), "1": Choice(depth=1), "2": Choice(depth=2), "all": Choice(depth=3),
    "dead rows run": Choice(depth=2, skip_dead_rows=False), "joint": Choice(depth=2, paths="joint"),
    "all, dead rows run": Choice(depth=3, skip_dead_rows=False),
    "weight": Choice(depth=2, fusion=0.4), "weight, prefix not shared": Choice(fusion=0.4, data_in_sizes=False),
    "keeps all": Choice(depth=2, keep=1.0), "keeps all, weight": Choice(fusion=0.4, keep=1.0),
}
MIXED = {
    "mean": dict(feed_mixing=MEAN), "shift": dict(feed_mixing=SHIFT), "scan": dict(feed_mixing=Mixing("scan")),
    "composed": dict(feed_mixing=Mixing("share", 1, "gate", "hidden", SHIFT)),
    "in a norm": dict(norm_mixing=Mixing("mean", place="behind second")),
    "convolution": dict(hybrid="convolution"), "count": dict(feed_mixing=Mixing("count", combine="replace")),
}


@pytest.mark.slow
@pytest.mark.parametrize("last_only", [False, True], ids=["all logits", "last logits"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("features", MIXED.values(), ids=MIXED.keys())
def test_schedules(features: dict, choice: Choice, last_only: bool) -> None:
    if features == MIXED["count"]:
        choice = dataclasses.replace(choice, dynamic=True)
    rewritten(choice, last_only=last_only, **features)


PLACES = {
    **{f"feed, {place}": dict(feed_mixing=Mixing("mean", place=place))
       for place in ("in", "hidden", "active", "gate", "out", "stream")},
    **{f"norm, {place}, {norms}": dict(norm_mixing=Mixing("mean", combine="add", place=place), place=norms)
       for place in ("before first", "behind first", "before second", "behind second") for norms in ("pre", "post")},
    **{f"{layers} layers": dict(feed_mixing=SHIFT, mixing_layers=layers) for layers in ("first", "last", "odd")},
    "final norm, before": dict(final_mixing=Mixing("mean", place="before")),
    "final norm, behind": dict(final_mixing=Mixing("previous", place="behind", combine="add")),
    "final norm, last row": dict(final_mixing=Mixing("mean", place="before"), last_only=True),
    "parallel residual": dict(feed_mixing=MEAN, parallel=True),
    "one flat function": dict(feed_mixing=MEAN, flat=True, attention="written"),
}


@pytest.mark.slow
@pytest.mark.parametrize("features", PLACES.values(), ids=PLACES.keys())
def test_places(features: dict) -> None:
    rewritten(Choice(depth=2), **features)


def test_an_arange_within_a_layer_is_never_taken_for_something_else() -> None:
    """The reference counts prompt positions, as rotary angles made in every layer do."""
    never_wrong(feed_mixing=Mixing("positions", place="in"))


@pytest.mark.parametrize("states", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("kind", ["convolution", "linear", "linear, masked", "linear, whole", "scan"])
@pytest.mark.parametrize("which", ["first", "odd", "all"])
def test_hybrid_layers(kind: str, which: str, states: bool) -> None:
    rewritten(Choice(depth=2), hybrid=kind, hybrid_layers=which, states=states)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("pair", ["own", "chain", "sum"])
def test_two_attention_calls_a_layer(pair: str, depth: int) -> None:
    rewritten(Choice(depth=depth), pair=pair)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("attention", ["causal", "masked", "written", "relative"])
@pytest.mark.parametrize("layout, stream", [
    ("heads first", ""), ("folded", ""), ("", "rows first"), ("heads first", "rows first"), ("folded", "rows first")])
def test_layouts(layout: str, stream: str, attention: str, batch: int) -> None:
    rows = tuple(Row(padding=row % 2, before=1 + row % 2) for row in range(batch))
    apart = layout != "folded" or attention == "causal" or batch == 1
    check = rewritten if apart else never_wrong  # masks of batch * heads that are made outside of the decoder
    check(Choice(depth=2), layout=layout, stream=stream, attention=attention, rows=rows, heads=2)


@pytest.mark.slow
@pytest.mark.supports("Attention", "a learned bias by distances that a layer counts in its own rows; sinks")
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
@pytest.mark.parametrize("attention", ["counted", "sinks"])
def test_numbers_of_rows_and_sinks(attention: str, choice: Choice) -> None:
    rewritten(choice, attention=attention, layers=3, rows=ROWS[:2], last_only=choice.depth == 2)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["counted", "sinks"])
@pytest.mark.parametrize("layout, stream", [("heads first", ""), ("", "rows first"), ("heads first", "rows first")])
def test_numbers_of_rows_and_sinks_in_other_layouts(layout: str, stream: str, attention: str) -> None:
    rewritten(Choice(depth=2), layout=layout, stream=stream, attention=attention, rows=ROWS[:2], heads=2)


@pytest.mark.slow
@pytest.mark.supports("Layers", "rows that choose among states which entered earlier layers")
@pytest.mark.parametrize("choice", [
    Choice(depth=0), Choice(depth=1), Choice(depth=2), Choice(depth=3), Choice(depth=2, fusion=0.4),
    Choice(depth=2, merge="clusters"), Choice(depth=3, merge="clusters")])
@pytest.mark.parametrize("attention", ["masked", "causal"])
def test_states_that_are_kept_beside_later_ones(attention: str, choice: Choice) -> None:
    rewritten(choice, attention=attention, layers=5, kept=True)


def test_two_paths_with_states_of_their_own_are_refused() -> None:
    result = outcome(Specification(**{**BASE, "layers": 5, "kept": True}), Choice(depth=3, fusion=0.4))
    assert result.kind == "refused" and "of which both paths have their own" in result.reason, result


@pytest.mark.supports("Left unrewritten", "a learned bias by distances that layers are given and decode steps count anew")
def test_distances_that_layers_are_given_are_refused() -> None:
    result = outcome(Specification(**{**BASE, "attention": "given"}), Choice(depth=1))
    assert result.kind == "refused" and "does not count by itself" in result.reason, result


@pytest.mark.parametrize("form", ["flat", "stacked", "one"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_cache_forms(form: str, batch: int) -> None:
    rewritten(Choice(depth=1), cache_form=form, rows=ROWS[:1] * batch, layers=2)


@pytest.mark.parametrize("flat_feed", [False, True], ids=["batch, rows", "batch * rows"])
@pytest.mark.parametrize("experts", ["sorted", "added", "every"])
def test_experts(experts: str, flat_feed: bool) -> None:
    rewritten(Choice(depth=2), experts=experts, flat_feed=flat_feed)


@pytest.mark.parametrize("mixing", [None, MEAN], ids=["alone", "mean"])
def test_feed_forward_of_all_samples_rows(mixing: Mixing | None) -> None:
    rewritten(Choice(depth=2), flat_feed=True, feed_mixing=mixing)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["attention", 0.4])
@pytest.mark.parametrize("features", [
    dict(video=True), dict(sound=3), dict(sound=3, sound_first=True), dict(video=True, sound=2),
    dict(video=True, sound=2, sound_first=True),
], ids=["video", "sound", "sound first", "video, sound", "sound first, video"])
def test_several_merges(features: dict, fusion: str | float) -> None:
    rewritten(Choice(depth=2, fusion=fusion), **features)


DRAWN = {
    "all rows asked together in front of a drop that merges, fused and causal": (
        Specification(layers=3, merge="assign", positions="learned"),
        Choice(depth=2, paths="joint", merge="clusters", skip_dead_rows=False)),
    "a softmax over tokens at the final norm, behind a stage that merges": (
        Specification(
            layers=5, heads=3, groups=3, head_dim=4, norm="layer", attention="written", reads_padding=False, numbering="mask",
            fused_qkv=True, parallel=True, caches=False, last_only=True, length=23, visual=8,
            rows=(Row(padding=1, before=3, between=1), Row(padding=3, before=0, between=1), Row(padding=1)), pad_right=True,
            final_mixing=Mixing("softmax", 1, place="behind"), stream="rows first"),
        Choice(keep=0.05, depth=0, skip_dead_rows=False, merge="clusters")),
    "norms over tokens alike in all layers, in front of parallel blocks": (
        Specification(
            heads=4, groups=2, span="window", reads_padding=False, scale=0.6, parallel=True, merge="choose the text",
            caches=False, last_only=True, length=23, visual=8,
            rows=(Row(), Row(padding=3, before=1, between=1), Row(before=1)), pad_right=True, pair="sum",
            norm_mixing=Mixing("whole norm", 1, place="before first", then=Mixing(
                "first", combine="divide", place="before first", then=Mixing("sorted", 1, place="before first")))),
        Choice(depth=2, keep=0.5, paths="joint", rule="uniform", skip_dead_rows=False)),
    "norms over tokens in front of the first parallel block alone": (
        Specification(
            heads=3, groups=3, head_dim=4, norm="layer", scale=0.6, positions="learned", numbering="mask", parallel=True,
            length=13, rows=(Row(padding=3, before=3, between=2), Row(padding=3, before=0)), mixing_layers="first", pair="sum",
            norm_mixing=Mixing("last", combine="replace", place="before first", then=Mixing(
                "whole norm", place="before first"))),
        Choice(depth=2, keep=0.5, fusion=0.7, rule="norm")),
    "parallel blocks, linear ones in front, whose queries join late": (
        Specification(
            layers=4, heads=1, place="post", attention="masked", scale=0.6, parallel=True, merge="put", caches=False, length=14,
            visual=7, rows=(Row(before=1, between=2), Row(padding=2, before=0, between=2), Row(between=2)),
            hybrid="linear, whole", hybrid_layers="all", states=True, pair="own", layout="heads first"),
        Choice(depth=4, keep=1 / 9, paths="joint", rule="distinct")),
    "parallel blocks, a linear one first, whose queries join late": (
        Specification(
            layers=4, groups=2, head_dim=4, norm="layer", place="post", span="images", reads_padding=False, scale=0.6,
            positions="learned", numbering="mask", parallel=True, length=23, rows=(Row(padding=1),), pad_right=True,
            hybrid="linear, whole", hybrid_layers="first"),
        Choice(depth=3, keep=1 / 9)),
    "parallel blocks, linear ones in front, weights": (
        Specification(
            layers=4, heads=3, groups=3, head_dim=4, span="window", reads_padding=False, scale=0.6, positions="learned",
            numbering="mask", fused_qkv=True, parallel=True, merge="choose", last_only=True, length=19, visual=3,
            rows=(Row(padding=1, before=1, between=2),), pad_right=True, hybrid="linear, whole", hybrid_layers="all",
            video=True),
        Choice(depth=3, keep=1, fusion=1.0, rule="tied", data_in_sizes=False)),
    "a router of the same shape as the attention's output": (
        Specification(
            heads=1, head_dim=4, norm="layer", attention="masked", span="images", reads_padding=False, scale=0.6,
            positions="learned", fused_qkv=True, merge="put", last_only=True, length=23, rows=(Row(before=3),), pad_right=True,
            feed_mixing=Mixing("scan", combine="gate", place="out"), experts="added"),
        Choice(keep=0.5, rule="tied")),
    "a filter of each channel by itself on the stream between two layers": (
        Specification(
            layers=3, heads=1, norm="layer", attention="masked", span="images", reads_padding=False, flat=True, caches=False,
            length=12, visual=7, rows=(Row(padding=1, before=0, between=2), Row(padding=3), Row(between=1)),
            feed_mixing=Mixing("filter", combine="gate", place="stream"), mixing_layers="odd", pair="own"),
        Choice(depth=2, keep=4, data_in_sizes=False)),
    "two calls a layer or a linear mixer, tokens meet in all feed-forwards": (
        Specification(
            layers=4, heads=1, head_dim=4, norm="layer", attention="masked", span="images", reads_padding=False, scale=0.6,
            positions="learned", caches=False, last_only=True, length=23, visual=6,
            rows=(Row(before=3), Row(before=0, between=1), Row(padding=2, before=1)),
            feed_mixing=Mixing("maximum", 2, "add", "out"), norm_mixing=Mixing("previous", 1, "divide", "behind second"),
            hybrid="linear, whole", pair="own", layout="folded"),
        Choice(depth=2, keep=0.8, paths="joint", rule="norm")),
    "a norm over tokens behind every second layer, weights": (
        Specification(
            layers=4, heads=4, groups=2, head_dim=4, place="post", attention="written", span="window", scale=0.6,
            numbering="mask", fused_qkv=True, merge="assign", caches=False, length=12, visual=3,
            rows=(Row(padding=3, before=1, between=1),), norm_mixing=Mixing("last", combine="add", place="behind second"),
            mixing_layers="odd", pair="sum"),
        Choice(depth=2, keep=0.8, fusion=0.7, rule="partly undefined", skip_dead_rows=False)),
}
"""What random examples have found."""


@pytest.mark.slow
@pytest.mark.parametrize("spec, choice", DRAWN.values(), ids=DRAWN.keys())
def test_drawn(spec: Specification, choice: Choice) -> None:
    assert outcome(spec, choice).kind == "rewritten"


AS_LONG_AS_HIDDEN = dict(head_dim=4, length=8, visual=3, rows=(Row(before=1),))


@pytest.mark.parametrize("features", [
    dict(AS_LONG_AS_HIDDEN, feed_mixing=Mixing("count", 1, "replace", "hidden"), mixing_layers="first"),
    dict(head_dim=4, heads=1, length=11, visual=4, rows=(Row(before=0),), place="post",
         feed_mixing=Mixing("count", 1, "subtract", "stream"), mixing_layers="last"),
    dict(AS_LONG_AS_HIDDEN, norm_mixing=Mixing("count", 1, "divide", "behind first")),
], ids=["in a feed-forward", "behind the last layer", "in front of attention"])
def test_one_over_the_number_of_rows_is_refused_where_another_size_is_as_large(features: dict) -> None:
    result = outcome(Specification(**{**BASE, **features}), Choice(fusion=0.25))
    assert result.kind == "refused" and "may be the prompt's length or a constant" in result.reason


@pytest.mark.parametrize("attention", ["masked", "written"])
def test_scores_are_scaled_where_a_head_is_as_large_as_the_prompt(attention: str) -> None:
    rewritten(Choice(depth=2), attention=attention, head_dim=12, length=12, rows=(Row(before=1),))
