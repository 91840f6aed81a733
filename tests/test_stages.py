"""Schedules of any stages: the two eager references against themselves, and what is compiled against them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import parvts_fx
from parvts_fx import scores
from parvts_fx.stages import Stage, check_order, placed
from tests import llava, reference
from tests.comparing import check, expected, rule
from tests.drawing import random_case
from tests.plain import Row, Specification, build, prompt, words
from tests.plain_checking import TOLERANCE, Choice, outcome, wanted
from tests.plain_reference import PlainPrefill, error_of
from tests.plain_reference import reference as plain_reference
from tests.reference import READINGS, Prefill, relative_error

ROWS = (Row(before=2, between=1), Row(padding=2, before=1), Row(before=3))
SPEC = Specification(layers=4, length=17, visual=8, rows=ROWS, attention="masked")
PROMPT = [[3, "image", 6], [2, "image", 2], ["image", 9]]
Stages = tuple[Stage, ...]

PYRAMID = tuple(Stage(at=at, keep=keep, rule="last_row") for at, keep in ((1, 0.5), (2, 0.25), (3, 0.125)))
READ_WHERE_THEY_MEET = (Stage(keep=5, migrate=2), Stage(at=2, keep=2, rule="last_row", migrate=1))
SCHEDULES: dict[str, Stages] = {
    "ParVTS": (Stage(keep=3, migrate=2),),
    "joint": (Stage(keep=3, migrate=2, paths="joint"),),
    "weighed": (Stage(keep=3, migrate=2, fusion=0.3),),
    "in front of layer 0": (Stage(keep=3),),
    "FastV": (Stage(at=2, keep=3, rule="last_row"),),
    "FastV, all text": (Stage(at=2, keep=3, rule="text_rows"),),
    "PyramidDrop": PYRAMID,
    "PyramidDrop, all text": tuple(dataclasses.replace(stage, rule="text_rows") for stage in PYRAMID),
    "looking ahead": (Stage(at=1, keep=3, rule="look_ahead"),),
    "looking ahead past the end": (Stage(at=3, keep=3, rule="look_ahead"),),
    "looking ahead at once": (Stage(at=0, keep=3, rule=scores.LookAhead(2), migrate=1),),
    "looking ahead twice": (Stage(at=1, keep=5, rule=scores.LookAhead(1), migrate=1), Stage(at=2, keep=2, rule="look_ahead")),
    "shares of the layers": (Stage(at=0.25, keep=0.5, migrate=0.25), Stage(at=0.75, keep=2)),
    "migrations that meet": (Stage(keep=5, migrate=2), Stage(at=2, keep=2, migrate=1)),
    "read where migrations meet": READ_WHERE_THEY_MEET,
    "read where a migration ends": (Stage(keep=5, migrate=2), Stage(at=2, keep=2, rule="last_row")),
    "read where joint ones meet": (Stage(keep=5, migrate=2, paths="joint"), Stage(at=2, keep=2, rule="text_rows")),
    "weighed, then parallel": (Stage(keep=5, migrate=1, fusion=0.3), Stage(at=1, keep=2, migrate=2)),
    "parallel, then weighed": (Stage(keep=5, migrate=1), Stage(at=2, keep=2, migrate=1, fusion=0.6)),
    "weighed at depth": (Stage(at=1, keep=3, migrate=2, fusion=0.3),),
    "to the end": (Stage(at=1, keep=3, migrate=3),),
    "joint, to the end": (Stage(at=2, keep=5), Stage(at=2, keep=3, rule="norm", migrate=2, paths="joint")),
    "weighed, to the end": (Stage(at=2, keep=3, migrate=2, fusion=0.6),),
    "twice at one layer": (Stage(at=1, keep=5), Stage(at=1, keep=3, rule="norm")),
}
EACH = pytest.mark.parametrize("stages", SCHEDULES.values(), ids=SCHEDULES.keys())


@pytest.fixture(scope="module")
def model() -> Any:
    return llava.build(layers=4)


def plainly(stages: Stages) -> list[PlainPrefill]:
    return wanted(build(SPEC), prompt(SPEC), Choice(stages=stages))


def with_hooks(model: Any) -> Callable[[Stages], list[Prefill]]:
    return lambda stages: expected(model, llava.prompt(model, PROMPT), stages=stages)


def distance(actual: list[Prefill], other: list[Prefill]) -> float:
    """Over logits and caches of all samples; infinite where other rows live."""
    errors = []
    for one, two in zip(actual, other, strict=True):
        pairs = zip([one.logits, *one.keys, *one.values], [two.logits, *two.keys, *two.values], strict=True)
        errors += [relative_error(*pair) if one.rows.equal(two.rows) else float("inf") for pair in pairs]
    return max(errors)


@pytest.fixture(params=["plain", "hooks"])
def oracle(request: pytest.FixtureRequest, model: Any) -> Callable[[Stages], list[Prefill]]:
    return plainly if request.param == "plain" else with_hooks(model)


@pytest.mark.parametrize("both", [dict(fusion="attention"), dict(fusion=0.3), dict(paths="joint")], ids=str)
@pytest.mark.parametrize("depth", [0, 2, 4, 0.5])
def test_one_stage_is_the_short_form(model: Any, depth: int | float, both: dict) -> None:
    stages = (Stage(keep=3, rule="norm", migrate=depth, **(both if depth else {})),)
    short = dict(migration_depth=depth, keep_tokens=3, merge=None, **both)
    given = llava.prompt(model, PROMPT)
    assert distance(with_hooks(model)(stages), expected(model, given, score="norm", **short)) == 0
    assert distance(plainly(stages), plain_reference(build(SPEC), prompt(SPEC), rule("norm"), **short)) == 0


@EACH
def test_a_stage_that_keeps_all_changes_nothing(oracle: Callable, stages: Stages) -> None:
    end = reference.placed(stages, 4)[-1].end
    for further in [dict(), dict(migrate=1), dict(migrate=1, fusion=0.4), dict(migrate=1, paths="joint")]:
        if end + further.get("migrate", 0) <= 4 and end < 4:
            assert distance(oracle((*stages, Stage(at=end, keep=1.0, **further))), oracle(stages)) < TOLERANCE


@pytest.mark.parametrize("at, both", [(0, 1), (0, 4), (1, 2), (2, 2)])
def test_two_ways_to_say_the_same(oracle: Callable, at: int, both: int) -> None:
    """With weight 1 path A is alone; where places decide, joint migration is a later choice."""
    at_once = oracle((Stage(at=at, keep=3),))
    assert distance(oracle((Stage(at=at, keep=3, migrate=both, fusion=1.0),)), at_once) < TOLERANCE
    if at + both < 4:
        jointly = oracle((Stage(at=at, keep=3, rule="uniform", migrate=both, paths="joint"),))
        assert distance(jointly, oracle((Stage(at=at + both, keep=3, rule="uniform"),))) < TOLERANCE


def test_no_two_schedules_are_alike(oracle: Callable) -> None:
    results = {name: oracle(stages) for name, stages in SCHEDULES.items()}
    for one, two in itertools.combinations(results, 2):
        assert distance(results[one], results[two]) > 1e-3, (one, two)


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What rules that read are given: those of stages with the rule "noting", or "noting all"."""
    given: list[Tensor] = []

    def noting(hidden: Tensor, visual: Tensor, attention: Tensor) -> Tensor:
        given.append(attention)
        return scores.uniform(hidden, visual)

    monkeypatch.setitem(READINGS, "noting", ("last_row", noting))
    monkeypatch.setitem(READINGS, "noting all", ("text_rows", noting))
    return given


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_weights_are_the_models_own(weights: list[Tensor], attention: str) -> None:
    model = llava.build(layers=4, attention=attention)
    given = llava.prompt(model, PROMPT)
    expected(model, given, stages=(Stage(at=3, rule="noting all"),))
    maps = llava.build(layers=4, attention="eager")(**given.inputs, output_attentions=True).attentions[2].detach()
    for sample, (visual, found) in enumerate(zip(given.visual, weights, strict=True)):
        own = maps[sample][:, ~visual].clone()
        own[:, (visual.cumsum(0) == 0)[~visual]] = 0
        assert relative_error(found[0], own) < TOLERANCE


