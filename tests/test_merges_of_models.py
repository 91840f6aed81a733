"""A picture and a video, or a picture and sound, in one prompt of transformers' models: the first forward as generate."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import parvts_fx
from tests.comparing import TOLERANCE
from tests.models.builders import BUILDERS
from tests.models.generating import Comparison, cache_lengths, run_generate
from tests.models.registry import AUDIO, IMAGE, VIDEO, pixels


def picture_and_video(name: str):
    """A builder's model, and a prompt with a picture and a video."""
    built, other = BUILDERS[name](), BUILDERS[f"{name} (video)"]()
    ids = torch.cat([built.inputs["input_ids"], other.inputs["input_ids"]], 1)
    inputs = {**other.inputs, **built.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return dataclasses.replace(built, token=(IMAGE, VIDEO), inputs=inputs)


def picture_and_sound(name: str, frames: int = 40, tokens: int = 10):
    built = BUILDERS[name]()
    ids = built.inputs["input_ids"]
    ids = torch.cat([ids[:, :3], torch.full((1, 1), 94), torch.full((1, tokens), AUDIO), ids[:, 3:]], 1)
    sound = dict(input_features=pixels(1, 20, frames), feature_attention_mask=torch.ones(1, frames, dtype=torch.int64))
    inputs = {**built.inputs, **sound, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return dataclasses.replace(built, inputs=inputs)


@pytest.mark.slow
@pytest.mark.supports("Prompts", "a picture and a video in one prompt: Video-LLaVA, LLaVA-OneVision, forward as generate")
@pytest.mark.parametrize("name", ["video_llava", "llava_onevision"])
def test_a_picture_and_a_video(name):
    """A fresh model's first forward breaks between the merges; generate's does not."""
    built = picture_and_video(name)
    with Comparison(built) as compared:
        assert compared.forward(built.inputs) <= TOLERANCE
        assert compared.generate(built.inputs) <= TOLERANCE
        assert set(cache_lengths(compared.run_compiled(built.inputs, 1).past_key_values)) == {compared.kept}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["video_llava", "llava_onevision"])
def test_a_picture_and_a_video_with_the_string_backend(name):
    built = picture_and_video(name)
    parts = [int((built.inputs["input_ids"] == token).sum()) for token in (IMAGE, VIDEO)]
    kept = built.inputs["input_ids"].shape[1] - sum(parts) + int(sum(parts) / 4 + 0.5)
    built.model.compile(backend="parvts", options=dict(lowering="eager", migration_depth=1, keep_ratio=0.25, strict=True))
    with torch.no_grad():
        assert built.model(**built.inputs).logits.shape[1] == kept
    assert set(cache_lengths(run_generate(built.model, built.inputs, 1).past_key_values)) == {kept}


@pytest.mark.slow
@pytest.mark.supports("Prompts", "a picture and sound in one prompt: Qwen2.5-Omni, forward and generate")
def test_a_picture_and_sound():
    built = picture_and_sound("qwen2_5_omni_thinker")
    with Comparison(built) as compared:
        assert compared.forward(built.inputs) <= TOLERANCE
        assert compared.generate(built.inputs) <= TOLERANCE


@pytest.mark.slow
def test_explain_of_a_picture_and_sound():
    built = picture_and_sound("qwen2_5_omni_thinker")
    report = parvts_fx.explain(built.model, **built.inputs, options=dict(migration_depth=1))
    assert [(one.modality, one.tokens, one.prunable) for one in report.merges] == [
        ("audio", 10, False), ("image", 16, True)]
