"""Pictures of any size and number: few compiles of the prefill, each prompt with its own answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers.modeling_outputs import BaseModelOutputWithPooling

import parvts_fx
from parvts_fx.options import parse_options
from parvts_fx.runtime.compiled_call import watched_call
from parvts_fx.runtime.joined_features import JoinedFeatures
from parvts_fx.torch_private import sizes_in_strings
from tests import llava
from tests.comparing import TOLERANCE, expected
from tests.models.builders import BUILDERS
from tests.models.generating import Comparison, logit_error, run_generate, scattered
from tests.models.registry import IMAGE, START
from tests.reference import relative_error

SIZES = [(8, 8), (16, 16), (12, 12), (16, 8), (12, 16), (8, 12)]
"""Height and width in patches, four of which are a token; the second differs from the first in all that may differ."""


def around(tokens: int, seed: int, **pictures: torch.Tensor) -> dict[str, torch.Tensor]:
    """Text around a picture."""
    text = functools.partial(torch.randint, 5, 60, generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([text((6,)), torch.tensor([START]), torch.full((tokens,), IMAGE), text((4 + seed % 3,))])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def patches_of(height: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    """Patches of two frames, one behind the other."""
    given = around(height * width // 4, seed, pixel_values=noise(seed, height * width, 96),
                   image_grid_thw=torch.tensor([[1, height, width]]))
    return given | {"mm_token_type_ids": (given["input_ids"] == IMAGE).int()}


def half_of(height: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    """A picture as it is, of half as many patches to a side: this tower has places for eight."""
    height, width = 2 * height, 2 * width
    return around(height * width // 64, seed, pixel_values=noise(seed, 1, 3, height, width),
                  image_sizes=torch.tensor([[height, width]]))


def tiles_of(height: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    """The picture as a whole, and in tiles of eight pixels; a feature more at the end of each row."""
    height, width = sorted((8 * (1 + height // 16), 8 * (1 + width // 16)))
    return around(4 + height // 4 * (width // 4 + 1), seed, image_sizes=torch.tensor([[height, width]]),
                  pixel_values=noise(seed, 1 + height * width // 64, 3, 8, 8)[None])


def batch_of(height: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    """A tile for each four patches of height, as pictures of a batch."""
    return around(height // 4 * 16, seed, pixel_values=noise(seed, height // 4, 3, 32, 32))


PROMPTS = {"qwen2_vl": patches_of, "qwen2_5_vl": patches_of, "qwen3_vl": patches_of, "glm4v": patches_of, "mistral3": half_of,
           "llava_next": tiles_of, "internvl": batch_of}


class Counted:
    """A lowering that counts the rewritten graphs that it is given: those that sort tokens by their scores."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        self.graphs += any("sort" in str(node.target) for node in module.graph.nodes)
        return module.forward


@pytest.mark.slow
@pytest.mark.supports("torch.compile", "pictures of any size (Qwen2-VL to Qwen3-VL, GLM-4V, Mistral 3, tiles of LLaVA-NeXT and "
                      "InternVL): two compiles of the prefill")
@pytest.mark.parametrize("name", PROMPTS)
def test_sizes_share_a_compiled_form(name: str) -> None:
    built, lowering = BUILDERS[name](), Counted()
    oracle = Comparison(built, keep_ratio=0.25).generating
    prompts = [PROMPTS[name](*size, seed) for seed, size in enumerate(SIZES)]
    wanted = []
    for given in prompts:
        oracle.visual = None
        with oracle.installed():
            wanted.append(run_generate(built.model, given, 2))
    parvts_fx.compile(built.model, lowering=lowering, strict=True, keep_ratio=0.25, migration_depth=1, score=scattered,
                      merge=None)
    graphs = []
    for given, own in zip(prompts, wanted):
        actual = run_generate(built.model, given, 2)
        graphs.append(lowering.graphs)
        assert max(map(logit_error, actual.logits, own.logits)) <= TOLERANCE
        assert actual.sequences.equal(own.sequences)
    assert graphs == [1] + [2] * (len(SIZES) - 1), "from the third size on everything is compiled"


