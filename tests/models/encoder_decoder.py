"""Models that encode the image, or image and prompt, before a decoder begins: its sequence holds no visual tokens."""

from __future__ import annotations

import torch
import transformers as hf

from tests.models.registry import END, IMAGE, START, VIDEO, builder, clip, pixels, prompt, sam, text, typed, vision
from tests.models.shared_keys import grid
from tests.models.windows import SLIDING


def begun(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs, and the first tokens of an answer."""
    return inputs | {"decoder_input_ids": torch.tensor([[1, 20, 21, 22]])}


@builder("image and text in one encoder")
def florence2():
    config = hf.Florence2Config(
        text_config=dict(model_type="bart", vocab_size=100, max_position_embeddings=256, encoder_layers=3,
                         decoder_layers=3, encoder_ffn_dim=56, decoder_ffn_dim=56, encoder_attention_heads=4,
                         decoder_attention_heads=4, d_model=48, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                         decoder_start_token_id=2, forced_eos_token_id=None),
        vision_config=dict(depths=(1,) * 4, embed_dim=(16,) * 4, num_heads=(2,) * 4, num_groups=(2,) * 4, window_size=2,
                           projection_dim=48, max_temporal_embeddings=4, max_position_embeddings=8),
        image_token_id=IMAGE)
    return hf.Florence2ForConditionalGeneration(config), begun(prompt(5, pixel_values=pixels(1, 3, 64, 64)))


@builder("image and text in one encoder; each decoder layer attends to both at once")
def t5gemma2():
    settings = text(query_pre_attn_scalar=12, **SLIDING)
    config = hf.T5Gemma2Config(
        encoder=dict(text_config=settings, vision_config=clip("siglip_vision_model"), mm_tokens_per_image=16,
                     boi_token_index=START, eoi_token_index=END, image_token_index=IMAGE),
        decoder=dict(settings), image_token_index=IMAGE, eoi_token_index=END)
    return hf.T5Gemma2ForConditionalGeneration(config), begun(prompt(16, pixel_values=pixels(1, 3, 16, 16)))


@builder("image, text and the places of its words in one encoder", token=None)
def udop():
    config = hf.UdopConfig(
        vocab_size=100, d_model=48, d_kv=12, d_ff=56, num_layers=3, num_decoder_layers=3, num_heads=4,
        max_2d_position_embeddings=64, image_size=16, patch_size=4, decoder_start_token_id=0)
    inputs = prompt(0, before=6)
    return hf.UdopForConditionalGeneration(config), begun(inputs) | dict(
        pixel_values=pixels(1, 3, 16, 16), bbox=pixels(*inputs["input_ids"].shape, 4).sigmoid())


@builder("patches of any grid in an encoder", token=None)
def pix2struct():
    config = hf.Pix2StructConfig(
        text_config=dict(vocab_size=100, hidden_size=48, d_kv=12, d_ff=56, num_layers=3, num_heads=4,
                         decoder_start_token_id=0, pad_token_id=0, eos_token_id=2),
        vision_config=dict(hidden_size=48, patch_embed_hidden_size=3 * 4 * 4, d_ff=40, d_kv=12, num_hidden_layers=2,
                           num_attention_heads=4, seq_len=64))
    rows_and_columns = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5))[None]
    patches = torch.cat([rows_and_columns, pixels(1, 16, 3 * 4 * 4)], -1)
    return hf.Pix2StructForConditionalGeneration(config), begun(
        dict(flattened_patches=patches, attention_mask=torch.ones(1, 16)))


@builder("any encoder of images, any decoder", name="vision-encoder-decoder", token=None)
def vision_encoder_decoder():
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hf.ViTConfig(**vision(image_size=16, patch_size=4)),
        hf.BertConfig(vocab_size=100, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56,
                      is_decoder=True, add_cross_attention=True))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return hf.VisionEncoderDecoderModel(config=config), begun(dict(pixel_values=pixels(1, 3, 16, 16)))


@builder("pages in an encoder with windows", token=None)
def pp_formulanet():
    config = hf.PPFormulaNetConfig(
        text_config=dict(vocab_size=100, max_position_embeddings=128, encoder_layers=2, encoder_attention_heads=4,
                         decoder_layers=3, decoder_ffn_dim=56, decoder_attention_heads=4, d_model=48),
        vision_config=sam(post_conv_in_channels=16, post_conv_out_channels=40, post_conv_mid_channels=20,
                          decoder_hidden_size=48))
    return hf.PPFormulaNetForConditionalGeneration(config), begun(dict(pixel_values=pixels(1, 3, 64, 64)))


@builder("a causal encoder caches the prompt; a decoder denoises a block of answer that sees itself in both directions")
def diffusion_gemma():
    config = hf.DiffusionGemmaConfig(
        text_config=text(**SLIDING, global_head_dim=16, num_experts=5, top_k_experts=2, moe_intermediate_size=20),
        vision_config=vision(model_type="gemma4_vision", num_attention_heads=2, num_key_value_heads=2, head_dim=16,
                             pooling_kernel_size=2, patch_size=4, position_embedding_size=64),
        image_token_id=IMAGE, video_token_id=VIDEO, boi_token_id=START, eoi_token_id=END, canvas_length=4)
    return hf.DiffusionGemmaForBlockDiffusion(config), begun(typed(prompt(
        16, pixel_values=pixels(1, 64, 3 * 4 * 4).sigmoid(), image_position_ids=grid(8))))
