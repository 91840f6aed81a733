"""What the model of cost predicts beside what is measured: ``python -m bench.cost``.

On the CPU at hand, for the prompts of ``bench.compare``: the processor's rates and the compiled prefills are measured in turns,
so that what else runs on the machine hits both. With one thread (``--threads 1``) its own time is taken, which other work does
not lengthen. For GPUs, what ``bench.gpu`` has measured on one stands beside what is predicted. Results go into
``bench/results/cost.json``; those of another number of threads stay there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from bench import compare, figures
from bench.demo import build_model
from bench.flops import CONFIGURATIONS, capture_prefill, rewrite
from bench.measuring import Built, build, in_turns, machine, many_compiles, spread
from bench.methods import LOWERINGS, QUICKER, methods
from bench.models import build_scene
from bench.tables import quieten
from parvts_fx.cost import Tally, count, cpu, predict
from parvts_fx.options import parse_options

STUDIES = ("cpu", "gpu")
COMPARED = ("inductor", "parvts", f"inductor {QUICKER}", f"parvts {QUICKER}")
OPTIONS: dict[str, dict[str, Any]] = {"parvts": {}, "parvts, not merged": {"merge": None}}
PROMPTS = (("LLaVA-1.5-7B", 1, 64), ("LLaVA-1.5-7B", 8, 64), ("Qwen2.5-VL-7B", 1, 142))
"""Configurations of bench.flops, prompts in a batch, visual tokens kept: what is predicted for GPUs."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model and a batch that bench.compare measures."""

    name: str
    settings: compare.Settings
    batch: int


LAYOUTS = (
    Layout("batch 1", compare.Settings(), 1), Layout("batch 4", compare.Settings(), 4), Layout("--short", compare.SHORT, 1))


def on_cpu(layout: Layout, lowering: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Measured and predicted times of one layout's prefills, a row for each method."""
    settings, known = layout.settings, {method.name: method for method in methods(layout.settings.depth)}
    model = build_model(settings.layers, settings.width)
    scene = build_scene(model, settings.visual, layout.batch, tower=False)
    with many_compiles():
        built = [build(known[name], scene, settings.kept, backend=LOWERINGS[lowering]) for name in COMPARED]
    tallies = [count(one.graph) for one in built if one.graph is not None]
    clock = cpu.clock_of(torch.get_num_threads())

    def time(one: Built, tally: Tally) -> tuple[float, float]:
        kernels = "auto" if one.method.quicker_products else "inductor"
        before = predict(tally, "cpu", linear_kernels=kernels).kernels
        start = clock()
        one.run_prefill()
        taken = clock() - start
        cpu.forget()
        return taken, statistics.mean((before, predict(tally, "cpu", linear_kernels=kernels).kernels))

    turns = in_turns([lambda pair=pair: time(*pair) for pair in zip(built, tallies)], repeats)
    for one, tally, taken in zip(built, tallies, turns):
        measured, predicted = (spread(values) for values in zip(*taken))
        assert measured is not None and predicted is not None
        yield {"layout": layout.name, "layers": settings.layers, "width": settings.width, "batch": layout.batch,
               "threads": torch.get_num_threads(), "method": one.method.name, "measured": measured, "predicted": predicted,
               "apart": statistics.median(guess / true for true, guess in taken) - 1, "flops": tally.flops}
    torch._dynamo.reset()


def on_gpus(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What is predicted for GPUs, a row for each prompt, method and GPU; what bench.gpu has measured on one stands beside it."""
    measured = {(found["model"], found["batch"], row["method"]): (found, row)
                for found in json.loads((figures.RESULTS / "gpu.json").read_text()) if found.get("mode") == "default"
                for row in found.get("rows", ())}
    for model, batch, kept in PROMPTS:
        config = next(config for config in CONFIGURATIONS if config.name == model)
        graph, inputs = capture_prefill(config, batch, torch.bfloat16)
        tallies = {"inductor": count(graph)}
        for name, options in OPTIONS.items():
            tallies[name] = count(rewrite(graph, inputs, parse_options(dict(keep_tokens=kept, **options)))[0].module)
        for name, tally in tallies.items():
            found, row = measured.get((model, batch, name), ({}, {}))
            there = found.get("machine", {}).get("gpu")
            for gpu in names:
                predicted = predict(tally, gpu)
                known = {"kernels": sum(row["profile"][part] for part in ("products", "attention", "rest")),
                         "call": row["prefill"]["median"]} if there == predicted.processor else None
                yield {"model": model, "batch": batch, "visual": config.visual, "kept": kept, "method": name,
                       "gpu": predicted.processor, "kernels": predicted.kernels, "call": predicted.seconds,
                       "launches": predicted.launches, "parts": predicted.parts, "measured": known}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", default=STUDIES, metavar="study", help=", ".join(STUDIES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's, on the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="turns, behind one that warms up")
    parser.add_argument("--layouts", nargs="+", choices=[layout.name.strip("-") for layout in LAYOUTS],
                        default=[layout.name.strip("-") for layout in LAYOUTS])
    parser.add_argument("--lowering", choices=LOWERINGS, default="inductor", help="eager: to try the script itself")
    parser.add_argument("--out", type=Path, default=figures.RESULTS / "cost.json")
    given = parser.parse_args(arguments)
    if unknown := set(given.studies) - set(STUDIES):
        parser.error(f"unknown study {sorted(unknown)[0]!r}: choose from {', '.join(STUDIES)}")
    return given


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, predict, show, write."""
    given = parse_arguments(arguments)
    quieten()
    torch.set_num_threads(given.threads)
    console = Console()
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    if "cpu" in given.studies:
        layouts = [layout for layout in LAYOUTS if layout.name.strip("-") in given.layouts]
        key, load = f"cpu, {given.threads} threads", os.getloadavg()[0]
        rows = [row for layout in track(layouts, "layouts", console=console)
                for row in on_cpu(layout, given.lowering, given.repeats)]
        others = [row for row in found.get(key, {}).get("rows", ()) if row["layout"] not in {row["layout"] for row in rows}]
        found[key] = {"machine": machine(torch.device("cpu")), "load": [load, os.getloadavg()[0]], "rows": [*rows, *others]}
    if "gpu" in given.studies:
        found["gpu"] = {"machine": machine(torch.device("cpu")), "rows": list(on_gpus(("H100", "H200", "A100", "L4")))}
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    for sheet in figures.cost_on_cpu(found) if "cpu" in given.studies else ():
        console.print(sheet)
    if "gpu" in given.studies:
        console.print(figures.cost_on_gpus(found["gpu"]))
    return found


if __name__ == "__main__":
    main()