def test_weights_where_a_stage_ends(oracle: Callable, weights: list[Tensor]) -> None:
    """They are shares of all that the last text row saw; what has left since then is missing from them."""
    for before, at in (((), 1), ((Stage(keep=3, migrate=2),), 3), ((Stage(keep=3, migrate=2),), 2)):
        weights.clear()
        oracle((*before, Stage(at=at, keep=2, rule="noting")))
        shares = torch.cat([found[:, :, 0].sum(-1) for found in weights])
        assert bool((shares < 0.999).all()) if at == 2 else torch.allclose(shares, torch.ones(()))


def rewritten(choice: Choice, spec: Specification = SPEC) -> None:
    result = outcome(spec, choice)
    assert result.kind == "rewritten", result


@EACH
def test_schedules(stages: Stages) -> None:
    rewritten(Choice(stages=stages))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FastV", "looking ahead", "migrations that meet", "parallel, then weighed", "to the end"])
@pytest.mark.parametrize("settings", [dict(skip_dead_rows=False), dict(dynamic=True)], ids=["dead rows run", "dynamic"])
def test_schedules_in_other_ways(name: str, settings: dict) -> None:
    rewritten(Choice(stages=SCHEDULES[name], **settings))


VARIANTS = {
    "one row, no mask": dict(attention="causal", rows=ROWS[:1]),
    "written out, the last row's logits": dict(attention="written", last_only=True),
    "bias by distance, parallel residual": dict(attention="relative", parallel=True),
    "learned positions, norms behind": dict(positions="learned", place="post", numbering="mask"),
    "images see each other": dict(span="images", groups=2),
    "two attention calls a layer": dict(pair="own"),
    "heads first": dict(layout="heads first"),
    "one flat function": dict(flat=True, attention="written"),
}


