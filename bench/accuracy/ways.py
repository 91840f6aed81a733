"""Every way to answer with fewer visual tokens that the evaluation compares."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.fx import GraphModule

import parvts_fx
from bench.accuracy.examples import LONGEST_ANSWER, Answer
from bench.accuracy.questions import END, IMAGE_TOKEN, PAD
from bench.accuracy.scenes import GRID, IMAGE
from bench.measuring import flops_of
from bench.models import rectangle
from parvts_fx.scores import ATTENDED, rule_named
from parvts_fx.stages import Stage

FASTV_LAYERS = 2
WEIGHTS = Path(__file__).parent / "weights"
"""The trained model that comes with the project."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to answer, at one number of visual tokens."""

    name: str
    kept: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of parvts_fx.compile, for what goes through it as one stage at layer 0."""

    kind: str = "parvts"
    """"parvts", "FastV", "pooled" (features averaged) or "chosen" (chosen features in front of the decoder, positions
    counted anew)."""

    stages: tuple[Stage, ...] = ()
    """In place of ``kept`` and ``options``, for other schedules."""

    @property
    def settings(self) -> dict[str, Any]:
        """The options as JSON holds them."""
        stages = [{"at": stage.at, "keep": stage.keep, "rule": stage.rule} for stage in self.stages]
        return self.options | ({"stages": stages} if stages else {})

    @property
    def key(self) -> str:
        settings = ", ".join(f"{name}={held}" for name, held in sorted(self.settings.items()))
        return f"{self.name} | {settings} | {self.kept}"


@dataclasses.dataclass
class Prepared:
    """A model that answers in one way."""

    answer: Answer
    flops: Callable[[], int]
    """Of a prefill of one batch; to be called behind an answer."""

    counts_tower: bool = False
    """Whether the vision tower is among them; generate runs it in front of the graph that parvts rewrites."""

    visual: int | None = None
    """Image tokens that its prompts must have; None for one a patch."""


def load(weights: Path = WEIGHTS) -> transformers.LlavaForConditionalGeneration:
    """A trained model in float32, for inference."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def prepare(model: Any, way: Way) -> Prepared:
    """A copy of the model that answers in one way; what it costs without the vision tower."""
    model = copy.deepcopy(model)
    if way.kind == "parvts":
        return _compiled(model, way)
    if way.kind == "FastV":
        fastv = FastV(model, way.kept)
        return Prepared(fastv.answer, lambda: fastv.flops)
    projector = model.model.multi_modal_projector
    wrapped = Pooled(projector, way.kept) if way.kind == "pooled" else Chosen(projector, way.kept, **way.options)
    model.model.multi_modal_projector = wrapped
    counted = _Counted(model)
    return Prepared(counted.answer, lambda: counted.flops, counts_tower=True, visual=way.kept)


