"""What pictures of many sizes cost, first calls included: ``python -m bench.picture_sizes``.

A Qwen2.5-VL with a decoder of real width and a small vision tower answers twenty prompts with their first token, by
``generate``, each with a picture of another size, and then all of them again. torch.compile with Inductor and parvts do so in
processes of their own, each with empty caches. Results go into ``bench/results/picture_sizes.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import parvts_fx
from bench import figures
from bench.arguments import add_keep_ratio, parser_of
from bench.measuring import in_own_process, machine, many_compiles, seconds
from bench.tables import quieten
from bench.uneven_batches import build_model, compiled, first_token, prompts

METHODS = ("inductor", "parvts")


def sizes(count: int, most: int) -> list[tuple[int, int]]:
    """Height and width of pictures in visual tokens, all different, in no order."""
    every = [(height, width) for height in range(8, most + 1) for width in range(8, most + 1)]
    return random.Random(0).sample(every, count)


@torch.no_grad()
def calls(given: argparse.Namespace, method: str) -> dict[str, Any]:
    """Seconds of each prompt's call, the first time and again."""
    model = compiled(build_model(given.layers, given.width), method, given.lowering, given.keep_ratio)
    device, found = torch.device("cpu"), []
    with many_compiles():
        for _ in range(2):
            found.append([])
            for size in sizes(given.sizes, given.most):
                inputs = prompts([size], given.text)
                found[-1].append(seconds(lambda inputs=inputs: first_token(model, inputs), device))
                record = parvts_fx.last_call(model) if method == "parvts" else None
                assert method == "inductor" or record is not None and record.pruned, record
    return {"method": method, "first": found[0], "again": found[1]}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("picture_sizes", __doc__, (
        ("layers", 12, "decoder layers"), ("width", 1024, "the decoder's width"), ("text", 48, "words of each prompt"),
        ("sizes", 20, "pictures"), ("most", 30, "visual tokens along the longest side")))
    add_keep_ratio(parser)
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, show, write; returns what the JSON holds."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parse_arguments(arguments)
    quieten()
    if given.one:
        found = calls(given, given.one)
        print(json.dumps(found))
        return found
    console = Console()
    rows = [json.loads(in_own_process("bench.picture_sizes", *arguments, "--one", method))
            for method in track(METHODS, "measuring", console=console)]
    settings = {name: held for name, held in vars(given).items() if name not in ("out", "one")}
    found = {"machine": machine(torch.device("cpu")), "settings": settings, "pictures": sizes(given.sizes, given.most),
             "rows": rows}
    with open(given.out, "w") as file:
        file.write(json.dumps(found, indent=1) + "\n")
    console.print(figures.picture_sizes(found))
    again = {row["method"]: statistics.median(row["again"]) for row in rows}
    console.print(f"Compiled, a call takes {again['inductor'] / again['parvts']:.2f} times as long with Inductor.")
    return found


if __name__ == "__main__":
    main()
