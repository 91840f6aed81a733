"""The scoring rules, each against a plain loop or a property of it."""

from __future__ import annotations

import copy

import pytest
import torch

import parvts_fx
from parvts_fx import scores
from parvts_fx.passes.insert_partition import partition
from parvts_fx.places import places_of
from parvts_fx.stages import Stage
from tests import llava
from tests.comparing import assert_equal_prefill, check, compile_with_parvts, expected, uncompile
from tests.models.builders import BUILDERS
from tests.reference import subjects_of

READING = tuple(name for name in scores.known_rules() if scores.reads_attention(name))
AHEAD = tuple(name for name in scores.known_rules() if scores.layers_ahead(name))
PLAIN = tuple(name for name in scores.known_rules() if name not in (*READING, *AHEAD, scores.ATTENDED))


@pytest.fixture(scope="module")
def model():
    return llava.build(layers=2)


def drawn(batch: int = 2, length: int = 14, visual: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(length, generator=generator)[:visual]] = True
    return torch.randn(batch, length, 6, generator=generator), mask


@pytest.mark.slow
@pytest.mark.captures_once
@pytest.mark.supports("Options", "every built-in scoring rule")
@pytest.mark.parametrize("name", PLAIN)
def test_rules_run_through_the_backend(model, name):
    check(model, llava.prompt(model, [[3, "image", 6], [2, "image", 3]]), score=name, migration_depth=1, keep_ratio=0.3)


@pytest.mark.captures_once
@pytest.mark.supports("Options", "rules that read attention weights of the layer in front")
@pytest.mark.parametrize("name", READING)
def test_rules_that_read_attention_run_through_the_backend(model, name):
    check(model, llava.prompt(model, [[3, "image", 6], [2, "image", 3]]),
          stages=(Stage(at=1, keep=0.3, rule=name, migrate=1),))


@pytest.mark.captures_once
@pytest.mark.supports("Options", "rules that look ahead: at what layers behind the choice would attend to")
@pytest.mark.parametrize("stage", [
    Stage(at=1, keep=0.3, rule="look_ahead", merge="clusters"), Stage(at=0, keep=0.3, rule=scores.LookAhead(1), migrate=1)],
    ids=["behind", "at once"])
def test_rules_that_look_ahead_run_through_the_backend(stage):
    model = llava.build(layers=3)
    check(model, llava.prompt(model, [[3, "image", 6], [2, "image", 3]]), stages=(stage,))


def test_looking_ahead_against_a_loop():
    """The largest share of what one row pays to visual tokens, on average over heads: its root, times the distance."""
    hidden, visual = drawn(batch=1)
    tokens, text = visual[0].nonzero()[:, 0].tolist(), (~visual[0]).nonzero()[:, 0].tolist()
    ahead = torch.rand(1, 6, len(text), 14, generator=torch.Generator().manual_seed(4))
    ahead[:, :, 0] = 0  # a row in front of the picture
    shares = [max(sum(float(row[token] / row[tokens].sum()) / 6 for row in ahead[0, :, place]) for place in range(1, len(text)))
              for token in tokens]
    nowhere = torch.tensor([[[0, -1, -1]] * 14])
    centred = hidden[0, tokens] - hidden[0, tokens].mean(0)
    wanted = []
    for i, share in enumerate(shares):
        better = [j for j, more in enumerate(shares) if more > share]
        near = [1 - float(torch.cosine_similarity(centred[i], centred[j], dim=0)) for j in better]
        wanted.append(share**0.5 * min(near, default=2.0))
    torch.testing.assert_close(scores.LookAhead()(hidden, visual, ahead, nowhere)[0, tokens], torch.tensor(wanted))


@pytest.mark.parametrize("layers", [0, -1, 1.5, True, "two"])
def test_how_far_a_rule_cannot_look(layers):
    with pytest.raises(ValueError, match=f"layers={layers!r}.*an int of at least 1"):
        parvts_fx.register_rule("curious", reads="ahead", layers=layers)
    with pytest.raises(ValueError, match="LookAhead.*an int of at least 1"):
        scores.LookAhead(layers)
    assert "curious" not in scores.known_rules()


@pytest.mark.parametrize("name, asked", [("last_row", 1), ("text_rows", 6)])
def test_attention_that_tokens_receive_against_a_loop(name, asked):
    """Averaged over heads and summed over the rows that are asked, of which the rule is given no others."""
    hidden, visual = drawn()
    weights = torch.rand(2, 3, asked, 14, generator=torch.Generator().manual_seed(4))
    received = scores.rule_named(name)(hidden, visual, weights)
    for sample in range(2):
        for place in range(14):
            wanted = sum(float(weights[sample, head, row, place]) for head in range(3) for row in range(asked)) / 3
            assert abs(float(received[sample, place]) - wanted) < 1e-5
    assert not scores.reads_hidden(name) and scores.reads_text(name)


