"""Everything that is to be known on a GPU, in one command: ``python -m bench.gpu --together``.

Models of published sizes in bfloat16 with random weights built on the device: the compiled prefill against the eager
reference, times beside Inductor's with and without mode="reduce-overhead", whole answers, batches whose samples differ, and a
profile of what is missing to the bound of the FLOPs. Without a GPU, and with --small, the same on small models in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import together
from bench.configurations import PUBLISHED, SMALL, Configuration
from bench.floor import Floor, decoder_weights
from bench.gpu_answers import Answers
from bench.gpu_check import METHODS, check, run_reference
from bench.measuring import (
    Built,
    Company,
    answer,
    build,
    ceilings,
    in_turns,
    machine,
    many_compiles,
    peak_memory,
    profile_call,
    seconds,
    spread,
)
from bench.methods import LOWERINGS, inductor
from bench.models import cache_bytes
from bench.tables import Sheet, mebibytes, milliseconds, quieten
from bench.uneven_batches import Uneven

COMPARED = ("inductor", "parvts, not merged", "parvts")
PAIR = (COMPARED[0], COMPARED[-1])
LONGEST = 25
"""Kernels of each profile that are written down."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A compiled method, and what its graph says it costs."""

    built: Built
    flops: int | None
    floor: Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Prefills(together.Task[list[Ready]]):
    """One configuration at one batch size: numerics, times, memory, and the profile."""

    config: Configuration
    batch: int
    given: argparse.Namespace
    methods: tuple[str, ...] = COMPARED
    mode: str | None = None
    """Of Inductor. With CUDA graphs there are times alone: the rest is as it is without."""

    def prepare(self) -> list[Ready]:
        quieten()
        config, given, device = self.config, self.given, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = config.build(device, torch.float32 if given.small else torch.bfloat16, given.layers)
        scene, backend = config.scene(model, self.batch), LOWERINGS[given.lowering]
        if self.mode and given.lowering == "inductor":
            backend = inductor(self.mode)
        company = Company(backend)
        with torch.no_grad(), many_compiles():
            built = [build(METHODS[name], scene, config.kept, backend=backend) for name in self.methods]
            if config.answers and self.mode is None:
                for one in built:
                    answer(company.join(one), 2)
            for one in 2 * built:  # CUDA graphs are recorded in the second call, and replayed from the third on
                one.run_prefill()
        return [Ready(one, one.flops, Floor(one.graph, decoder_weights(model))) for one in built]

    @torch.no_grad()
    def measure(self, ready: list[Ready]) -> dict[str, Any]:
        built = [one.built for one in ready]
        config, given, scene = self.config, self.given, built[0].scene
        model, device = scene.model, scene.model.device
        prefills = in_turns([lambda one=one: seconds(one.run_prefill, device) for one in built], given.repeats, 3)
        rows: list[dict[str, Any]] = [
            {"method": one.method.name, "prefill": spread(times), "compile_seconds": one.compile_seconds}
            for one, times in zip(built, prefills)]
        found = {"model": config.name, "layers": len(model.model.language_model.layers), "batch": self.batch,
                 "visual": config.visual, "kept": config.kept, "tokens": given.tokens, "dtype": str(model.dtype),
                 "mode": self.mode or "default", "machine": machine(device), "rows": rows}
        if self.mode:
            return found
        try:
            return self._look_closer(found, ready)
        except Exception:  # what was measured so far is not lost
            return found | {"failed": traceback.format_exc()}

    def _look_closer(self, found: dict[str, Any], ready: list[Ready]) -> dict[str, Any]:
        """With what else is to be known of the same methods."""
        built = [one.built for one in ready]
        config, given, scene = self.config, self.given, built[0].scene
        model, device = scene.model, scene.model.device
        exact = run_reference(scene, config.kept, torch.float32)
        rounded = None if model.dtype == torch.float32 else run_reference(scene, config.kept, model.dtype)
        held = check(built[-1], exact, rounded)
        floors = [_replayed(one.floor, device) for one in ready]
        alone = in_turns([lambda floor=floor: seconds(floor, device) for floor in floors], given.repeats, 2)
        for row, one, flops, floor in zip(found["rows"], built, [one.flops for one in ready], alone):
            seen, kernels = profile_call(one.run_prefill, device)
            row |= {"flops": flops, "floor": spread(floor), "peak_memory": peak_memory(one.run_prefill, device),
                    "cache_bytes": cache_bytes(one.run_prefill()[1]), "profile": dataclasses.asdict(seen),
                    "launches": sum(kernel.runs for kernel in kernels),
                    "kernels": [dataclasses.asdict(kernel) for kernel in kernels[:LONGEST]]}
        if config.answers:
            taken = in_turns([lambda one=one: answer(one, given.tokens)[0] for one in built], max(1, given.repeats // 2))
            for row, times in zip(found["rows"], taken):
                row |= {name: spread([getattr(each, name) for each in times]) for name in ("first_token", "step", "whole")}
        return found | {"ceilings": ceilings(device) if device.type == "cuda" else None,
                        "check": dataclasses.asdict(held) | {"holds": held.holds}}


def _replayed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """On a GPU a CUDA graph of the call: what it costs without the time that Python takes to launch it."""
    if device.type != "cuda":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def show(console: Console, result: dict[str, Any]) -> None:
    """One configuration's results as tables."""
    title = (f"{result['model']}, {result['dtype']}, batch {result['batch']}, "
             f"{result['kept']} of {result['visual']} kept, mode {result['mode']}")
    headings = ["method", "prefill", "ratio", "FLOPs allow", "of floor", "launches", "first token", "decode step",
                f"{result['tokens']} tokens", "peak memory", "KV cache"]
    shown = {"first_token": milliseconds, "step": milliseconds, "whole": milliseconds, "peak_memory": mebibytes,
             "cache_bytes": mebibytes}
    plain, *others = result["rows"]
    console.print(Sheet(title, headings, [[
        row["method"], milliseconds(row["prefill"]), f"{plain['prefill']['median'] / row['prefill']['median']:.2f}x",
        f"{plain['flops'] / row['flops']:.2f}x" if "flops" in row else "",
        f"{row['prefill']['median'] / row['floor']['median']:.2f}" if "floor" in row else "", str(row.get("launches", "")),
        *(write(row[name]) if name in row else "" for name, write in shown.items())] for row in result["rows"]]))
    if "check" not in result:
        return
    for row in others:
        share = row["flops"] / plain["flops"]
        parts = [(name, 1e3 * plain["profile"][name], 1e3 * row["profile"][name]) for name in plain["profile"]]
        console.print(Sheet("Profile of the prefill", ["ms", "inductor", "bound", row["method"], "missing"], [
            [name, *(f"{held:.2f}" for held in (whole, share * whole, part, part - share * whole))]
            for name, whole, part in parts]))
    found = result["check"]
    console.print(f"against the eager reference: logits {found['logits']:.1e} of {found['allowed_logits']:.1e}, cache"
                  f" {found['cache']:.1e} of {found['allowed_cache']:.1e} allowed"
                  + ("" if found["holds"] else ": [bold red]does not agree[/bold red]"))


def tasks_of(given: argparse.Namespace) -> dict[str, together.Task[Any]]:
    """What is asked for, by name."""
    configurations = SMALL if given.small else PUBLISHED
    found: dict[str, together.Task[Any]] = {}
    for config in configurations:
        for batch in config.batches:
            if batch <= given.largest_batch:
                name = f"{config.name}, batch {batch}"
                found[name] = Prefills(config, batch, given, COMPARED if batch > 1 else PAIR)
                found[f"{name}, with CUDA graphs"] = Prefills(config, batch, given, PAIR, "reduce-overhead")
    first = configurations[0]
    found[f"{first.name}, answers on a static cache"] = Answers(first, max(first.batches[:2]), given)
    if not given.small:
        found["Qwen2.5-VL, samples that differ"] = Uneven(dict(
            layers=given.layers or 12, width=3584, text=48, keep_ratio=1 / 9, repeats=given.repeats, lowering=given.lowering))
    return {name: task for name, task in found.items() if re.search(given.only, name, re.IGNORECASE)}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", default=not torch.cuda.is_available(),
                        help="small models in float32; always so without a GPU")
    parser.add_argument("--only", default="", help="a regular expression of what is measured, by name")
    parser.add_argument("--layers", type=int, help="decoder layers, in place of the published number")
    parser.add_argument("--largest-batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of an answer")
    parser.add_argument("--together", action="store_true", help="all compile beside each other, each in its own process, and "
                        "measure one by one: for a GPU whose memory holds all models at once")
    parser.add_argument("--lowering", choices=LOWERINGS, default="inductor", help="eager: to try the script itself")
    parser.add_argument("--out", type=Path, help="JSON file: bench/results/gpu.json, with --small demo_out/gpu.json")
    given = parser.parse_args(arguments)
    given.out = given.out or (Path("demo_out") if given.small else Path(__file__).parent / "results") / "gpu.json"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and time all that is asked for; returns 0 if all ran and agree with the reference."""
    given = parse_arguments(arguments)
    quieten()
    console, results, fine = Console(), [], True
    tasks = tasks_of(given)
    groups = [tasks] if given.together else [{name: task} for name, task in tasks.items()]
    with console.status("compiling and measuring"):
        for name, result in (done for group in groups for done in together.run(group)):
            if isinstance(result, str):
                console.print(f"[bold red]{name} failed[/bold red]", result, markup=False)
                fine = False
                continue
            console.rule(name)
            (show if "mode" in result else tasks[name].show)(console, result)
            console.print(result.get("failed", ""), markup=False)
            fine = fine and "failed" not in result and result.get("check", {"holds": True})["holds"]
            results.append(result)
            given.out.write_text(json.dumps(results, indent=1) + "\n")
    console.print("Written:", str(given.out))
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
