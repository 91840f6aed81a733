"""The synthetic task: what pictures show is what answers say, and packed questions are what they are alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.accuracy.batches import IDS, IGNORED, pack, question_batch, stream
from bench.accuracy.model import build_model, build_processor, prompt
from bench.accuracy.questions import SHARES, ask, vocabulary
from bench.accuracy.scenes import CELL, COLOURS, CORNERS, FONT, GROUNDS, IMAGE, draw, patch_labels, sample_scene
from bench.accuracy.train import Stage, Training

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