def test_what_rules_say_that_they_read():
    assert READING == ("last_row", "text_rows") and not any(map(scores.reads_attention, PLAIN))
    assert [name for name in READING if scores.asks_all_text(name)] == ["text_rows"]
    assert [name for name in PLAIN if scores.reads_text(name)] == ["question", "question_diverse"]
    assert AHEAD == ("look_ahead",) and scores.reads_text("look_ahead") and scores.reads_places(scores.LookAhead(2))
    assert [scores.layers_ahead(rule) for rule in ("look_ahead", scores.LookAhead(2), "norm", torch.norm)] == [3, 2, 0, 0]
    assert scores.reads_attention(scores.last_row) and not scores.reads_attention(lambda hidden, visual: hidden[..., 0])


@pytest.mark.parametrize("reads", ["weights", ["last_row", "text_rows"], ["ahead", "last_row"], ["hidden", "all"]], ids=str)
def test_what_a_rule_cannot_read(reads):
    with pytest.raises(ValueError, match="expected names out of hidden, text, last_row, text_rows"):
        parvts_fx.register_rule("curious", reads=reads)
    assert "curious" not in scores.known_rules()


@pytest.mark.parametrize("name", PLAIN)
def test_rules_look_at_the_samples_visual_tokens_alone(name):
    """Other samples and text rows, padding included, do not matter; nor does a shift of the visual tokens.

    Of rules that read the question, the text behind the first visual token matters, in whatever order.
    """
    hidden, visual = drawn()
    known = places_of(visual)

    def rule(hidden, visual, places=known):
        return scores.rule_named(name)(hidden, visual, *([places] if scores.reads_places(name) else []))

    asked = ~visual[1] & (visual[1].cumsum(0) > 0) if scores.reads_text(name) else torch.zeros_like(visual[1])
    alone = rule(torch.cat([hidden[1:, visual[1]], hidden[1:, asked]], 1),
                 torch.cat([visual[1, visual[1]], visual[1, asked]])[None],
                 torch.cat([known[1, visual[1]], known[1, asked]])[None])[:, :8]
    other = hidden.clone()
    other[0] = 100.0
    other[1, ~visual[1] & ~asked] = -50.0
    torch.testing.assert_close(rule(other, visual)[1, visual[1]], alone[0], rtol=1e-4, atol=1e-5)
    if asked.any():
        other[1, asked] *= -1
        assert not torch.allclose(rule(other, visual)[1, visual[1]], alone[0])


def test_diverse_is_relevance_times_distance_to_the_nearest_better_one():
    hidden, visual = drawn(batch=1, seed=3)
    tokens = hidden[0, visual[0]]
    centred = tokens - tokens.mean(0)
    relevance = centred.norm(dim=1)
    wanted = []
    for i in range(len(tokens)):
        better = [j for j in range(len(tokens)) if relevance[j] > relevance[i]]
        near = [1 - torch.cosine_similarity(centred[i], centred[j], dim=0) for j in better]
        wanted.append(relevance[i] * min(near, default=torch.tensor(2.0)))
    torch.testing.assert_close(scores.diverse(hidden, visual)[0, visual[0]], torch.stack(wanted))


def test_peaks_begin_with_the_middle_of_the_larger_cluster():
    """Three directions with 5, 3 and 1 tokens near them: the first two ranks are in the two larger clusters."""
    torch.manual_seed(0)
    tokens = torch.eye(3)[[0, 1, 0, 2, 0, 1, 0, 1, 0]] + 0.02 * torch.randn(9, 3)
    order = scores.peaks(tokens[None], torch.ones(1, 9, dtype=torch.bool))[0].argsort(descending=True).tolist()
    assert order[0] in (0, 2, 4, 6, 8) and order[1] in (1, 5, 7) and order[2] == 3


def test_question_prefers_what_the_text_behind_names():
    words = torch.eye(4)
    hidden = torch.stack([words[3], words[0], words[1], words[2], words[1]])[None]  # text, three patches, text
    visual = torch.tensor([[False, True, True, True, False]])
    assert scores.question(hidden, visual)[0, 1:4].argmax() == 1


@pytest.mark.supports("Options", "the attention received inside the vision tower as a score")
@pytest.mark.parametrize("rows", [[[3, "image", 6], [2, "image", 3]], [[1, "image", 2, "image", 3]]])
def test_attended_is_what_the_towers_last_layer_looks_at(model, rows):
    """Against the weights that the tower's eager attention returns, class token's row included and its column left out."""
    prompt = llava.prompt(model, rows)
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tower(prompt.inputs["pixel_values"], output_attentions=True).attentions[-1]
    images = [row.count("image") for row in rows]
    received = iter(weights.mean((1, 2))[:, 1:].split(images))  # the reference scores sample after sample

    def known(hidden, visual):
        return torch.zeros(visual.shape).masked_scatter(visual, next(received))

    wanted = expected(model, prompt, score=known, migration_depth=1, keep_ratio=0.3)
    parvts_fx.compile(model, lowering="eager", strict=True, score=scores.ATTENDED, migration_depth=1, keep_ratio=0.3)
    with torch.no_grad():
        assert_equal_prefill(model(**prompt.inputs), wanted)
    uncompile(model)


