"""DeepStack: features of the image enter again behind the first decoder layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tests.models.registry import AUDIO, IMAGE, builder, clip, grid_prompt, merging, pixels, prompt, text, typed, vision
from tests.models.rotary import AXES, TOKENS

INTERLEAVED = AXES | {"mrope_interleaved": True}
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, decoder_sparse_step=1)


def tower(**more: Any) -> dict[str, Any]:
    """A vision tower that hands out what its two layers computed."""
    return merging(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]) | more


@builder("features added to the visual rows behind the first layers (DeepStack), interleaved rotary positions")
def qwen3_vl():
    config = hf.Qwen3VLConfig(text_config=text(rope_parameters=INTERLEAVED), vision_config=tower(), **TOKENS)
    return hf.Qwen3VLForConditionalGeneration(config), typed(grid_prompt(4))


@builder("DeepStack, experts")
def qwen3_vl_moe():
    config = hf.Qwen3VLMoeConfig(text_config=text(rope_parameters=INTERLEAVED, **EXPERTS), vision_config=tower(),
                                 **TOKENS)
    return hf.Qwen3VLMoeForConditionalGeneration(config), typed(grid_prompt(4))


@builder("DeepStack, experts, images and sound")
def qwen3_omni_moe_thinker():
    config = hf.Qwen3OmniMoeThinkerConfig(
        text_config=text(rope_parameters=INTERLEAVED, **EXPERTS), vision_config=tower(), **TOKENS,
        audio_config=dict(num_mel_bins=20, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=40, d_model=32,
                          max_source_positions=50, output_dim=48, downsample_hidden_size=16),
        audio_token_id=AUDIO, audio_start_token_id=94)
    return hf.Qwen3OmniMoeThinkerForConditionalGeneration(config), grid_prompt(4)


@builder("DeepStack, text and vision models named separately")
def cosmos3_omni():
    config = hf.Cosmos3OmniConfig(
        text_config=text(model_type="qwen3_vl_text", rope_parameters=INTERLEAVED),
        vision_config=tower(model_type="qwen3_vl_vision"), **TOKENS)
    return hf.Cosmos3OmniForConditionalGeneration(config), typed(grid_prompt(4))


@builder("DeepStack, parallel attention and MLP, sliding-window layers")
def cohere_compass():
    config = hf.CohereCompassConfig(
        text_config=text(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=22,
                         rope_parameters=dict(sliding_attention=dict(AXES), full_attention=dict(AXES))),
        vision_config=tower(), **TOKENS)
    return hf.CohereCompassForConditionalGeneration(config), typed(grid_prompt(4))


@builder("DeepStack, one rotary position a token, scaled embeddings, residuals and logits")
def granite_docling():
    config = hf.GraniteDoclingConfig(
        image_token_id=IMAGE,
        text_config=text(embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.6,
                         logits_scaling=2.0),
        vision_config=vision(hidden_size=24, num_attention_heads=2, image_size=32, patch_size=4, out_hidden_size=48,
                             scale_factor=2, deepstack_visual_indexes=[0, 1], use_fine_route=False))
    return hf.GraniteDoclingForConditionalGeneration(config), prompt(
        32, pixel_values=pixels(1, 2, 3, 32, 32), pixel_attention_mask=torch.ones(1, 2, dtype=torch.bool))


@builder("visual rows begin as zeros; features are added inside the first layers")
def granite4_vision():
    config = hf.Granite4VisionConfig(
        text_config=text(), vision_config=clip(hidden_size=64), image_token_index=IMAGE, downsample_rate="1/2",
        qformer_config=dict(hidden_size=64, encoder_hidden_size=64, num_attention_heads=1, intermediate_size=44,
                            num_hidden_layers=1),  # transformers 5.17 does not derive the first three
        image_grid_pinpoints=[[32, 32]],
        deepstack_layer_map=[[-1, 0]], spatial_target_layers=[1], vision_feature_layer=-1)
    return hf.Granite4VisionForConditionalGeneration(config), prompt(
        4 + 16 + 4, pixel_values=pixels(1, 5, 3, 16, 16), image_sizes=torch.tensor([[32, 32]]))
