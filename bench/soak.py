"""Many calls of all kinds in one process: ``python -m bench.soak``.

Prompts with pictures of several sizes, with several pictures and with none are drawn at random for batches of all kinds in
turn (``KINDS``) and answered by ``generate``, from several threads; one batch in three is asked a second question, on the
cache of the first. Every row's tokens and first logits must be those that the prompt has by itself, and behind the first
calls, in which each kind comes with one turn and with two, neither compiled forms nor memory may grow. Exits with 1 if one of
that does not hold. Results go into ``bench/results/soak.json``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import gc
import json
import random
import resource
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch.fx import GraphModule

import parvts_fx
from bench import figures
from bench.measuring import machine, many_compiles
from bench.tables import progress, quieten
from bench.uneven_batches import END, IMAGE, PAD, START, build_model

SIZES = ((2, 2), (2, 4), (4, 4), (4, 6), (6, 6), (2, 8))
TOLERANCE = 2e-5
QUESTION = [17, 23, 5, 31]
"""A further turn."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row: its ids, and its pictures by height and width in visual tokens."""

    ids: torch.Tensor
    sizes: tuple[tuple[int, int], ...]
    patches: torch.Tensor

    @property
    def visual_tokens(self) -> int:
        return sum(height * width for height, width in self.sizes)


Kind = Callable[[Sequence[Prompt], random.Random], list[Prompt]]


def several(prompts: Sequence[Prompt], numbers: random.Random, most: int = 6) -> list[Prompt]:
    """A batch of two to ``most`` whose rows have not all one length: it is padded."""
    while True:
        drawn = [numbers.choice(prompts) for _ in range(numbers.randint(2, most))]
        if len({len(prompt.ids) for prompt in drawn}) > 1:
            return drawn


def alike(prompts: Sequence[Prompt], numbers: random.Random) -> list[Prompt]:
    """A padded batch whose rows have the same number of visual tokens."""
    by_count: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        by_count.setdefault(prompt.visual_tokens, []).append(prompt)
    lengths = {count: {len(prompt.ids) for prompt in held} for count, held in by_count.items()}
    return several(by_count[numbers.choice([count for count in by_count if count and len(lengths[count]) > 1])], numbers)


def repeated(prompts: Sequence[Prompt], numbers: random.Random) -> list[Prompt]:
    """A batch without padding."""
    return [numbers.choice(prompts)] * numbers.randint(2, 6)


def where(condition: Callable[[int], bool], kind: Kind) -> Kind:
    """The kind, of prompts with such numbers of visual tokens."""
    return lambda prompts, numbers: kind([prompt for prompt in prompts if condition(prompt.visual_tokens)], numbers)


KINDS: dict[str, Kind] = {
    "any": several,
    "single": lambda prompts, numbers: [numbers.choice(prompts)],
    "alike": alike,
    "without padding": where(lambda count: count > 4, repeated),
    "text": where(lambda count: count == 0, several),
    "text without padding": where(lambda count: count == 0, repeated),
    "at most one token kept": where(lambda count: count <= 4, several),
    "one token kept, without padding": where(lambda count: 0 < count <= 4, repeated),
}
"""What torch.compile tells apart by a call's arguments, or by sizes of 1."""


