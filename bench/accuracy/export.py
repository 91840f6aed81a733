"""Ship a trained model: ``python -m bench.accuracy.export accuracy_out/seed0`` writes half-precision weights and a card.

Beside them it writes the processor's files, so that transformers' AutoProcessor and ``parvts-fx try`` load the folder by itself;
without a trained folder it writes these alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.examples import Examples, grade, sample_examples
from bench.accuracy.model import build_processor, build_tokenizer
from bench.accuracy.tasks import TASKS, TIDY, Task
from bench.accuracy.train import FACTS
from bench.accuracy.ways import WEIGHTS, generate, load
from bench.tables import markdown, percent

PICTURES, SEED = 250, 999

CARD = """# A small LLaVA for synthetic questions

Written by `python -m bench.accuracy.export`; do not edit by hand.

What it is: {parameters:.1f} M parameters in Hugging Face's LLaVA classes: a CLIP tower of 4 layers, a Llama of 8 layers,
width 128; 144 visual tokens a picture of 96 x 96 pixels. float16 safetensors; load it in float32.

What it is for: to measure what dropping visual tokens costs (`python -m bench.accuracy.evaluate`) and to show it
(`python -m bench.demo`). It knows the synthetic pictures of `bench/accuracy/{scenes}.py`, the {words} words of
`bench/accuracy/{questions}.py`, and nothing else. It was trained on generated pictures alone: no data of anyone's.
The processor's files lie beside the weights.

How it was trained: `{command}` with torch {torch}, {minutes:.0f} minutes of one core:
{steps}. The vision tower first learned what each patch shows, as real towers
are pretrained.

What it can do: right answers, every word, greedy decoding, on {pictures} held-out pictures with one question of each kind
(`--seed {held_out}` of the evaluation's pictures), weights as shipped:

{table}
"""


def write(trained: Path, target: Path) -> None:
    """Convert, measure, describe."""
    facts = json.loads((trained / FACTS).read_text())
    task = TASKS[facts.get("task", TIDY.name)]
    load(trained).half().save_pretrained(target)
    write_processor(target, task)
    model = load(target)
    examples: Examples = sample_examples(PICTURES, SEED, task)
    right = grade(lambda batch: generate(model, batch, task.longest), examples, 40).reshape(PICTURES, len(task.kinds))
    rows = [[kind, percent(share)] for kind, share in zip(task.kinds, right.mean(0))]
    table = markdown(["kind", "right"], [*rows, ["**all**", f"**{percent(right.mean())}**"]])
    (target / "README.md").write_text(CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6, words=len(build_tokenizer(task)), table=table,
        scenes=task.sample.__module__.split(".")[-1], questions=task.ask.__module__.split(".")[-1],
        command=_command(facts, task), pictures=PICTURES, held_out=SEED, minutes=facts["seconds"] / 60,
        torch=torch.__version__.split("+")[0],
        steps=", ".join(f"{count} steps of {name}" for name, count in facts["steps"].items())))


def _command(facts: dict[str, Any], task: Task) -> str:
    """The one that trained a model."""
    of_task = "" if task is TIDY else f"--task {task.name} "
    start = f"--start {facts['start']} " if facts.get("start") else ""
    return f"python -m bench.accuracy.train {of_task}{start}--seed {facts['seed']}"


def write_processor(target: Path, task: Task = TIDY) -> None:
    """The tokenizer, how pictures are prepared, and the form of a prompt, as transformers reads them."""
    build_processor(task).save_pretrained(target)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.export", description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path, nargs="?", help="folder that the training wrote; without it the processor alone")
    parser.add_argument("--to", type=Path, default=WEIGHTS, help="folder for weights and card")
    options = parser.parse_args(arguments)
    if options.trained is None:
        write_processor(options.to)
    else:
        write(options.trained, options.to)
    print(f"Written: {options.to}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
