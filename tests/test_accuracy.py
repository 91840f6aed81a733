"""The synthetic task: what pictures show is what answers say, and packed questions are what they are alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import parvts_fx
from bench.accuracy import evaluate, side_by_side
from bench.accuracy.batches import IDS, IGNORED, pack, question_batch, stream
from bench.accuracy.examples import VISUAL, grade, sample_examples
from bench.accuracy.model import build_model, build_processor, prompt
from bench.accuracy.questions import END, IMAGE_TOKEN, PAD, SHARES, ask, vocabulary
from bench.accuracy.results import ahead, summarise, unpack
from bench.accuracy.scenes import CELL, COLOURS, CORNERS, FONT, GROUNDS, IMAGE, draw, patch_labels, sample_scene
from bench.accuracy.train import Stage, Training
from bench.accuracy.ways import Way, generate, load, prepare
from bench.methods import named
from parvts_fx.schedules import SCHEDULES

KINDS = ["parvts", "fastv", "pyramiddrop", "pooled", "chosen"]
NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}


def scenes(count: int, seed: int = 3) -> list:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(count)]


def colour_at(picture: np.ndarray, row: int, column: int) -> str:
    """The nearest named colour of a pixel."""
    known = {**COLOURS, **GROUNDS}
    return min(known, key=lambda name: np.abs(picture[row, column].astype(int) - known[name]).sum())


def test_pictures_follow_the_seed():
    one, other, third = (scenes(3, seed) for seed in (3, 3, 4))
    assert one == other != third
    assert all((draw(a) == draw(b)).all() for a, b in zip(one, other))


def test_corner_colours_are_in_the_pixels():
    for scene in scenes(40):
        picture = draw(scene)
        assert picture.shape == (IMAGE, IMAGE, 3)
        for (place, (row, column)), thing in zip(CORNERS.items(), scene.small):
            assert (thing.top // CELL, thing.left // CELL) == (row, column), place
            middle = thing.size // 2  # every shape covers its middle
            assert colour_at(picture, thing.top + middle, thing.left + middle) == thing.colour


def test_answers_against_the_scene():
    """Counts, relations, words and lists, worked out from the scene in another way."""
    rng = np.random.default_rng(0)
    seen = set()
    for scene in scenes(60):
        for kind in SHARES:
            question = ask(scene, kind, rng)
            words, answer = question.text.split(), question.answer
            if kind == "count":
                assert len([thing for thing in scene.small if thing.colour == words[3]]) == NUMBERS[answer]
            elif kind == "relation":
                by_colour = {thing.colour: thing for thing in scene.small}
                axis = "left" if "left" in words else "top"
                pair = [by_colour[words[-3]], by_colour[words[-1]]]
                assert min(pair, key=lambda thing: getattr(thing, axis)).colour == answer
            elif kind == "word" and words[1:] == ["the", "word"]:
                assert "".join(answer.split()) == scene.word
            elif kind == "list":
                named = [thing.colour if "colours" in words else thing.shape for thing in scene.small[:4]]
                assert answer.split() == named
            else:
                continue
            seen.add(kind)
    assert seen == {"count", "relation", "word", "list"}


def test_every_word_is_in_the_vocabulary():
    rng = np.random.default_rng(1)
    for scene in scenes(60, 5):
        for kind in SHARES:
            question = ask(scene, kind, rng)
            assert set(f"{question.text} {question.answer}".split()) <= set(vocabulary())


def test_patch_labels_name_the_letters():
    for scene in scenes(20):
        labels = patch_labels(scene).reshape(12, 12, -1)
        row, column = scene.word_at
        assert "".join(list(FONT)[label - 1] for label in labels[row, column:column + 3, 3]) == scene.word


@torch.no_grad()
def test_packed_questions_are_what_they_are_alone():
    torch.manual_seed(0)
    model, processor = build_model().eval(), build_processor()
    batch = question_batch(stream(0, "train", 0), 2, 5)
    packed = model(input_ids=batch.ids, pixel_values=batch.pixels, attention_mask=batch.mask,
                   position_ids=batch.positions, use_cache=False).logits
    rng = stream(0, "train", 0)  # the same two scenes again
    pictures = [draw(sample_scene(rng)) for _ in range(2)]
    for row, asked in enumerate(batch.questions):
        for number, question in enumerate(asked, 1):
            inputs = processor(images=pictures[row], text=prompt(question.text), return_tensors="pt")
            torch.testing.assert_close(inputs["pixel_values"][0], batch.pixels[row], atol=1e-5, rtol=0)
            alone = model(**inputs).logits[0, -1]
            place = (batch.segments[row] == number) & (batch.targets[row] != IGNORED)
            first = place.nonzero()[0, 0]
            assert batch.targets[row, first] == IDS[question.answer.split()[0]]
            torch.testing.assert_close(packed[row, first], alone, atol=1e-4, rtol=1e-4)


def test_padding_changes_nothing():
    few, rng = scenes(2), np.random.default_rng(0)
    questions = [[ask(few[0], "word", rng)], [ask(few[1], kind, rng) for kind in SHARES]]
    batch = pack(few, questions)
    assert (batch.segments[0] == -1).sum() > (batch.segments[1] == -1).sum()
    assert (batch.targets[batch.segments == -1] == IGNORED).all()


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_training_goes_on_as_if_it_had_not_been(tmp_path, stop):
    stages = (Stage("vision", 2, 2, 1e-3), Stage("questions", 2, 2, 1e-3))

    def run(training: Training, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(training.advance())
            if training.step == training.stages[training.stage].steps:
                training.finish_stage()
        return losses

    path = tmp_path / "checkpoint.pt"
    whole = run(Training(stages, 0, path, 3), 4)
    stopped = Training(stages, 0, path, 3)
    first = run(stopped, stop)
    stopped.save()
    again = Training(stages, 0, path, 3)
    again.load()
    assert first + run(again, 4 - stop) == pytest.approx(whole, rel=1e-6)


# -- the evaluation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    return load()


@pytest.fixture(scope="module")
def examples():
    return sample_examples(10, 5)


@pytest.fixture(scope="module")
def whole(trained, examples) -> np.ndarray:
    return grade(lambda batch: generate(trained, batch), examples, 40)


def test_the_shipped_model_is_good_at_its_task(whole):
    """80 questions; the card has the figure over 2,000."""
    assert whole.shape == (80,) and whole.mean() >= 0.93


def test_grading_knows_right_from_wrong(examples):
    """Right is every word and the end; what follows the end does not matter."""
    given = iter(examples.answers.split(40))
    assert grade(lambda batch: next(given), examples, 40).all()
    longer = examples.answers.clone()
    longer[(longer == END).int().cumsum(1) - (longer == END).int() > 0] = 7
    given = iter(longer.split(40))
    assert grade(lambda batch: next(given), examples, 40).all()
    wrong = examples.answers.clone()
    wrong[:, 0] += 1
    given = iter(wrong.split(40))
    assert not grade(lambda batch: next(given), examples, 40).any()
    cut = examples.answers.masked_fill(examples.answers == END, PAD)
    given = iter(cut.split(40))
    assert not grade(lambda batch: next(given), examples, 40).any()


def way(kind: str, kept: int) -> Way:
    return Way(kind, kept, stages=named(kind)(kept)) if kind in SCHEDULES else Way(kind, kept, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_ways_that_keep_every_token_answer_like_the_model(trained, examples, whole, kind):
    prepared = prepare(trained, way(kind, VISUAL))
    given = examples.with_visual(prepared.visual) if prepared.visual else examples
    assert (grade(prepared.answer, given, 40) == whole).all()


@pytest.mark.parametrize("kind", KINDS)
def test_ways_that_drop_tokens_do_and_cost_less(trained, examples, whole, kind):
    def run(kept: int) -> tuple[np.ndarray, int]:
        prepared = prepare(trained, way(kind, kept))
        given = examples.with_visual(prepared.visual) if prepared.visual else examples
        return grade(prepared.answer, given, 40), prepared.flops()

    (few, cheap), (_, dear) = run(4), run(VISUAL)
    assert few.mean() < whole.mean() and cheap < 0.6 * dear


@pytest.mark.parametrize("kept, least", [(48, 0.975), (32, 0.96), (16, 0.88)])
def test_the_defaults_keep_most_answers(trained, kept, least):
    """Fresh pictures, nothing but the compile call: within what chance allows of the figures in docs/merging.md (99.8, 99.4
    and 93.7 %), and above what dropping alone keeps (95, 91 and 79 %)."""
    fresh = sample_examples(25, 77)
    model = parvts_fx.compile(copy.deepcopy(trained), keep_tokens=kept, lowering="eager", strict=True)
    assert grade(lambda batch: generate(model, batch), fresh, 40).mean() >= least


def test_prompts_with_fewer_image_tokens(examples):
    fewer = examples.with_visual(9)
    assert ((fewer.ids == IMAGE_TOKEN).sum(1) == 9).all()
    for short, long in zip(fewer.ids, examples.ids):
        assert short[short != IMAGE_TOKEN].tolist() == long[long != IMAGE_TOKEN].tolist()


def test_statistics():
    """Shares of the full model's, and intervals that hold a known share."""
    rng = np.random.default_rng(0)
    pictures = 200

    def row(share: float) -> dict:
        right = rng.random((pictures, len(SHARES))) < share
        return {"right": np.packbits(right.ravel()).tobytes().hex(), "decoder_flops": share, "name": "", "kept": 1}

    full, good, bad = row(1.0), row(0.9), row(0.6)
    assert unpack(full, pictures).all()
    summary = summarise([full, good, bad], full, pictures)
    assert summary[0]["share"] == summary[0]["low"] == summary[0]["high"] == 100
    assert summary[1]["low"] < 90 < summary[1]["high"] and summary[1]["high"] - summary[1]["low"] < 5
    assert summary[2]["share"] == pytest.approx(100 * unpack(bad, pictures).mean())
    assert summary[2]["by_kind"]["word"] == pytest.approx(100 * unpack(bad, pictures)[:, list(SHARES).index("word")].mean())
    difference, low, high = ahead(good, bad, full, pictures)
    assert low < 30 < high and difference == pytest.approx(summary[1]["share"] - summary[2]["share"])


