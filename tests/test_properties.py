"""Models drawn from a specification: the compiled prefill equals the eager reference, whatever the model looks like."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests import drawing
from tests.drawing import ATTENTIONS
from tests.plain import Plain, Row, Specification, prompt, words
from tests.plain_checking import RULES, TOLERANCE, Choice, Outcome, outcome
from tests.plain_reference import largest_error, reference
from tests.reference import relative_error

PROPERTY = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
DRAWN, LEAST_REWRITTEN = 24, 0.8
"""Models with features beside the base's, and the share of them that is not to be refused."""


def picking(draw: st.DrawFn) -> drawing.Pick:
    return lambda options: draw(st.sampled_from(options))


def prompted(pick: drawing.Pick, spec: Specification) -> Specification:
    return drawing.with_padding_that_fits(drawing.with_prompt(pick, spec, pick(range(1, 4))))


@st.composite
def bases(draw: st.DrawFn, attention: str) -> tuple[Specification, Choice]:
    pick = picking(draw)
    spec = prompted(pick, drawing.base(pick, attention))
    return spec, drawing.choice(pick, spec)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Specification, Choice]:
    return drawing.case(picking(draw), draw(st.integers(1, 3)))


@st.composite
def sequences(draw: st.DrawFn) -> tuple[tuple[Specification, ...], Choice]:
    """One model, and two or three prompts of other lengths (and batches) for it."""
    pick = picking(draw)
    first = dataclasses.replace(draw(bases(pick(ATTENTIONS)))[0], layers=pick((1, 2)))
    second, third = (prompted(pick, first) for _ in range(2))
    if second.length == first.length:
        second = dataclasses.replace(second, length=first.length + 1)
    choice = drawing.choice(pick, dataclasses.replace(first, layers=1))
    return pick([(first, second), (first, second, first), (first, second, third)]), choice


def check(compiled: Callable[..., Any], model: Plain, spec: Specification, choice: Choice, seed: int = 1) -> None:
    """One call of the compiled model: lengths, then numbers."""
    prompted = prompt(spec, seed)
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=choice.data_in_sizes):
        logits, caches = compiled(*prompted.arguments)
        unpruned, _ = model(*prompted.arguments)
        expected = reference(model, prompted, RULES[choice.rule], **choice.semantic)
    kept = choice.kept(spec)
    assert logits.shape[1] == (1 if spec.last_only else kept)
    assert [key.shape[2] for key, _ in caches] == [kept] * (spec.layers if spec.caches else 0)
    assert largest_error((logits, caches), expected, spec.caches) < TOLERANCE
    if kept == spec.length:
        assert relative_error(logits, unpruned) < TOLERANCE


FRONTS = (Row(before=4, between=1), Row(before=2, between=2))
TWO_ROWS = (Row(padding=0, before=1, between=2), Row(padding=3, before=2))
CORNERS: dict[str, tuple[Specification, Choice]] = {
    "one token of one layer": (Specification(layers=1), Choice(keep=1)),
    "last row alone, no caches": (Specification(caches=False, last_only=True), Choice(rule="tied")),
    "last row alone, fused qkv": (
        Specification(layers=3, caches=False, last_only=True, fused_qkv=True, rows=TWO_ROWS), Choice()),
    "last row alone, migration to the end": (
        Specification(layers=2, caches=False, last_only=True, rows=TWO_ROWS, attention="masked"), Choice(depth=2)),
    "last row alone, migration to the end, image last": (
        Specification(length=9, layers=2, last_only=True, rows=(Row(before=4), Row(padding=2))), Choice(depth=2)),
    "last row alone, joint to the end": (Specification(layers=2, last_only=True), Choice(depth=2, paths="joint")),
    "learned positions, fused qkv, biases": (
        Specification(layers=3, rows=TWO_ROWS, positions="learned", fused_qkv=True, norm="layer", attention="masked",
                      numbering="mask"), Choice(depth=2)),
    "parallel residual, bias by distance": (
        Specification(layers=3, rows=TWO_ROWS, parallel=True, attention="relative", norm="layer"), Choice(depth=2)),
    "one flat function": (Specification(layers=3, rows=TWO_ROWS, flat=True, attention="written"), Choice(depth=2)),
    "merged by assignment": (Specification(merge="assign", rows=TWO_ROWS), Choice()),
    "merged by index_put": (Specification(merge="put", rows=TWO_ROWS), Choice(fusion=0.5)),
    "merged by a choice": (Specification(merge="choose", rows=TWO_ROWS), Choice()),
    "merged by a choice of the text": (Specification(merge="choose the text"), Choice(fusion=0.5)),
    "merged by joining": (Specification(merge="join"), Choice()),
    "length is hidden size": (Specification(length=12), Choice(depth=2)),
    "path A is hidden size": (Specification(length=15), Choice()),
    "length is head_dim": (
        Specification(head_dim=12, length=12, rows=TWO_ROWS, attention="masked"), Choice(fusion=0.5)),
    "length is vocabulary": (Specification(length=23, flat=True), Choice(depth=2)),
    "length is MLP's size": (Specification(length=19, attention="written"), Choice()),
    "batch is heads, length is batch * visual": (Specification(length=10, rows=TWO_ROWS), Choice()),
    "no text": (Specification(length=5, rows=(Row(before=0),)), Choice(keep=1)),
    "no text, weight": (Specification(length=5, rows=(Row(before=0),)), Choice(keep=1, fusion=0.5)),
    "image last": (Specification(length=9, rows=(Row(before=4), Row(padding=2)), attention="masked"), Choice(keep=1)),
    "one visual token": (Specification(visual=1), Choice(keep=1)),
    "two visual tokens": (Specification(visual=2, rows=TWO_ROWS), Choice(keep=1, rule="norm")),
    "scores undefined": (Specification(rows=TWO_ROWS), Choice(rule="partly undefined", keep=3)),
    "weight, all of three layers": (Specification(layers=3, rows=TWO_ROWS), Choice(depth=3, fusion=0.3)),
    "weight, all of two layers": (Specification(layers=2), Choice(depth=2, fusion=0.5)),
    "weight, text in front": (
        Specification(layers=3, length=13, rows=FRONTS, attention="masked", caches=False), Choice(depth=2, fusion=0.3)),
    "weight, text in front, causal": (
        Specification(layers=3, length=13, rows=FRONTS, positions="learned", fused_qkv=True), Choice(depth=2, fusion=0.3)),
    "weight, text in front, all of three layers": (
        Specification(layers=3, length=13, rows=FRONTS, attention="relative", last_only=True), Choice(depth=3, fusion=0.3)),
    "weight, text in front, one flat function": (
        Specification(layers=3, length=13, rows=FRONTS, attention="written", flat=True), Choice(depth=2, fusion=0.3)),
    "weight, text in front, window": (
        Specification(layers=3, length=13, rows=FRONTS, attention="written", span="window"), Choice(depth=2, fusion=0.3)),
    "weight, text in front, images see each other": (
        Specification(layers=3, length=13, rows=FRONTS, attention="masked", span="images"), Choice(depth=2, fusion=0.3)),
    "weight, text in front, all see all": (
        Specification(layers=3, length=13, rows=FRONTS, attention="written", span="all"), Choice(depth=2, fusion=0.3)),
    "bidirectional images": (
        Specification(rows=TWO_ROWS, attention="masked", span="images"), Choice(depth=2, paths="joint")),
    "one bias for all samples": (Specification(attention="relative", rows=TWO_ROWS), Choice()),
}


