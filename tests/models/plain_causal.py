"""One image of fixed size; causal attention; one rotary position a token."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tests.models.registry import (
    END,
    IMAGE,
    START,
    VIDEO,
    builder,
    clip,
    grid_prompt,
    pixels,
    prompt,
    sam,
    text,
    vision,
)
from tests.models.rotary import windowed_tower


@builder("one image of fixed size, causal")
def llava():
    config = hf.LlavaConfig(vision_config=clip(), text_config=text(model_type="llama"), image_token_index=IMAGE,
                            vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 16, 16))


@builder("features of several layers of the vision tower side by side")
def vipllava():
    config = hf.VipLlavaConfig(vision_config=clip(), text_config=text(model_type="llama"), image_token_index=IMAGE,
                               vision_feature_layers=[-1, -2])
    return hf.VipLlavaForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 16, 16))


def internvl_tower() -> dict[str, Any]:
    return vision(hidden_size=24, num_attention_heads=2, image_size=[32, 32], patch_size=[4, 4])


@builder("features shuffled to fewer tokens, qkv with biases")
def internvl():
    config = hf.InternVLConfig(vision_config=internvl_tower(), text_config=text(model_type="qwen2"),
                               image_token_id=IMAGE, image_seq_length=16)
    return hf.InternVLForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 32, 32))


@builder("features shuffled to fewer tokens, queries and keys normalized")
def qianfan_ocr():
    config = hf.QianfanOCRConfig(vision_config=internvl_tower(), text_config=text(model_type="qwen3"),
                                 image_token_id=IMAGE, image_seq_length=16)
    return hf.QianfanOCRForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 32, 32))


def _got_ocr2(config_class: Any):
    config = config_class(vision_config=sam(), text_config=text(model_type="qwen2"), image_token_index=IMAGE,
                          image_seq_length=16)
    return hf.GotOcr2ForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 64, 64))


@builder("a vision tower with windows, qkv with biases")
def got_ocr2():
    return _got_ocr2(hf.GotOcr2Config)


@builder("got_ocr2 under another configuration")
def pp_chart2table():
    return _got_ocr2(hf.PPChart2TableConfig)


@builder("a tower that reads images, beside one that makes them")
def janus():
    config = hf.JanusConfig(
        vision_config=vision(image_size=16, patch_size=4, projection_dim=48, num_image_tokens=16, mlp_ratio=2.0),
        vq_config=dict(embed_dim=8, num_embeddings=30, latent_channels=32, base_channels=32, channel_multiplier=[1, 1],
                       num_res_blocks=1, num_patches=4, projection_dim=48, image_token_embed_dim=48),
        text_config=text(model_type="llama"), image_token_id=IMAGE)
    return hf.JanusForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 16, 16))


@builder("one image of fixed size, a deeper projector")
def deepseek_vl():
    config = hf.DeepseekVLConfig(vision_config=clip("siglip_vision_model", vision_use_head=False),
                                 text_config=text(model_type="llama"), image_token_id=IMAGE)
    return hf.DeepseekVLForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 16, 16))


@builder("one image read at two resolutions by two towers")
def deepseek_vl_hybrid():
    config = hf.DeepseekVLHybridConfig(
        vision_config=clip("siglip_vision_model", vision_use_head=False), high_res_vision_config=sam(),
        text_config=text(model_type="llama"), image_token_id=IMAGE)
    return hf.DeepseekVLHybridForConditionalGeneration(config), prompt(
        16, pixel_values=pixels(1, 3, 16, 16), high_res_pixel_values=pixels(1, 3, 64, 64))


@builder("a vision tower of convolutions")
def fast_vlm():
    convolutions = dict(model_type="convnext", num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], patch_size=4,
                        hidden_size=32)
    config = hf.FastVlmConfig(vision_config=convolutions, text_config=text(model_type="qwen2"), image_token_index=IMAGE)
    return hf.FastVlmForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 32, 32))


@builder("a vision tower with windows; positions counted from the cache")
def hyperclovax_vision_v2():
    config = hf.HyperCLOVAXVisionV2Config(
        text_config=text(model_type="hyperclovax"), image_token_id=IMAGE, video_token_id=VIDEO,
        vision_config=windowed_tower(model_type="qwen2_5_vl_vision"))
    return hf.HyperCLOVAXVisionV2ForConditionalGeneration(config), grid_prompt(4)


@builder("no vision tower: patches are projected at once; half of each head rotated")
def fuyu():
    config = hf.FuyuConfig(text_config=text(model_type="persimmon"), image_size=20, patch_size=5, image_token_id=IMAGE)
    return hf.FuyuForCausalLM(config), prompt(16, pixel_values=pixels(1, 16, 3 * 5 * 5))


@builder("images as tokens of the vocabulary, found by a codebook; queries and keys normalized")
def chameleon():
    words = {f"IMGIMG{'ABC'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 20 + i for i in range(30)}
    config = hf.ChameleonConfig(
        **text(), vocabulary_map=words | {"<image>": IMAGE, "<racm3:break>": START, "<eoss>": END}, swin_norm=False,
        vq_config=dict(embed_dim=16, num_embeddings=30, latent_channels=16, resolution=16, base_channels=32,
                       channel_multiplier=[1, 1, 2], num_res_blocks=1))
    return hf.ChameleonForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 16, 16))


@builder("images as tokens of the vocabulary, found by a codebook; a token ends each row")
def emu3():
    words = {f"<|visual token {i:06d}|>": 20 + i for i in range(30)}
    config = hf.Emu3Config(
        text_config=text(), vocabulary_map=words | {"<image>": IMAGE, "<|extra_200|>": 94},
        vq_config=dict(codebook_size=30, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1],
                       num_res_blocks=1, temporal_downsample_factor=1, attn_resolutions=[], hidden_size=32,
                       num_attention_heads=1))
    return hf.Emu3ForConditionalGeneration(config), prompt(
        4 * 5, pixel_values=pixels(1, 3, 8, 8), image_sizes=torch.tensor([[8, 8]]))


@builder("features as mixtures of visual words; two more, learned, enclose the image; merged in code that Dynamo skips",
         token=(IMAGE, 94, 93))
def ovis2():
    config = hf.Ovis2Config(
        vision_config=vision(image_size=16, patch_size=4, vocab_size=60, hidden_stride=1),
        text_config=text(model_type="qwen2"), image_token_id=IMAGE, visual_indicator_token_ids=[94, 93, 92, 91, 90],
        vocab_size=100, hidden_size=48)
    inputs = prompt(16, pixel_values=pixels(1, 3, 16, 16))
    inputs["input_ids"][:, [4, 21]] = torch.tensor([94, 93])
    return hf.Ovis2ForConditionalGeneration(config), inputs