def generate(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The ids that greedy decoding adds, [batch, up to LONGEST_ANSWER + 1]."""
    ids = model.generate(**batch, max_new_tokens=LONGEST_ANSWER + 1, do_sample=False)
    return ids[:, batch["input_ids"].shape[1]:]


def generate_by_hand(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same by calls of the model: they run the vision tower in one graph with the decoder, as generate does not."""
    mask, said = batch["attention_mask"], []
    output = model(**batch, position_ids=(mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1)
    for _ in range(LONGEST_ANSWER + 1):
        said.append(output.logits[:, -1].argmax(-1, keepdim=True))
        positions = mask.sum(1, keepdim=True)
        mask = F.pad(mask, (0, 1), value=1)
        output = model(input_ids=said[-1], attention_mask=mask, position_ids=positions,
                       past_key_values=output.past_key_values)
    return torch.cat(said, 1)


def _compiled(model: Any, way: Way) -> Prepared:
    """Through parvts_fx.compile."""
    counts: list[int] = []
    pruning = {"stages": way.stages} if way.stages else {"keep_tokens": way.kept, **way.options}

    def lowering(module: GraphModule, example_inputs: list[object]) -> Callable[..., Any]:
        if not counts:  # the prefill comes first
            counts.append(parvts_fx.api.count_flops(module))
        return module.forward

    parvts_fx.compile(model, lowering=lowering, strict=True, **pruning)
    in_graph = way.options.get("score") == ATTENDED
    if in_graph:  # transformers hooks into the tower at its first call, which would break the graph
        model.model.get_image_features(pixel_values=torch.zeros(1, 3, IMAGE, IMAGE))
    answer = generate_by_hand if in_graph else generate
    return Prepared(lambda batch: answer(model, batch), lambda: counts[0], counts_tower=in_graph)


class _Counted:
    """Generates eagerly, counting the first prefill's FLOPs."""

    def __init__(self, model: Any):
        self.model, self.flops = model, 0

    def answer(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not self.flops:
            self.flops, _ = flops_of(lambda: self.model(**batch, logits_to_keep=1))
        return generate(self.model, batch)


class Pooled(nn.Module):
    """Downsampling: projected features averaged over a coarser grid."""

    def __init__(self, projector: nn.Module, kept: int):
        super().__init__()
        self.projector = projector
        self.shape = rectangle(kept)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        grid = self.projector(features).transpose(1, 2).unflatten(2, (GRID, GRID))
        return F.adaptive_avg_pool2d(grid, self.shape).flatten(2).transpose(1, 2)


class Chosen(nn.Module):
    """Pruning in front of the decoder with positions counted anew: a shorter prompt with chosen features."""

    def __init__(self, projector: nn.Module, kept: int, score: str = "auto"):
        super().__init__()
        self.projector, self.kept, self.rule = projector, kept, rule_named(score)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected = self.projector(features)
        ranked = self.rule(projected, torch.ones(projected.shape[:2], dtype=torch.bool))
        rows = ranked.argsort(dim=-1, descending=True, stable=True)[:, :self.kept].sort(-1).values
        return projected.gather(1, rows[..., None].expand(-1, -1, projected.shape[-1]))


class FastV:
    """FastV (arXiv 2403.06764) with K = 2 and a prompt padded on the left, written from the paper's description.

    Behind the second layer the visual tokens stay that the prompt's last row attends to most there, averaged over heads.
    Each layer of the cache keeps the rows that the layer has had. For Llama's layers.
    """

    def __init__(self, model: Any, kept: int):
        self.model, self.kept, self.flops = model, kept, 0
        self.text = model.model.language_model

    def answer(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, valid = batch["input_ids"], batch["attention_mask"].bool()
        features = torch.cat(list(self.model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output))
        hidden = self.model.get_input_embeddings()(ids)
        hidden = hidden.masked_scatter((ids == IMAGE_TOKEN)[..., None], features)
        cache = transformers.DynamicCache(config=self.text.config)
        if self.flops:
            logits, seen = self.prefill(hidden, ids == IMAGE_TOKEN, valid, cache)
        else:
            self.flops, (logits, seen) = flops_of(lambda: self.prefill(hidden, ids == IMAGE_TOKEN, valid, cache))
        return self.decode(logits, seen, valid.sum(1), cache)

    def prefill(self, hidden: torch.Tensor, visual: torch.Tensor, valid: torch.Tensor,
                cache: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits of the last row [batch, vocabulary]; for each layer which of its cached rows may be seen."""
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        seen, before, rotary = [], hidden, self.text.rotary_emb(hidden, positions)
        for index, layer in enumerate(self.text.layers):
            if index == FASTV_LAYERS:
                rows = self.choose(before, rotary, visual, valid, cache)
                hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
                positions, valid = positions.gather(1, rows), valid.gather(1, rows)
                rotary = self.text.rotary_emb(hidden, positions)
            size = hidden.shape[1]
            causal = torch.ones(size, size, dtype=torch.bool).tril()
            mask = (causal & valid[:, None, :]) | torch.eye(size, dtype=torch.bool)
            before = hidden
            hidden = layer(hidden, attention_mask=mask[:, None], position_embeddings=rotary, past_key_values=cache,
                           use_cache=True)
            seen.append(valid)
        return self.model.lm_head(self.text.norm(hidden[:, -1])), seen

    def choose(self, entering: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], visual: torch.Tensor,
               valid: torch.Tensor, cache: Any) -> torch.Tensor:
        """Rows of text and of the visual tokens with the most attention, in order: [batch, rows]."""
        layer, held = self.text.layers[FASTV_LAYERS - 1], cache.layers[FASTV_LAYERS - 1]
        attention = layer.self_attn
        query = attention.q_proj(layer.input_layernorm(entering[:, -1:])).unflatten(-1, (-1, attention.head_dim))
        query = query.transpose(1, 2)
        turned = torch.cat([-query[..., attention.head_dim // 2:], query[..., :attention.head_dim // 2]], -1)
        cosine, sine = (part[:, None, -1:] for part in rotary)
        weights = (query * cosine + turned * sine) @ held.keys.transpose(2, 3) * attention.scaling
        weights = weights.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1).mean((1, 2))
        order = weights.masked_fill(~visual, -1).argsort(dim=-1, descending=True, stable=True)
        keep = ~visual
        keep.scatter_(1, order[:, :self.kept], True)
        return keep.nonzero()[:, 1].view(len(keep), -1)

    def decode(self, logits: torch.Tensor, seen: list[torch.Tensor], position: torch.Tensor, cache: Any) -> torch.Tensor:
        """Greedy words, [batch, LONGEST_ANSWER + 1]."""
        words = [logits.argmax(-1)]
        for _ in range(LONGEST_ANSWER):
            hidden = self.model.get_input_embeddings()(words[-1])[:, None]
            rotary = self.text.rotary_emb(hidden, position[:, None])
            for index, layer in enumerate(self.text.layers):
                seen[index] = F.pad(seen[index], (0, 1), value=True)
                hidden = layer(hidden, attention_mask=seen[index][:, None, None], position_embeddings=rotary,
                               past_key_values=cache, use_cache=True)
            following = self.model.lm_head(self.text.norm(hidden[:, -1])).argmax(-1)
            words.append(following.masked_fill((words[-1] == END) | (words[-1] == PAD), PAD))
            position = position + 1
        return torch.stack(words, 1)