@pytest.mark.slow
@pytest.mark.supports("torch.compile", "batches of any size, as generate calls: three compiles of the prefill")
def test_batches_share_a_compiled_form() -> None:
    """generate hands over one tensor a picture. After the first batch of several, any number of them runs what is there."""
    if not hasattr(llava.transformers.LlavaForConditionalGeneration, "_supports_mm_encoder_outputs"):
        pytest.skip("this version's generate leaves pictures to forward, whose graph has one tensor for each")
    model, lowering, told = llava.build(layers=2), Counted(), []
    prompts = [llava.prompt(model, [[2 + row % 2, "image", 5 - row % 2 + batch] for row in range(batch)])
               for batch in (1, 3, 2, 5, 1, 4)]
    options = dict(keep_tokens=3, migration_depth=1)
    wanted = [expected(model, given, given.with_positions, **options) for given in prompts]
    parvts_fx.compile(model, lowering=lowering, strict=True, on_call=told.append, **options)
    graphs = []
    for given, rows in zip(prompts, wanted):
        first = run_generate(model, given.inputs, 2).logits[0]
        graphs.append(lowering.graphs)
        assert max(relative_error(logits, row.logits[-1]) for logits, row in zip(first, rows, strict=True)) <= TOLERANCE
    assert graphs[1:] == [graphs[1]] * (len(prompts) - 1), "the second batch has compiled for all"
    assert [len(record.visual_tokens) for record in told] == [1, 3, 2, 5, 1, 4], "what is tried out makes no record"


PICTURES = tuple(torch.randn(count, 4, generator=torch.Generator().manual_seed(count)) for count in (3, 5))


@pytest.mark.parametrize("model, same", [
    (lambda features: torch.cat(features), True),
    (lambda features: torch.stack([feature.mean(0) for feature in features]).sum(0), False),
    (lambda features: torch.cat(features) + len(features), False),
    (lambda features: features[1], False),
], ids=["joins them", "sums them up one by one", "counts them", "reads the second"])
def test_only_what_joins_features_is_given_joined_ones(model: Callable, same: bool) -> None:
    joined = JoinedFeatures()
    given = {"mask": torch.ones(2), "outputs": {"image": BaseModelOutputWithPooling(pooler_output=PICTURES)}}

    def call(kwargs: Any) -> Any:
        return {"logits": model(kwargs["outputs"]["image"].pooler_output)}

    assert joined.joined(given) is given
    joined.try_out(given, call)
    later = joined.joined(given)["outputs"]["image"].pooler_output
    assert len(later) == (1 if same else 2) and torch.equal(torch.cat(later), torch.cat(PICTURES))
    assert given["outputs"]["image"].pooler_output is PICTURES, "what the caller holds stays"
    joined.try_out(given, lambda kwargs: pytest.fail("once is enough"))


class Joining(torch.nn.Module):
    """Tells how many tensors it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, outputs: Any) -> torch.Tensor:
        self.seen.append(len(outputs["image"]))
        return torch.cat(outputs["image"])


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=str)
def test_trials_run_uncompiled(options: dict[str, Any]) -> None:
    """The compiled form is given joined features from the first call on, and is never called twice in one."""
    model, compiled = Joining(), Joining()
    run = watched_call(compiled, parse_options(options), model)
    for _ in range(2):
        assert run(outputs={"image": PICTURES}).equal(torch.cat(PICTURES))
    assert (model.seen, compiled.seen) == ([2, 1], [1, 1])


@pytest.mark.parametrize("held", [
    PICTURES[:1], (PICTURES[0], torch.ones(3, 5)), (torch.ones(3, dtype=torch.int64),) * 2, "text", None], ids=str)
def test_what_is_not_joined(held: Any) -> None:
    joined, given = JoinedFeatures(), {"outputs": {"image": held}, "past_key_values": PICTURES}  # that may be a cache
    joined.try_out(given, lambda kwargs: pytest.fail("nothing is tried out"))
    assert joined.joined(given) is given


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


def test_features_that_a_call_returns_come_back_as_they_were() -> None:
    joined, given = JoinedFeatures(), {"outputs": {"image": PICTURES}}

    def call(kwargs: Any) -> Any:
        return {"logits": torch.cat(kwargs["outputs"]["image"]), "image_hidden_states": kwargs["outputs"]["image"]}

    joined.try_out(given, call)
    later = joined.joined(given)
    output = joined.parted(call(later), given, later)
    assert later is not given and output["image_hidden_states"] is PICTURES and output["logits"].shape == (8, 4)
