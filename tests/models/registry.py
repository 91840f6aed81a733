"""What the builders share: the registry, the token ids, and the sizes that most text models and vision towers take.

The sizes differ from one another, so that a number in a graph tells what it counts.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

IMAGE, VIDEO, START, END, AUDIO = 99, 98, 97, 96, 95


@dataclasses.dataclass(frozen=True)
class Built:
    model: Any
    inputs: dict[str, torch.Tensor]
    trait: str
    """What is peculiar about the architecture, as structure."""
    token: int | tuple[int, ...] | None = IMAGE
    """The ids of the visual tokens in input_ids; None where no id says where the visual features stand."""
    generates: bool = True
    """Whether ``model.generate(**inputs)`` works."""
    part: str | None = None
    """The part of the model that its ``generate`` hands over to, if it has one."""


def stands_for_features(ids: torch.Tensor, token: int | tuple[int, ...]) -> torch.Tensor:
    """Where ids are placeholders of visual features: a bool tensor of the same shape."""
    return torch.isin(ids, torch.tensor(token))


BUILDERS: dict[str, Callable[[], Built]] = {}

Build = Callable[[], tuple[Any, dict[str, torch.Tensor]]]


def builder(trait: str, *, name: str | None = None, token: int | tuple[int, ...] | None = IMAGE, generates: bool = True,
            part: str | None = None, scale: float = 4) -> Callable[[Build], Callable[[], Built]]:
    """Register a function that returns (model, inputs) under its own name or another one."""

    def register(build: Build) -> Callable[[], Built]:
        def built() -> Built:
            torch.manual_seed(0)
            with torch.no_grad():
                model, inputs = build()
            model.eval().requires_grad_(False)
            generator = torch.Generator().manual_seed(1)
            for key, parameter in model.named_parameters():  # large enough that every token matters
                if parameter.dim() > 1:
                    if not parameter.any():  # some projections begin as zeros, so that no token would matter
                        parameter.normal_(0, 0.02, generator=generator)
                    parameter.mul_(scale)
                elif "norm" in key:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                elif parameter.numel() == 1 and not parameter.any():  # a gate that begins closed
                    parameter.fill_(0.5)
            if generates:
                model.generation_config.eos_token_id = None
            return Built(model, inputs, trait, token, generates, part)

        BUILDERS[name or build.__name__] = built
        return built

    return register


def text(**more: Any) -> dict[str, Any]:
    """Settings that every text model takes: three layers of width 48 with four heads in two groups."""
    return dict(hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                head_dim=12, vocab_size=100, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
                eos_token_id=2) | copy.deepcopy(more)  # some configurations change the lists they are given


def latent(**more: Any) -> dict[str, Any]:
    """A text model whose keys and values are made from latents that the heads share."""
    return text(**dict(num_key_value_heads=4, kv_lora_rank=10, q_lora_rank=14, qk_rope_head_dim=6, qk_nope_head_dim=12,
                       v_head_dim=16, head_dim=6) | more)


def experts(**more: Any) -> dict[str, Any]:
    """Five experts, two of which a token is sent to, and one that every token goes through."""
    return dict(n_routed_experts=5, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=20, n_group=1,
                topk_group=1) | more


def vision(**more: Any) -> dict[str, Any]:
    """Settings that most vision towers take."""
    return dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4) | more


def clip(kind: str = "clip_vision_model", **more: Any) -> dict[str, Any]:
    """A vision tower for 4 x 4 patches."""
    return vision(model_type=kind, hidden_size=24, num_attention_heads=2, image_size=16, patch_size=4) | more


def merging(**more: Any) -> dict[str, Any]:
    """A vision tower that takes patches of two frames and merges neighbours two by two."""
    return dict(depth=2, hidden_size=32, out_hidden_size=48, num_heads=4, intermediate_size=40, patch_size=4,
                spatial_merge_size=2, temporal_patch_size=2, in_channels=3) | more


def sam(**more: Any) -> dict[str, Any]:
    """A vision tower for pages: windows, relative positions, convolutions to a sixteenth of the patches."""
    return dict(hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4, image_size=64,
                patch_size=4, window_size=7, global_attn_indexes=[1], mlp_dim=40, initializer_range=0.02) | more


def prompt(visual: int, before: int = 5, after: int = 9, *, token: int = IMAGE,
           **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Text, an image of so many tokens, text."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 90, (1, before + visual + after), generator=generator)
    ids[:, before:before + visual] = token
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids)) | more


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def grid_prompt(patch: int, *, frames: int = 2, visual: int = 16) -> dict[str, torch.Tensor]:
    """8 x 8 patches, each of so many frames; merged two by two they are 16 tokens."""
    inputs = prompt(visual, before=6, pixel_values=pixels(64, 3 * frames * patch ** 2),
                    image_grid_thw=torch.tensor([[1, 8, 8]]))
    inputs["input_ids"][:, 5] = START
    return inputs


def video_grid_prompt(patch: int, *, frames: int = 2, visual: int = 16) -> dict[str, torch.Tensor]:
    """A video: twice 4 x 8 patches, each of so many frames; merged two by two they are 16 tokens."""
    inputs = prompt(visual, before=6, token=VIDEO, pixel_values_videos=pixels(64, 3 * frames * patch ** 2),
                    video_grid_thw=torch.tensor([[2, 4, 8]]))
    inputs["input_ids"][:, 5] = START
    return inputs


def typed(inputs: dict[str, torch.Tensor], name: str = "mm_token_type_ids") -> dict[str, torch.Tensor]:
    """The inputs, and which of their tokens are an image's (1) or a video's (2)."""
    ids = inputs["input_ids"]
    return inputs | {name: (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
