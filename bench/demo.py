"""What pruning does to answers, and to time: ``python -m bench.demo``.

First a small trained model answers questions about a picture with all visual tokens and with few (bench/answers.py).
Then a photograph goes through a LLaVA-sized prompt, compiled by plain Inductor and by parvts. That model has random
weights, so its answers mean nothing; its prefill costs what a trained one of that size would cost, and its numbers can
be compared with those of the eager reference (tests/reference.py).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import statistics
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

import parvts_fx
from bench import answers
from bench.measuring import in_turns, seconds
from bench.models import PATCH, TEXT_AFTER, TEXT_BEFORE
from bench.plots import plot_patches
from bench.tables import Sheet, progress, quieten
from parvts_fx.cost import flops_of
from tests import reference

IMAGE = 336
GRID = IMAGE // PATCH
IMAGE_TOKEN, VOCABULARY = 32000, 32064
HEAD_DIM = 64
DECODE_STEPS = 8
TOLERANCE = 1e-3  # both sides are float32; a wrong token or mask shows as 0.01 to 1


@dataclasses.dataclass(frozen=True)
class Prompt:
    inputs: dict[str, Any]
    visual: torch.Tensor
    """[1, seq] bool"""

    photograph: torch.Tensor
    """What the model sees, [height, width, 3] in 0..1."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far the compiled prefill is from the eager reference, as relative errors."""

    logits: float
    cache: float
    unpruned_logits: float
    """The full model's distance from the reference: what an error that matters would look like."""

    tokens: list[int]
    expected_tokens: list[int]

    @property
    def holds(self) -> bool:
        return self.tokens == self.expected_tokens and max(self.logits, self.cache) < TOLERANCE


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a message where a value makes no sense."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=_positive, default=16, help="decoder layers")
    parser.add_argument("--width", type=_positive, default=1024, help=f"the decoder's width, a multiple of {HEAD_DIM}")
    parser.add_argument("--keep-ratio", type=_ratio, default="1/9", help="share of the visual tokens kept, as 1/9 or 0.11")
    parser.add_argument("--migration-depth", type=int, default=3, help="decoder layers in which both groups run")
    parser.add_argument("--repeats", type=_positive, default=7, help="measured calls of each model")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the picture")
    options = parser.parse_args(arguments)
    if options.width % HEAD_DIM:
        parser.error(f"argument --width: {options.width} is no multiple of {HEAD_DIM} (the size of a head)")
    if not 0 <= options.migration_depth <= options.layers:
        parser.error(f"argument --migration-depth: {options.migration_depth} is not within 0 to --layers={options.layers}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {options.out}: {error.strerror}")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _ratio(text: str) -> float:
    try:
        ratio = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction such as 1/9") from None
    if not 0 < ratio < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1 (1 would keep every token)")
    return ratio


def build_model(layers: int, width: int) -> transformers.LlavaForConditionalGeneration:
    """A LLaVA with a small vision tower and seeded random weights."""
    config = transformers.LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=512, intermediate_size=2048, num_hidden_layers=4,
            num_attention_heads=8, image_size=IMAGE, patch_size=PATCH),
        text_config=dict(
            model_type="llama", hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
            num_attention_heads=width // HEAD_DIM, num_key_value_heads=width // HEAD_DIM, vocab_size=VOCABULARY,
            max_position_embeddings=4096, initializer_range=0.03),
        image_token_index=IMAGE_TOKEN)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration._from_config(config).eval()


def build_prompt() -> Prompt:
    """A photograph that scikit-image carries, between two runs of random text tokens."""
    try:
        from skimage.data import astronaut
    except ImportError:
        raise SystemExit('The demo needs scikit-image and matplotlib: pip install -e ".[demo]"') from None
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    pixels = processor(images=astronaut(), return_tensors="pt")["pixel_values"]
    photograph = pixels[0].permute(1, 2, 0) * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randint(4, IMAGE_TOKEN, (count,), generator=generator) for count in (TEXT_BEFORE, TEXT_AFTER))
    ids = torch.cat([before, torch.full((GRID * GRID,), IMAGE_TOKEN), after])[None]
    # logits_to_keep is what generate() asks for: the row of the next token
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, use_cache=True, logits_to_keep=1)
    return Prompt(inputs, ids == IMAGE_TOKEN, photograph.clamp(0, 1))


def compare(
    model: torch.nn.Module, output: Any, expected: reference.Prefill, unpruned: torch.Tensor, mask: torch.Tensor
) -> Agreement:
    """Hold a compiled prefill against the reference's, and decode on from both caches with the untouched model."""
    layers = output.past_key_values.layers
    actual = reference.Prefill(expected.rows, output.logits[0], [c.keys for c in layers], [c.values for c in layers])
    error = reference.relative_error
    cached = zip(actual.keys + actual.values, expected.keys + expected.values, strict=True)
    cache = max(error(ours, theirs) for ours, theirs in cached)
    same_length = layers[0].keys.shape[2] == len(expected.rows)  # otherwise there is nothing to decode on
    tokens = reference.generate(model, actual, mask, DECODE_STEPS)[0] if same_length else []
    expected_tokens = reference.generate(model, expected, mask, DECODE_STEPS)[0]
    last = expected.logits[-1:]
    return Agreement(error(actual.logits, last), cache, error(unpruned, last), tokens, expected_tokens)


