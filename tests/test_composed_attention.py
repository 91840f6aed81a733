"""Attention that torch keeps in one function together with its projections: ``nn.MultiheadAttention`` and what is made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parvts_fx
from parvts_fx.analysis.calls import attention_nodes, composed, is_fused_attention
from parvts_fx.capture import capture as captured_copy
from parvts_fx.capture.write_out_attention import WriteOutAttention
from parvts_fx.pipeline import Work
from parvts_fx.stages import Stage
from tests import any_decoder
from tests.comparing import TOLERANCE
from tests.models.generating import scattered
from tests.plain_graphs import capture
from tests.reference import relative_error

WIDTH, HEADS, LENGTH, VISUAL, KEPT, IMAGE_TOKEN, VOCABULARY = 24, 4, 13, 6, 2, 1, 31
CHOICES: dict[str, dict[str, Any]] = {
    "attention": dict(keep_tokens=KEPT, migration_depth=1, score=scattered, merge=None),
    "weights": dict(keep_tokens=KEPT, migration_depth=2, score=scattered, fusion=0.4),
    "merged": dict(stages=(Stage(at=1, keep=KEPT, rule=scattered, migrate=1, merge="clusters"),)),
}


class Block(nn.Module):
    """Attention with its weights, which nobody reads, or without; rows first or not."""

    def __init__(self, batch_first: bool, weights: bool):
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first), weights
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor, src_mask: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        inner = self.first(x) if self.attention.batch_first else self.first(x).transpose(0, 1)
        seen = self.attention(inner, inner, inner, need_weights=self.weights, attn_mask=src_mask,
                              key_padding_mask=src_key_padding_mask)[0]
        x = x + (seen if self.attention.batch_first else seen.transpose(0, 1))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def layer(kind: str) -> nn.Module:
    if kind.startswith("layer"):
        return nn.TransformerEncoderLayer(WIDTH, HEADS, 40, dropout=0, batch_first=True, norm_first=kind == "layer")
    return Block("rows first" not in kind, "weights" in kind)


KINDS = "attention", "attention, float masks", "attention, rows first", "attention with weights", "layer", "layer, norms behind"


class Decoder(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.layers, self.norm = nn.ModuleList(layer(kind) for _ in range(3)), nn.LayerNorm(WIDTH)
        self.head, self.is_bool = nn.Linear(WIDTH, VOCABULARY), "float" not in kind
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.3 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
        self.eval().requires_grad_(False)

    def forward(self, ids: Tensor, features: Tensor, hidden: Tensor) -> Tensor:
        """``hidden`` [batch, seq]: keys that nobody sees."""
        x = self.tokens(ids).masked_scatter((ids == IMAGE_TOKEN)[..., None], features)
        x = x + self.places(torch.arange(ids.shape[1]))
        ahead = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        if not self.is_bool:
            ahead, hidden = (torch.zeros(mask.shape).masked_fill(mask, float("-inf")) for mask in (ahead, hidden))
        for each in self.layers:
            x = each(x, src_mask=ahead, src_key_padding_mask=hidden)
        return self.finish(x)

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def prompt(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (batch, LENGTH), generator=generator)
    for row in range(batch):
        ids[row, 2 + row:2 + row + VISUAL] = IMAGE_TOKEN
    hidden = torch.zeros(batch, LENGTH, dtype=torch.bool)
    hidden[0, 1] = True
    return ids, torch.randn(batch * VISUAL, WIDTH, generator=generator), hidden


@pytest.mark.slow
@pytest.mark.supports("Models", "decoders of nn.MultiheadAttention and of nn.TransformerEncoderLayer")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
@torch.no_grad()
def test_decoders(choice: dict[str, Any], kind: str) -> None:
    """The second batch has a size with a name in the graph, beside a prompt's length without."""
    plain = Decoder("attention" if kind.startswith("attention") else kind)
    model = torch.compile(Decoder(kind), backend="parvts", options=dict(choice, lowering="eager", strict=True))
    for batch in (1, 2):
        ids, features, hidden = prompt(batch)
        expected = any_decoder.wanted(
            plain, plain.layers, plain.finish, dict(ids=ids, features=features, hidden=hidden), ids == IMAGE_TOKEN,
            lambda output: (output, None, None), **choice)
        logits = model(ids, features, hidden)
        assert logits.shape[1] == LENGTH - VISUAL + KEPT
        assert any_decoder.error(logits, [], expected) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_written_out(kind: str) -> None:
    """The values stay; weights that nobody reads are gone."""
    module, inputs = capture(Decoder(kind), *prompt(2))
    work = captured_copy(module, inputs)
    assert len(composed(work.graph)) == len(attention_nodes(work.graph)) == 3
    assert WriteOutAttention().run(Work(work)).matches == 3 and not composed(work.graph)
    work.graph.lint()
    work.recompile()
    ((ours,), (wanted,)) = work(*inputs), module(*inputs)
    assert relative_error(ours, wanted) <= 1e-6
    assert all(node.users for node in work.graph.nodes if node.op == "call_function")
    assert sum(map(is_fused_attention, work.graph.nodes)) == len(attention_nodes(work.graph)) == 3