def test_evaluation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Ways that are kept are not run again; the tables and the plot come from all of them."""
    monkeypatch.setattr(evaluate, "RESULTS", tmp_path)
    asked = []

    def answer_all(way, weights, pictures, seed):
        asked.append(way.key)
        right = np.random.default_rng(len(asked)).random(pictures * len(SHARES)) < 0.8
        return {"name": way.name, "kept": way.kept, "options": way.settings, "key": way.key, "decoder_flops": 1.0,
                "right": np.packbits(right).tobytes().hex()}

    class Here:
        def __init__(self, *args, **kwargs): ...
        def __enter__(self): return self
        def __exit__(self, *args): ...

        def submit(self, function, *args):
            done = evaluate.concurrent.futures.Future()
            done.set_result(answer_all(*args))
            return done

    monkeypatch.setattr(evaluate.concurrent.futures, "ProcessPoolExecutor", Here)
    assert evaluate.main(["methods", "--kept", "16", "--pictures", "20"]) == 0
    first = list(asked)
    assert first and evaluate.main(["methods", "--kept", "16", "--pictures", "20"]) == 0 and asked == first
    assert evaluate.main(["methods", "--kept", "16", "--pictures", "25"]) == 0 and asked == 2 * first
    assert (tmp_path / "accuracy_methods.png").stat().st_size > 10_000


def test_models_side_by_side(capsys):
    """Every method once, with each model that has been asked; and by how much one is ahead of another, from paired answers."""
    assert side_by_side.main(["merging", "merging_seed1", "--kept", "16", "--markdown"]) == 0
    shares, ahead = (table.splitlines() for table in capsys.readouterr().out.strip().split("\n\n\n"))
    (whole,), (dropped,) = ([line for line in shares if line.startswith(f"| {name} |")] for name in ("parvts, merged", "parvts"))
    (gain,) = [line for line in ahead if line.startswith("| parvts, merged, against parvts | 16 |")]
    first, second, more = (float(line.split("|")[place].split()[0]) for line, place in ((whole, 2), (dropped, 2), (gain, 3)))
    assert abs(first - second - more) < 0.11 and len(shares) == len({line.split("|")[1] for line in shares})