class Forms:
    """A lowering that counts what it is given, and runs it as it is or through Inductor."""

    def __init__(self, name: str):
        self.name, self.count = name, 0

    def __call__(self, module: GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        self.count += 1
        return module.forward if self.name == "eager" else torch._inductor.compile(module, example_inputs)


def pool(count: int, seed: int) -> list[Prompt]:
    """Prompts with one picture to three, every fourth with none."""
    generator, numbers = torch.Generator().manual_seed(seed), random.Random(seed)
    made = []
    for index in range(count):
        sizes = tuple(numbers.choice(SIZES) for _ in range(numbers.randint(1, 3) if index % 4 else 0))
        parts = [torch.randint(5, 900, (numbers.randint(2, 9),), generator=generator)]
        for height, width in sizes:
            parts += [torch.tensor([START]), torch.full((height * width,), IMAGE), torch.tensor([END])]
            parts.append(torch.randint(5, 900, (numbers.randint(1, 5),), generator=generator))
        patches = torch.randn(4 * sum(height * width for height, width in sizes), 96, generator=generator)
        made.append(Prompt(torch.cat(parts), sizes, patches))
    return made


def batch(prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
    """What generate is given, padded on the left."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.stack([torch.nn.functional.pad(prompt.ids, (longest - len(prompt.ids), 0), value=PAD) for prompt in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(prompt.ids) for prompt in prompts]).long()
    given = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int()}
    sizes = [size for prompt in prompts for size in prompt.sizes]
    if sizes:
        given["pixel_values"] = torch.cat([prompt.patches for prompt in prompts])
        given["image_grid_thw"] = torch.tensor([[1, 2 * height, 2 * width] for height, width in sizes])
    return given


Answers = list[tuple[torch.Tensor, torch.Tensor]]
"""Of each turn: [batch, tokens] int64 and the first token's logits [batch, vocabulary]."""


def answer(model: Any, prompts: Sequence[Prompt], tokens: int, turns: int) -> Answers:
    """Args: ``turns``, 2 for a further question of text."""
    given, answers = batch(prompts), []
    for _ in range(turns):
        done = model.generate(**given, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True)
        answers.append((done.sequences[:, given["input_ids"].shape[1]:], done.logits[0]))
        ids = torch.cat([done.sequences, torch.tensor([QUESTION]).expand(len(prompts), -1)], 1)
        mask = torch.nn.functional.pad(given["attention_mask"], (0, ids.shape[1] - given["attention_mask"].shape[1]), value=1)
        given = {"input_ids": ids, "attention_mask": mask, "past_key_values": done.past_key_values}
    return answers


def is_right(model: Any, prompts: Sequence[Prompt], alone: dict[int, Answers], tokens: int, turns: int) -> bool:
    """Whether every row's answers are those that the prompt has by itself."""
    for turn, (ids, logits) in enumerate(answer(model, prompts, tokens, turns)):
        for row, prompt in enumerate(prompts):
            (own_ids,), (own,) = alone[id(prompt)][turn]
            if not torch.equal(ids[row], own_ids) or float((logits[row] - own).abs().max() / own.abs().max()) > TOLERANCE:
                return False
    return True


def soak(given: argparse.Namespace, advance: Callable[[], None]) -> dict[str, Any]:
    forms, numbers, lock = Forms(given.lowering), random.Random(given.seed), threading.Lock()
    model = parvts_fx.compile(build_model(3, 128), lowering=forms, strict=True, keep_ratio=0.25, migration_depth=1)
    prompts = pool(given.prompts, given.seed)
    alone = {id(prompt): answer(model, [prompt], given.tokens, 2) for prompt in prompts}
    kinds = list(KINDS.values())
    drawn = [kinds[number % len(kinds)](prompts, numbers) for number in range(given.calls)]
    seen: list[dict[str, Any]] = []

    def one(number: int) -> None:
        right = is_right(model, drawn[number], alone, given.tokens, 2 if number % 3 == 2 else 1)
        with lock:
            gc.collect()
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            seen.append({"right": right, "forms": forms.count, "mebibytes": most})
            advance()

    later = range(given.first, given.calls)
    for number in range(given.first):
        one(number)
    with concurrent.futures.ThreadPoolExecutor(given.threads) as threads:
        list(threads.map(one, (number for number in later if number % 3 != 2)))
    for number in later:
        if number % 3 == 2:  # the model itself keeps the last prompt's shift of positions for the next turn: no other in between
            one(number)
    return {"wrong": sum(not call["right"] for call in seen), "calls": len(seen),
            **{name: [seen[given.first - 1][name], seen[-1][name]] for name in ("forms", "mebibytes")}}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default, help in (("calls", 300, "in all"), ("first", 30, "calls in which anything may be compiled"),
                                ("prompts", 24, "different ones"), ("threads", 3, "that call the model behind the first ones"),
                                ("tokens", 3, "of each answer"), ("seed", 0, "of prompts and batches")):
        parser.add_argument(f"--{name}", type=int, default=default, help=help)
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="eager", help="of the graphs")
    parser.add_argument("--out", default=str(figures.RESULTS / "soak.json"), help="JSON file")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Call, show, write; 0 if all is right and nothing grows."""
    given = parse_arguments(arguments)
    quieten()
    console = Console()
    with many_compiles(), progress(console) as display:
        task = display.add_task("calling", total=given.calls)
        found = soak(given, lambda: display.advance(task))
    settings = {name: held for name, held in vars(given).items() if name != "out"}
    results = {"machine": machine(torch.device("cpu")), "settings": settings, **found}
    with open(given.out, "w") as file:
        file.write(json.dumps(results, indent=1) + "\n")
    console.print(figures.soak(results))
    grown = found["forms"][0] != found["forms"][1] or found["mebibytes"][1] > 1.1 * found["mebibytes"][0]
    return int(bool(found["wrong"]) or grown)


if __name__ == "__main__":
    raise SystemExit(main())
