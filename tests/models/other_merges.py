"""Visual features that reach the prompt in other ways: through learned queries, by a mask, in front of the text."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tests.models.registry import IMAGE, VIDEO, builder, clip, pixels, prompt, text, vision

TOWER = vision(image_size=16, patch_size=4, initializer_range=0.02)
QUERIES = 10


def with_queries(config_class: Any, **tokens: int) -> Any:
    """A transformer whose learned queries read the image; a language model with learned positions."""
    return config_class(
        vision_config=TOWER, num_query_tokens=QUERIES, **tokens,
        qformer_config=dict(hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4,
                            vocab_size=90, encoder_hidden_size=32),
        text_config=dict(model_type="opt", hidden_size=48, ffn_dim=56, num_hidden_layers=3, num_attention_heads=4,
                         vocab_size=100, max_position_embeddings=256, word_embed_proj_dim=48, pad_token_id=1))


def instruction() -> dict[str, torch.Tensor]:
    """Text for the queries' transformer."""
    ids = torch.arange(20, 27)[None]
    return dict(qformer_input_ids=ids, qformer_attention_mask=torch.ones_like(ids))


@builder("learned queries read the image; generate merges them and calls a sub-model's", name="blip-2",
         part="language_model")
def blip_2():
    config = with_queries(hf.Blip2Config, image_token_index=IMAGE)
    return hf.Blip2ForConditionalGeneration(config), prompt(QUERIES, pixel_values=pixels(1, 3, 16, 16))


@builder("learned queries read the image and an instruction; generate merges them and calls a sub-model's",
         part="language_model")
def instructblip():
    config = with_queries(hf.InstructBlipConfig, image_token_index=IMAGE)
    return hf.InstructBlipForConditionalGeneration(config), prompt(
        QUERIES, pixel_values=pixels(1, 3, 16, 16), **instruction())


@builder("learned queries read each frame and an instruction; generate merges them and calls a sub-model's",
         token=VIDEO, part="language_model")
def instructblipvideo():
    config = with_queries(hf.InstructBlipVideoConfig, video_token_index=VIDEO)
    return hf.InstructBlipVideoForConditionalGeneration(config), prompt(
        4 * QUERIES, token=VIDEO, pixel_values=pixels(1, 4, 3, 16, 16), **instruction())


KOSMOS = dict(vocab_size=100, max_position_embeddings=256, embed_dim=48, layers=3, ffn_dim=56, attention_heads=4)


def placed_by_mask(model: Any, **more: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
    model.image_to_text_projection.latent_query.mul_(0.02)  # else the queries see nothing but themselves
    inputs = prompt(16, **more)
    return model, inputs | {"image_embeds_position_mask": (inputs["input_ids"] == IMAGE).long()}


@builder("features written where a mask says, learned positions", name="kosmos-2", token=None, part="text_model")
def kosmos_2():
    config = hf.Kosmos2Config(text_config=KOSMOS, vision_config=TOWER, latent_query_num=16)
    return placed_by_mask(hf.Kosmos2ForConditionalGeneration(config), pixel_values=pixels(1, 3, 16, 16))


@builder("features written where a mask says, positions computed from the ids", name="kosmos-2.5", token=None)
def kosmos_2_5():
    config = hf.Kosmos2_5Config(
        text_config=KOSMOS, latent_query_num=16,
        vision_config=dict(hidden_size=32, patch_embed_hidden_size=3 * 4 * 4, intermediate_size=40, head_dim=8,
                           num_hidden_layers=2, num_attention_heads=4, max_num_patches=64))
    rows_and_columns = torch.cartesian_prod(torch.arange(1, 9), torch.arange(1, 9))[None]
    patches = torch.cat([rows_and_columns, pixels(1, 64, 3 * 4 * 4)], -1)
    return placed_by_mask(hf.Kosmos2_5ForConditionalGeneration(config), flattened_patches=patches)


@builder("features joined in front of the text, seen by all of it; learned positions", token=None)
def git():
    config = hf.GitConfig(vocab_size=100, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
                          intermediate_size=56, max_position_embeddings=128, vision_config=TOWER)
    return hf.GitForCausalLM(config), prompt(0, before=4, pixel_values=pixels(1, 3, 16, 16))


# A policy, not a language model: it answers with actions and has no generate.
@builder("features chosen by torch.where; a second decoder makes actions from the first one's cache", generates=False)
def pi0():
    config = hf.PI0Config(
        vlm_config=dict(
            model_type="paligemma", vision_config=clip("siglip_vision_model", projection_dim=48),
            text_config=text(model_type="gemma"), image_token_index=IMAGE, projection_dim=48, hidden_size=48),
        dit_config=text(model_type="gemma", hidden_size=36, intermediate_size=44), chunk_size=5, max_state_dim=8,
        max_action_dim=7)
    return hf.PI0ForConditionalGeneration(config), prompt(
        16, before=0, pixel_values=pixels(1, 1, 3, 16, 16), pixel_attention_mask=torch.ones(1, 1, dtype=torch.bool),
        state=pixels(1, 8), noise=pixels(1, 5, 7), timestep=torch.tensor([0.5]))
