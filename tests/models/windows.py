"""Attention that is not plainly causal: sliding windows, images or prefixes that see themselves in both directions."""

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
    clip,
    grid_prompt,
    pixels,
    prompt,
    text,
    typed,
    vision,
)
from tests.models.rotary import windowed_tower

SLIDING = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=22)


def _gemma3(config_class: Any):
    config = config_class(
        vision_config=clip("siglip_vision_model"), text_config=text(query_pre_attn_scalar=12, **SLIDING),
        mm_tokens_per_image=16, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END)
    return hf.Gemma3ForConditionalGeneration(config), typed(
        prompt(16, pixel_values=pixels(1, 3, 16, 16)), "token_type_ids")


@builder("sliding-window layers, visual tokens see each other in both directions, four norms a layer")
def gemma3():
    return _gemma3(hf.Gemma3Config)


@builder("gemma3 under another configuration")
def shieldgemma2():
    return _gemma3(hf.ShieldGemma2Config)


@builder("the whole prompt sees itself in both directions")
def paligemma():
    config = hf.PaliGemmaConfig(
        vision_config=clip("siglip_vision_model", projection_dim=48), text_config=text(model_type="gemma"),
        image_token_index=IMAGE, projection_dim=48, hidden_size=48)
    inputs = prompt(16, before=0, pixel_values=pixels(1, 3, 16, 16))
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return hf.PaliGemmaForConditionalGeneration(config), inputs


@builder("features added to the embeddings of the image's tokens, which see each other in both directions", scale=8)
def molmo2():
    attention = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    config = hf.Molmo2Config(
        vision_config=dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, image_size=[32, 32], patch_size=4,
                           num_position_embeddings=64, **attention),
        adapter_config=dict(vision_feature_layer=[2, 1], hidden_size=32, intermediate_size=40, text_hidden_size=48,
                            **attention),
        text_config=text(additional_vocab_size=8), image_patch_id=IMAGE, image_start_token_id=START,
        image_end_token_id=END, low_res_image_start_token_id=94, frame_start_token_id=93, frame_end_token_id=92)
    neighbours = torch.arange(64).view(8, 8).unfold(0, 2, 2).unfold(1, 2, 2).reshape(16, 4)
    return hf.Molmo2ForConditionalGeneration(config), typed(prompt(
        16, pixel_values=pixels(1, 64, 3 * 4 * 4), image_token_pooling=neighbours, image_num_crops=torch.tensor([1]),
        image_grids=torch.tensor([[4, 4, 0, 0]])))


@builder("parallel attention and MLP, sliding-window layers")
def aya_vision():
    config = hf.AyaVisionConfig(
        vision_config=clip("siglip_vision_model", image_size=32, vision_use_head=False), image_token_index=IMAGE,
        downsample_factor=2, text_config=text(model_type="cohere2", **SLIDING))
    return hf.AyaVisionForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 32, 32))


@builder("parallel attention and MLP, sliding-window layers, a gated projector")
def cohere2_vision():
    config = hf.Cohere2VisionConfig(
        vision_config=clip("siglip_vision_model", image_size=32, vision_use_head=False), image_token_id=IMAGE,
        downsample_factor=2, alignment_intermediate_size=52, text_config=text(model_type="cohere2", **SLIDING))
    return hf.Cohere2VisionForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 32, 32))


@builder("sliding-window layers, norms behind attention and MLP alone; positions counted from the cache")
def exaone4_5():
    config = hf.Exaone4_5_Config(
        text_config=text(model_type="exaone4", **SLIDING), vision_config=windowed_tower(num_key_value_heads=2),
        image_token_id=IMAGE, video_token_id=VIDEO)
    return hf.Exaone4_5_ForConditionalGeneration(config), grid_prompt(4)


def muse_tower() -> dict[str, Any]:
    return vision(patch_size=4, pos_emb_height=8, pos_emb_width=8, max_position_embeddings=64,
                  layer_types=["window_attention", "full_attention"])


MUSE = SLIDING | dict(layer_rope_theta=[10000.0, 0, 10000.0])
"""The layers without a window have no positions either."""


@builder("gated attention, sliding-window layers, full ones without positions, capped logits")
def muse_glimmer():
    config = hf.MuseGlimmerConfig(
        text_config=text(**MUSE), vision_config=muse_tower(), image_token_id=IMAGE, video_token_id=VIDEO,
        out_hidden_size=4 * 32, projector_hidden_size=52)
    return hf.MuseGlimmerForConditionalGeneration(config), grid_prompt(4)


@builder("experts of a width of their own, sliding-window layers, full ones without positions, images and sound")
def muse_spark():
    config = hf.MuseSparkConfig(
        text_config=text(moe_intermediate_size=20, num_local_experts=5, num_experts_per_tok=2, moe_hidden_size=28,
                         **MUSE),
        vision_config=muse_tower(),
        audio_config=dict(hidden_sizes=(8,) * 4, depths=(1,) * 4, out_hidden_size=48, patch_sizes=(16, 6, 5, 4)),
        image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO, out_hidden_size=4 * 32,
        projector_hidden_size=52)
    return hf.MuseSparkForConditionalGeneration(config), grid_prompt(4)
