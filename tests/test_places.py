"""Where in its picture a visual token stands: told by multimodal rotary positions, for pictures of any shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import parvts_fx
from parvts_fx import scores
from parvts_fx.places import places_of
from tests.models.builders import BUILDERS
from tests.test_picture_sizes import patches_of


def positions_of(*parts: int | tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Visual tokens [1, seq], and positions [3, 1, seq] as the Qwen family counts them, of texts so long and of pictures with so
    many frames, rows and columns."""
    held, visual, begin = [], [], 0
    for part in parts:
        if isinstance(part, int):
            held.append((begin + torch.arange(part)).expand(3, -1))
        else:
            frames, rows, columns = part
            held.append(begin + torch.cartesian_prod(*map(torch.arange, (frames, rows, columns))).T)
        visual += [not isinstance(part, int)] * held[-1].shape[1]
        begin = int(held[-1].max()) + 1
    return torch.tensor([visual]), torch.cat(held, 1)[:, None]


def grid(rows: int, columns: int) -> list[list[int]]:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).tolist()


def test_grids_of_any_shape() -> None:
    visual, positions = positions_of(3, (1, 2, 5), 2, (1, 4, 1), (1, 3, 2), 4)
    places = places_of(visual, positions)[visual]
    assert places[:, 1:].tolist() == grid(2, 5) + grid(4, 1) + grid(3, 2)
    assert places[:, 0].tolist() == [1] * 10 + [2] * 10, "a picture is a run of visual tokens"
    assert places_of(visual)[visual][:, 1:].unique().tolist() == [-1], "10 and 10 are no squares"
    with_text = torch.cat([torch.arange(visual.shape[1])[None, None], positions])
    assert places_of(visual, with_text)[visual].equal(places), "what some models put in front"


def test_frames_of_a_video() -> None:
    visual, positions = positions_of(1, (3, 2, 4), 2)
    assert places_of(visual, positions)[visual][:, 1:].tolist() == 3 * grid(2, 4)


@pytest.mark.parametrize("change", ["plain", "another order", "a row too few", "a step too wide"])
def test_what_is_no_grid(change: str) -> None:
    """Then squares are taken for squares, and of anything else nothing is known."""
    visual, positions = positions_of(2, (1, 3, 3), 1, (1, 2, 3), 2)
    changed = positions.clone()
    if change == "plain":
        changed[:] = torch.arange(visual.shape[1])
    elif change == "another order":
        changed[1:] = positions[1:].flip(0)
    elif change == "a row too few":
        visual = visual.clone()
        visual[0, 10], visual[0, -3] = False, False
    else:
        changed[2] *= 2
    places = places_of(visual, changed)[visual][:, 1:]
    first, second = places.split([8, 5] if change == "a row too few" else [9, 6])
    assert second.unique().tolist() == [-1]
    assert first.tolist() == grid(3, 3) if change != "a row too few" else first.unique().tolist() == [-1]


def test_samples_have_their_own() -> None:
    rows = [positions_of(2, (1, 2, 3), 3), positions_of(4, (1, 3, 2), 1)]
    visual, positions = torch.cat([held for held, _ in rows]), torch.cat([held for _, held in rows], 1)
    for row, (own, alone) in enumerate(rows):
        assert places_of(visual, positions)[row].equal(places_of(own, alone)[0])


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> str:
    """A rule that keeps what stands nearest to the third row's second column."""
    monkeypatch.setattr(scores, "_RULES", dict(scores._RULES))
    monkeypatch.setattr(scores, "_READS", dict(scores._READS))

    @parvts_fx.register_rule("near", reads="places")
    def rule(hidden: torch.Tensor, visual: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return -((places[..., 1] - 2).abs() * 10 + (places[..., 2] - 1).abs()).float()

    return "near"


@pytest.mark.slow
@pytest.mark.supports("Options", "rules that read the places of tokens, also in pictures that are no squares")
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_models_tell_the_places(name: str, near: str) -> None:
    """By generate and by a call, with static sizes and dynamic ones, in batches that run sample by sample."""
    built = BUILDERS[name]()
    model = built.model
    parvts_fx.compile(model, lowering="eager", strict=True, keep_tokens=3, migration_depth=1, score=near)
    sizes = [(8, 12), (12, 8), (16, 12)]
    prompts = [patches_of(*size, seed) for seed, size in enumerate(sizes)]
    wanted = [[2 * (width // 2) + column for column in range(3)] for _, width in sizes]
    for given, places in zip(prompts, wanted):
        model.generate(**given, max_new_tokens=1)
        assert kept_of(model) == [places]
    with torch.no_grad():
        model(**prompts[0])
    assert kept_of(model) == wanted[:1]
    longest = max(given["input_ids"].shape[1] for given in prompts)
    batch: dict[str, Any] = {
        key: torch.cat([torch.nn.functional.pad(given[key], (longest - given[key].shape[1], 0)) for given in prompts])
        for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
    batch |= {key: torch.cat([given[key] for given in prompts]) for key in ("pixel_values", "image_grid_thw")}
    model.generate(**batch, max_new_tokens=1)
    assert kept_of(model) == wanted


def test_a_later_stage_knows_the_places(near: str) -> None:
    """Also where the stage in front, which merges and so needs to know the pictures apart, reads no places."""
    built = BUILDERS["qwen2_5_vl"]()
    stages = (parvts_fx.Stage(at=0, keep=23, rule="uniform", merge="clusters"), parvts_fx.Stage(at=1, keep=1, rule=near))
    parvts_fx.compile(built.model, lowering="eager", strict=True, stages=stages)
    built.model.generate(**patches_of(8, 12, 0), max_new_tokens=1)
    (kept,), = kept_of(built.model)
    assert kept in (6 * 2 + 1, 6 * 2 + 0, 6 * 2 + 2), "the third row's second column, or beside it where that is the one dropped"


def kept_of(model: Any) -> list[list[int]]:
    """The numbers of the kept tokens among a row's visual ones."""
    record = parvts_fx.last_call(model)
    assert record is not None and record.visual is not None and record.kept is not None
    return [kept[visual].nonzero()[:, 0].tolist() for visual, kept in zip(record.visual, record.kept)]