@contextlib.contextmanager
def step(display: Progress, text: str, total: int | None = None) -> Iterator[Any]:
    """One line of the progress display; gives a function that advances it."""
    task = display.add_task(text, total=total or 1)
    yield lambda: display.advance(task)
    if total is None:
        display.advance(task)


def show(console: Console, options: argparse.Namespace, prompt: Prompt, kept: int, times: list[list[float]],
         flops: tuple[int, int] | None, agreement: Agreement) -> None:
    """Print what was measured: plain Inductor, parvts with Inductor's matrix products, parvts as it comes."""
    size, visual = prompt.visual.shape[1], int(prompt.visual.sum())
    plain, same, fast = (statistics.median(each) for each in times)
    counts = ["not available"] * 3 if flops is None else [f"{count / 1e9:.1f} G" for count in (*flops, flops[1])]
    allowed = [] if flops is None else [["speedup that they allow", "", *2 * [f"{flops[0] / flops[1]:.2f}x"]]]
    console.print(Sheet(
        f"Prefill, {torch.get_num_threads()} threads, float32",
        ["", "Inductor", "parvts, Inductor's matrix products", "parvts"], [
            ["prompt tokens", *3 * [str(size)]],
            [f"kept from layer {options.migration_depth} on", str(size), *2 * [f"{kept}, {kept - size + visual} visual"]],
            ["FLOPs", *counts], *allowed,
            [f"time, median of {options.repeats}", *(f"{time:.3f} s" for time in (plain, same, fast))],
            ["fastest to slowest", *(f"{min(each):.3f} to {max(each):.3f} s" for each in times)],
            ["speedup measured", "", *(f"**{plain / time:.2f}x**" for time in (same, fast))],
        ]))
    if fast < 0.9 * same:
        console.print("On this processor parvts found a quicker library for the large matrix products (option "
                      "linear_kernels): the last column gains by pruning and by that.")
    equal = sum(ours == theirs for ours, theirs in zip(agreement.tokens, agreement.expected_tokens))
    console.print(Sheet("Against the eager reference", ["", "relative error"], [
        ["logits of the next token", f"{agreement.logits:.1e}"],
        ["cached keys and values, all layers", f"{agreement.cache:.1e}"],
        ["for scale: the unpruned model's logits", f"{agreement.unpruned_logits:.1e}"],
    ]))
    console.print(f"Greedy tokens: {equal} of {len(agreement.expected_tokens)} equal")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns 0 if the compiled prefill agrees with the reference."""
    options = parse_arguments(arguments)
    quieten()
    console = Console()
    pruning = dict(keep_ratio=options.keep_ratio, migration_depth=options.migration_depth)
    with progress(console) as display:
        with step(display, "answers of a trained model"):
            shown = answers.show_answers(options.keep_ratio)
        with step(display, "build the model and the prompt"):
            prompt, model = build_prompt(), build_model(options.layers, options.width)
            text = model.model.language_model
        with step(display, "eager reference"):
            expected = reference.prefill(
                model, text.layers, lambda hidden: model.lm_head(text.norm(hidden)), prompt.inputs, prompt.visual,
                stages=parvts_fx.Options(**pruning).schedule)[0]
        with step(display, "count FLOPs"):
            found = parvts_fx.explain(model, options=pruning, **prompt.inputs).prefill
            total, unpruned = flops_of(lambda: model(**prompt.inputs).logits[0])
        with step(display, "compile with Inductor"):
            plain = torch.compile(model)
            plain(**prompt.inputs)
        with step(display, "compile with parvts"):
            same = parvts_fx.compile(copy.deepcopy(model), strict=True, linear_kernels="inductor", **pruning)
            same(**prompt.inputs)
            fast = parvts_fx.compile(copy.deepcopy(model), strict=True, **pruning)
            output = fast(**prompt.inputs)
        with step(display, "measure", options.repeats + 1) as advance:
            calls = [lambda each=each: seconds(lambda: each(**prompt.inputs), model.device) for each in (plain, same, fast)]
            times = in_turns(calls, options.repeats, 1, advance)
        with step(display, "compare with the reference"):
            agreement = compare(model, output, expected, unpruned, prompt.inputs["attention_mask"][0])
    counted = found is not None and found.flops_before and found.flops_after
    flops = (total, total - found.flops_before + found.flops_after) if counted else None
    console.print(answers.table(shown))
    console.print(f"Picture: {answers.picture(shown, options.out / 'question_patches.png')}")
    show(console, options, prompt, output.past_key_values.layers[-1].keys.shape[2], times, flops, agreement)
    slow, _, quick = (statistics.median(each) for each in times)
    kept = torch.isin(prompt.visual[0].nonzero()[:, 0], expected.rows).view(GRID, GRID)
    path = plot_patches(prompt.photograph, kept, options.out / "subject_patches.png",
                        f"prefill {slow:.2f} s with Inductor, {quick:.2f} s with parvts ({slow / quick:.2f}x)")
    console.print(f"Picture: {path}")
    if not (agreement.holds and shown.holds):
        console.print("[bold red]The compiled prefill does not agree with the eager reference.[/bold red]")
    return 0 if agreement.holds and shown.holds else 1


if __name__ == "__main__":
    sys.exit(main())
