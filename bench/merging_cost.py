"""What merging costs in seconds: ``python -m bench.merging_cost``.

Two tables. The whole prefill of the benchmark's model, with and without merging, beside Inductor's, in turns. And one
attention call behind the drop in three forms: the causal kernel as the model has it; with a float mask that holds log n, as
the project writes it; and with log n as one entry more of every query and key (ERA, arXiv 2606.31982), which leaves the call
causal and pads heads to a multiple of 8. Results go into ``bench/results/merging_cost.json``.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from bench.arguments import parser_of
from bench.demo import build_model
from bench.measuring import build, in_turns, machine, many_compiles, seconds, spread
from bench.methods import LOWERINGS, methods
from bench.models import build_scene
from bench.tables import Sheet, progress, quieten

COMPARED = ("inductor", "parvts, not merged", "parvts")
CALLS = ((1, 16, 128, 64), (4, 16, 128, 64), (1, 32, 128, 128), (1, 32, 384, 128))
"""[batch, heads, rows, entries of a head] of the calls: the benchmark's model, then LLaVA-1.5-7B's with 64 and 320 kept."""


def call_forms(batch: int, heads: int, rows: int, size: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Half of the rows are visual and stand for nine tokens each; all forms but the first compute the same."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, batch, heads, rows, size)
    visual = torch.arange(rows) % 2 == 0
    bias = (torch.where(visual, 9.0, 1.0).log() * ~visual[:, None]).expand(batch, 1, rows, rows)
    hidden = torch.ones(rows, rows, dtype=torch.bool).tril()
    mask = bias.masked_fill(~hidden, -torch.inf).contiguous()
    wide = [F.pad(held, (0, 8)) for held in (query, key, value)]
    wide[0][..., size] = ~visual * size ** 0.5
    wide[1][..., size] = torch.where(visual, 9.0, 1.0).log()
    attend = F.scaled_dot_product_attention
    return {
        "causal, nothing counted": lambda: attend(query, key, value, is_causal=True),
        "float mask": lambda: attend(query, key, value, attn_mask=mask),
        "entry more": lambda: attend(*wide, is_causal=True, scale=size ** -0.5)[..., :size],
    }


def measure_calls(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for sizes in CALLS:
        forms = call_forms(*sizes)
        apart = float((forms["float mask"]() - forms["entry more"]()).abs().max())
        assert apart < 1e-4, f"the two forms differ by {apart}"
        many = [functools.partial(seconds, lambda form=form: [form() for _ in range(50)], torch.device("cpu"))
                for form in forms.values()]
        taken = in_turns(many, repeats, 2)
        rows.append({"sizes": sizes, "forms": {
            name: spread([each / 50 for each in times]) for name, times in zip(forms, taken)}})
    return rows


def measure_prefills(given: argparse.Namespace, advance: Callable[[], None]) -> list[dict[str, Any]]:
    scene = build_scene(build_model(given.layers, given.width), given.visual, given.batch)
    known = {method.name: method for method in methods()}
    built = []
    for name in COMPARED:
        built.append(build(known[name], scene, given.kept, backend=LOWERINGS[given.lowering]))
        advance()
    calls = [functools.partial(seconds, one.run_prefill, scene.ids.device) for one in built]
    taken = in_turns(calls, given.repeats, 2, advance)
    return [{"method": one.method.name, "prefill": spread(times), "seconds": times, "flops": one.flops}
            for one, times in zip(built, taken)]


def sheets(found: dict[str, Any]) -> list[Sheet]:
    first, without, merged = (row["prefill"]["median"] for row in found["prefills"])
    flops = [row["flops"] for row in found["prefills"]]
    ratios = ["", f"{first / without:.2f}x", f"{first / merged:.2f}x"]
    prefills = [[row["method"], f"{1e3 * row['prefill']['median']:.0f} ms ({1e3 * row['prefill']['min']:.0f} to "
                 f"{1e3 * row['prefill']['max']:.0f})", ratio, f"{flops[0] / row['flops']:.2f}x"]
                for row, ratio in zip(found["prefills"], ratios)]
    calls = [[" x ".join(map(str, row["sizes"])), *(f"{1e6 * held['median']:.0f} us" for held in row["forms"].values())]
             for row in found["calls"]]
    title = f"Prefill; merging costs {100 * (merged / without - 1):+.1f} %"
    return [Sheet(title, ["", "time", "ratio", "FLOPs allow"], prefills),
            Sheet("One attention call", ["batch x heads x rows x entries", *found["calls"][0]["forms"]], calls)]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return parser_of("merging_cost", __doc__, (
        ("layers", 16, "decoder layers"), ("width", 1024, "the decoder's width"), ("visual", 576, "visual tokens"),
        ("kept", 64, "visual tokens that stay"), ("batch", 1, "prompts"), ("repeats", 15, "measured calls of each"),
    )).parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, show, write; returns what the JSON holds."""
    given = parse_arguments(arguments)
    quieten()
    console = Console()
    with many_compiles(), progress(console) as display:
        task = display.add_task("measuring", total=len(COMPARED) + given.repeats + 2)
        prefills = measure_prefills(given, functools.partial(display.advance, task))
    settings = {name: held for name, held in vars(given).items() if name != "out"}
    found = {"machine": machine(torch.device("cpu")), "settings": settings, "prefills": prefills,
             "calls": measure_calls(given.repeats)}
    with open(given.out, "w") as file:
        file.write(json.dumps(found, indent=1) + "\n")
    for sheet in sheets(found):
        console.print(sheet)
    return found


if __name__ == "__main__":
    main()
