"""Decoders of other packages than transformers, with random weights: timm's towers, OpenCLIP's blocks and its CoCa."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import parvts_fx
from parvts_fx import Stage
from tests import any_decoder
from tests.comparing import TOLERANCE
from tests.models.generating import scattered
from tests.models.registry import IMAGE

PIXELS, PATCH, PATCHES = 16, 4, 16
WIDTH, VOCABULARY, LAYERS = 48, 100, 3
KEPT, TEXT = 4, 9
CHOICES: dict[str, dict[str, Any]] = {
    "attention": dict(keep_tokens=KEPT, migration_depth=1, score=scattered, merge=None),
    "weights": dict(keep_tokens=KEPT, migration_depth=2, score=scattered, fusion=0.4),
    "merged": dict(stages=(Stage(at=1, keep=KEPT, rule=scattered, migrate=1, merge="clusters"),)),
}
every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
every_way = pytest.mark.parametrize("by_string", [True, False], ids=["string", "compile"])

_LACKING: list[torch.library.Library] = []
"""Operators of torchvision's compiled library where that cannot be loaded: declared, and never called."""


@functools.cache
def package(name: str) -> ModuleType:
    """timm and OpenCLIP import torchvision, of which not every build can be loaded beside every torch."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        lacking = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            lacking.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LACKING.append(lacking)
    return importlib.import_module(name)


def tower() -> nn.Module:
    """timm's vision transformer, [batch, 3, side, side] to [batch, patches, 24]."""
    return package("timm").create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=PIXELS, patch_size=PATCH, embed_dim=24, depth=2, num_heads=2,
        num_classes=0, class_token=False, global_pool="")


def drawn(model: nn.Module) -> nn.Module:
    """With random weights, large enough that every token matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    return model.eval().requires_grad_(False)


def pictures(batch: int) -> Tensor:
    return torch.randn(batch, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1))


def words(batch: int, length: int = TEXT) -> Tensor:
    return torch.randint(4, 90, (batch, length), generator=torch.Generator().manual_seed(2))


def compiled(model: Any, by_string: bool, **choice: Any) -> Any:
    options = dict(choice, lowering="eager", strict=True)
    return torch.compile(model, backend="parvts", options=options) if by_string else parvts_fx.compile(model, **options)


class Captioner(nn.Module):
    """timm's tower in front of GPT-2: features in place of placeholders, or before all text."""

    def __init__(self, prefixed: bool):
        super().__init__()
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=4, attn_pdrop=0, embd_pdrop=0,
            resid_pdrop=0)
        self.tower, self.bridge = tower(), nn.Linear(24, WIDTH)
        self.text, self.prefixed = transformers.GPT2LMHeadModel(config), prefixed

    def forward(self, input_ids: Tensor, pixel_values: Tensor, **more: Any) -> Any:
        features, x = self.bridge(self.tower.forward_features(pixel_values)), self.text.transformer.wte(input_ids)
        if self.prefixed:
            x = torch.cat([features, x], dim=1)
        else:
            x = x.masked_scatter((input_ids == IMAGE)[..., None], features)
        return self.text(inputs_embeds=x, **more)

    def finish(self, x: Tensor) -> Tensor:
        return self.text.lm_head(self.text.transformer.ln_f(x))


@pytest.mark.supports("Other packages", "a timm tower in front of GPT-2, features as a prefix or in place of placeholders")
@every_way
@pytest.mark.parametrize("prefixed", [True, False], ids=["prefix", "placeholders"])
@every_choice
@torch.no_grad()
def test_timm_and_gpt2(choice: dict[str, Any], prefixed: bool, by_string: bool) -> None:
    model, runs = drawn(Captioner(prefixed)), compiled(drawn(Captioner(prefixed)), by_string, **choice)
    for batch in (1, 2):
        ids, pixels = words(batch), pictures(batch)
        visual = (torch.arange(PATCHES + TEXT) < PATCHES).expand(batch, -1)
        if not prefixed:
            ids = torch.cat([ids[:, :3], torch.full((batch, PATCHES), IMAGE), ids[:, 3:]], dim=1)
            visual = ids == IMAGE
        inputs = dict(input_ids=ids, pixel_values=pixels, use_cache=True)
        expected = any_decoder.wanted(model, model.text.transformer.h, model.finish, inputs, visual, **choice)
        output = runs(**inputs)
        assert output.logits.shape[1] == TEXT + KEPT
        caches = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        assert any_decoder.error(output.logits, caches, expected) <= TOLERANCE


