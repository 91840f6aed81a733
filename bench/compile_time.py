"""What compiling costs: ``python -m bench.compile_time``.

First the rewriting alone (analysis, passes, cheap verification) of LLaVA-1.5-7B's decoder with 8 to 64 layers, captured
on fake tensors; then the whole first call of a smaller model beside plain Inductor's, each in a process of its own: with
empty compile caches, with those of the process before, and with empty ones into which the artifacts of that process were
loaded (``torch.compiler.load_cache_artifacts``), as on another machine. Results go into ``bench/results/compile_time.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

import parvts_fx
from bench import figures
from bench.demo import build_model
from bench.flops import CONFIGURATIONS, capture_prefill, rewrite
from bench.measuring import in_own_process, machine
from bench.models import Prefill, build_scene
from bench.tables import quieten
from parvts_fx.options import parse_options

RESULTS = Path(__file__).parent / "results" / "compile_time.json"
OPTIONS = {"keep_tokens": 64, "migration_depth": 3}
LAYERS = (8, 16, 32, 64)
KINDS = ("inductor", "parvts")


def rewriting_seconds(layers: int, repeats: int) -> tuple[float, int]:
    """Seconds of one rewriting (median) and the graph's number of nodes."""
    graph, inputs = capture_prefill(dataclasses.replace(CONFIGURATIONS[0], layers=layers))
    seconds = [rewrite(graph, inputs, parse_options(OPTIONS))[1] for _ in range(repeats + 1)]
    return statistics.median(seconds[1:]), len(graph.graph.nodes)  # the first one imports things


@torch.no_grad()
def first_call(kind: str, layers: int, width: int, artifacts: Path | None = None) -> float:
    """Seconds of a prefill's first call in this process, without those of a second one.

    Args:
        artifacts: a file of compile caches: loaded first where it is there, else written behind the calls.
    """
    quieten()
    loads = artifacts is not None and artifacts.exists()
    if artifacts is not None and loads:
        torch.compiler.load_cache_artifacts(artifacts.read_bytes())
    scene = build_scene(build_model(layers, width), 576, tower=False)
    prefill = Prefill(scene.model)
    call = torch.compile(prefill) if kind == "inductor" else parvts_fx.compile(prefill, strict=True, **OPTIONS)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        call(*scene.inputs)
        seconds.append(time.perf_counter() - start)
    if artifacts is not None and not loads and (saved := torch.compiler.save_cache_artifacts()) is not None:
        artifacts.write_bytes(saved[0])
    return seconds[0] - seconds[1]


def three_starts(kind: str, layers: int, width: int) -> dict[str, float]:
    """Seconds of first calls: cold, in a second process, and elsewhere with the first one's artifacts."""
    with tempfile.TemporaryDirectory() as folder:
        command = "bench.compile_time", "--one", kind, str(layers), str(width)
        artifacts = f"{folder}/artifacts"
        return {"cold": float(in_own_process(*command, artifacts, caches=f"{folder}/caches")),
                "second": float(in_own_process(*command, caches=f"{folder}/caches")),
                "carried": float(in_own_process(*command, artifacts))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_time", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each")
    parser.add_argument("--short", action="store_true", help="8 and 16 layers, one measurement, nothing is written")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        kind, layers, width, *files = given.one
        print(first_call(kind, int(layers), int(width), *map(Path, files)))
        return
    console = Console()
    repeats, sizes, width = (1, LAYERS[:2], 256) if given.short else (given.repeats, LAYERS, 1024)
    rewriting, whole = [], []
    for layers in track(sizes, "rewriting", console=console):
        seconds, nodes = rewriting_seconds(layers, repeats)
        rewriting.append({"layers": layers, "nodes": nodes, "seconds": round(seconds, 3)})
    for layers in track(sizes[:2], "whole compile", console=console):
        found: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
        for _ in range(repeats):
            for kind in KINDS:
                for start, taken in three_starts(kind, layers, width).items():
                    found[kind].setdefault(start, []).append(taken)
        whole.append({"layers": layers, "width": width, "seconds": found})
    held = {"machine": machine(torch.device("cpu")), "rewriting": rewriting, "whole": whole}
    console.print(figures.compile_time(held))
    if not given.short:
        RESULTS.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
