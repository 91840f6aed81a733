"""Everything that is to be known on a GPU, in one command: ``python -m bench.gpu``.

Models of published sizes in bfloat16 with random weights built on the device: the compiled prefill against the eager
reference, times beside Inductor's with and without mode="reduce-overhead", whole answers, and a profile of what is
missing to the bound of the FLOPs. Without a GPU, and with --small, the same on small models in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.configurations import PUBLISHED, SMALL, Configuration
from bench.floor import Floor, decoder_weights
from bench.measuring import (
    Built,
    Company,
    answer,
    build,
    in_turns,
    machine,
    many_compiles,
    peak_memory,
    profile_call,
    seconds,
    spread,
)
from bench.methods import LOWERINGS, inductor, methods
from bench.models import Prefill, Scene, cache_bytes
from bench.tables import Sheet, mebibytes, milliseconds, quieten
from tests import reference

METHODS = {method.name: method for method in methods()}
TOLERANCE = 1e-3
"""In float32; a wrong token or mask shows as 0.01 to 1."""

NOISE = 2.0
"""In bfloat16 the compiled prefill may be this many times as far from the float32 reference as the reference run in
bfloat16 is: the same arithmetic in another order."""


@dataclasses.dataclass(frozen=True)
class Check:
    """The compiled prefill against the eager reference, as relative errors of (logits, all cached keys and values)."""

    logits: float
    cache: float
    allowed_logits: float
    allowed_cache: float

    @property
    def holds(self) -> bool:
        return self.logits <= self.allowed_logits and self.cache <= self.allowed_cache


def run_reference(scene: Scene, kept: int, dtype: torch.dtype) -> reference.Prefill:
    """The eager reference of the first sample, with the scene's weights and features in ``dtype``."""
    model, text = scene.model, scene.model.model.language_model
    held = [(parameter, parameter.data) for part in (text, model.lm_head) for parameter in part.parameters()]
    first = scene.features[:scene.visual]
    inputs = {"ids": scene.ids[:1], "features": first.to(dtype)}
    if scene.positions is not None:
        inputs["positions"] = scene.positions[:, :1]
    try:
        for parameter, data in held:  # parameters alone: tables of angles are float32 in any model
            parameter.data = data.to(dtype)
        return reference.prefill(
            Prefill(model), text.layers, lambda hidden: model.lm_head(text.norm(hidden)), inputs,
            scene.ids[:1] == model.config.image_token_id, stages=METHODS["parvts"].stages(kept))[0]
    finally:
        for parameter, data in held:
            parameter.data = data


def distance(logits: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor],
             expected: reference.Prefill) -> tuple[float, float]:
    """Relative errors of the next token's logits, and of the worst cached tensor."""
    pairs = [*zip(keys, expected.keys, strict=True), *zip(values, expected.values, strict=True)]
    return reference.relative_error(logits, expected.logits[-1]), max(reference.relative_error(*pair) for pair in pairs)


def check(built: Built, exact: reference.Prefill, rounded: reference.Prefill | None) -> Check:
    """Args:
        exact: the reference in float32.
        rounded: the reference in the model's own precision, where that is a lower one.
    """
    logits, cache = built.run_prefill()
    keys, values = [layer.keys[:1] for layer in cache.layers], [layer.values[:1] for layer in cache.layers]
    found = distance(logits[0], keys, values, exact)
    if rounded is None:
        return Check(*found, TOLERANCE, TOLERANCE)
    noise = distance(rounded.logits[-1], rounded.keys, rounded.values, exact)
    return Check(*found, NOISE * noise[0], NOISE * noise[1])


