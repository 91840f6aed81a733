"""Rotary positions along several axes: position ids [axes, batch, seq], computed from the image's grid."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.models.registry import (
    AUDIO,
    END,
    IMAGE,
    START,
    VIDEO,
    builder,
    grid_prompt,
    merging,
    pixels,
    text,
    typed,
    video_grid_prompt,
    vision,
)

TOKENS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
AXES = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2])
"""Time, height and width, in a sixth of a head each."""


def windowed_tower(**more: Any) -> dict[str, Any]:
    """A vision tower whose first layer attends within windows."""
    return merging(window_size=16, fullatt_block_indexes=[1]) | more


def _qwen2_vl():
    config = hf.Qwen2VLConfig(
        text_config=text(rope_parameters=AXES), **TOKENS,
        vision_config=dict(depth=2, embed_dim=32, hidden_size=48, num_heads=4, mlp_ratio=2, patch_size=4,
                           spatial_merge_size=2, temporal_patch_size=2, in_channels=3))
    return hf.Qwen2VLForConditionalGeneration(config)


@builder("multimodal rotary positions [3, batch, seq]")
def qwen2_vl():
    return _qwen2_vl(), typed(grid_prompt(4))


@builder("multimodal rotary positions, a video", name="qwen2_vl (video)", token=VIDEO)
def qwen2_vl_video():
    return _qwen2_vl(), typed(video_grid_prompt(4))


@builder("multimodal rotary positions, a vision tower that attends within windows")
def qwen2_5_vl():
    config = hf.Qwen2_5_VLConfig(text_config=text(rope_parameters=AXES), vision_config=windowed_tower(), **TOKENS)
    return hf.Qwen2_5_VLForConditionalGeneration(config), typed(grid_prompt(4))


@builder("multimodal rotary positions, images and sound")
def qwen2_5_omni_thinker():
    config = hf.Qwen2_5OmniThinkerConfig(
        text_config=text(rope_parameters=AXES), vision_config=windowed_tower(),
        audio_config=dict(num_mel_bins=20, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=40, d_model=32,
                          max_source_positions=50, output_dim=48),
        image_token_index=IMAGE, video_token_index=VIDEO, audio_token_index=AUDIO, vision_start_token_id=START,
        vision_end_token_id=END, audio_start_token_id=94, audio_end_token_id=93)
    return hf.Qwen2_5OmniThinkerForConditionalGeneration(config), grid_prompt(4)


def glm(config_class: Any, **text_settings: Any) -> Any:
    return config_class(
        text_config=text(rope_parameters=AXES | {"partial_rotary_factor": 1.0}, **text_settings),
        vision_config=merging(image_size=32),
        image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END,
        video_start_token_id=94, video_end_token_id=93)


@builder("multimodal rotary positions, rotated in pairs; norms before and behind attention and MLP")
def glm4v():
    return hf.Glm4vForConditionalGeneration(glm(hf.Glm4vConfig)), typed(grid_prompt(4))


@builder("multimodal rotary positions, rotated in pairs; norms before and behind attention and MLP")
def glm46v():
    return hf.Glm46VForConditionalGeneration(glm(hf.Glm46VConfig)), typed(grid_prompt(4))


@builder("glm46v under another configuration")
def glmga():
    return hf.Glm46VForConditionalGeneration(glm(hf.GlmgaConfig)), typed(grid_prompt(4))


@builder("multimodal rotary positions, rotated in pairs; a vision tower with biases")
def glm_ocr():
    return hf.GlmOcrForConditionalGeneration(glm(hf.GlmOcrConfig)), typed(grid_prompt(4))


@builder("multimodal rotary positions, learned positions in the vision tower")
def paddleocr_vl():
    config = hf.PaddleOCRVLConfig(
        text_config=text(rope_parameters=AXES), **TOKENS,
        vision_config=vision(image_size=32, patch_size=4, spatial_merge_size=2))
    return hf.PaddleOCRVLForConditionalGeneration(config), typed(grid_prompt(4)) | {"pixel_values": pixels(64, 3, 4, 4)}


@builder("multimodal rotary positions, MLPs without a gate")
def cosmos3_edge():
    config = hf.Cosmos3EdgeConfig(
        text_config=text(rope_parameters=AXES), **TOKENS, projector_hidden_size=52,
        vision_config=vision(num_patches=64, patch_size=4, spatial_merge_size=2))
    return hf.Cosmos3EdgeForConditionalGeneration(config), typed(grid_prompt(4, frames=1))


@builder("multimodal rotary positions [4, batch, seq]; a feature ends each row of the image, two more enclose it")
def hunyuan_vl():
    config = hf.HunYuanVLConfig(
        text_config=text(rope_parameters=AXES | {"mrope_section": [1, 2, 2, 1]}), image_token_id=IMAGE,
        im_start_id=START, im_end_id=END, im_newline_id=94,
        vision_config=vision(out_hidden_size=48, patch_size=4, max_image_size=32, min_image_size=16))
    return hf.HunYuanVLForConditionalGeneration(config), typed(grid_prompt(4, frames=1, visual=4 * 5 + 2))
