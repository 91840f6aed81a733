"""Every named schedule beside Inductor, with as many tokens left in the end: ``python -m bench.schedules``.

A LLaVA-like model with random weights; the prefill with its vision tower, as calls of the model have it (a schedule may read
attention weights in there). All have Inductor's choice of matrix products, and take turns. The decoder's FLOPs are counted
on the graphs. Results go into ``bench/results/schedules.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import figures
from bench.arguments import parser_of
from bench.demo import HEAD_DIM, build_model
from bench.measuring import build, in_turns, machine, many_compiles, seconds, spread
from bench.methods import LOWERINGS, Method, nothing, scaled
from bench.models import build_scene
from bench.tables import progress, quieten
from parvts_fx.schedules import SCHEDULES
from parvts_fx.stages import Stage


def fitted(schedule: Sequence[Stage], layers: int) -> tuple[Stage, ...]:
    """A schedule in a model of so many layers; what lies beyond them is moved to the last ones."""
    def count(given: int | float) -> int:
        return math.floor(given * layers + 0.5) if isinstance(given, float) else given

    stages = []
    for stage in schedule:
        at = min(count(stage.at), layers - 1)
        stages.append(dataclasses.replace(stage, at=at, migrate=min(count(stage.migrate), layers - at)))
    return tuple(stages)


def methods(layers: int) -> list[Method]:
    """Inductor first, then every named schedule."""
    return [Method("inductor"), *(
        Method(name, lambda kept, stages=stages: fitted(scaled(stages, kept), layers)) for name, stages in SCHEDULES.items())]


def measure(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """A row for each method, Inductor's first."""
    backend = LOWERINGS[given.lowering]
    scene = build_scene(build_model(given.layers, given.width), given.visual)
    compared = methods(given.layers)
    whole = build(compared[0], scene, given.kept, backend=nothing).flops
    seeing = dataclasses.replace(scene, features=scene.pixels)
    with progress(console) as display:
        task = display.add_task("compiling", total=len(compared) + given.repeats + 1)
        built = []
        for method in compared:
            display.update(task, description=f"compiling {method.name}")
            built.append(build(method, seeing, given.kept, backend=backend))
            display.advance(task)
        display.update(task, description="measuring")
        calls = [functools.partial(seconds, one.run_prefill, scene.ids.device) for one in built]
        taken = in_turns(calls, given.repeats, 1, functools.partial(display.advance, task))
    tower = built[0].flops - whole
    return [{
        "method": one.method.name, "stages": [dataclasses.asdict(stage) for stage in one.method.stages(given.kept)]
        if one.method.stages else [], "kept": one.run_prefill()[1].layers[-1].keys.shape[2] - scene.prompt + scene.visual,
        "flops": one.flops - tower, "flops_share": (one.flops - tower) / whole, "prefill": spread(times), "seconds": times,
        "compile_seconds": one.compile_seconds,
    } for one, times in zip(built, taken)]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("schedules", __doc__, (
        ("layers", 16, "decoder layers"), ("width", 1024, f"the decoder's width, a multiple of {HEAD_DIM}"),
        ("visual", 576, "visual tokens"), ("kept", 64, "visual tokens that are left in the end"),
        ("repeats", 5, "measured calls of each, behind one to warm up")))
    given = parser.parse_args(arguments)
    if given.width % HEAD_DIM:
        parser.error(f"--width: {given.width} is no multiple of {HEAD_DIM} (the size of a head)")
    if not 1 <= given.kept <= given.visual:
        parser.error(f"--kept: {given.kept} is not within 1 to --visual={given.visual}")
    if min(given.layers, given.repeats) < 1:
        parser.error("--layers and --repeats: at least 1")
    return given


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, show, write; returns what the JSON holds."""
    given = parse_arguments(arguments)
    quieten()
    console = Console()
    with many_compiles():
        rows = measure(given, console)
    settings = {name: held for name, held in vars(given).items() if name != "out"}
    found = {"machine": machine(torch.device("cpu")), "settings": settings, "rows": rows}
    out = Path(given.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    console.print(figures.schedules(found))
    console.print("Written:", given.out)
    return found


if __name__ == "__main__":
    main()