def measure(config: Configuration, model: torch.nn.Module, batch: int, company: Company,
            given: argparse.Namespace) -> dict[str, Any]:
    """One configuration at one batch size: numerics, times, memory, and the profile."""
    scene, device = config.scene(model, batch), model.device
    dtype = model.dtype
    exact = run_reference(scene, config.kept, torch.float32)
    rounded = None if dtype == torch.float32 else run_reference(scene, config.kept, dtype)
    backend = LOWERINGS[given.lowering]
    plain, ours = (company.join(build(METHODS[name], scene, config.kept, backend=backend))
                   for name in ("inductor", "parvts"))
    found = check(ours, exact, rounded)
    answers = in_turns([lambda one=one: answer(one, given.tokens)[0] for one in (plain, ours)], given.repeats)
    floors = [Floor(one.graph, decoder_weights(model)) for one in (plain, ours)]
    alone = in_turns([lambda floor=floor: seconds(floor, device) for floor in floors], given.repeats)
    profiles = [profile_call(one.run_prefill, device) for one in (plain, ours)]
    rows = [{
        "mode": "default", "method": one.method.name, "prefill": spread([times.prefill for times in taken]),
        "first_token": spread([times.first_token for times in taken]), "step": spread([times.step for times in taken]),
        "whole": spread([times.whole for times in taken]), "flops": one.flops, "floor": spread(floor),
        "peak_memory": peak_memory(one.run_prefill, device), "cache_bytes": cache_bytes(one.run_prefill()[1]),
        "compile_seconds": one.compile_seconds, "profile": dataclasses.asdict(seen),
    } for one, taken, floor, seen in zip((plain, ours), answers, alone, profiles)]
    if batch == config.batches[0]:
        graphed = inductor("reduce-overhead") if given.lowering == "inductor" else backend
        pair = [build(METHODS[name], scene, config.kept, backend=graphed) for name in ("inductor", "parvts")]
        # CUDA graphs are recorded in the second call: one more to warm up than elsewhere
        taken = in_turns([lambda one=one: seconds(one.run_prefill, device) for one in pair], given.repeats, warm_up=3)
        rows += [{"mode": "reduce-overhead", "method": one.method.name, "prefill": spread(times),
                  "compile_seconds": one.compile_seconds} for one, times in zip(pair, taken)]
    return {"model": config.name, "layers": len(model.model.language_model.layers), "batch": batch,
            "visual": config.visual, "kept": config.kept, "tokens": given.tokens, "dtype": str(dtype),
            "check": dataclasses.asdict(found) | {"holds": found.holds}, "rows": rows}


def show(console: Console, result: dict[str, Any]) -> None:
    """One configuration's results as tables."""
    title = (f"{result['model']}, {result['dtype']}, batch {result['batch']}, "
             f"{result['kept']} of {result['visual']} kept")
    headings = ["method", "mode", "prefill", "of floor", "first token", "decode step", f"{result['tokens']} tokens",
                "peak memory", "KV cache"]
    console.print(Sheet(title, headings, [[row["method"], row["mode"], milliseconds(row["prefill"]), *((
        f"{row['prefill']['median'] / row['floor']['median']:.2f}", milliseconds(row["first_token"]),
        milliseconds(row["step"]), milliseconds(row["whole"]), mebibytes(row["peak_memory"]), mebibytes(row["cache_bytes"]),
    ) if row["mode"] == "default" else [""] * 6)] for row in result["rows"]]))
    plain, ours = result["rows"][:2]
    reached, share = plain["prefill"]["median"] / ours["prefill"]["median"], ours["flops"] / plain["flops"]
    console.print(f"prefill {reached:.2f}x over Inductor, {1 / share:.2f}x allowed by the FLOPs")
    parts = [(name, 1e3 * plain["profile"][name], 1e3 * ours["profile"][name]) for name in plain["profile"]]
    console.print(Sheet("Profile of the prefill", ["ms", "inductor", "bound", "parvts", "missing"], [
        [name, *(f"{held:.2f}" for held in (whole, share * whole, part, part - share * whole))] for name, whole, part in parts]))
    found = result["check"]
    console.print(f"against the eager reference: logits {found['logits']:.1e} of {found['allowed_logits']:.1e}, cache"
                  f" {found['cache']:.1e} of {found['allowed_cache']:.1e} allowed"
                  + ("" if found["holds"] else ": [bold red]does not agree[/bold red]"))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", default=not torch.cuda.is_available(),
                        help="small models in float32; always so without a GPU")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--layers", type=int, help="decoder layers, in place of the published number")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of an answer")
    parser.add_argument("--lowering", choices=LOWERINGS, default="inductor", help="eager: to try the script itself")
    parser.add_argument("--out", type=Path, help="JSON file: bench/results/gpu.json, with --small demo_out/gpu.json")
    given = parser.parse_args(arguments)
    given.out = given.out or (Path("demo_out") if given.small else Path(__file__).parent / "results") / "gpu.json"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    return given


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Check and time all configurations; returns 0 if all agree with the reference."""
    given = parse_arguments(arguments)
    quieten()
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: list[dict[str, Any]] = []
    for config in SMALL if given.small else PUBLISHED:
        if given.only.lower() not in config.name.lower():
            continue
        with console.status(f"{config.name}: build"):
            model = config.build(device, torch.float32 if given.small else torch.bfloat16, given.layers)
        company = Company(LOWERINGS[given.lowering])
        for batch in config.batches:
            with console.status(f"{config.name}, batch {batch}: compile, check and measure"), many_compiles():
                results.append(measure(config, model, batch, company, given))
            show(console, results[-1])
            given.out.write_text(json.dumps({"machine": machine(device), "results": results}, indent=1) + "\n")
        torch._dynamo.reset()
        del model, company
        if device.type == "cuda":
            torch.cuda.empty_cache()
    console.print("Written:", str(given.out))
    return 0 if all(result["check"]["holds"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
