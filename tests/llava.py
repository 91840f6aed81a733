"""Small LLaVA models with random weights, and prompts for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import transformers

IMAGE_TOKEN, PAD = 3, 0


def build(
    text: str = "llama", *, layers: int = 3, hidden: int = 48, heads: int = 4, groups: int = 2, head_dim: int = 12,
    vocabulary: int = 101, patches: int = 4, attention: str = "sdpa", seed: int = 0,
) -> transformers.LlavaForConditionalGeneration:
    """A LLaVA with ``patches`` squared visual tokens per image; weights large enough that every token matters."""
    patch = 4
    config = transformers.LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=24, intermediate_size=40, num_hidden_layers=1,
            num_attention_heads=2, image_size=patches * patch, patch_size=patch, initializer_range=0.2),
        text_config=dict(
            model_type=text, hidden_size=hidden, intermediate_size=56, num_hidden_layers=layers, head_dim=head_dim,
            num_attention_heads=heads, num_key_value_heads=groups, vocab_size=vocabulary, initializer_range=0.15,
            max_position_embeddings=2048, pad_token_id=PAD, bos_token_id=1, eos_token_id=2),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-1, initializer_range=0.15,
    )
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases: away from one and zero
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    return model


@dataclasses.dataclass
class Prompt:
    inputs: dict[str, torch.Tensor]
    visual: torch.Tensor
    """[batch, seq] bool"""

    @property
    def with_positions(self) -> dict[str, torch.Tensor]:
        """The inputs with the position ids that ``generate`` derives from the attention mask."""
        positions = (self.inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return {**self.inputs, "position_ids": positions}


    def row(self, index: int) -> Prompt:
        """One sample by itself, without padding."""
        mask = self.inputs["attention_mask"][index].bool()
        given = {name: self.inputs[name][index:index + 1, mask] for name in ("input_ids", "attention_mask")}
        visual = given["input_ids"] == IMAGE_TOKEN
        if visual.any():
            pictures = self.inputs["pixel_values"]
            each = int(self.visual.sum()) // len(pictures)
            first = int(self.visual[:index].sum()) // each
            given["pixel_values"] = pictures[first:first + int(visual.sum()) // each]
        return Prompt(given, visual)


def prompt(model: transformers.PreTrainedModel, rows: Sequence[Sequence[int | str]], seed: int = 1) -> Prompt:
    """A batch of prompts, left-padded to the longest.

    Args:
        rows: per sample a sequence of text lengths and "image", as in ``[3, "image", 5]``.
    """
    generator = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    vocabulary = model.config.text_config.vocab_size
    samples = []
    for row in rows:
        parts = [
            torch.full((tokens,), IMAGE_TOKEN) if part == "image"
            else torch.randint(4, vocabulary, (part,), generator=generator) for part in row
        ]
        samples.append(torch.cat(parts))
    longest = max(len(sample) for sample in samples)
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for index, sample in enumerate(samples):
        ids[index, longest - len(sample):] = sample
        mask[index, longest - len(sample):] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    images = sum(part == "image" for row in rows for part in row)
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, vision.image_size, vision.image_size, generator=generator)
    return Prompt(inputs, ids == IMAGE_TOKEN)


def text_model(model: transformers.PreTrainedModel) -> torch.nn.Module:
    return model.model.language_model


def finish(model: transformers.PreTrainedModel):
    return lambda hidden: model.lm_head(text_model(model).norm(hidden))
