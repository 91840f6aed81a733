"""Pictures of any size and number: few compiles of the prefill, each prompt with its own answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import parvts_fx
from parvts_fx.torch_private import sizes_in_strings
from tests.models.builders import BUILDERS
from tests.models.generating import Comparison, logit_error, run_generate, scattered
from tests.models.registry import IMAGE, START

SIZES = [(8, 8), (8, 12), (12, 12), (16, 8), (12, 16), (16, 16), (8, 20), (20, 20)]
"""In patches; four of them are a token."""


def prompt(patch: int, size: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """Text around a picture."""
    generator, (height, width) = torch.Generator().manual_seed(seed), size
    text = functools.partial(torch.randint, 5, 60, generator=generator)
    ids = torch.cat([text((3,)), torch.tensor([START]), torch.full((height * width // 4,), IMAGE), text((4 + seed % 3,))])[None]
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(height * width, patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]])}


class Counted:
    """A lowering that counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


@pytest.mark.supports("torch.compile", "pictures of eight sizes (Qwen2.5-VL, Qwen3-VL): two compiles of the prefill")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_sizes_share_a_compiled_form(name: str) -> None:
    built, lowering = BUILDERS[name](), Counted()
    oracle = Comparison(built, keep_ratio=0.25).generating
    prompts = [prompt(built.inputs["pixel_values"].shape[1], size, seed) for seed, size in enumerate(SIZES)]
    wanted = []
    for given in prompts:
        oracle.visual = None
        with oracle.installed():
            wanted.append(run_generate(built.model, given, 2))
    parvts_fx.compile(built.model, lowering=lowering, strict=True, keep_ratio=0.25, migration_depth=1, score=scattered,
                      merge=None)
    graphs = []
    for given, expected in zip(prompts, wanted):
        actual = run_generate(built.model, given, 2)
        graphs.append(lowering.graphs)
        assert max(map(logit_error, actual.logits, expected.logits)) <= 2e-5
        assert actual.sequences.equal(expected.sequences)
    assert graphs[2:] == [graphs[2]] * (len(SIZES) - 2), "from the third size on everything is compiled"


def test_strings_are_formatted_late_only_inside() -> None:
    """Nested and side by side; afterwards torch is as it was."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase as Translator

    before = Translator._format_value
    sizes_in_strings.__enter__()
    with sizes_in_strings:
        changed = Translator._format_value
        assert changed is not before
    assert Translator._format_value is changed
    sizes_in_strings.__exit__()
    assert Translator._format_value is before


def test_messages_hold_the_size() -> None:
    @torch.compile(backend="eager", dynamic=True)
    def described(x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return x + 1, f"{x.shape[0]} rows of {x.shape[1]:>4}"

    with sizes_in_strings:
        assert [described(torch.ones(count, 7))[1] for count in (3, 5, 9)] == [
            f"{count} rows of    7" for count in (3, 5, 9)]
