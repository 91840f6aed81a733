"""Dropped tokens merged into kept ones: compiled prefills equal the reference, caches and decode steps included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import parvts_fx
from parvts_fx.analysis.samples import Samples
from parvts_fx.passes.clusters import clusters, taken_over
from parvts_fx.places import places_of
from parvts_fx.stages import Stage
from tests import llava
from tests.clusters_reference import clusters_of, pictures_of
from tests.comparing import TOLERANCE, check, compile_with_parvts, expected, uncompile
from tests.reference import relative_error

PROMPTS = {
    "padding": [[3, "image", 5], [2, "image", 2]],
    "two pictures": [[2, "image", 3, "image", 4]],
}
ONE = (Stage(keep=4, migrate=2, merge="clusters"),)
SCHEDULES = {
    "before the first layer": (Stage(keep=4, merge="clusters"),),
    "one layer": (Stage(keep=4, migrate=1, merge="clusters"),),
    "joint": (Stage(keep=4, migrate=2, paths="joint", merge="clusters"),),
    "late": (Stage(at=2, keep=0.3, rule="last_row", merge="clusters"),),
    "behind the last layer": (Stage(keep=4, migrate=4, merge="clusters"),),
    "twice": (Stage(keep=9, migrate=1, merge="clusters"), Stage(at=2, keep=3, merge="clusters", migrate=1)),
    "twice, by attention that counts clusters": (
        Stage(keep=9, migrate=1, merge="clusters"), Stage(at=2, keep=3, rule="text_rows", merge="clusters")),
    "the second stage drops": (Stage(keep=9, migrate=1, merge="clusters"), Stage(at=2, keep=3)),
    "the second stage merges": (Stage(keep=9, migrate=1), Stage(at=2, keep=3, merge="clusters")),
    "the second stage chooses where the first one ends, by the states": (
        Stage(keep=9, migrate=2, merge="clusters"), Stage(at=2, keep=3, rule="norm")),
    "then constant weights": (Stage(keep=9, merge="clusters"), Stage(at=1, keep=3, migrate=2, fusion=0.3)),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return llava.build(layers=4)


@pytest.mark.captures_once
@pytest.mark.supports("Options", "dropped tokens merged into kept ones, in any schedule")
@pytest.mark.parametrize("stages", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS.keys())
def test_schedules(model: Any, stages: tuple[Stage, ...], rows: list) -> None:
    check(model, llava.prompt(model, rows), stages=stages)


@pytest.mark.slow
@pytest.mark.captures_once
def test_generate(model: Any) -> None:
    check(model, llava.prompt(model, PROMPTS["padding"]), steps=4, stages=ONE)


@pytest.mark.captures_once
@pytest.mark.parametrize("stages", [ONE, SCHEDULES["twice"]], ids=["once", "twice"])
def test_attention_written_out(stages: tuple[Stage, ...]) -> None:
    model = llava.build(layers=4, attention="eager")
    check(model, llava.prompt(model, PROMPTS["padding"]), stages=stages)


@pytest.mark.captures_once
def test_without_skipping_dead_rows(model: Any) -> None:
    check(model, llava.prompt(model, PROMPTS["padding"]), stages=ONE, skip_dead_rows=False)


@pytest.mark.slow
@pytest.mark.captures_once
@pytest.mark.inductor
def test_inductor(model: Any) -> None:
    check(model, llava.prompt(model, PROMPTS["padding"]), stages=SCHEDULES["twice"], lowering="inductor")


@pytest.mark.slow
def test_prompts_of_several_lengths(model: Any) -> None:
    prompts = [llava.prompt(model, [[before, "image", behind]]) for before, behind in ((3, 5), (4, 9), (2, 3))]
    wanted = [expected(model, prompt, stages=ONE)[0] for prompt in prompts]
    compile_with_parvts(model, stages=ONE, dynamic=True)
    try:
        for prompt, own in zip(prompts, wanted):
            with torch.no_grad():
                assert relative_error(model(**prompt.inputs).logits[0], own.logits) < TOLERANCE
    finally:
        uncompile(model)


@pytest.mark.slow
def test_a_sample_does_not_depend_on_its_batch(model: Any) -> None:
    rows = [[3, "image", 5], [2, "image", 2], [6, "image", 4]]
    together = llava.prompt(model, rows)
    compile_with_parvts(model, stages=ONE)
    try:
        with torch.no_grad():
            whole = model(**together.with_positions).logits
            for sample in range(len(rows)):
                inputs = {name: held[sample:sample + 1] for name, held in together.with_positions.items()}
                alone = model(**inputs).logits
                assert relative_error(whole[sample], alone[0]) < TOLERANCE
    finally:
        uncompile(model)


@pytest.mark.slow
@pytest.mark.parametrize("given, same", [
    ({}, {"merge": "clusters", "score": "placed"}), ({"fusion": 0.5}, {"fusion": 0.5, "merge": None, "score": "placed"})],
    ids=["attention fusion merges", "constant weights do not"])
def test_the_default(model: Any, given: dict, same: dict) -> None:
    prompt, results = llava.prompt(model, PROMPTS["padding"]), []
    for options in (given, same):
        torch._dynamo.reset()
        compile_with_parvts(model, keep_tokens=4, **options)
        with torch.no_grad():
            results.append(model(**prompt.inputs).logits)
        uncompile(model)
    assert torch.equal(*results)


@pytest.mark.captures_once
def test_off_is_the_method_of_the_paper(model: Any) -> None:
    check(model, llava.prompt(model, PROMPTS["padding"]), keep_tokens=4, merge=None)


def test_explain_tells_which_steps_a_model_gets(model: Any) -> None:
    prompt = llava.prompt(model, [[3, "image", 5]])
    report = parvts_fx.explain(model, options={"merge": "clusters", "migration_depth": 2, "lowering": "eager"}, **prompt.inputs)
    assert report.prefill.merging == (
        "hidden states at the input of layer 2, log n on the logits of 2 calls, values in 2 caches in front",)
    assert report.prefill.merging[0].split(",")[0] in " ".join(str(report).split())


@pytest.mark.parametrize("given, told", [
    (dict(merge="average"), "option merge='average': expected \"auto\", None or \"clusters\""),
    (dict(merge="clusters", fusion=0.5), "option merge='clusters': expected None together with fusion=0.5"),
])
def test_bad_options(given: dict, told: str) -> None:
    with pytest.raises(ValueError) as error:
        parvts_fx.Options(**given)
    assert told in str(error.value)


def test_constant_weights_do_not_merge() -> None:
    with pytest.raises(ValueError, match="merge='clusters': expected None together with fusion=0.5"):
        Stage(migrate=1, fusion=0.5, merge="clusters")


# -- the parts --------------------------------------------------------------------------------------------------------


def drawn(seed: int, rows: int = 23) -> tuple[torch.Tensor, ...]:
    """Two samples with as many visual and kept rows: hidden, visual, kept, sizes."""
    torch.manual_seed(seed)
    visual = torch.zeros(2, rows, dtype=torch.bool)
    visual[0, 3:9] = visual[0, 12:18] = visual[1, 5:17] = True
    kept = torch.stack([(~visual[i] | torch.zeros(rows, dtype=torch.bool).scatter(
        0, visual[i].nonzero()[:, 0][torch.randperm(12)[:4]], True)).nonzero()[:, 0] for i in range(2)])
    return torch.randn(2, rows, 8), visual, kept, torch.randint(1, 5, (2, rows)).float()


@pytest.mark.parametrize("seed", range(5))
def test_clusters_against_one_token_after_the_other(seed: int) -> None:
    hidden, visual, kept, sizes = drawn(seed)
    found = clusters(hidden, visual, kept, places_of(visual)[..., 0], sizes, 12, 4)
    for sample in range(2):
        subject = torch.zeros_like(visual[sample]).scatter(0, kept[sample], True) & visual[sample]
        wanted = clusters_of(hidden[sample], visual[sample], subject, pictures_of(visual[sample]), sizes[sample])
        assert wanted.gap > 1e-4
        assert torch.equal(found["sizes"][sample].double(), wanted.sizes[kept[sample]])
        for part, whole in (("steps", wanted.taken_over(hidden[sample]) - hidden[sample]),
                            ("values", wanted.shifted(hidden[sample], visual[sample]))):
            actual = taken_over(hidden, found[part], found["visual"], 1, Samples(0))[sample]
            assert relative_error(actual, whole[subject]) < 1e-5


def test_sizes_add_up_and_pictures_keep_theirs() -> None:
    hidden, visual, kept, sizes = drawn(8)
    found = clusters(hidden, visual, kept, places_of(visual)[..., 0], sizes, 12, 4)
    for sample in range(2):
        is_text = found["is_text"][sample]
        assert torch.equal(found["sizes"][sample][~is_text].sum(), sizes[sample][visual[sample]].sum())
        assert bool((found["sizes"][sample][is_text] == 1).all())
    steps, places = found["steps"][0], found["visual"][0]
    first = places < 11
    of_first = kept[0][~found["is_text"][0]] < 11
    assert 0 < int(of_first.sum()) < 4
    assert bool((steps[of_first][:, ~first] == 0).all()) and bool((steps[~of_first][:, first] == 0).all())


def test_a_picture_without_kept_tokens_goes_to_others() -> None:
    hidden, visual, _, sizes = drawn(3)
    text = (~visual).nonzero()
    rows = [torch.cat([text[text[:, 0] == i, 1], visual[i].nonzero()[:4, 0]]).sort().values for i in range(2)]
    found = clusters(hidden, visual, torch.stack(rows), places_of(visual)[..., 0], sizes, 12, 4)
    assert float(found["sizes"][0][~found["is_text"][0]].sum()) == float(sizes[0][visual[0]].sum())
    assert bool((found["steps"][0][:, 6:] > 0).any(0).all())


def test_places_in_pictures() -> None:
    visual = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 0], [1] * 9 + [0, 0, 0]]).bool()
    picture, row, column = places_of(visual).unbind(-1)
    assert picture.tolist() == [[0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3], [1] * 12]
    assert row.tolist() == [[-1, 0, 0, 1, 1, -1, -1, -1, -1, -1, 0, -1], [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1]]
    assert column.tolist() == [[-1, 0, 1, 0, 1, -1, -1, -1, -1, -1, 0, -1], [0, 1, 2] * 3 + [-1] * 3]


def test_placed_adds_what_the_distance_on_the_grid_is_worth() -> None:
    visual = torch.zeros(1, 12, dtype=torch.bool)
    visual[0, 1:10] = True
    hidden = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(0))
    actual = parvts_fx.scores.rule_named("placed")(hidden, visual, places_of(visual))[0]
    centred = hidden[0] - hidden[0, 1:10].mean(0)
    length = centred.norm(dim=-1)
    for one in range(1, 10):
        ahead = []
        for other in range(1, 10):
            if length[other] > length[one]:
                g2 = (one - 1) // 3 - (other - 1) // 3, (one - 1) % 3 - (other - 1) % 3
                cosine = float(torch.nn.functional.cosine_similarity(centred[one], centred[other], dim=0))
                ahead.append(1 - cosine + 0.3 * (1 - math.exp(-(g2[0] ** 2 + g2[1] ** 2) / (2 * 0.75 ** 2))))
        wanted = float(length[one]) ** 0.5 * min(ahead, default=2.3)
        assert abs(float(actual[one]) - wanted) < 1e-5 * max(1, wanted)
