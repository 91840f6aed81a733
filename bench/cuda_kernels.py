"""What a prefill becomes on an H100, counted without one: ``python -m bench.cuda_kernels`` (``make check-cuda`` first).

A LLaVA of LLaVA-1.5-7B's width and few layers, in bfloat16, is lowered by Inductor alone and through parvts for a GPU: kernels,
launches, products and attention calls, and what keeps CUDA graphs from being used. It needs a build of torch for CUDA. Results go
into ``bench/results/cuda_kernels.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from rich.console import Console

import parvts_fx
from bench import figures
from bench.measuring import machine
from bench.models import Prefill, Scene, build_scene
from bench.tables import quieten
from tests.cuda.lowered import Lowered, lowering

METHODS: Mapping[str, dict[str, Any] | None] = {"inductor": None, "parvts, not merged": dict(merge=None), "parvts": {}}
"""Options of parvts_fx.compile; None for torch.compile alone."""


def build_model(layers: int, width: int) -> Any:
    """A decoder with narrow feed-forwards: how many kernels it becomes does not depend on them, how long it runs here does."""
    config = transformers.LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                           num_attention_heads=2, image_size=336, patch_size=14),
        text_config=dict(model_type="llama", hidden_size=width, intermediate_size=256, num_hidden_layers=layers,
                         num_attention_heads=width // 128, num_key_value_heads=width // 128, vocab_size=1000),
        image_token_index=999)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def lowered(scene: Scene, options: dict[str, Any] | None, depth: int) -> Lowered:
    """The graph of a prefill, as an H100 would get it."""
    seen: list[Lowered] = []
    torch._dynamo.reset()
    prefill = Prefill(scene.model)
    with lowering(seen) as backend, torch.no_grad():
        if options is None:
            prefill.compile(backend=backend)
        else:
            parvts_fx.compile(prefill, strict=True, migration_depth=depth, **options)
        prefill(*scene.inputs)
    found, = seen
    return found


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_kernels", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default, help in (("layers", 6, "decoder layers"), ("width", 4096, "the decoder's width"),
                                ("depth", 3, "migration depth")):
        parser.add_argument(f"--{name}", type=int, default=default, help=help)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2], help="prompts in a batch")
    parser.add_argument("--out", default=str(figures.RESULTS / "cuda_kernels.json"), help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, show, write."""
    given = parse_arguments(arguments)
    if torch.version.cuda is None:
        raise SystemExit("bench.cuda_kernels needs a build of torch for CUDA (`make check-cuda` installs one into .venvs/cuda)")
    quieten()
    console, rows = Console(), []
    model = build_model(given.layers, given.width)
    for batch in given.batches:
        scene = build_scene(model, 576, batch, tower=False)
        for name, options in METHODS.items():
            with console.status(f"{name}, batch {batch}"):
                found = lowered(scene, options, given.depth)
            kernels = [dataclasses.asdict(kernel) for kernel in found.kernels]
            rows.append({"method": name, "batch": batch, **dataclasses.asdict(found), "kernels": kernels})
    settings = {name: held for name, held in vars(given).items() if name != "out"}
    result = {"machine": machine(torch.device("cpu")), "settings": settings, "rows": rows}
    with open(given.out, "w") as file:
        file.write(json.dumps(result, indent=1) + "\n")
    console.print(figures.cuda_kernels(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