@pytest.mark.slow
@pytest.mark.parametrize("features", VARIANTS.values(), ids=VARIANTS.keys())
def test_models(features: dict) -> None:
    rewritten(Choice(stages=READ_WHERE_THEY_MEET), dataclasses.replace(SPEC, **features))


@pytest.mark.parametrize("features", [
    dict(fused_qkv=True, groups=2, span="images"), dict(pair="own", layout="heads first"),
    dict(positions="learned", place="post"), dict(hybrid="linear", hybrid_layers="first", attention="written")], ids=str)
def test_models_looking_ahead(features: dict) -> None:
    rewritten(Choice(stages=SCHEDULES["looking ahead twice"]), dataclasses.replace(SPEC, **features))


@pytest.mark.slow
@pytest.mark.parametrize("stages", [PYRAMID, SCHEDULES["weighed, then parallel"], SCHEDULES["looking ahead twice"]],
                         ids=["PyramidDrop", "weighed", "looking ahead"])
def test_prompts_of_several_lengths(stages: Stages) -> None:
    """One compiled model: from the second prompt on, sizes are symbols."""
    model, choice = build(SPEC), Choice(stages=stages)
    parvts_fx.compile(model, **choice.options)
    for seed, sizes in enumerate([dict(), dict(length=23, visual=6), dict(length=18, rows=ROWS[1:])]):
        spec = dataclasses.replace(SPEC, **sizes)
        given = prompt(spec, seed)
        with torch.no_grad():
            assert error_of(spec, model(*given.arguments), wanted(build(SPEC), given, choice)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.captures_once
@pytest.mark.parametrize("name, rows, steps", [
    ("PyramidDrop", PROMPT, 3), ("read where migrations meet", PROMPT, 0), ("weighed, then parallel", PROMPT[:1], 0)])
def test_llava(model: Any, name: str, rows: list, steps: int) -> None:
    check(model, llava.prompt(model, rows), stages=SCHEDULES[name], steps=steps)


@pytest.mark.inductor
def test_inductor() -> None:
    spec = dataclasses.replace(SPEC, layers=3, rows=ROWS[:2])
    choice = Choice(stages=(Stage(keep=5, migrate=1), Stage(at=1, keep=2, rule="last_row", migrate=1)))
    model, given = build(spec), prompt(spec)
    compiled = torch.compile(model, backend="parvts", options={**choice.options, "lowering": "inductor"})
    assert error_of(spec, compiled(*given.arguments), wanted(model, given, choice)) < TOLERANCE


@pytest.mark.inductor
def test_inductor_lays_out_keys_in_its_own_way() -> None:
    """As many heads of keys as of queries, in a batch: what the rule reads lies otherwise in memory than when it was traced."""
    model = llava.build(groups=4)
    stages = (Stage(keep=5, at=1, rule="last_row"), Stage(at=2, keep=2, rule="last_row"))
    check(model, llava.prompt(model, PROMPT), stages=stages, lowering="inductor")


def test_drawn_at_random() -> None:
    """``python -m tests.fuzz --stages all`` draws as many as wanted."""
    outcomes = []
    for seed in range(6):
        spec, choice = random_case(seed, staged=True)
        outcomes.append(outcome(spec, choice))
        assert outcomes[-1].kind != "wrong", f"({words(spec)}, {words(choice)}): {outcomes[-1].reason}"
    refused = [one.reason for one in outcomes if one.kind == "refused"]
    assert len(refused) <= 2, refused


@pytest.fixture(params=["last_row", "text_rows"])
def third_party(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a rule that somebody else has registered."""
    name = f"loud, by {request.param}"

    def loud(hidden: Tensor, visual: Tensor, attention: Tensor) -> Tensor:
        assert attention.shape[-1] == visual.shape[1] and attention.shape[0] == visual.shape[0]
        return attention.amax((1, 2)) * hidden.norm(dim=-1)

    monkeypatch.setitem(READINGS, name, (request.param, loud))
    parvts_fx.register_rule(name, reads=request.param)(loud)
    yield name
    scores._RULES.pop(name, None)


def test_rules_of_others(third_party: str) -> None:
    rewritten(Choice(stages=(Stage(keep=5, migrate=1), Stage(at=1, keep=3, rule=third_party, migrate=1))))


BAD_STAGES = [
    (dict(at=-1), "at=-1"), (dict(at=1.0), "at=1.0"), (dict(at=True), "at=True"), (dict(at="2"), "at='2'"),
    (dict(keep=0), "keep=0"), (dict(keep=1.5), "keep=1.5"), (dict(keep=float("nan")), "keep=nan"),
    (dict(keep=False), "keep=False"), (dict(rule=3), "rule=3"), (dict(migrate=-2), "migrate=-2"),
    (dict(migrate=1.0), "migrate=1.0"), (dict(migrate=1, paths="serial"), "paths='serial'"),
    (dict(migrate=1, fusion="mean"), "fusion='mean'"), (dict(migrate=1, fusion=1.2), "fusion=1.2"),
    (dict(migrate=1, fusion=True), "fusion=True"), (dict(migrate=1, paths="joint", fusion=0.5), "fusion=0.5"),
    (dict(paths="joint"), "paths='joint'"), (dict(fusion=0.5), "fusion=0.5"), (dict(merge="mean"), "merge='mean'"),
]


@pytest.mark.parametrize("fields, told", BAD_STAGES, ids=lambda held: held if isinstance(held, str) else "")
def test_bad_stages(fields: dict, told: str) -> None:
    with pytest.raises(ValueError) as error:
        Stage(**fields)
    assert f"parvts_fx: option stages.{told}: expected" in str(error.value)


BAD_ORDERS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    (dict(stages=(Stage(at=2), Stage(at=1))), ("stages[1].at=1",)),
    (dict(stages=(Stage(at=0.5), Stage(at=0.25))), ("stages[1].at=0.25",)),
    (dict(stages=(Stage(), Stage(at=1, migrate=2), Stage(at=2))), ("stages[2].at=2", "3")),
    (dict(stages=(Stage(keep=4), Stage(at=1, keep=5))), ("stages[1].keep=5", "4")),
    (dict(stages=(Stage(keep=0.25), Stage(at=1, keep=0.5))), ("stages[1].keep=0.5", "0.25")),
    (dict(stages=(Stage(), Stage(at=1, rule="norms"))), ("stages[1].rule='norms'", 'Did you mean "norm"')),
    (dict(stages=(Stage(rule="last_row"),)), ("stages[0]", "last_row", "0")),
    (dict(stages=(Stage(), Stage(rule="text_rows"))), ("stages[1]", "text_rows", "0")),
    (dict(stages=(3,)), ("stages", "3")),
    *((dict(stages=(Stage(),), **{name: value}), ("stages", name)) for name, value in dict(
        keep_ratio=0.5, keep_tokens=3, migration_depth=1, fusion=0.5, paths="joint", score="norm").items()),
]


@pytest.mark.parametrize("given, told", BAD_ORDERS, ids=lambda held: held[0] if isinstance(held, tuple) else "")
def test_bad_schedules_at_the_call(given: dict, told: tuple[str, ...]) -> None:
    model = build(SPEC)
    with pytest.raises(ValueError) as error:
        parvts_fx.compile(model, **given)
    assert all(part in str(error.value) for part in ("parvts_fx: option", *told)), error.value
    assert model._compiled_call_impl is None


BEHIND_NOTHING = (Stage(at=0.1, rule="last_row"),)
BAD_PLACES = [
    (BEHIND_NOTHING, "stages[0]"),
    ((Stage(), Stage(at=4)), "stages[1].at=4"), ((Stage(at=0.95),), "stages[0].at=0.95"),
    ((Stage(at=2, migrate=3),), "stages[0].migrate=3"), ((Stage(at=2, migrate=0.75),), "stages[0].migrate=0.75"),
    ((Stage(at=1, migrate=0.5), Stage(at=2)), "stages[1].at=2"),
    ((Stage(migrate=2), Stage(at=0.25)), "stages[1].at=0.25"),
]


@pytest.mark.parametrize("stages, told", BAD_PLACES, ids=lambda held: held if isinstance(held, str) else "")
def test_stages_that_the_model_has_no_place_for(stages: Stages, told: str) -> None:
    check_order(stages)
    with pytest.raises(ValueError) if stages != BEHIND_NOTHING else contextlib.nullcontext() as error:
        placed(stages, 4)
    assert stages == BEHIND_NOTHING or f"parvts_fx: option {told}: expected" in str(error.value)
    fast = torch.compile(build(SPEC), backend="parvts", options={"stages": stages, "lowering": "eager"})
    with torch.no_grad(), pytest.raises(ValueError) as error:
        fast(*prompt(SPEC).arguments)
    assert type(error.value) is ValueError and told in str(error.value)


def test_nothing_to_see_ahead() -> None:
    model = build(dataclasses.replace(SPEC, hybrid="linear", hybrid_layers="odd"))
    parvts_fx.compile(model, lowering="eager", stages=(Stage(at=1, rule=scores.LookAhead(1)),))
    with torch.no_grad(), pytest.raises(ValueError, match=r"stages\[0\]\.rule=LookAhead\(layers=1\).*none of them has softmax"):
        model(*prompt(SPEC).arguments)
