"""Layers that attend to the keys and values of earlier ones, and embeddings that every layer takes in anew."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import transformers as hf

from tests.models.registry import AUDIO, END, IMAGE, START, VIDEO, builder, pixels, prompt, text, typed, vision

TOKENS = dict(image_token_id=IMAGE, audio_token_id=AUDIO, boi_token_id=START, eoi_token_id=END, boa_token_id=94)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4, sliding_window=22)
SHARED = SLIDING | dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=100, num_kv_shared_layers=2)
"""The last two layers use the keys and values of the first two."""


def convolutions_in_place_of(kind: str) -> Any:
    """In this context convolutions stand in for models of one type, whose package need not be installed."""
    build = hf.AutoModel.from_config
    convolutions = hf.ConvNextConfig(num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], patch_size=4)

    def from_config(config: Any, **options: Any) -> Any:
        return build(convolutions if config.model_type == kind else config, **options)

    return mock.patch.object(hf.AutoModel, "from_config", from_config)


def grid(side: int) -> torch.Tensor:
    """Column and row of each patch of a square image."""
    return torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)[None]


@builder("keys shared between layers, embeddings of each layer, several streams of hidden states")
def gemma3n():
    config = hf.Gemma3nConfig(
        text_config=text(**SHARED | {"intermediate_size": [56] * 4}, laurel_rank=6, vocab_size=108,
                         activation_sparsity_pattern=[0.0] * 4),
        vision_config=dict(hidden_size=32, vocab_size=4, vocab_offset=100),
        audio_config=dict(vocab_size=4, vocab_offset=104, hidden_size=24, conf_num_attention_heads=4,
                          conf_num_hidden_layers=1, sscp_conv_channel_size=(8, 4)),
        vision_soft_tokens_per_image=16, eoa_token_id=93, **TOKENS)
    with convolutions_in_place_of("gemma3n_vision"):
        model = hf.Gemma3nForConditionalGeneration(config)
    return model, typed(prompt(16, pixel_values=pixels(1, 3, 32, 32)), "token_type_ids")


def _gemma4(**more: Any):
    config = hf.Gemma4Config(
        text_config=text(global_head_dim=16, **SHARED, **more), video_token_id=VIDEO, eoa_token_index=93, **TOKENS,
        vision_config=vision(num_attention_heads=2, head_dim=16, num_key_value_heads=2, pooling_kernel_size=2,
                             patch_size=4, position_embedding_size=64))
    return hf.Gemma4ForConditionalGeneration(config), typed(prompt(
        16, pixel_values=pixels(1, 64, 3 * 4 * 4).sigmoid(), image_position_ids=grid(8)))


@builder("keys shared between layers, embeddings of each layer, visual tokens see each other in both directions")
def gemma4():
    return _gemma4(use_bidirectional_attention="vision")


@builder("keys shared between layers, embeddings of each layer, experts beside the MLP", name="gemma4 (experts)")
def gemma4_experts():
    return _gemma4(enable_moe_block=True, num_experts=5, top_k_experts=2, moe_intermediate_size=20)


@builder("no vision tower: patches are projected at once; wider heads in full-attention layers")
def gemma4_unified():
    config = hf.Gemma4UnifiedConfig(
        text_config=text(**SLIDING, global_head_dim=16, use_bidirectional_attention="vision"),
        vision_config=dict(patch_size=4, pooling_kernel_size=1, mm_embed_dim=32, mm_posemb_size=16,
                           output_proj_dims=32),
        video_token_id=VIDEO, eoa_token_index=93, **TOKENS)
    return hf.Gemma4UnifiedForConditionalGeneration(config), typed(prompt(
        16, pixel_values=pixels(1, 16, 3 * 4 * 4).sigmoid(), image_position_ids=grid(4)))