@pytest.mark.parametrize("masks", [(), ("src_mask",), ("src_key_padding_mask",), ("src_mask", "src_key_padding_mask")], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
@torch.no_grad()
def test_whole_layers(norm_first: bool, activation: str, masks: tuple[str, ...]) -> None:
    """Of every form that they have."""
    whole = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 40, activation=activation, layer_norm_eps=0.1, batch_first=True, norm_first=norm_first).eval()
    held = dict(src_mask=torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), src_key_padding_mask=prompt(2)[2])
    module, inputs = capture(lambda x, *given: whole(x, **dict(zip(masks, given))), torch.randn(2, LENGTH, WIDTH),
                             *(held[name] for name in masks))
    work = captured_copy(module, inputs)
    assert WriteOutAttention().run(Work(work)).matches == 1 and len(attention_nodes(work.graph)) == 1
    work.recompile()
    ((ours,), (wanted,)) = work(*inputs), module(*inputs)
    assert relative_error(ours, wanted) <= 1e-6


class Showing(Decoder):
    def forward(self, ids: Tensor, features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(ids).masked_scatter((ids == IMAGE_TOKEN)[..., None], features)
        seen, weights = self.layers[0].attention(x, x, x)
        return self.finish(x + seen), weights


@torch.no_grad()
def test_weights_that_are_handed_out() -> None:
    model = Showing("attention")
    compiled = torch.compile(model, backend="parvts", options=dict(keep_tokens=KEPT, lowering="eager", strict=True))
    with pytest.raises(parvts_fx.NotRewritten, match="attention weights are"):
        compiled(*prompt(1))


@pytest.mark.parametrize("kind", ["attention", "layer"])
@torch.no_grad()
def test_rows_that_differ(kind: str) -> None:
    """A batch with other numbers of visual tokens: each row as it is by itself, at the end."""
    ids, features, hidden = prompt(2)
    hidden[:], ids[1, 5:9] = False, 7
    features = features[:VISUAL + 2]
    plain, choice = Decoder(kind), dict(CHOICES["attention"], keep_tokens=1)
    expected = [
        any_decoder.wanted(
            plain, plain.layers, plain.finish, dict(ids=ids[row:row + 1], features=own, hidden=hidden[row:row + 1]),
            ids[row:row + 1] == IMAGE_TOKEN, lambda output: (output, None, None), **choice)
        for row, own in enumerate((features[:VISUAL], features[VISUAL:]))]
    logits = parvts_fx.compile(Decoder(kind), lowering="eager", strict=True, **choice)(ids, features, hidden)
    for row, alone in zip(logits, expected):
        assert any_decoder.error(row[None, -len(alone[0].rows):], [], alone) <= TOLERANCE
