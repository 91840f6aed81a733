"""Images of any size, several images, videos: tiles, patches in a row, frames. Causal, one rotary position a token."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tests.models.registry import (
    IMAGE,
    VIDEO,
    builder,
    clip,
    grid_prompt,
    pixels,
    prompt,
    text,
    video_grid_prompt,
    vision,
)


def pixtral() -> dict[str, Any]:
    return vision(model_type="pixtral", num_attention_heads=2, image_size=32, patch_size=4)


@builder("tiles of an image, joined by newline features")
def llava_next():
    config = hf.LlavaNextConfig(
        vision_config=clip(image_size=8), text_config=text(model_type="llama"), image_token_index=IMAGE,
        vision_feature_layer=-1, image_grid_pinpoints=[[8, 8], [8, 16], [16, 16]], image_seq_length=4)
    return hf.LlavaNextForConditionalGeneration(config), prompt(
        4 + 16 + 4, pixel_values=pixels(1, 5, 3, 8, 8), image_sizes=torch.tensor([[16, 16]]))


def _llava_next_video():
    config = hf.LlavaNextVideoConfig(
        vision_config=clip(), text_config=text(model_type="llama"), image_token_index=IMAGE, video_token_index=VIDEO,
        vision_feature_layer=-1, image_grid_pinpoints=[[16, 16]], image_seq_length=16)
    return hf.LlavaNextVideoForConditionalGeneration(config)


@builder("tiles of an image, joined by newline features")
def llava_next_video():
    return _llava_next_video(), prompt(
        16 + 16 + 4, pixel_values=pixels(1, 2, 3, 16, 16), image_sizes=torch.tensor([[16, 16]]))


@builder("a video whose frames are pooled", name="llava_next_video (video)", token=VIDEO)
def llava_next_video_of_frames():
    return _llava_next_video(), prompt(5 * 4, token=VIDEO, pixel_values_videos=pixels(1, 5, 3, 16, 16))


def _llava_onevision():
    config = hf.LlavaOnevisionConfig(
        vision_config=clip("siglip_vision_model", vision_use_head=False), text_config=text(model_type="qwen2"),
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=[[16, 16]])
    return hf.LlavaOnevisionForConditionalGeneration(config)


@builder("tiles of an image, joined by newline features")
def llava_onevision():
    return _llava_onevision(), prompt(
        16 + 16 + 4, pixel_values=pixels(1, 2, 3, 16, 16), image_sizes=torch.tensor([[16, 16]]))


@builder("a video whose frames are pooled, and a newline feature", name="llava_onevision (video)", token=VIDEO)
def llava_onevision_video():
    return _llava_onevision(), prompt(5 * 4 + 1, token=VIDEO, pixel_values_videos=pixels(1, 5, 3, 16, 16))


def _video_llava():
    config = hf.VideoLlavaConfig(
        vision_config=clip(), text_config=text(model_type="llama"), image_token_index=IMAGE, video_token_index=VIDEO,
        vision_feature_layer=-1)
    return hf.VideoLlavaForConditionalGeneration(config)


@builder("towers for images and for videos")
def video_llava():
    return _video_llava(), prompt(16, pixel_values_images=pixels(1, 3, 16, 16))


@builder("a video, every patch of every frame a token", name="video_llava (video)", token=VIDEO)
def video_llava_video():
    return _video_llava(), prompt(2 * (16 + 1), token=VIDEO, pixel_values_videos=pixels(1, 2, 3, 16, 16))


def _video_llama_3():
    config = hf.VideoLlama3Config(text_config=text(model_type="qwen2"), vision_config=vision(patch_size=4),
                                  image_token_id=IMAGE, video_token_id=VIDEO)
    return hf.VideoLlama3ForConditionalGeneration(config)


@builder("a vision tower for images of any size that merges neighbours")
def video_llama_3():
    return _video_llama_3(), grid_prompt(4, frames=1) | {"image_merge_sizes": torch.tensor([2])}


@builder("a video without the features that repeat an earlier frame's", name="video_llama_3 (video)", token=VIDEO)
def video_llama_3_video():
    kept = torch.arange(16) % 5 != 4
    inputs = video_grid_prompt(4, frames=1, visual=int(kept.sum()))
    return _video_llama_3(), inputs | {"video_merge_sizes": torch.tensor([2]), "video_compression_mask": kept}


def _perception_lm():
    config = hf.PerceptionLMConfig(
        vision_config=clip(model_args=dict(embed_dim=24)), text_config=text(model_type="llama"), image_token_id=IMAGE,
        video_token_id=VIDEO, projector_pooling_ratio=2)
    return hf.PerceptionLMForConditionalGeneration(config)


@builder("tiles of an image, pooled")
def perception_lm():
    return _perception_lm(), prompt(5 * 4, pixel_values=pixels(1, 5, 3, 16, 16))


@builder("frames of a video, pooled", name="perception_lm (video)", token=VIDEO)
def perception_lm_video():
    return _perception_lm(), prompt(5 * 4, token=VIDEO, pixel_values_videos=pixels(1, 5, 3, 16, 16))


@builder("a vision tower for images of any size")
def mistral3():
    config = hf.Mistral3Config(
        vision_config=pixtral(), text_config=text(model_type="mistral", sliding_window=None), image_token_index=IMAGE,
        spatial_merge_size=2)
    return hf.Mistral3ForConditionalGeneration(config), prompt(
        16, pixel_values=pixels(1, 3, 32, 32), image_sizes=torch.tensor([[32, 32]]))


@builder("a vision tower for images of any size, queries and keys normalized")
def lighton_ocr():
    config = hf.LightOnOcrConfig(vision_config=pixtral(), text_config=text(model_type="qwen3"), image_token_id=IMAGE,
                                 spatial_merge_size=2)
    return hf.LightOnOcrForConditionalGeneration(config), prompt(
        16, pixel_values=pixels(1, 3, 32, 32), image_sizes=torch.tensor([[32, 32]]))


@builder("llava with a vision tower for images of any size", name="llava (any size)")
def llava_any_size():
    config = hf.LlavaConfig(
        vision_config=pixtral(), text_config=text(model_type="mistral", sliding_window=None), image_token_index=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="full")
    return hf.LlavaForConditionalGeneration(config), prompt(
        24, pixel_values=pixels(1, 3, 16, 24), image_sizes=torch.tensor([[16, 24]]))


@builder("learned queries read each image; a data-dependent check between merge and decoder", scale=7)
def idefics2():
    config = hf.Idefics2Config(
        vision_config=vision(hidden_size=24, num_attention_heads=2, image_size=16, patch_size=4),
        perceiver_config=dict(hidden_size=48, resampler_n_latents=8, resampler_depth=2, resampler_n_heads=4,
                              resampler_head_dim=14, num_key_value_heads=2),
        text_config=text(model_type="mistral", sliding_window=None), image_token_id=IMAGE)
    return hf.Idefics2ForConditionalGeneration(config), prompt(
        2 * 8, pixel_values=pixels(1, 2, 3, 16, 16), pixel_attention_mask=torch.ones(1, 2, 16, 16, dtype=torch.bool))


def _idefics3(config_class: Any) -> Any:
    return config_class(
        vision_config=vision(hidden_size=24, num_attention_heads=2, image_size=32, patch_size=4),
        text_config=text(model_type="llama"), image_token_id=IMAGE, scale_factor=2)


def two_images() -> dict[str, torch.Tensor]:
    return prompt(2 * 16, pixel_values=pixels(1, 2, 3, 32, 32),
                  pixel_attention_mask=torch.ones(1, 2, 32, 32, dtype=torch.bool))


@builder("a data-dependent check between merge and decoder")
def idefics3():
    return hf.Idefics3ForConditionalGeneration(_idefics3(hf.Idefics3Config)), two_images()


@builder("two images, their features shuffled to fewer tokens")
def smolvlm():
    return hf.SmolVLMForConditionalGeneration(_idefics3(hf.SmolVLMConfig)), two_images()
