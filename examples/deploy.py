"""The pruned prefill of a LLaVA-like model as one file, which runs without Python code of the model's or of parvts_fx.

    python examples/deploy.py FOLDER --out prefill.pt2 --keep-tokens 64 --batch 1

``torch.export`` captures the prefill (vision tower, merge, decoder), ``parvts_fx.rewrite`` prunes the graph, and AOTInductor
compiles it ahead of time. On a machine with the same kind of processor nothing is compiled any more:

    prefill = torch._inductor.aoti_load_package("prefill.pt2")
    logits, *cache = prefill(input_ids, attention_mask, pixel_values)     # the keys and values of each layer, in turns

Prompts may have any length, up to the longest that the model knows. Their number is fixed (--batch), with one picture for each:
the code of LLaVA makes a list of the pictures, and a captured graph has one length of it. Results are compared with those of
``parvts_fx.compile`` before packaging and after.

A compiled model looks at each prompt before it runs the pruned graph. A package does not: it is for prompts with as many image
tokens in every row as its metadata say (``prefill.get_metadata()``: ``visual_tokens``, ``image_token_id``, ``batch``), padded on
the left if at all, and what it makes of others is undefined. With ``AOTI_RUNTIME_CHECK_INPUTS=1`` in the environment it checks
sizes and types at least; without, it reads beyond the end of a batch that is too small.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from transformers import AutoModelForImageTextToText

import parvts_fx

TOLERANCE = 1e-4
"""Relative error, in float32: other kernels round otherwise. What is pruned wrongly is off by far more."""

_WORDS = 14
"""Of the prompt that is traced; others may be of any length."""


class Prefill(torch.nn.Module):
    """A model's first call, from tensors to tensors."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            input_ids: [batch, length], attention_mask likewise.
            pixel_values: [batch, channels, height, width], one picture a prompt.

        Returns:
            Logits [batch, rows, vocabulary], and for each layer keys and values [batch, heads, rows, head size].
        """
        return results(self.model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=True))


def results(output: Any) -> tuple[torch.Tensor, ...]:
    """Logits, and the keys and values of each layer, of what a model returns."""
    layers = output.past_key_values.layers
    return output.logits, *(held for layer in layers for held in (layer.keys, layer.values))


def example_inputs(model: Any, batch: int) -> tuple[torch.Tensor, ...]:
    """Prompts of random words around a random picture each, as :class:`Prefill` takes them.

    Raises:
        ValueError: the model's configuration does not tell what pictures and their tokens look like.
    """
    config = model.config
    token, vision = getattr(config, "image_token_id", None), getattr(config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    if token is None or not isinstance(size, int):
        raise ValueError(f"{type(model).__name__} is not like LLaVA: its configuration lacks image_token_id or "
                         "vision_config.image_size")
    pixels = torch.randn(batch, getattr(vision, "num_channels", 3), size, size)
    tokens = len(model.get_image_features(pixel_values=pixels).pooler_output[0])
    words = torch.randint(config.get_text_config().vocab_size - 1, (batch, _WORDS))
    words += words >= token  # any but the image token
    half = _WORDS // 2
    ids = torch.cat([words[:, :half], torch.full((batch, tokens), token), words[:, half:]], 1)
    return ids, torch.ones_like(ids), pixels


def shapes_of(model: Any, inputs: Sequence[torch.Tensor]) -> tuple[dict[int, Any] | None, ...]:
    """What may vary: the length, from the visual tokens and two words on. Of a picture or a batch nothing."""
    visual = int((inputs[0][0] == model.config.image_token_id).sum())
    length = Dim("length", min=visual + 2, max=model.config.get_text_config().max_position_embeddings)
    return {1: length}, {1: length}, None


def prune(model: Any, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]) -> torch.fx.GraphModule:
    """The exported and rewritten prefill.

    Raises:
        parvts_fx.NotRewritten: it cannot be pruned.
        ValueError: there is nothing to prune, or bad options.
    """
    graph = torch.export.export(Prefill(model), inputs, dynamic_shapes=shapes_of(model, inputs)).module()
    rewritten = parvts_fx.rewrite(graph, inputs, {**options, "strict": True})
    report = rewritten.meta["parvts_fx"]
    if report.status != "rewritten":
        raise ValueError(f"nothing is pruned: {report.reason}")
    return rewritten


def compiled(model: Any, inputs: Sequence[torch.Tensor], options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """What the model returns, compiled by parvts_fx. The graph that Dynamo captures is rewritten, and run as it is."""
    parvts_fx.compile(model, lowering="eager", strict=True, **options)
    try:
        return results(model(**dict(zip(("input_ids", "attention_mask", "pixel_values"), inputs))))
    finally:
        parvts_fx.uncompile(model)


def compare(what: str, actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str:
    """How far two results are apart, in words.

    Raises:
        ValueError: too far.
    """
    if [held.shape for held in actual] != [held.shape for held in expected]:
        raise ValueError(f"{what} has results of other sizes than the compiled model")
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual, expected))
    if not error <= TOLERANCE:
        raise ValueError(f"{what} is off by {error:.1e} from the compiled model")
    return f"{what} equals the compiled model: relative error {error:.1e}"


def package(program: ExportedProgram, out: Path, about: dict[str, int]) -> Any:
    """Compile it ahead of time, write it, and load what was written."""
    metadata = {name: str(held) for name, held in about.items()}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(out), inductor_configs={"aot_inductor.metadata": metadata})
    return torch._inductor.aoti_load_package(str(out))


@torch.no_grad()
def deploy(given: argparse.Namespace) -> None:
    """Do what the command line asks.

    Raises:
        ValueError, OSError, RuntimeError: what was given cannot be used.
    """
    asked = {"keep_tokens": given.keep_tokens, "migration_depth": given.migration_depth}
    options = {name: held for name, held in asked.items() if held is not None}
    parvts_fx.Options(**options)
    model: Any = AutoModelForImageTextToText.from_pretrained(given.model, dtype=torch.float32).eval().requires_grad_(False)
    torch.manual_seed(0)
    inputs = example_inputs(model, given.batch)
    start = time.perf_counter()
    graph = prune(model, inputs, options)
    report = graph.meta["parvts_fx"]
    print(f"exported and rewritten in {time.perf_counter() - start:.1f} s: {report.subject_tokens} of {report.visual_tokens} "
          f"visual tokens stay behind layer {report.migration_depth}")
    expected = compiled(model, inputs, options)
    print(compare("the rewritten graph", graph(*inputs), expected))
    start = time.perf_counter()
    length = {1: Dim.DYNAMIC}  # no bounds are given: those of the graph hold, and torch could not prove its sizes within others
    program = torch.export.export(graph, inputs, dynamic_shapes=(length, length, None))
    about = {"batch": given.batch, "visual_tokens": report.visual_tokens, "image_token_id": model.config.image_token_id}
    loaded = package(program, given.out, about)
    print(f"packaged in {time.perf_counter() - start:.1f} s: {given.out}, {given.out.stat().st_size / 2**20:.1f} MiB, for "
          f"{given.batch} prompts of any length")
    print(compare("the package", loaded(*inputs), expected))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--out", type=Path, default=Path("prefill.pt2"), help="the package (default: prefill.pt2)")
    parser.add_argument("--keep-tokens", type=int, help="visual tokens to keep of each prompt (default: a ninth)")
    parser.add_argument("--migration-depth", type=int, help="decoder layers that run on all of them (default: 3)")
    parser.add_argument("--batch", type=int, default=1, help="prompts of each call (default: 1)")
    return parser.parse_args()


def main() -> None:
    """Check what is cheap to find wrong first."""
    given = parse()
    try:
        if not (given.model / "config.json").is_file():
            raise ValueError(f"{given.model} is no folder of a model: it has no config.json")
        if given.out.suffix != ".pt2" or not given.out.absolute().parent.is_dir():
            raise ValueError(f"--out {given.out}: expected a file that ends in .pt2, in a folder that exists")
        if given.batch < 1:
            raise ValueError(f"--batch {given.batch}: expected at least one prompt")
        deploy(given)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        sys.exit(f"deploy.py: {line}")


if __name__ == "__main__":
    main()
