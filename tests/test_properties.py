"""Models drawn from a specification: the compiled prefill equals the eager reference, whatever the model looks like."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parvts_fx import scores
from tests.plain import Plain, Row, Specification, prompt
from tests.plain_reference import largest_error, reference
from tests.reference import relative_error, subject_count

TOLERANCE = 2e-5

PROPERTY = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


def tied(hidden: Tensor, visual: Tensor) -> Tensor:
    """Three scores for all tokens, so that ties decide."""
    return (visual.long().cumsum(1) % 3).float()


def partly_undefined(hidden: Tensor, visual: Tensor) -> Tensor:
    return torch.where(visual.long().cumsum(1) % 2 == 0, hidden[..., 0], torch.nan)


ATTENTIONS = ("causal", "masked", "written", "relative")
RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "diverse": scores.diverse, "norm": scores.norm, "distinct": scores.distinct, "uniform": scores.uniform,
    "tied": tied, "partly undefined": partly_undefined,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The options of one example."""

    depth: int = 1
    keep: int | float = 2
    """An int for ``keep_tokens``, a float for ``keep_ratio``."""
    fusion: str | float = "attention"
    paths: str = "parallel"
    rule: str = "diverse"
    data_in_sizes: bool = True
    """Whether graphs may hold numbers that depend on data, as under parvts_fx.compile: then weights share the prefix."""

    @property
    def semantic(self) -> dict[str, Any]:
        name = "keep_tokens" if isinstance(self.keep, int) else "keep_ratio"
        return {name: self.keep, "migration_depth": self.depth, "fusion": self.fusion, "paths": self.paths}

    @property
    def options(self) -> dict[str, Any]:
        rule = RULES[self.rule]
        name = self.rule if self.rule in scores.known_rules() else rule
        return {**self.semantic, "score": name, "lowering": "eager", "strict": True}

    def kept(self, spec: Specification) -> int:
        keep = {"keep_tokens" if isinstance(self.keep, int) else "keep_ratio": self.keep}
        return spec.length - spec.visual + subject_count(spec.visual, **keep)


@st.composite
def layouts(draw: st.DrawFn, spec: Specification, batch: int) -> Specification:
    """The specification with a prompt: its length, visual tokens, padding and places of the images."""
    visual = draw(st.integers(3, 8))  # of two, all lie equally far from their mean: rounding would choose
    row = st.builds(Row, padding=st.integers(0, 3), before=st.integers(0, 3), between=st.integers(0, 2))
    rows = tuple(draw(row) for _ in range(batch))
    least = max(row.padding + row.before + visual + row.between for row in rows)
    colliding = [size for size in (spec.hidden, spec.vocabulary, spec.mlp, 2 * visual, spec.head_dim) if size >= least]
    length = draw(st.sampled_from([least, least + 1, least + 4, *colliding]))
    return dataclasses.replace(spec, length=length, visual=visual, rows=rows, pad_right=draw(st.booleans()))


@st.composite
def specifications(draw: st.DrawFn, attention: str) -> Specification:
    heads, groups = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (3, 3)]))
    spec = Specification(
        layers=draw(st.integers(1, 4)), heads=heads, groups=groups, head_dim=draw(st.sampled_from([4, 6])),
        norm=draw(st.sampled_from(["rms", "layer"])), place=draw(st.sampled_from(["pre", "post"])),
        attention=attention, span=draw(st.sampled_from(["causal", "window", "images", "all"])),
        reads_padding=draw(st.booleans()), scale=draw(st.sampled_from([None, 0.6])),
        positions=draw(st.sampled_from(["rotary", "learned"])), numbering=draw(st.sampled_from(["index", "mask"])),
        fused_qkv=draw(st.booleans()), parallel=draw(st.booleans()), flat=draw(st.booleans()),
        caches=draw(st.booleans()), last_only=draw(st.booleans()),
    )
    return draw(layouts(spec, draw(st.integers(1, 3))))


@st.composite
def choices(draw: st.DrawFn, layers: int) -> Choice:
    kind = draw(st.sampled_from(["attention", "weight", "joint"]))
    # Where a single layer ends cannot be told from what follows it; constant weights need that end for K = layers.
    deepest = layers - 1 if kind == "weight" and layers == 1 else layers
    return Choice(
        depth=draw(st.sampled_from([*range(1, deepest + 1), 0])),
        keep=draw(st.one_of(st.integers(1, 4), st.sampled_from([0.05, 1 / 9, 0.25, 0.5, 0.8, 1.0]))),
        fusion=draw(st.sampled_from([0.0, 0.25, 0.7, 1.0])) if kind == "weight" else "attention",
        paths="joint" if kind == "joint" else "parallel", rule=draw(st.sampled_from(list(RULES))),
        data_in_sizes=draw(st.booleans()),
    )


@st.composite
def cases(draw: st.DrawFn, attention: str) -> tuple[Specification, Choice]:
    spec = draw(specifications(attention))
    return spec, draw(choices(spec.layers))


@st.composite
def sequences(draw: st.DrawFn) -> tuple[tuple[Specification, ...], Choice]:
    """One model, and two or three prompts of other lengths (and batches) for it."""
    attention = draw(st.sampled_from(ATTENTIONS))
    first = dataclasses.replace(draw(specifications(attention)), layers=draw(st.integers(1, 2)))
    second, third = (draw(layouts(first, draw(st.integers(1, 3)))) for _ in range(2))
    if second.length == first.length:
        second = dataclasses.replace(second, length=first.length + 1)
    return draw(st.sampled_from([(first, second), (first, second, first), (first, second, third)])), draw(choices(1))


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


@pytest.mark.versions
@pytest.mark.parametrize("attention", ATTENTIONS)
@settings(PROPERTY, max_examples=7)
@given(data=st.data())
def test_equals_the_reference(attention: str, data: st.DataObject) -> None:
    spec, choice = data.draw(cases(attention))
    torch._dynamo.reset()
    model = Plain(spec)
    check(torch.compile(model, backend="parvts", options=choice.options), model, spec, choice)


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


@pytest.mark.versions
@pytest.mark.parametrize("specs, choice", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_sequences_of_prompts(specs: tuple[Specification, ...], choice: Choice) -> None:
    serve(specs, choice)


@settings(PROPERTY, max_examples=6)
@given(sequences())
def test_one_compiled_model_serves_prompts_of_several_lengths(
    case: tuple[tuple[Specification, ...], Choice]
) -> None:
    serve(*case)
