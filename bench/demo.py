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
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import parvts_fx
from bench import answers
from parvts_fx.scores import AUTO, rule_named
from tests import reference

IMAGE, PATCH = 336, 14
GRID = IMAGE // PATCH
TEXT_BEFORE, TEXT_AFTER = 35, 29
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


def count_flops(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[int, torch.Tensor]:
    """FLOPs of the whole unpruned call, vision tower included, and its logits."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know CPU's attention
        logits = model(**inputs).logits[0]
    return counter.get_total_flops(), logits


def measure(models: list[Any], inputs: dict[str, Any], repeats: int, advance: Any) -> list[list[float]]:
    """Seconds of every call. The models take turns, so that whatever else the machine does hits all of them alike."""
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(repeats):
        for model, times in zip(models, seconds):
            start = time.perf_counter()
            model(**inputs)
            times.append(time.perf_counter() - start)
        advance()
    return seconds


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


def draw(path: Path, prompt: Prompt, rows: torch.Tensor, title: str) -> None:
    """The photograph as the model sees it, and the same with all but its subject patches dimmed."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('The demo needs scikit-image and matplotlib: pip install -e ".[demo]"') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = torch.zeros(prompt.visual.shape[1], dtype=torch.bool)
    kept[rows] = True
    patches = kept[prompt.visual[0]].reshape(GRID, GRID)
    bright = patches.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)[..., None]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 5.4), layout="constrained")
    panels = ((f"what the model sees: {GRID * GRID} patches", prompt.photograph),
              (f"subject group: {int(patches.sum())} patches", torch.where(bright, prompt.photograph, prompt.photograph * 0.25)))
    for axis, (heading, picture) in zip(axes, panels):
        axis.imshow(picture.numpy())
        axis.set_title(heading)
        axis.axis("off")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


@contextlib.contextmanager
def step(progress: Progress, text: str, total: int | None = None) -> Iterator[Any]:
    """One line of the progress display; gives a function that advances it."""
    task = progress.add_task(text, total=total or 1)
    yield lambda: progress.advance(task)
    if total is None:
        progress.advance(task)


def show(console: Console, options: argparse.Namespace, prompt: Prompt, kept: int, seconds: list[list[float]],
         flops: tuple[int, int] | None, agreement: Agreement) -> None:
    """Print what was measured: plain Inductor, parvts with Inductor's matrix products, parvts as it comes."""
    size, visual = prompt.visual.shape[1], int(prompt.visual.sum())
    plain, same, fast = (statistics.median(times) for times in seconds)
    table = Table(title=f"Prefill, {torch.get_num_threads()} threads, float32", title_justify="left")
    table.add_column("")
    for heading in ("Inductor", "parvts, Inductor's\nmatrix products", "parvts"):
        table.add_column(heading, justify="right")
    table.add_row("prompt tokens", *3 * [str(size)])
    rows = f"{kept}, {kept - size + visual} visual"
    table.add_row(f"kept from layer {options.migration_depth} on", str(size), rows, rows)
    if flops is None:
        table.add_row("FLOPs", *3 * ["not available"])
    else:
        table.add_row("FLOPs", *(f"{count / 1e9:.1f} G" for count in (*flops, flops[1])))
        table.add_row("speedup that they allow", "", *2 * [f"{flops[0] / flops[1]:.2f}x"])
    table.add_row(f"time, median of {options.repeats}", *(f"{time:.3f} s" for time in (plain, same, fast)))
    table.add_row("fastest to slowest", *(f"{min(times):.3f} to {max(times):.3f} s" for times in seconds))
    table.add_row("speedup measured", "", *(f"[bold]{plain / time:.2f}x[/bold]" for time in (same, fast)))
    console.print(table)
    if fast < 0.9 * same:
        console.print("On this processor parvts found a quicker library for the large matrix products (option "
                      "linear_kernels): the last column gains by pruning and by that.")
    equal = sum(ours == theirs for ours, theirs in zip(agreement.tokens, agreement.expected_tokens))
    facts = Table(title="Against the eager reference", title_justify="left", show_header=False)
    facts.add_row("logits of the next token", f"relative error {agreement.logits:.1e}")
    facts.add_row("cached keys and values, all layers", f"relative error {agreement.cache:.1e}")
    facts.add_row("greedy tokens", f"{equal} of {len(agreement.expected_tokens)} equal")
    facts.add_row("for scale: the unpruned model's logits", f"relative error {agreement.unpruned_logits:.1e}")
    console.print(facts)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns 0 if the compiled prefill agrees with the reference."""
    options = parse_arguments(arguments)
    transformers.logging.set_verbosity_error()
    if not os.environ.get("TORCH_LOGS"):  # Dynamo's page on the graph break in transformers' input check
        torch._logging.set_logs(dynamo=logging.ERROR)
    console = Console()
    pruning = dict(keep_ratio=options.keep_ratio, migration_depth=options.migration_depth, score=AUTO)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        with step(progress, "answers of a trained model"):
            shown = answers.show_answers(options.keep_ratio)
        with step(progress, "build the model and the prompt"):
            prompt, model = build_prompt(), build_model(options.layers, options.width)
            text = model.model.language_model
        with step(progress, "eager reference"):
            expected = reference.prefill(
                model, text.layers, lambda hidden: model.lm_head(text.norm(hidden)), prompt.inputs, prompt.visual,
                depth=options.migration_depth, score=rule_named(AUTO), keep_ratio=options.keep_ratio)[0]
        with step(progress, "count FLOPs"):
            found = parvts_fx.explain(model, options=pruning, **prompt.inputs).prefill
            total, unpruned = count_flops(model, prompt.inputs)
        with step(progress, "compile with Inductor"):
            plain = torch.compile(model)
            plain(**prompt.inputs)
        with step(progress, "compile with parvts"):
            same = parvts_fx.compile(copy.deepcopy(model), strict=True, linear_kernels="inductor", **pruning)
            same(**prompt.inputs)
            fast = parvts_fx.compile(copy.deepcopy(model), strict=True, **pruning)
            output = fast(**prompt.inputs)
        with step(progress, "measure", options.repeats + 1) as advance:
            models = [plain, same, fast]
            measure(models, prompt.inputs, 1, advance)  # once more to warm up
            seconds = measure(models, prompt.inputs, options.repeats, advance)
        with step(progress, "compare with the reference"):
            agreement = compare(model, output, expected, unpruned, prompt.inputs["attention_mask"][0])
    counted = found is not None and found.flops_before and found.flops_after
    flops = (total, total - found.flops_before + found.flops_after) if counted else None
    console.print(answers.table(shown))
    console.print(f"Picture: {answers.picture(shown, options.out / 'question_patches.png')}")
    show(console, options, prompt, output.past_key_values.layers[-1].keys.shape[2], seconds, flops, agreement)
    plain_time, _, fast_time = (statistics.median(times) for times in seconds)
    path = options.out / "subject_patches.png"
    draw(path, prompt, expected.rows, f"prefill {plain_time:.2f} s with Inductor, {fast_time:.2f} s with parvts "
                                      f"({plain_time / fast_time:.2f}x)")
    console.print(f"Picture: {path}")
    if not (agreement.holds and shown.holds):
        console.print("[bold red]The compiled prefill does not agree with the eager reference.[/bold red]")
    return 0 if agreement.holds and shown.holds else 1


if __name__ == "__main__":
    sys.exit(main())
