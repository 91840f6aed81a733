"""What pruning costs in accuracy: ``python -m bench.accuracy.evaluate``.

Three studies on held-out pictures, each question answered by greedy decoding: scoring rules, migration depth and fusion,
and ParVTS beside other methods. Results are kept after every way to answer, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import logging
import math
import multiprocessing
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console

from bench.accuracy.examples import grade, sample_examples
from bench.accuracy.model import LAYERS
from bench.accuracy.results import plot, summarise, tables
from bench.accuracy.tasks import TASKS, TIDY, Task
from bench.accuracy.ways import WEIGHTS, Way, load, prepare
from bench.measuring import machine
from bench.methods import named
from bench.tables import progress
from parvts_fx.cost import flops_of
from parvts_fx.options import Options
from parvts_fx.scores import AUTO, known_rules, reads_attention
from parvts_fx.stages import Stage

RESULTS = Path(__file__).parents[1] / "results"
KEPT = (48, 32, 16, 8, 4)
"""Of the 144 of one picture: 1/3, 2/9, 1/9, 1/18, 1/36."""

DEPTHS = (0, 1, 2, 3, 4, 6, 8)
"""Migration depths that are compared, as far as the model has so many layers."""

BATCH = 40
DEFAULT = Options()


def ways(
    study: str, depth: int, score: str, fusion: str | float, counts: Sequence[int] = KEPT, layers: int = LAYERS,
    merge: str | None = "clusters", task: Task = TIDY,
) -> list[Way]:
    """What one study compares. The full model is among all of them.

    Args:
        layers: of the model's decoder.
        counts: visual tokens kept, for rules every second of them.
        merge: what becomes of dropped tokens where rules are compared.
    """
    chosen = {"migration_depth": depth, "score": score, "fusion": fusion, "merge": None}
    full = [whole_of(task)]
    if study == "rules":
        rules = [rule for rule in known_rules() if rule != "auto" and not reads_attention(rule)]
        return full + [Way("parvts", kept, chosen | {"score": rule, "merge": merge}) for kept in counts[::2] for rule in rules]
    if study == "depth":
        tried = [depth for depth in DEPTHS if depth <= layers]
        forms = [{"fusion": "attention", "merge": "clusters"}, {"fusion": "attention", "merge": None}, {"fusion": 0.5}]
        return full + [Way("parvts", kept, chosen | {"migration_depth": depth} | form)
                       for kept in counts[1:3] for form in forms for depth in tried]
    before = {"migration_depth": 0, "fusion": "attention", "merge": None}
    both = {"fusion": "attention"}
    return full + [way for kept in counts for way in (
        *_with_and_without(Way("parvts", kept, chosen | both)),
        *_with_and_without(Way("parvts, balanced", kept, chosen | both | {"score": "balanced"})),
        *_with_and_without(Way("joint", kept, chosen | both | {"paths": "joint"})),
        *_with_and_without(Way("pruned before layer 0", kept, before | {"score": score})),
        *(both_ways for name, rule in (("looking ahead", "look_ahead"), ("chosen late", score)) if depth
          for both_ways in _with_and_without(Way(name, kept, stages=(Stage(at=depth, keep=kept, rule=rule),)))),
        *_with_and_without(Way("FastV's schedule", kept, stages=named("fastv")(kept))),
        *_with_and_without(Way("PyramidDrop's schedule", kept, stages=named("pyramiddrop")(kept))),
        *_with_and_without(Way("parvts, random choice", kept, chosen | both | {"score": "random"})),
        Way("parvts fusion 0.5", kept, chosen | {"fusion": 0.5}),
        Way("the same, positions counted anew", kept, {"score": score}, "chosen"),
        *(Way(rule, kept, before | {"score": rule}) for rule in ("random", "uniform", "diverse")),
        Way("downsampled", kept, {}, "pooled"),
    )]


def whole_of(task: Task) -> Way:
    """The full model's way, which every study holds."""
    return Way("full", task.visual, kind="chosen")


def _with_and_without(way: Way) -> tuple[Way, Way]:
    """A way that drops tokens, and the same with what is dropped merged into what is kept."""
    if way.stages:
        merged = dataclasses.replace(way, stages=tuple(dataclasses.replace(stage, merge="clusters") for stage in way.stages))
    else:
        merged = dataclasses.replace(way, options=way.options | {"merge": "clusters"})
    return way, dataclasses.replace(merged, name=f"{way.name}, merged")


