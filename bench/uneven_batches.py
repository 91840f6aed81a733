"""What a batch of prompts with pictures of different sizes costs: ``python -m bench.uneven_batches``.

A Qwen2.5-VL with a decoder of real width and a small vision tower answers four prompts with their first token, by ``generate``:
once with four pictures of one size, once with pictures of four sizes and as many tokens in all. torch.compile with Inductor pads
the second batch; parvts prunes it sample by sample. Results go into ``bench/results/uneven_batches.json``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from rich.console import Console

import parvts_fx
from bench import figures, together
from bench.arguments import add_keep_ratio, parser_of
from bench.measuring import in_turns, machine, many_compiles, seconds, spread
from bench.tables import progress, quieten

IMAGE, VIDEO, START, END, PAD = 997, 998, 995, 996, 0
EVEN = ((19, 24),) * 4
UNEVEN = ((12, 12), (18, 18), (24, 24), (26, 30))
"""Height and width of the pictures in visual tokens: 1,824 in each batch."""

Inputs = dict[str, torch.Tensor]


def build_model(layers: int, width: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Random weights; the tower is so small that the decoder's time is what is measured."""
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                         num_attention_heads=width // 64, num_key_value_heads=width // 128, vocab_size=1000,
                         max_position_embeddings=8192, pad_token_id=PAD,
                         rope_parameters=dict(rope_type="default", mrope_section=[8, 12, 12], rope_theta=1e6)),
        vision_config=dict(depth=1, hidden_size=64, intermediate_size=64, num_heads=2, out_hidden_size=width, patch_size=4,
                           fullatt_block_indexes=[0], window_size=56),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None
    return model


def prompts(sizes: Sequence[tuple[int, int]], text: int) -> Inputs:
    """Text around a picture of each size, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for height, width in sizes:
        words = torch.randint(5, 900, (text,), generator=generator)
        rows.append(torch.cat([words[:text // 2], torch.tensor([START]), torch.full((height * width,), IMAGE),
                               torch.tensor([END]), words[text // 2:]]))
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=PAD) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    patches = 4 * sum(height * width for height, width in sizes)
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int(),
            "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4, generator=generator),
            "image_grid_thw": torch.tensor([[1, 2 * height, 2 * width] for height, width in sizes])}


def first_token(model: Any, given: Inputs) -> torch.Tensor:
    return model.generate(**given, max_new_tokens=1, do_sample=False)


def compiled(model: Any, method: str, lowering: str, keep_ratio: float) -> Any:
    """The model, compiled by "inductor" (torch.compile alone) or "parvts"."""
    if method == "parvts":
        return parvts_fx.compile(model, lowering=lowering, strict=True, keep_ratio=keep_ratio)
    model.compile(backend=lowering)
    return model


@dataclasses.dataclass(frozen=True)
class Ready:
    """Both batches by both methods, compiled."""

    calls: dict[tuple[str, str], Callable[[], torch.Tensor]]
    """By method and batch."""

    pruned: Any
    """The model that prunes."""


@dataclasses.dataclass(frozen=True)
class Uneven(together.Task[Ready]):
    """On a GPU where there is one, in bfloat16, with weights that both methods share; else in float32.

    Args:
        settings: the command line's.
    """

    settings: dict[str, Any]

    def prepare(self, advance: Callable[[], None] = lambda: None) -> Ready:
        quieten()
        how, device = self.settings, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = build_model(how["layers"], how["width"], device, dtype)
        plain = copy.deepcopy(model, {id(held): held for held in (*model.parameters(), *model.buffers())})
        calls: dict[tuple[str, str], Callable[[], torch.Tensor]] = {}
        with torch.no_grad(), many_compiles():
            for method, one in (("inductor", plain), ("parvts", model)):
                pruned = compiled(one, method, how["lowering"], how["keep_ratio"])
                for name, sizes in (("even", EVEN), ("uneven", UNEVEN)):
                    batch = {held: tensor.to(device, dtype if tensor.is_floating_point() else None)
                             for held, tensor in prompts(sizes, how["text"]).items()}
                    calls[method, name] = functools.partial(first_token, pruned, batch)
                    for _ in range(2):  # features of several pictures are tried out in the first call
                        calls[method, name]()
                    advance()
        record = parvts_fx.last_call(pruned)
        assert record is not None and record.pruned, record
        return Ready(calls, pruned)

    @torch.no_grad()
    def measure(self, ready: Ready, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
        device = ready.pruned.device
        with many_compiles():
            taken = in_turns([functools.partial(seconds, call, device) for call in ready.calls.values()],
                             self.settings["repeats"], 2, advance)
            ready.calls["parvts", "uneven"]()
        return {"machine": machine(device), "settings": self.settings, "pictures": {"even": EVEN, "uneven": UNEVEN},
                "kept": parvts_fx.last_call(ready.pruned).kept_tokens,
                "rows": [{"method": method, "batch": name, "seconds": spread(times)}
                         for (method, name), times in zip(ready.calls, taken)]}

    @staticmethod
    def show(console: Console, result: dict[str, Any]) -> None:
        console.print(figures.uneven_batches(result))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of("uneven_batches", __doc__, (
        ("layers", 12, "decoder layers"), ("width", 1024, "the decoder's width"), ("text", 48, "words of each prompt"),
        ("repeats", 9, "measured calls of each")))
    add_keep_ratio(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, show, write; returns what the JSON holds."""
    given = parse_arguments(arguments)
    quieten()
    console = Console()
    task = Uneven({name: held for name, held in vars(given).items() if name != "out"})
    with progress(console) as display:
        shown = display.add_task("measuring", total=4 + given.repeats + 2)
        advance = functools.partial(display.advance, shown)
        found = task.measure(task.prepare(advance), advance)
    with open(given.out, "w") as file:
        file.write(json.dumps(found, indent=1) + "\n")
    task.show(console, found)
    return found


if __name__ == "__main__":
    main()
