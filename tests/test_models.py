"""Architectures that differ in structure, against the eager reference; the whole list is ``python -m tests.models``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from parvts_fx import NotRewritten
from tests.comparing import TOLERANCE
from tests.models.generating import Comparison, cache_lengths, compared
from tests.models.installed import build
from tests.models.registry import Built

GENERATE = (
    "llava", "llava_next", "internvl", "qwen2_vl", "qwen3_vl", "gemma3", "paligemma", "aya_vision", "idefics3", "mistral3",
    "llama4", "qwen3_vl_moe", "qwen3_5", "lfm2_vl", "gemma3n", "gemma4", "granite4_vision", "kimi_k25", "molmo2",
    "nemotron_h_omni", "exaone4_5", "video_llama_3 (video)", "dots3_note", "ovis2", "git", "inkling_mm_model",
)
"""One architecture for every structural trait."""

FORWARD = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "kosmos-2", "git", "mistral_large4", "inkling2", "kimi_k25")
"""The last one's embeddings arrive at the decoder's graph with placeholders that its features are yet to replace."""


def errors(built: Built, check: Callable[[Comparison], float]) -> dict[str, float | str]:
    """By schedule; where it does not run rewritten, the reason."""
    found: dict[str, float | str] = {}
    for schedule, held in compared(built).items():
        try:
            found[schedule] = check(held)
        except NotRewritten as error:
            found[schedule] = str(error)
    return found


def agree(found: dict[str, float | str]) -> bool:
    return all(isinstance(error, float) and error <= TOLERANCE for error in found.values())


@pytest.mark.supports("Architectures", ", ".join(GENERATE) + " (generate, both fusions, two stages)")
@pytest.mark.versions
@pytest.mark.parametrize("name", GENERATE)
def test_generate(name: str) -> None:
    built = build(name)

    def check(held: Comparison) -> float:
        error = held.generate(built.inputs)
        assert max(cache_lengths(held.run_compiled(built.inputs, 1).past_key_values)) == held.kept
        return error

    found = errors(built, check)
    assert agree(found), found


@pytest.mark.supports("Architectures", ", ".join(FORWARD) + " (forward, both fusions, two stages)")
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str) -> None:
    built = build(name)
    found = errors(built, lambda held: held.forward(built.inputs))
    assert agree(found), found
