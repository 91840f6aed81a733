"""One builder per architecture: a small model with random weights, and inputs for one prompt with an image.

The sizes differ from one another, so that a number in a graph tells what it counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

IMAGE, VIDEO, START, END = 99, 98, 97, 96


@dataclasses.dataclass(frozen=True)
class Built:
    model: Any
    inputs: dict[str, torch.Tensor]
    trait: str
    """What is peculiar about the architecture, as structure."""


BUILDERS: dict[str, Callable[[], Built]] = {}


def builder(trait: str) -> Callable[[Callable[[], tuple[Any, dict]]], Callable[[], Built]]:
    """Register a function that returns (model, inputs) under its own name."""

    def register(build: Callable[[], tuple[Any, dict]]) -> Callable[[], Built]:
        def built() -> Built:
            torch.manual_seed(0)
            model, inputs = build()
            model.eval().requires_grad_(False)
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():  # large enough that every token matters
                if parameter.dim() > 1:
                    parameter.mul_(4)
                elif "norm" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            model.generation_config.eos_token_id = None
            return Built(model, inputs, trait)

        BUILDERS[build.__name__] = built
        return built

    return register


def text(**more: Any) -> dict[str, Any]:
    """Settings that every text model takes: three layers of width 48 with four heads in two groups."""
    return dict(hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                head_dim=12, vocab_size=100, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2) | more


def clip(kind: str = "clip_vision_model", **more: Any) -> dict[str, Any]:
    return dict(model_type=kind, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
                image_size=16, patch_size=4) | more


def prompt(visual: int, before: int = 5, after: int = 9, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Text, an image of so many tokens, text."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 90, (1, before + visual + after), generator=generator)
    ids[:, before:before + visual] = IMAGE
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids)) | more


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@builder("one image of fixed size, causal")
def llava():
    config = hf.LlavaConfig(vision_config=clip(), text_config=dict(model_type="llama", **text()), image_token_index=IMAGE,
                            vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 16, 16))


@builder("tiles of an image, joined by newline features")
def llava_next():
    config = hf.LlavaNextConfig(
        vision_config=clip(image_size=8), text_config=dict(model_type="llama", **text()), image_token_index=IMAGE,
        vision_feature_layer=-1, image_grid_pinpoints=[[8, 8], [8, 16], [16, 16]], image_seq_length=4)
    return hf.LlavaNextForConditionalGeneration(config), prompt(
        4 + 16 + 4, pixel_values=pixels(1, 5, 3, 8, 8), image_sizes=torch.tensor([[16, 16]]))


@builder("features shuffled to fewer tokens, qkv with biases")
def internvl():
    config = hf.InternVLConfig(
        vision_config=dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
                           image_size=[32, 32], patch_size=[4, 4]),
        text_config=dict(model_type="qwen2", **text()), image_token_id=IMAGE, image_seq_length=16)
    return hf.InternVLForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 32, 32))


def grid_prompt(patch: int) -> dict[str, torch.Tensor]:
    """8 x 8 patches, merged two by two: 16 tokens."""
    inputs = prompt(16, before=6, pixel_values=pixels(64, 3 * 2 * patch * patch), image_grid_thw=torch.tensor([[1, 8, 8]]))
    inputs["input_ids"][:, 5] = START
    return inputs | {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).int()}


TOKENS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)


@builder("multimodal rotary positions [3, batch, seq]")
def qwen2_vl():
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2])
    config = hf.Qwen2VLConfig(
        text_config=text(rope_parameters=rope), **TOKENS,
        vision_config=dict(depth=2, embed_dim=32, hidden_size=48, num_heads=4, mlp_ratio=2, patch_size=4,
                           spatial_merge_size=2, temporal_patch_size=2, in_channels=3))
    return hf.Qwen2VLForConditionalGeneration(config), grid_prompt(4)


@builder("features added to the visual rows behind the first layers (DeepStack), interleaved rotary positions")
def qwen3_vl():
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2], mrope_interleaved=True)
    config = hf.Qwen3VLConfig(
        text_config=text(rope_parameters=rope), **TOKENS,
        vision_config=dict(depth=2, hidden_size=32, out_hidden_size=48, num_heads=4, intermediate_size=40, patch_size=4,
                           spatial_merge_size=2, temporal_patch_size=2, in_channels=3, num_position_embeddings=64,
                           deepstack_visual_indexes=[0, 1]))
    return hf.Qwen3VLForConditionalGeneration(config), grid_prompt(4)


@builder("sliding-window layers, visual tokens see each other in both directions, four norms a layer")
def gemma3():
    config = hf.Gemma3Config(
        vision_config=clip("siglip_vision_model"), mm_tokens_per_image=16, image_token_index=IMAGE, boi_token_index=START,
        eoi_token_index=END,
        text_config=text(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=22,
                         query_pre_attn_scalar=12))
    inputs = prompt(16, pixel_values=pixels(1, 3, 16, 16))
    return hf.Gemma3ForConditionalGeneration(config), inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


@builder("the whole prompt sees itself in both directions")
def paligemma():
    config = hf.PaliGemmaConfig(
        vision_config=clip("siglip_vision_model", projection_dim=48), text_config=dict(model_type="gemma", **text()),
        image_token_index=IMAGE, projection_dim=48, hidden_size=48)
    inputs = prompt(16, before=0, pixel_values=pixels(1, 3, 16, 16))
    return hf.PaliGemmaForConditionalGeneration(config), inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


@builder("parallel attention and MLP, sliding-window layers")
def aya_vision():
    config = hf.AyaVisionConfig(
        vision_config=clip("siglip_vision_model", image_size=32, vision_use_head=False), image_token_index=IMAGE,
        downsample_factor=2, text_config=dict(
            model_type="cohere2", **text(layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                                         sliding_window=22)))
    return hf.AyaVisionForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 32, 32))


@builder("a data-dependent check between merge and decoder")
def idefics3():
    config = hf.Idefics3Config(
        vision_config=dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                           patch_size=4),
        text_config=dict(model_type="llama", **text()), image_token_id=IMAGE, scale_factor=2)
    return hf.Idefics3ForConditionalGeneration(config), prompt(
        32, pixel_values=pixels(1, 2, 3, 32, 32), pixel_attention_mask=torch.ones(1, 2, 32, 32, dtype=torch.bool))


@builder("a vision tower for images of any size")
def mistral3():
    config = hf.Mistral3Config(
        vision_config=dict(model_type="pixtral", hidden_size=32, intermediate_size=40, num_hidden_layers=2,
                           num_attention_heads=2, image_size=32, patch_size=4),
        text_config=dict(model_type="mistral", **text(sliding_window=None)), image_token_index=IMAGE, spatial_merge_size=2)
    return hf.Mistral3ForConditionalGeneration(config), prompt(
        16, pixel_values=pixels(1, 3, 32, 32), image_sizes=torch.tensor([[32, 32]]))


@builder("experts whose results are added in place, chunked attention, layers without positions")
def llama4():
    config = hf.Llama4Config(
        vision_config=dict(hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                           patch_size=4, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32,
                           pixel_shuffle_ratio=0.5),
        text_config=text(intermediate_size_mlp=56, num_local_experts=3, num_experts_per_tok=1, attention_chunk_size=18,
                         layer_types=["chunked_attention", "chunked_attention", "full_attention"], no_rope_layers=[1, 1, 0]),
        image_token_index=IMAGE)
    return hf.Llama4ForConditionalGeneration(config), prompt(16, pixel_values=pixels(1, 3, 32, 32))
