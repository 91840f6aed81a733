"""A vision-language model in plain PyTorch (:mod:`tests.small_vlm`), pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import parvts_fx
from parvts_fx import scores
from tests import any_decoder, small_vlm
from tests.comparing import TOLERANCE

KEEP = dict(keep_tokens=4, migration_depth=1)
CHOICES = {"attention": dict(KEEP, merge=None), "weights": dict(KEEP, fusion=0.4), "merged": KEEP}


def wanted(model: Any, ids: torch.Tensor, pixels: torch.Tensor, real: torch.Tensor | None = None, **choice: Any) -> list:
    """The reference's prefill."""
    decoder = model.decoder
    return any_decoder.wanted(
        model, decoder.blocks, lambda x: decoder.head(decoder.norm(x)), dict(ids=ids, pixels=pixels, real=real),
        ids == small_vlm.IMAGE_TOKEN, lambda output: (output[0], output[1]["key"], output[1]["value"]),
        score=scores.norm, **choice)


def error(output: Any, expected: list) -> float:
    logits, caches = output
    return any_decoder.error(logits, [(held["key"], held["value"]) for held in caches], expected)


def compiled(model: Any, by_string: bool, **choice: Any) -> Any:
    options = dict(choice, score="norm", lowering="eager", strict=True)
    return torch.compile(model, backend="parvts", options=options) if by_string else parvts_fx.compile(model, **options)


@pytest.mark.slow
@pytest.mark.supports("Models", "a vision-language model in plain PyTorch: pixel shuffle, grouped keys, a list of dicts as cache")
@pytest.mark.parametrize("by_string", [True, False], ids=["string", "compile"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
@torch.no_grad()
def test_prefill(choice: dict[str, Any], by_string: bool) -> None:
    model, runs = small_vlm.build(), compiled(small_vlm.build(), by_string, **choice)
    for before in ((3,), (3, 6)):
        given = small_vlm.prompt(before)
        output = runs(*given)
        assert output[0].shape[1] == given[0].shape[1] - small_vlm.TOKENS + KEEP["keep_tokens"]
        assert error(output, wanted(model, *given, **choice)) <= TOLERANCE


@torch.no_grad()
def test_padding() -> None:
    model, (ids, pixels) = small_vlm.build(), small_vlm.prompt((5, 6))
    real = torch.ones_like(ids)
    real[0, :3] = 0
    expected = wanted(model, ids, pixels, real, **CHOICES["attention"])
    assert error(compiled(model, True, **CHOICES["attention"])(ids, pixels, real), expected) <= TOLERANCE


def continued(model: Any, length: int, expected: list, steps: int) -> torch.Tensor:
    """[batch, steps] greedy tokens of the eager model on the reference's caches."""
    answers = []
    for one in expected:
        caches = [dict(key=key, value=value) for key, value in zip(one.keys, one.values)]
        answer = [one.logits[-1:].argmax(-1)[None]]
        for step in range(steps - 1):
            logits, caches = model(answer[-1], None, None, caches, length + step)
            answer.append(logits[:, -1:].argmax(-1))
        answers.append(torch.cat(answer, 1))
    return torch.cat(answers)


@pytest.mark.slow
@pytest.mark.supports("Models", "one whose generate merges by itself and calls a decoder that can generate, in plain PyTorch")
@pytest.mark.filterwarnings("ignore:parvts_fx. the model goes on from a cache")  # numbers in place of position_ids
@pytest.mark.parametrize("way", ["answer", "generate"])
def test_decode_steps(way: str) -> None:
    """Positions follow the full prompt, as the model counts them."""
    model, given = small_vlm.build(), small_vlm.prompt((3, 6))
    with torch.no_grad():
        tokens = continued(model, given[0].shape[1], wanted(model, *given, **CHOICES["attention"]), 6)
    whole = getattr(model, way)(*given, 6)
    compiled(model, False, **CHOICES["attention"])
    assert torch.equal(getattr(model, way)(*given, 6), tokens) and not torch.equal(tokens, whole)
    assert parvts_fx.last_call(model).pruned


def test_a_merge_that_no_compiled_part_takes() -> None:
    """The decoder cannot generate, so that nothing says that it is to be compiled by itself."""
    model, given = small_vlm.build(small_vlm.Decoder), small_vlm.prompt()
    whole = model.generate(*given, 3)
    parvts_fx.compile(model, lowering="eager")
    with pytest.warns(parvts_fx.ParvtsWarning, match="no compiled part of the model took the merged embeddings"):
        assert torch.equal(model.generate(*given, 3), whole)
    parvts_fx.compile(model, lowering="eager", strict=True)
    with pytest.raises(parvts_fx.NotRewritten, match="no compiled part"):
        model.generate(*given, 3)
