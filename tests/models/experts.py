"""Mixtures of experts."""

from __future__ import annotations

import torch
import transformers as hf

from tests.models.registry import (
    END,
    IMAGE,
    START,
    VIDEO,
    builder,
    clip,
    experts,
    grid_prompt,
    latent,
    pixels,
    prompt,
    sam,
    text,
    typed,
    vision,
)
from tests.models.rotary import AXES, glm

DENSE_FIRST = ["dense", "sparse", "sparse"]


@builder("experts whose results are added in place, chunked attention, layers without positions")
def llama4():
    config = hf.Llama4Config(
        vision_config=vision(intermediate_size=128, num_attention_heads=2, image_size=32, patch_size=4,
                             vision_output_dim=32, projector_input_dim=32, projector_output_dim=32,
                             pixel_shuffle_ratio=0.5),
        text_config=text(intermediate_size_mlp=56, num_local_experts=3, num_experts_per_tok=1, attention_chunk_size=18,
                         layer_types=["chunked_attention", "chunked_attention", "full_attention"],
                         no_rope_layers=[1, 1, 0]),
        image_token_index=IMAGE)
    return hf.Llama4ForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 32, 32))


@builder("experts in every layer; learned queries read the image")
def aria():
    config = hf.AriaConfig(
        text_config=text(moe_num_experts=5, moe_topk=2, moe_num_shared_experts=1), image_token_index=IMAGE,
        vision_config=clip("idefics3_vision", image_size=32), projector_patch_to_query_dict={64: 16})
    return hf.AriaForConditionalGeneration(config), prompt(
        16, pixel_values=pixels(1, 3, 32, 32), pixel_mask=torch.ones(1, 32, 32, dtype=torch.bool))


@builder("experts, multimodal rotary positions")
def glm4v_moe():
    config = glm(hf.Glm4vMoeConfig, first_k_dense_replace=1, **experts())
    return hf.Glm4vMoeForConditionalGeneration(config), typed(grid_prompt(4))


@builder("experts chosen apart for text and image, multimodal rotary positions")
def ernie4_5_vl_moe():
    config = hf.Ernie4_5_VLMoeConfig(
        text_config=text(rope_parameters=AXES, moe_intermediate_size=[20, 16], moe_k=2, moe_num_experts=5,
                         moe_num_shared_experts=1, mlp_layer_types=DENSE_FIRST),
        vision_config=dict(depth=2, hidden_size=32, num_heads=4, patch_size=4, spatial_merge_size=2,
                           intermediate_size=40, temporal_merge_size=2, in_channels=3),
        image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END,
        video_start_token_id=94, video_end_token_id=93)
    inputs = grid_prompt(4, frames=1)
    return hf.Ernie4_5_VLMoeForConditionalGeneration(config), typed(inputs) | typed(inputs, "moe_mm_token_type_ids")


@builder("experts, sliding-window layers with heads of their own, gated attention")
def step3p7():
    config = hf.Step3p7Config(
        text_config=text(num_experts_per_tok=2, num_local_experts=5, n_routed_experts=5, moe_intermediate_size=20,
                         share_expert_dim=28, sliding_window=22, num_sliding_attention_heads=6,
                         layer_types=["full_attention", "sliding_attention", "full_attention"],
                         mlp_layer_types=DENSE_FIRST),
        vision_config=vision(image_size=64, patch_size=4, max_position_embeddings=256, mlp_ratio=2.0),
        image_token_id=IMAGE)
    return hf.Step3p7ForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 64, 64))


@builder("experts; the tower always makes 144 tokens of a small page, and one that separates it from the next")
def deepseek_ocr2():
    config = hf.DeepseekOcr2Config(
        vision_config=dict(
            sam_config=sam(downsample_channels=[20, 24]),
            encoder_config=dict(hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
                                num_key_value_heads=2, vocab_size=90, max_position_embeddings=512)),
        text_config=text(mlp_layer_types=DENSE_FIRST, **experts()), image_token_id=IMAGE)
    return hf.DeepseekOcr2ForConditionalGeneration(config), prompt(144 + 1, pixel_values=pixels(1, 3, 64, 64))


@builder("experts, a window behind a prompt that all tokens see")
def unlimited_ocr():
    config = hf.UnlimitedOcrConfig(
        vision_config=dict(
            sam_config=sam(downsample_channels=[20, 24]),
            encoder_config=dict(hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
                                image_size=64, patch_size=16)),
        text_config=text(mlp_layer_types=DENSE_FIRST, layer_types=["reference_sliding_attention"] * 3,
                         sliding_window=22, **experts()),
        image_token_id=IMAGE)
    return hf.UnlimitedOcrForConditionalGeneration(config), prompt(4 * 5 + 1, pixel_values=pixels(1, 3, 64, 64))


@builder("experts; the cache holds latents and one rotary key that all heads share")
def kimi_k25():
    config = hf.Kimi_K25Config(
        text_config=latent(model_type="deepseek_v3", first_k_dense_replace=1, **experts()),
        vision_config=dict(patch_size=4, pos_emb_height=8, pos_emb_width=8, pos_emb_time=1, num_attention_heads=4,
                           num_hidden_layers=2, hidden_size=32, intermediate_size=40),
        projection_hidden_size=32, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END)
    return hf.Kimi_K25ForConditionalGeneration(config), grid_prompt(4) | {"pixel_values": pixels(64, 3, 4, 4)}


@builder("experts, keys and values made from latents, text alone", token=None)
def mistral4():
    inputs = prompt(0, before=12)
    return hf.Mistral4ForCausalLM(hf.Mistral4Config(**latent(**experts()))), inputs