def test_attended_needs_a_tower_in_the_graph(model):
    """Where patches are pooled in front of the decoder there is no row for every visual token."""
    pooled = BUILDERS["internvl"]()
    parvts_fx.compile(pooled.model, lowering="eager", score="attended", migration_depth=1)
    with torch.no_grad(), pytest.raises(ValueError, match='score="attended"'):
        pooled.model(**pooled.inputs)


@pytest.mark.parametrize("runs", [(6,), (6, 8), (2, 3, 5)])
def test_placed_is_balanced_where_no_picture_is_a_square(runs):
    """Their grids are not known: nothing is added to distances, and no score is lost on the way."""
    visual = torch.cat([torch.tensor([False] + [True] * run) for run in runs])[None]
    hidden = torch.randn(1, visual.shape[1], 12, generator=torch.Generator().manual_seed(3))
    found = scores.placed(hidden, visual, places_of(visual))[visual]
    torch.testing.assert_close(found, scores.balanced(hidden, visual)[visual])
    assert found.isfinite().all() and len(set(found.tolist())) > 1


def test_norm():
    hidden, visual = drawn()
    torch.testing.assert_close(scores.norm(hidden, visual), hidden.pow(2).sum(-1).sqrt())


@pytest.mark.parametrize("name", ["uniform", "random"])
def test_fixed_orders_have_no_ties(name):
    hidden, visual = drawn(length=40, visual=30)
    held = scores.rule_named(name)(hidden, visual)[0, visual[0]]
    assert len(set(held.tolist())) == 30


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("subjects", [1, 3, 8])
def test_partition_against_a_loop(seed, subjects):
    hidden, visual = drawn(batch=3, seed=seed)
    held = (hidden.sum(-1) * 2).round()  # ties
    held[0, visual[0].nonzero()[1, 0]] = float("nan")
    held[1, visual[1].nonzero()[2, 0]] = float("inf")
    made = partition(held, visual, subjects, 8)
    rows_a, rows_b, rows_t = made["subject"], made["non_subject"], made["text"]
    slots, is_text, subject_slots = made["slots"], made["is_text"], made["subject_slots"]
    for sample in range(3):
        positions = visual[sample].nonzero()[:, 0].tolist()
        text = [p for p in range(14) if p not in positions]
        chosen = subjects_of(held[sample].tolist(), positions, subjects)
        assert rows_a[sample].tolist() == sorted(text + chosen)
        assert rows_b[sample].tolist() == [p for p in range(14) if p not in chosen]
        assert rows_t[sample].tolist() == text
        stacked = torch.cat([rows_a[sample], rows_b[sample], rows_t[sample]])
        assert stacked[slots[sample]].tolist() == list(range(14))
        assert rows_a[sample][is_text[sample]].tolist() == text
        assert rows_b[sample][made["partners"][sample]][is_text[sample]].tolist() == text
        assert rows_t[sample][made["text_partners"][sample]][is_text[sample]].tolist() == text
        assert rows_a[sample][made["text_in_subject"][sample]].tolist() == text
        assert rows_b[sample][made["text_in_non_subject"][sample]].tolist() == text
        stacked = torch.cat([rows_a[sample], rows_t[sample]])
        assert stacked[subject_slots[sample]].tolist() == rows_a[sample].tolist()
        assert (subject_slots[sample] >= rows_a.shape[1]).tolist() == is_text[sample].tolist()


def test_nan_ranks_last(model):
    """All scores NaN but two: those two are kept, whatever their values."""
    prompt = llava.prompt(model, [[3, "image", 6]])

    def mostly_nan(hidden, visual):
        place = torch.arange(visual.shape[1], device=visual.device)
        return torch.where((place == 7) | (place == 11), -place.float(), torch.nan).expand(visual.shape)

    wanted = expected(model, prompt, score=mostly_nan, keep_tokens=2, migration_depth=1)
    assert {7, 11} <= set(wanted[0].rows.tolist())
    compile_with_parvts(model, score=mostly_nan, keep_tokens=2, migration_depth=1)
    with torch.no_grad():
        assert_equal_prefill(model(**prompt.inputs), wanted)
    uncompile(model)


@pytest.mark.captures_once
@pytest.mark.supports("Options", "scoring rules of your own")
def test_a_rule_of_ones_own(model):
    try:
        @parvts_fx.register_rule("first")
        def first(hidden, visual):
            return -torch.arange(visual.shape[1], device=visual.device).float().expand(visual.shape)

        check(model, llava.prompt(model, [[3, "image", 6]]), score="first", migration_depth=1)
        with pytest.raises(ValueError, match="first"):
            parvts_fx.register_rule("first")(first)
    finally:
        scores._RULES.pop("first", None)