class Causal(nn.Module):
    """OpenCLIP's blocks over visual features and text as one causal sequence."""

    def __init__(self, **settings: Any):
        super().__init__()
        transformer = package("open_clip.transformer").Transformer
        self.tower, self.bridge, self.tokens = tower(), nn.Linear(24, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.places, self.norm, self.head = nn.Embedding(64, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.decoder = transformer(WIDTH, LAYERS, 4, mlp_ratio=1.5, **settings)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        x = torch.cat([self.bridge(self.tower.forward_features(pixels)), self.tokens(ids)], dim=1)
        x = x + self.places(torch.arange(x.shape[1], device=x.device))
        return self.finish(self.decoder(x, attn_mask=torch.full((x.shape[1],) * 2, float("-inf")).triu(1)))

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


SETTINGS: dict[str, dict[str, Any]] = {
    "MultiheadAttention": {}, "rows first": dict(batch_first=False), "scaled": dict(ls_init_value=0.5),
    "own attention": dict(qk_norm=True, scale_heads=True, scale_attn_inner=True),
}


@pytest.mark.supports("Other packages", "OpenCLIP's transformer blocks over features and text as one causal sequence")
@every_way
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@every_choice
@torch.no_grad()
def test_blocks_of_open_clip(choice: dict[str, Any], settings: dict[str, Any], by_string: bool) -> None:
    """The reference cuts samples out of batches that come first; the same weights may run with rows first."""
    model, runs = drawn(Causal(**settings | {"batch_first": True})), compiled(drawn(Causal(**settings)), by_string, **choice)
    for batch in (1, 2):
        ids, pixels = words(batch), pictures(batch)
        visual = (torch.arange(PATCHES + TEXT) < PATCHES).expand(batch, -1)
        expected = any_decoder.wanted(
            model, model.decoder.resblocks, model.finish, dict(ids=ids, pixels=pixels), visual,
            lambda output: (output, None, None), **choice)
        logits = runs(ids, pixels)
        assert logits.shape[1] == TEXT + KEPT
        assert any_decoder.error(logits, [], expected) <= TOLERANCE


@pytest.mark.supports("Left unrewritten", "OpenCLIP's CoCa, whose decoder reads features by cross-attention, with the reason")
@torch.no_grad()
def test_coca() -> None:
    sizes = dict(context_length=12, vocab_size=VOCABULARY, width=32, heads=4, layers=2)
    model = drawn(package("open_clip.coca_model").CoCa(
        embed_dim=32, multimodal_cfg=dict(sizes, mlp_ratio=2), text_cfg=dict(sizes, embed_cls=True, output_tokens=True),
        vision_cfg=dict(image_size=PIXELS, patch_size=PATCH, width=24, head_width=12, layers=2, mlp_ratio=2, output_tokens=True,
                        attentional_pool=True, attn_pooler_queries=8, attn_pooler_heads=2)))
    ids, pixels = words(2, 12), pictures(2)
    wanted = model(pixels, ids)["logits"]
    assert not torch.allclose(wanted, model(pixels.flip(0), ids)["logits"])
    parvts_fx.compile(model, lowering="eager", migration_depth=1)
    with pytest.warns(parvts_fx.ParvtsWarning, match="they enter by cross-attention"):
        actual = model(pixels, ids)["logits"]
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
