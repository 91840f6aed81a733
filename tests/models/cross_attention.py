"""Visual features that the decoder reads by cross-attention: they never stand in its sequence."""

from __future__ import annotations

import torch
import transformers as hf

from tests.models.registry import IMAGE, builder, pixels, prompt, text, vision


@builder("some layers attend to the image in place of the text", token=None)
def mllama():
    config = hf.MllamaConfig(
        vision_config=dict(hidden_size=32, attention_heads=4, num_hidden_layers=2, num_global_layers=1,
                           intermediate_size=40, vision_output_dim=64, image_size=8, patch_size=4, max_num_tiles=2,
                           intermediate_layers_indices=[1], supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]]),
        text_config=text(num_hidden_layers=4, cross_attention_layers=[1, 3],
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        image_token_index=IMAGE)
    inputs = prompt(1, after=20)
    return hf.MllamaForConditionalGeneration(config), inputs | dict(
        pixel_values=pixels(1, 1, 2, 3, 8, 8), aspect_ratio_ids=torch.tensor([[2]]),
        aspect_ratio_mask=torch.ones(1, 1, 2, dtype=torch.long),
        cross_attention_mask=torch.ones(*inputs["input_ids"].shape, 1, 2, dtype=torch.long))


@builder("gated layers that attend to the image, before some of the text's", token=None)
def idefics():
    settings = text()
    del settings["head_dim"], settings["num_key_value_heads"]
    config = hf.IdeficsConfig(
        **settings | {"num_hidden_layers": 4}, additional_vocab_size=8, cross_layer_interval=2, use_resampler=False,
        vision_config=dict(embed_dim=32, image_size=16, intermediate_size=40, patch_size=4, num_hidden_layers=2,
                           num_attention_heads=4))
    inputs = prompt(0, before=12, pixel_values=pixels(1, 1, 3, 16, 16))
    return hf.IdeficsForVisionText2Text(config), inputs | {
        "image_attention_mask": torch.ones(*inputs["input_ids"].shape, 1, dtype=torch.long)}


@builder("every layer attends to the image behind its self-attention", token=None)
def blip():
    config = hf.BlipConfig(
        text_config=dict(vocab_size=100, hidden_size=48, encoder_hidden_size=32, intermediate_size=56,
                         projection_dim=24, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128,
                         bos_token_id=3, eos_token_id=2, sep_token_id=4),
        vision_config=vision(projection_dim=24, image_size=16, patch_size=4, initializer_range=0.02),
        projection_dim=24, image_text_hidden_size=24)
    return hf.BlipForConditionalGeneration(config), prompt(0, before=4, pixel_values=pixels(1, 3, 16, 16))


@builder("adapters behind some layers attend to a protein in place of an image", token=None)
def evolla():
    settings = text()
    del settings["head_dim"]
    config = hf.EvollaConfig(
        **settings, aligner_num_add_layers=2, aligner_ffn_mult=2, resampler_depth=1, resampler_dim_head=8,
        resampler_heads=4, resampler_num_latents=7,
        protein_encoder_config=dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                    intermediate_size=40, max_position_embeddings=64))
    protein = torch.arange(5, 18)[None]
    return hf.EvollaForProteinText2Text(config), prompt(
        0, before=12, protein_input_ids=protein, protein_attention_mask=torch.ones_like(protein))
