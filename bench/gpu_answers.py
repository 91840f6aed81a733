"""Whole answers as users get them: ``generate`` on a static cache, whose decode steps it compiles by itself on a GPU."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

import parvts_fx
from bench import together
from bench.configurations import Configuration
from bench.measuring import in_turns, machine, many_compiles, seconds, spread
from bench.tables import Sheet, milliseconds, quieten

Call = Callable[[], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Answers(together.Task[dict[str, Call]]):
    """Pictures to the last token, compiled by torch.compile alone and through parvts_fx.compile."""

    config: Configuration
    batch: int
    given: argparse.Namespace

    def prepare(self) -> dict[str, Call]:
        quieten()
        given, device = self.given, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = self.config.build(device, torch.float32 if given.small else torch.bfloat16, given.layers)
        model.generation_config.eos_token_id = None
        plain = copy.deepcopy(model, {id(held): held for held in (*model.parameters(), *model.buffers())})  # weights are shared
        plain.compile(backend=given.lowering)
        pruned = parvts_fx.compile(model, lowering=given.lowering, strict=True, keep_tokens=self.config.kept)
        scene = self.config.scene(model, self.batch)
        inputs = {"input_ids": scene.ids, "attention_mask": torch.ones_like(scene.ids), "pixel_values": scene.pixels}

        def answering(model: Any) -> Call:
            return lambda: model.generate(**inputs, max_new_tokens=given.tokens, min_new_tokens=given.tokens, do_sample=False,
                                          cache_implementation="static")

        calls = {"inductor": answering(plain), "parvts": answering(pruned)}
        with torch.no_grad(), many_compiles():
            for call in 3 * list(calls.values()):  # CUDA graphs of steps are recorded in the second one
                call()
        record = parvts_fx.last_call(pruned)
        assert record is not None and record.pruned, record
        return calls

    @torch.no_grad()
    def measure(self, calls: dict[str, Call]) -> dict[str, Any]:
        device = calls["parvts"]().device
        taken = in_turns([lambda call=call: seconds(call, device) for call in calls.values()], self.given.repeats, 2)
        return {"answers": self.config.name, "batch": self.batch, "visual": self.config.visual, "kept": self.config.kept,
                "tokens": self.given.tokens, "machine": machine(device),
                "rows": [{"method": name, "whole": spread(times)} for name, times in zip(calls, taken)]}

    @staticmethod
    def show(console: Console, result: dict[str, Any]) -> None:
        plain = result["rows"][0]["whole"]["median"]
        console.print(Sheet(
            f"{result['answers']}, batch {result['batch']}, {result['tokens']} tokens by generate on a static cache",
            ["method", "whole answer", "ratio"],
            [[row["method"], milliseconds(row["whole"]), f"{plain / row['whole']['median']:.2f}x"] for row in result["rows"]]))