@pytest.mark.versions
@pytest.mark.parametrize("spec, choice", CORNERS.values(), ids=CORNERS.keys())
def test_corners(spec: Specification, choice: Choice) -> None:
    model = Plain(spec)
    check(torch.compile(model, backend="parvts", options=choice.options), model, spec, choice)


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("attention", ATTENTIONS)
@settings(PROPERTY, max_examples=5)
@given(data=st.data())
def test_equals_the_reference(attention: str, data: st.DataObject) -> None:
    spec, choice = data.draw(bases(attention))
    torch._dynamo.reset()
    model = Plain(spec)
    check(torch.compile(model, backend="parvts", options=choice.options), model, spec, choice)


@pytest.mark.slow
def test_whatever_is_drawn_is_right_or_refused() -> None:
    """Token mixers, layouts, caches, hybrid layers, experts, several merges: never wrong, and mostly rewritten."""
    outcomes: list[Outcome] = []

    @settings(PROPERTY, max_examples=DRAWN, phases=(Phase.explicit, Phase.generate))  # tests.fuzz makes failures simple
    @given(cases())
    def never_wrong(case: tuple[Specification, Choice]) -> None:
        outcomes.append(outcome(*case))
        assert outcomes[-1].kind != "wrong", f"({', '.join(map(words, case))}): {outcomes[-1].reason}"

    never_wrong()
    refused = [one.reason for one in outcomes if one.kind == "refused"]
    assert len(refused) <= (1 - LEAST_REWRITTEN) * len(outcomes), refused


def serve(specs: tuple[Specification, ...], choice: Choice) -> None:
    """Several prompts through one compiled model."""
    torch._dynamo.reset()
    model = Plain(specs[0])
    compiled = torch.compile(model, backend="parvts", options=choice.options)
    for seed, spec in enumerate(specs, start=1):
        check(compiled, model, spec, choice, seed)


def sized(**sizes: list[int]) -> tuple[Specification, ...]:
    return tuple(Specification(**dict(zip(sizes, values))) for values in zip(*sizes.values()))


SEQUENCES: dict[str, tuple[tuple[Specification, ...], Choice]] = {
    "length is hidden size at first": (sized(length=[12, 13, 16]), Choice()),
    "text in front of three lengths": (
        tuple(dataclasses.replace(Specification(attention="masked"), length=length, rows=(Row(before=before),) * batch)
              for length, before, batch in ((11, 3, 1), (13, 0, 1), (16, 7, 2))), Choice(fusion=0.3)),
    "length is hidden size later": (sized(length=[9, 12, 9], visual=[5, 7, 5]), Choice(fusion=0.5, keep=0.3)),
    "the last one keeps all": (sized(length=[16, 14, 11], visual=[8, 6, 4]), Choice(keep=4)),
    "the last one keeps all, weight": (sized(length=[16, 14, 11], visual=[8, 6, 4]), Choice(fusion=0.3, keep=4)),
    # 0.58 * 25 is 14.5 in decimals and a little less in binary: every graph must round alike
    "a share at half a token": (sized(length=[40, 33, 30], visual=[35, 28, 25]), Choice(keep=0.58)),
}


@pytest.mark.slow
@pytest.mark.versions
@pytest.mark.parametrize("specs, choice", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_sequences_of_prompts(specs: tuple[Specification, ...], choice: Choice) -> None:
    serve(specs, choice)


@pytest.mark.slow
@settings(PROPERTY, max_examples=6)
@given(sequences())
def test_one_compiled_model_serves_prompts_of_several_lengths(
    case: tuple[tuple[Specification, ...], Choice]
) -> None:
    serve(*case)
