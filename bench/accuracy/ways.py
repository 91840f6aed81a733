"""Every way to answer with fewer visual tokens that the evaluation compares.

Whatever the stages, every layer caches the rows that are left in the end. So FastV and PyramidDrop stand here with their
schedules: the first word is the same, but for the words behind it the authors' own code still has all tokens in the caches
of the layers in front of a choice, and answers longer questions better (50 pictures, 16 of 144 kept, one word: 66 % right in
both; several: 46 % with FastV's whole caches, 17 % with these).
"""

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
from bench.accuracy.examples import Answer
from bench.accuracy.scenes import GRID, IMAGE
from bench.accuracy.tasks import TIDY, Task
from bench.models import rectangle
from parvts_fx.cost import count_flops, flops_of
from parvts_fx.places import places_of
from parvts_fx.scores import ATTENDED, reads_places, rule_named
from parvts_fx.stages import Stage

WEIGHTS = Path(__file__).parent / "weights"
"""The trained model that comes with the project."""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to answer, at one number of visual tokens."""

    name: str
    kept: int
    """Visual tokens of a prompt."""

    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of parvts_fx.compile, for what goes through it as one stage at layer 0."""

    kind: str = "parvts"
    """"parvts", "pooled" (features averaged) or "chosen" (chosen features in front of the decoder, positions counted anew)."""

    stages: tuple[Stage, ...] = ()
    """In place of ``kept`` and ``options``, for other schedules."""

    @property
    def settings(self) -> dict[str, Any]:
        """The options as JSON holds them; no word of merging where nothing is merged."""
        stages = [{"at": stage.at, "keep": stage.keep, "rule": stage.rule} | ({"merge": stage.merge} if stage.merge else {})
                  for stage in self.stages]
        options = {name: held for name, held in self.options.items() if (name, held) != ("merge", None)}
        return options | ({"stages": stages} if stages else {})

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


def prepare(model: Any, way: Way, task: Task = TIDY) -> Prepared:
    """A copy of the model that answers in one way; what it costs without the vision tower."""
    model = copy.deepcopy(model)
    if way.kind == "parvts":
        return _compiled(model, way, task)
    projector, kept = model.model.multi_modal_projector, way.kept // task.pictures
    wrapped = Pooled(projector, kept) if way.kind == "pooled" else Chosen(projector, kept, **way.options)
    model.model.multi_modal_projector = wrapped
    counted = _Counted(model, task.longest)
    return Prepared(counted.answer, lambda: counted.flops, counts_tower=True, visual=way.kept)


def generate(model: Any, batch: dict[str, torch.Tensor], longest: int = TIDY.longest) -> torch.Tensor:
    """The ids that greedy decoding adds, [batch, up to longest + 1]: as many words, and the end."""
    ids = model.generate(**batch, max_new_tokens=longest + 1, do_sample=False)
    return ids[:, batch["input_ids"].shape[1]:]


def generate_by_hand(model: Any, batch: dict[str, torch.Tensor], longest: int = TIDY.longest) -> torch.Tensor:
    """The same by calls of the model: they run the vision tower in one graph with the decoder, as generate does not."""
    mask, said = batch["attention_mask"], []
    output = model(**batch, position_ids=(mask.cumsum(1) - 1).clamp(min=0), logits_to_keep=1)
    for _ in range(longest + 1):
        said.append(output.logits[:, -1].argmax(-1, keepdim=True))
        positions = mask.sum(1, keepdim=True)
        mask = F.pad(mask, (0, 1), value=1)
        output = model(input_ids=said[-1], attention_mask=mask, position_ids=positions,
                       past_key_values=output.past_key_values)
    return torch.cat(said, 1)


def _compiled(model: Any, way: Way, task: Task) -> Prepared:
    """Through parvts_fx.compile."""
    counts: list[int] = []
    pruning = {"stages": way.stages} if way.stages else {"keep_tokens": way.kept, **way.options}

    def lowering(module: GraphModule, example_inputs: list[object]) -> Callable[..., Any]:
        if not counts:  # the prefill comes first
            counts.append(count_flops(module))
        return module.forward

    parvts_fx.compile(model, lowering=lowering, strict=True, **pruning)
    in_graph = way.options.get("score") == ATTENDED
    if in_graph:  # transformers hooks into the tower at its first call, which would break the graph
        model.model.get_image_features(pixel_values=torch.zeros(1, 3, IMAGE, IMAGE))
    answer = generate_by_hand if in_graph else generate
    return Prepared(lambda batch: answer(model, batch, task.longest), lambda: counts[0], counts_tower=in_graph)


class _Counted:
    """Generates eagerly, counting the first prefill's FLOPs."""

    def __init__(self, model: Any, longest: int):
        self.model, self.longest, self.flops = model, longest, 0

    def answer(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not self.flops:
            self.flops, _ = flops_of(lambda: self.model(**batch, logits_to_keep=1))
        return generate(self.model, batch, self.longest)


class Pooled(nn.Module):
    """Downsampling: projected features of each picture averaged over a coarser grid."""

    def __init__(self, projector: nn.Module, kept: int):
        super().__init__()
        self.projector = projector
        self.shape = rectangle(kept)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        grid = self.projector(features).transpose(1, 2).unflatten(2, (GRID, GRID))
        return F.adaptive_avg_pool2d(grid, self.shape).flatten(2).transpose(1, 2)


class Chosen(nn.Module):
    """Pruning in front of the decoder with positions counted anew: a shorter prompt with chosen features of each picture."""

    def __init__(self, projector: nn.Module, kept: int, score: str = "auto"):
        super().__init__()
        self.projector, self.kept, self.rule = projector, kept, rule_named(score)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected = self.projector(features)
        visual = torch.ones(projected.shape[:2], dtype=torch.bool)
        ranked = self.rule(projected, visual, *([places_of(visual)] if reads_places(self.rule) else []))
        rows = ranked.argsort(dim=-1, descending=True, stable=True)[:, :self.kept].sort(-1).values
        return projected.gather(1, rows[..., None].expand(-1, -1, projected.shape[-1]))
