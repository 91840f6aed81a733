"""Models at their published sizes with random weights, built on the device, and prompts for them: for bench.gpu."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import transformers as hf

from bench.models import TEXT_AFTER, TEXT_BEFORE, Scene, build_scene, rectangle

IMAGE = 7


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A model and the prompts that it is measured with."""

    name: str
    config: Callable[[int | None], hf.PretrainedConfig]
    """From the number of decoder layers; None for the published one."""

    visual: int
    kept: int
    batches: tuple[int, ...]
    answers: bool = True
    """Whether whole answers are timed as well."""

    def build(self, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> torch.nn.Module:
        """The model, initialised where it will run."""
        config = self.config(layers)
        kind = {"llava": hf.LlavaForConditionalGeneration, "qwen2_5_vl": hf.Qwen2_5_VLForConditionalGeneration}
        torch.manual_seed(0)
        with device:
            return kind[config.model_type]._from_config(config, dtype=dtype).eval().requires_grad_(False)

    def scene(self, model: torch.nn.Module, batch: int) -> Scene:
        """Prompts with random pictures; for Qwen2.5-VL with random features and positions on a grid."""
        if model.config.model_type != "qwen2_5_vl":
            return build_scene(model, self.visual, batch)
        scene = build_scene(model, self.visual, batch, tower=False)
        positions = grid_positions(*rectangle(self.visual)).to(scene.ids.device)[:, None].expand(3, batch, -1)
        return dataclasses.replace(scene, positions=positions, next_position=int(positions.max()) + 1)


def grid_positions(height: int, width: int) -> torch.Tensor:
    """M-RoPE ids of text, one picture, text: [3, prompt], for time, row and column."""
    before = torch.arange(TEXT_BEFORE).expand(3, -1)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    picture = torch.stack([torch.zeros(height * width, dtype=torch.long), rows.flatten(), columns.flatten()])
    after = torch.arange(TEXT_AFTER).expand(3, -1) + TEXT_BEFORE + max(height, width)
    return torch.cat([before, picture + TEXT_BEFORE, after], 1)


def llava(layers: int | None) -> hf.LlavaConfig:
    """LLaVA-1.5-7B: Vicuna-7B behind CLIP ViT-L/14 at 336 pixels."""
    return hf.LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096,
                           num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14,
                           projection_dim=768),
        text_config=dict(model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers or 32,
                         num_attention_heads=32, num_key_value_heads=32, vocab_size=32064,
                         max_position_embeddings=4096),
        image_token_index=32000)


def qwen(layers: int | None) -> hf.Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B with one block of its vision tower, which is left out of the measurements."""
    return hf.Qwen2_5_VLConfig(
        text_config=dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=layers or 28,
                         num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
        vision_config=dict(depth=1, hidden_size=1280, out_hidden_size=3584), image_token_id=IMAGE)


def small_llava(layers: int | None) -> hf.LlavaConfig:
    return hf.LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                           num_attention_heads=2, image_size=84, patch_size=14),
        text_config=dict(model_type="llama", hidden_size=128, intermediate_size=352, num_hidden_layers=layers or 4,
                         num_attention_heads=2, num_key_value_heads=2, vocab_size=1000, initializer_range=0.1),
        image_token_index=IMAGE)


def small_qwen(layers: int | None) -> hf.Qwen2_5_VLConfig:
    return hf.Qwen2_5_VLConfig(
        text_config=dict(hidden_size=128, intermediate_size=352, num_hidden_layers=layers or 4, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=1000, initializer_range=0.1,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6])),
        vision_config=dict(depth=1, hidden_size=64, out_hidden_size=128, num_heads=2), image_token_id=IMAGE)


PUBLISHED = (
    Configuration("LLaVA-1.5-7B", llava, 576, 64, (1, 8, 32), answers=False),
    Configuration("LLaVA-NeXT size", llava, 2880, 320, (1,), answers=False),
    Configuration("Qwen2.5-VL-7B", qwen, 1280, 142, (1,), answers=False),
)
"""LLaVA-NeXT's prompt of five pictures runs through LLaVA-1.5's decoder, which is the same."""

SMALL = (
    Configuration("small LLaVA", small_llava, 36, 9, (1, 2)),
    Configuration("small Qwen2.5-VL", small_qwen, 36, 9, (1,)),
)
