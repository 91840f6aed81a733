"""Train the model of one seed and task: ``python -m bench.accuracy.train --seed 0``.

First the vision tower learns what each patch shows (real towers are pretrained too), then the whole model answers
questions, many to a prompt's pictures (batches.py), until it is good at every kind, and cools down at a falling rate. Kinds
that it still gets wrong are asked more often. With ``--start`` it begins as a model that was trained before. A batch is a
function of the seed, the step and the last validation, so a training that was stopped goes on from its checkpoint as if it
had not been. Matrix products run in bfloat16, weights stay in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench.accuracy.batches import IGNORED, Batch, question_batch, stream, vision_batch
from bench.accuracy.model import LAYERS, build_model, take_over
from bench.accuracy.scenes import EVERYWHERE
from bench.accuracy.tasks import TASKS, TIDY, Task

VALIDATION_SCENES = 64
CHECKPOINT, FACTS = "checkpoint.pt", "training.json"
TARGET = 0.95
"""Share of right answers on every kind of question behind which the model cools down."""

KNOWN_SHARE = 0.05
"""A kind that is always right keeps this part of its share of the questions."""

SEEN_SHARE = 0.1
"""Weight of the vision tower's own loss while the whole model learns questions."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of the training: its schedule and what it minimises."""

    name: str
    steps: int
    pictures: int
    rate: float
    warmup: int = 100

    def factor(self, step: int) -> float:
        """The learning rate at a step as a share of ``rate``: linear warm-up, then half a cosine to nearly zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


class Trainee(torch.nn.Module):
    """The model, and linear heads that say what its vision tower has seen."""

    def __init__(self, compiled: bool = False, layers: int = LAYERS, task: Task = TIDY) -> None:
        super().__init__()
        self.task = task
        self.model = build_model(layers, task=task)
        self.model.set_attn_implementation("eager")  # a third of the time of SDPA's backward on CPU
        self.heads = torch.nn.Linear(self.model.config.vision_config.hidden_size, sum(task.labels.values()))
        self._features: torch.Tensor | None = None
        if compiled:
            for part in (self.model.model.language_model, self.model.model.vision_tower):
                part.forward = torch.compile(part.forward, dynamic=True)
        self.model.model.vision_tower.register_forward_hook(self._keep_features)

    def _keep_features(self, tower: torch.nn.Module, arguments: tuple, output: object) -> None:
        self._features = output.last_hidden_state[:, 1:]

    def vision_loss(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of what each patch shows, summed over the kinds of labels."""
        self.model.model.vision_tower(pixel_values=pixels, output_hidden_states=True)
        return self.seen_loss(labels)

    def seen_loss(self, labels: torch.Tensor) -> torch.Tensor:
        """The same for the pictures that the tower saw last. Patches that show something count once more on their own:
        a letter stands in few of 144."""
        scores = self.heads(self._features).float().split(list(self.task.labels.values()), dim=-1)
        loss = torch.zeros(())
        for index, (name, score) in enumerate(zip(self.task.labels, scores)):
            each = F.cross_entropy(score.flatten(0, 1), labels[..., index].flatten(), reduction="none")
            loss = loss + each.mean()
            if name not in EVERYWHERE:
                shown = (labels[..., index] > 0).flatten()
                loss = loss + (each * shown).sum() / shown.sum()
        return loss

    def answer_logits(self, batch: Batch) -> torch.Tensor:
        """[batch, S, vocabulary] float32"""
        mask = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, -1e9)
        return self.model(
            input_ids=batch.ids, pixel_values=batch.pixels, attention_mask=mask, position_ids=batch.positions,
            use_cache=False).logits.float()

    def answer_loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the answers' words, and a share of what the tower must go on to see."""
        answers = F.cross_entropy(
            self.answer_logits(batch).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
        return answers + SEEN_SHARE * self.seen_loss(batch.labels)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.train", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default=TIDY.name, help="what pictures show and questions ask")
    parser.add_argument("--start", type=Path, default=None, metavar="FOLDER",
                        help="weights to begin with in place of random ones, of as many layers and the same task or \"tidy\"")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the decoder")
    parser.add_argument("--vision-steps", type=int, default=1000, help="steps on the vision tower alone")
    parser.add_argument("--steps", type=int, default=5000, help="most steps on questions, ended where every kind is "
                        f"right to {100 * TARGET:.0f} %%")
    parser.add_argument("--cooling", type=int, default=600, help="steps with a falling rate at the end")
    parser.add_argument("--pictures", type=int, default=16, help="pictures in a step on questions")
    parser.add_argument("--questions", type=int, default=16, help="questions to a prompt's pictures")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate on questions")
    parser.add_argument("--validate", type=int, default=250, help="steps between validations and checkpoints")
    parser.add_argument("--out", type=Path, default=None, help="folder for checkpoint and weights [accuracy_out/seed<N>, "
                        "and task and number of layers if they are not the default]")
    parser.add_argument("--no-compile", action="store_true", help="train eagerly: slower steps, no minute of compiling")
    parser.add_argument("--fresh", action="store_true", help="start anew even if there is a checkpoint")
    options = parser.parse_args(arguments)
    depth = "" if options.layers == LAYERS else f"-{options.layers}layers"
    task = "" if options.task == TIDY.name else f"{options.task}-"
    options.out = options.out or Path("accuracy_out") / f"{task}seed{options.seed}{depth}"
    return options


def build_optimisers(trainee: torch.nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside both transformers, AdamW for embeddings, heads, norms and biases."""
    matrices, others = [], []
    for name, parameter in trainee.named_parameters():
        inner = parameter.dim() == 2 and ".layers." in name
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.AdamW(others, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01),
        torch.optim.Muon(matrices, lr=stage.rate, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]


@torch.no_grad()
def validate(trainee: Trainee, questions: int, seed: int) -> dict[str, tuple[int, int]]:
    """Right answers and questions by kind on held-out scenes; right is an answer of which every word is."""
    counts = {kind: [0, 0] for kind in trainee.task.kinds}
    for step in range(VALIDATION_SCENES // 16):
        batch = question_batch(stream(seed, "held out", step), 16, questions, task=trainee.task)
        wrong = (trainee.answer_logits(batch).argmax(-1) != batch.targets) & (batch.targets != IGNORED)
        for row, asked in enumerate(batch.questions):
            missed = set(batch.segments[row][wrong[row]].tolist())
            for number, question in enumerate(asked, 1):
                counts[question.kind][0] += number not in missed
                counts[question.kind][1] += 1
    return {kind: (right, total) for kind, (right, total) in counts.items()}


def describe(counts: dict[str, tuple[int, int]]) -> str:
    """One line with every kind's share of right answers in per cent."""
    kinds = ", ".join(f"{kind} {100 * right / max(1, total):.1f}" for kind, (right, total) in counts.items())
    mean = sum(right / max(1, total) for right, total in counts.values()) / len(counts)
    return f"{100 * mean:.1f} % over kinds: {kinds}"


class Training:
    """A model on its way through the stages; everything that a checkpoint holds."""

    def __init__(self, stages: tuple[Stage, ...], seed: int, path: Path, questions: int, compiled: bool = False,
                 layers: int = LAYERS, task: Task = TIDY, start: Path | None = None):
        self.stages, self.seed, self.path, self.questions = stages, seed, path, questions
        torch.manual_seed(seed)
        self.task, self.trainee = task, Trainee(compiled, layers, task)
        if start is not None:
            take_over(self.trainee.model, start)
        self.stage = self.step = 0
        self.done: list[int] = []
        """Steps of each finished stage."""
        self.seconds = 0.0
        self.shares: dict[str, float] = dict(task.shares)
        """How often each kind of question is asked."""
        self.optimisers = build_optimisers(self.trainee, stages[0])

    def load(self) -> None:
        saved = torch.load(self.path)
        self.stage, self.step, self.seconds = saved["place"]
        self.done, self.shares = saved["done"], saved["shares"]
        self.trainee.load_state_dict(saved["weights"])
        if self.stage < len(self.stages):
            self.optimisers = build_optimisers(self.trainee, self.stages[self.stage])
            for optimiser, content in zip(self.optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(content)

    def save(self) -> None:
        content = {"place": (self.stage, self.step, self.seconds), "done": self.done, "shares": self.shares,
                   "weights": self.trainee.state_dict(),
                   "optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}
        torch.save(content, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)  # a run that is stopped here loses nothing

    def advance(self) -> float:
        """One step; returns its loss."""
        start, stage = time.perf_counter(), self.stages[self.stage]
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = stage.rate * stage.factor(self.step)
        with torch.autocast("cpu", torch.bfloat16):
            if stage.name == "vision":
                loss = self.trainee.vision_loss(*vision_batch(stream(self.seed, "vision", self.step), stage.pictures, self.task))
            else:
                batch = question_batch(stream(self.seed, "train", self.step), stage.pictures // self.task.pictures,
                                       self.questions, self.shares, self.task)
                loss = self.trainee.answer_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - start
        return loss.item()

    def ask_what_is_wrong(self, counts: dict[str, tuple[int, int]]) -> None:
        """Ask each kind of question in proportion to what a validation found wrong of it."""
        self.shares = {kind: self.task.shares[kind] * (KNOWN_SHARE + 1 - right / max(1, total))
                       for kind, (right, total) in counts.items()}

    def finish_stage(self) -> None:
        self.done.append(self.step)
        self.shares = dict(self.task.shares)
        self.stage, self.step = self.stage + 1, 0
        if self.stage < len(self.stages):
            self.optimisers = build_optimisers(self.trainee, self.stages[self.stage])


def main(arguments: list[str] | None = None) -> int:
    """Train, or go on with a training that was stopped."""
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    console = Console()
    stages = (Stage("vision", options.vision_steps, 32, 2e-3),
              Stage("questions", options.steps, options.pictures, options.rate),
              Stage("cooling", options.cooling, options.pictures, options.rate / 2, warmup=20))
    training = Training(stages, options.seed, options.out / CHECKPOINT, options.questions,
                        compiled=not options.no_compile, layers=options.layers, task=TASKS[options.task], start=options.start)
    if training.path.exists() and not options.fresh:
        training.load()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        while training.stage < len(stages):
            stage = stages[training.stage]
            task = progress.add_task(stage.name, total=stage.steps, completed=training.step)
            ended = False
            while training.step < stage.steps and not ended:
                loss = training.advance()
                progress.update(task, completed=training.step, description=f"{stage.name} {loss:.3f}")
                if training.step % options.validate == 0:
                    text = f"{stage.name} {training.step}: loss {loss:.4f}, {training.seconds:.0f} s"
                    if stage.name != "vision":
                        counts = validate(training.trainee, options.questions, options.seed)
                        text += ", " + describe(counts)
                        if stage.name == "questions":
                            training.ask_what_is_wrong(counts)
                        ended = stage.name == "questions" and min(r / max(1, n) for r, n in counts.values()) >= TARGET
                    console.print(text)
                    if not ended:  # then the stage's end is kept, at once
                        training.save()
            training.finish_stage()
            training.save()
    training.trainee.model.save_pretrained(options.out)
    facts = {"seed": options.seed, "layers": options.layers, "steps": dict(zip((stage.name for stage in stages), training.done)),
             "seconds": training.seconds, "task": options.task, "start": options.start and str(options.start)}
    (options.out / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    console.print(f"Written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
