"""Layers that carry a state along the sequence in place of keys: linear attention, convolutions, state-space models."""

from __future__ import annotations

from typing import Any

import torch
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
    prompt,
    text,
    typed,
    vision,
)
from tests.models.rotary import AXES, TOKENS

LINEAR = dict(linear_key_head_dim=10, linear_value_head_dim=14, linear_num_key_heads=2, linear_num_value_heads=4,
              layer_types=["linear_attention", "full_attention", "linear_attention"],
              rope_parameters=AXES | dict(mrope_section=[1, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5))
"""Linear attention around gated attention that rotates half of each head."""

EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=28)


def plain_tower() -> dict[str, Any]:
    return merging(num_position_embeddings=64)


@builder("linear attention, multimodal rotary positions")
def qwen3_5():
    config = hf.Qwen3_5Config(text_config=text(**LINEAR), vision_config=plain_tower(), **TOKENS)
    return hf.Qwen3_5ForConditionalGeneration(config), typed(grid_prompt(4))


@builder("linear attention, experts, multimodal rotary positions")
def qwen3_5_moe():
    config = hf.Qwen3_5MoeConfig(text_config=text(**LINEAR, **EXPERTS), vision_config=plain_tower(), **TOKENS)
    return hf.Qwen3_5MoeForConditionalGeneration(config), typed(grid_prompt(4))


@builder("short convolutions between attention layers")
def lfm2_vl():
    config = hf.Lfm2VlConfig(
        vision_config=vision(patch_size=4, num_patches=64, vision_use_head=False),
        text_config=text(model_type="lfm2", layer_types=["conv", "full_attention", "conv"], conv_L_cache=3),
        image_token_id=IMAGE, projector_hidden_size=52, downsample_factor=2)
    return hf.Lfm2VlForConditionalGeneration(config), prompt(
        16, pixel_values=pixels(1, 64, 3 * 4 * 4), spatial_shapes=torch.tensor([[8, 8]]),
        pixel_attention_mask=torch.ones(1, 64, dtype=torch.long))


@builder("short convolutions and sliding-window layers, in the vision tower too")
def lfm3_vl():
    config = hf.Lfm3VlConfig(
        text_config=text(layer_types=["conv", "full_attention", "sliding_attention"], conv_L_cache=3,
                         sliding_window=22),
        vision_config=dict(hidden_size=32, intermediate_size=40, in_channels=3, patch_size=4, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
        projector_hidden_size=52, **TOKENS)
    return hf.Lfm3VlForConditionalGeneration(config), grid_prompt(4)


def minicpm(config_class: Any, **more: Any) -> Any:
    return config_class(
        text_config=text(model_type="qwen3_5_text", **LINEAR),
        vision_config=vision(num_hidden_layers=3, image_size=64, patch_size=4, insert_layer_id=1),
        insert_layer_id=1, image_token_id=IMAGE, video_token_id=VIDEO, **more)


def strip(patches: int) -> dict[str, torch.Tensor]:
    """The patches of a square image, 4 pixels high, in one row."""
    return dict(pixel_values=pixels(1, 3, 4, 4 * patches ** 2), target_sizes=torch.tensor([[patches, patches]]))


@builder("linear attention; patches merged within the vision tower and behind it")
def minicpmv4_6():
    config = minicpm(hf.MiniCPMV4_6Config, image_size=64)
    return hf.MiniCPMV4_6ForConditionalGeneration(config), prompt(16, **strip(16))


@builder("linear attention, multimodal rotary positions; patches merged within the vision tower and behind it")
def minicpmv4_7():
    config = minicpm(hf.MiniCPMV4_7Config, image_size=64, image_start_id=START, image_end_id=END, slice_start_id=94,
                     slice_end_id=93, newline_id=92)
    return hf.MiniCPMV4_7ForConditionalGeneration(config), typed(prompt(16, **strip(16)))


@builder("linear attention; patches merged behind the vision tower")
def minicpm_ocr():
    return hf.MiniCPMOcrForConditionalGeneration(minicpm(hf.MiniCPMOcrConfig)), prompt(16, **strip(8))


@builder("state-space layers; each layer is attention, experts or a state, never two of them")
def nemotron_h_omni():
    config = hf.NemotronH_Omni_Reasoning_V3_Config(
        vision_config=vision(model_type="radio", patch_size=4, image_size=32, max_img_size=32, num_cls_tokens=1,
                             num_registers=1, patch_dim=3 * 4 * 4, video_patch_dim=2 * 3 * 4 * 4, summary_idxs=[0],
                             video_temporal_patch_size=2),
        text_config=text(
            model_type="nemotron_h", num_hidden_layers=4,
            layers_block_type=["linear_attention", "full_attention", "moe", "linear_attention"], ssm_state_size=10,
            mamba_num_heads=4, mamba_head_dim=14, n_groups=1, conv_kernel=4, chunk_size=16, n_routed_experts=5,
            moe_intermediate_size=20, moe_shared_expert_intermediate_size=28, num_experts_per_tok=2),
        projector_hidden_size=52, vision_hidden_size=32, image_token_id=IMAGE, video_token_id=VIDEO,
        audio_token_id=AUDIO)
    return hf.NemotronH_Omni_Reasoning_V3(config), prompt(
        16, pixel_values=pixels(64, 3 * 4 * 4), image_grid_hw=torch.tensor([[8, 8]]))


HYBRID = dict(layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"], sliding_window_size=22,
              swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=12, d_rel=6, rel_extent=34,
              unpadded_vocab_size=100, n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=20)
"""Convolutions and attention in every layer, a learned bias by distance in place of rotary positions."""


@builder("convolutions and attention in every layer, a learned bias by distance, experts; images and sound")
def inkling_mm_model():
    config = hf.InklingConfig(
        text_config=text(**HYBRID, mlp_layer_types=["dense", "sparse", "sparse"], n_shared_experts=1,
                         logits_mup_width_multiplier=2.0),
        audio_config=dict(n_mel_bins=4, mel_vocab_size=8, text_hidden_size=48),
        vision_config=vision(text_hidden_size=48, patch_size=2, temporal_patch_size=2, num_hidden_layers=3),
        image_token_id=IMAGE, audio_token_id=AUDIO, image_bos_token_id=START, audio_bos_token_id=94)
    return hf.InklingForConditionalGeneration(config), prompt(16, pixel_values=pixels(16, 2, 2, 2, 3))


@builder("convolutions and attention in every layer, a learned bias by distance, residuals chosen by attention")
def inkling2():
    settings = text(**HYBRID, n_layers_per_attn_res_block=2)
    del settings["intermediate_size"]
    config = hf.Inkling2Config(
        text_config=settings, image_token_id=IMAGE,
        vision_config=vision(patch_size=4, spatial_merge_size=2, posemb_grid_size=8, projection_hidden_dim=52,
                             text_hidden_size=48, mlp_ratio=2.0))
    return hf.Inkling2ForConditionalGeneration(config), prompt(
        16, pixel_values=pixels(16, 3, 8, 8), image_grid_thw=torch.tensor([[1, 4, 4]]))
