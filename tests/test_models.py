"""Architectures that differ in structure, against the eager reference; the whole list is ``python -m tests.models``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import parvts_fx
from parvts_fx import NotRewritten, Stage, scores
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


@pytest.mark.slow
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


AHEAD = ("qwen3_vl", "gemma3n", "llama4", "lfm2_vl", "kimi_k25", "git")
"""Hidden states added between layers, several streams, experts, layers without attention among those ahead, latents written
into buffers, attention that is written out."""


@pytest.fixture
def paid_ahead() -> Iterator[str]:
    """A rule that looks at nothing else: what models make of the embeddings in front of the first layer differs."""
    name = "paid ahead"
    parvts_fx.register_rule(name, reads="ahead", layers=2)(lambda hidden, visual, ahead: ahead.mean(1).sum(1))
    yield name
    scores._RULES.pop(name)


@pytest.mark.slow
@pytest.mark.supports("Architectures", ", ".join(AHEAD) + " (a rule that looks ahead)")
@pytest.mark.parametrize("name", AHEAD)
def test_looking_ahead(name: str, paid_ahead: str) -> None:
    built = build(name)
    with Comparison(built, stages=(Stage(at=1, keep=0.25, rule=paid_ahead),)) as held:
        assert held.generate(built.inputs) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.supports("Architectures", ", ".join(FORWARD) + " (forward, both fusions, two stages)")
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name: str) -> None:
    built = build(name)
    found = errors(built, lambda held: held.forward(built.inputs))
    assert agree(found), found
