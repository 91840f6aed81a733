"""Architectures that differ in structure, against the eager reference; the whole list is ``python -m tests.models``."""

from __future__ import annotations

import pytest
import transformers

from tests.comparing import TOLERANCE
from tests.models.builders import BUILDERS
from tests.models.generating import Comparison, cache_lengths
from tests.models.registry import Built

GENERATE = (
    "llava", "llava_next", "internvl", "qwen2_vl", "qwen3_vl", "gemma3", "paligemma", "aya_vision", "idefics3", "mistral3",
    "llama4", "qwen3_vl_moe", "qwen3_5", "lfm2_vl", "gemma3n", "gemma4", "granite4_vision", "kimi_k25", "molmo2",
    "nemotron_h_omni", "exaone4_5", "video_llama_3 (video)", "dots3_note", "ovis2", "git",
)
"""One architecture for every structural trait."""

FORWARD = ("llava", "qwen2_5_vl", "qwen3_vl", "idefics3", "kosmos-2", "git", "mistral_large4")

BROKEN = {("llama4", "5.24.0"): "the model's forward reads image_outputs, which its decoder does not return"}
"""What the installed transformers cannot run at all, compiled or not."""


def build(name: str) -> Built:
    """Skips what the installed transformers does not have yet, and what does not run in it."""
    if (name, transformers.__version__) in BROKEN:
        pytest.skip(f"transformers {transformers.__version__}: {BROKEN[name, transformers.__version__]}")
    try:
        return BUILDERS[name]()
    except AttributeError as error:
        if error.obj is not transformers:
            raise
        pytest.skip(f"transformers {transformers.__version__} has no {error.name}")


@pytest.mark.supports("Architectures", ", ".join(GENERATE) + " (generate, both fusions)")
@pytest.mark.parametrize("fusion", [pytest.param("attention", marks=pytest.mark.versions), 0.4])
@pytest.mark.parametrize("name", GENERATE)
def test_generate(name, fusion):
    built = build(name)
    with Comparison(built, fusion=fusion) as compared:
        assert compared.generate(built.inputs) <= TOLERANCE
        lengths = cache_lengths(compared.run_compiled(built.inputs, 1).past_key_values)
    assert max(lengths) == compared.kept


@pytest.mark.supports("Architectures", ", ".join(FORWARD) + " (forward)")
@pytest.mark.parametrize("name, fusion", [*((name, "attention") for name in FORWARD), ("kimi_k25", 0.4)])
def test_forward(name, fusion):
    """The last one's embeddings arrive at the decoder's graph with placeholders that its features are yet to replace."""
    built = build(name)
    with Comparison(built, fusion=fusion) as compared:
        assert compared.forward(built.inputs) <= TOLERANCE
