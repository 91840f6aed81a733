"""Attention to a few chosen tokens: an index scores the past, by keys of its own."""

from __future__ import annotations

import torch
import transformers as hf

from tests.models.recurrent import EXPERTS, LINEAR, plain_tower
from tests.models.registry import (
    AUDIO,
    END,
    IMAGE,
    START,
    VIDEO,
    builder,
    experts,
    grid_prompt,
    latent,
    merging,
    pixels,
    prompt,
    text,
    typed,
    vision,
)
from tests.models.rotary import TOKENS

DENSE_FIRST = ["dense", "sparse", "sparse"]
INDEX = dict(index_topk=20, index_head_dim=10, index_n_heads=2)


@builder("latents, an index that chooses 20 tokens for each, experts")
def mistral_large4():
    config = hf.MistralLarge4Config(
        vision_config=vision(model_type="pixtral", num_attention_heads=2, image_size=32, patch_size=4),
        text_config=latent(**INDEX, **experts()), image_token_index=IMAGE, spatial_merge_size=2)
    return hf.MistralLarge4ForConditionalGeneration(config), prompt(
        16, pixel_values=pixels(1, 3, 32, 32), image_sizes=torch.tensor([[32, 32]]))


@builder("an index that chooses blocks of tokens, experts")
def minimax_m3_vl():
    config = hf.MiniMaxM3VLConfig(
        text_config=text(
            num_local_experts=5, num_experts_per_tok=2, intermediate_size=20, dense_intermediate_size=56,
            shared_intermediate_size=28, rotary_dim=6, index_n_heads=2, index_head_dim=10, index_block_size=8,
            index_topk_blocks=2, index_local_blocks=1, mlp_layer_types=DENSE_FIRST,
            layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]),
        vision_config=vision(hidden_size=48, num_attention_heads=2, image_size=32, patch_size=4),
        projector_hidden_size=52, image_token_index=IMAGE, video_token_index=VIDEO)
    return hf.MiniMaxM3SparseForConditionalGeneration(config), grid_prompt(4)


@builder("linear attention and latents with an index, several streams of hidden states, experts")
def glm5_next():
    config = hf.Glm5NextConfig(
        text_config=latent(
            **experts(), **INDEX, index_kpool=4, qk_rope_head_dim=0, head_dim=0, mlp_layer_types=DENSE_FIRST,
            layer_types=["linear_attention", "indexed_attention", "linear_attention"], indexer_types=["full"] * 3,
            linear_head_dim=14, linear_num_heads=4, hc_mult=2, hc_sinkhorn_iters=2),
        vision_config=merging(image_size=32, projection_intermediate_size=52),
        image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END,
        video_start_token_id=94, video_end_token_id=93)
    return hf.Glm5NextForConditionalGeneration(config), typed(grid_prompt(4))


@builder("linear attention, an index that chooses compressed tokens, several streams of hidden states, experts")
def qwen4_exp():
    config = hf.Qwen4ExpConfig(
        text_config=text(**LINEAR, **EXPERTS, hc_count=2, hc_lowrank=6, indexer_n_heads=2, indexer_kv_heads=1,
                         indexer_head_dim=10, indexer_budget=16, indexer_compress_ratio=4),
        vision_config=plain_tower(), **TOKENS)
    return hf.Qwen4ExpForConditionalGeneration(config), typed(grid_prompt(4))


@builder("latents with an index between sliding windows over latents of their own, experts, images and sound")
def dots3_note():
    windows = dict(sliding_window=22, swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=14,
                   swa_kv_lora_rank=10, swa_head_dim=18, swa_qk_nope_head_dim=12, swa_v_head_dim=16)
    config = hf.Dots3NoteConfig(
        text_config=latent(**experts(), **INDEX, **windows, moe_shared_expert_intermediate_size=28,
                           layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
                           mlp_layer_types=DENSE_FIRST),
        vision_config=vision(patch_size=4, spatial_merge_size=2, per_layer_config={}, mlp_layer_types=["dense"] * 2,
                             adapter_in_dim=32, adapter_out_dim=48),
        audio_config=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
                          feature_size=20, downsample_hidden_size=16, adapter_input_size=24, adapter_out_dim=48),
        image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO)
    return hf.Dots3NoteForConditionalGeneration(config), grid_prompt(4, frames=1)