def answer_all(way: Way, weights: Path, pictures: int, seed: int, name: str = TIDY.name) -> dict[str, Any]:
    """Everything that is kept of one way, on the task of that name; runs in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch._dynamo.reset()
    model, task = load(weights), TASKS[name]
    prepared = prepare(model, way, task)
    examples = sample_examples(pictures, seed, task)
    right = grade(prepared.answer, examples.with_visual(prepared.visual) if prepared.visual else examples, BATCH)
    flops = prepared.flops() - (_tower_flops(model, task) if prepared.counts_tower else 0)
    return {"name": way.name, "kept": way.kept, "options": way.settings, "key": way.key, "decoder_flops": flops / BATCH,
            "right": np.packbits(right).tobytes().hex()}


def _tower_flops(model: Any, task: Task) -> int:
    pixels = torch.zeros(BATCH * task.pictures, 3, 96, 96)
    return flops_of(lambda: model.model.get_image_features(pixel_values=pixels))[0]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy.evaluate", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("studies", nargs="*", default=["rules", "depth", "methods"], metavar="study",
                        help="rules, depth, methods")
    parser.add_argument("--task", choices=TASKS, default=TIDY.name, help="that the model was trained on")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with a trained model")
    parser.add_argument("--pictures", type=int, default=250, help="held-out pictures, or prompts with several, and one "
                        "question of each kind to each")
    parser.add_argument("--seed", type=int, default=1000, help="of the held-out pictures")
    parser.add_argument("--depth", type=int, default=DEFAULT.migration_depth, help="migration depth where it is not varied")
    parser.add_argument("--score", default=AUTO, help="scoring rule where it is not varied")
    parser.add_argument("--fusion", default=DEFAULT.fusion, type=_fusion, help="fusion where it is not varied")
    parser.add_argument("--merge", choices=["clusters", "none"], default="clusters",
                        help="what becomes of dropped tokens where rules are compared")
    parser.add_argument("--kept", type=int, nargs="+", default=None,
                        help="visual tokens kept of a prompt's [a third to a 36th]")
    parser.add_argument("--ways", nargs="+", metavar="NAME", help="of the study of methods these alone, by name, with and "
                        'without ", merged" [all]')
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--name", default="accuracy", help="of the files under bench/results")
    parser.add_argument("--markdown", action="store_true", help="print the tables as pages have them")
    parser.add_argument("--fresh", action="store_true", help="forget kept results")
    options = parser.parse_args(arguments)
    if unknown := set(options.studies) - {"rules", "depth", "methods"}:
        parser.error(f"unknown study {sorted(unknown)[0]!r}: choose from rules, depth, methods")
    options.task = TASKS[options.task]
    pictures, visual, kinds = options.task.pictures, options.task.visual, len(options.task.kinds)
    options.kept = options.kept or [kept * pictures for kept in KEPT]
    if bad := [kept for kept in options.kept if not 1 <= kept <= visual or kept % pictures]:
        parser.error(f"--kept: {bad[0]} is not within 1 to {visual}, or not a multiple of {pictures}")
    if options.pictures * kinds % BATCH:
        parser.error(f"--pictures: {options.pictures} must be a multiple of {BATCH // math.gcd(BATCH, kinds)}")
    return options


def _fusion(text: str) -> str | float:
    return text if text == "attention" else float(text)


def main(arguments: list[str] | None = None) -> int:
    """Answer, keep, show."""
    options = parse_arguments(arguments)
    console = Console()
    path = RESULTS / f"{options.name}.json"
    task = options.task
    settings = {"pictures": options.pictures, "seed": options.seed, "weights": options.weights.name}
    settings |= {} if task is TIDY else {"task": task.name}
    kept: dict[str, Any] = {}
    if path.exists() and not options.fresh:
        held = json.loads(path.read_text())
        kept = held["ways"] if held["settings"] == settings else {}
    layers = transformers.AutoConfig.from_pretrained(options.weights).text_config.num_hidden_layers
    asked = {study: ways(study, options.depth, options.score, options.fusion, options.kept, layers,
                          None if options.merge == "none" else options.merge, task)
             for study in options.studies}
    if options.ways:
        asked = {study: [way for way in compared if way.name.removesuffix(", merged") in ("full", *options.ways)]
                 for study, compared in asked.items()}
    todo = {way.key: way for study in asked.values() for way in study if way.key not in kept}
    with progress(console) as display, concurrent.futures.ProcessPoolExecutor(
            options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        shown = display.add_task("answering", total=len(todo))
        running = {pool.submit(answer_all, way, options.weights, options.pictures, options.seed, task.name): way
                   for way in todo.values()}
        for done in concurrent.futures.as_completed(running):
            kept[running[done].key] = done.result()
            path.write_text(json.dumps({"machine": machine(torch.device("cpu")), "settings": settings, "ways": kept},
                                       indent=1) + "\n")
            display.update(shown, advance=1, description=running[done].key[:60])
    full = kept[whole_of(task).key]
    for study, compared in asked.items():
        rows = summarise([kept[way.key] for way in compared], full, options.pictures, task.kinds)
        for sheet in tables(study, rows, task.kinds):
            if options.markdown:
                print(f"\n{sheet.markdown()}\n")
            else:
                console.print(sheet)
        console.print(f"Written: {plot(study, rows, RESULTS / f'{options.name}_{study}.png', task.visual)}")
    console.print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
