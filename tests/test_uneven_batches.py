"""Batches whose samples differ, or have padding behind pictures: pruned, and every row as it is by itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import parvts_fx
from parvts_fx import ParvtsWarning
from tests import llava
from tests.comparing import TOLERANCE, expected
from tests.models.builders import BUILDERS
from tests.models.generating import COMPILED, cache_tensors, logit_error, run_generate, scattered
from tests.models.prompts import Inputs, mixed
from tests.reference import relative_error

ROWS = [[2, "image", 3], [4, "image", 1, "image", 2], [5]]
"""A picture, two, and none."""
OPTIONS = dict(keep_tokens=3, migration_depth=1)


@pytest.fixture
def model() -> Any:
    return llava.build(layers=3)


def on_the_right(prompt: llava.Prompt) -> llava.Prompt:
    """With its padding behind the text."""
    inputs = dict(prompt.inputs)
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.stack([row.roll(-count) for row, count in zip(inputs[name], padding)])
    return llava.Prompt(inputs, inputs["input_ids"] == llava.IMAGE_TOKEN)


def called(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **more)


def any_size(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, marked as of any batch, length and number of pictures: compiled so from the first call on."""
    for name, held in inputs.items():
        for axis in (0,) if name == "pixel_values" else (0, 1):
            torch._dynamo.maybe_mark_dynamic(held, axis)
    return inputs


def alone(model: Any, prompt: llava.Prompt) -> list[Any]:
    """The reference's prefill of each row by itself."""
    return [expected(model, row, row.with_positions, **OPTIONS)[0] if row.visual.any() else None
            for row in (prompt.row(index) for index in range(len(prompt.visual)))]


@pytest.mark.slow
@pytest.mark.supports("Batches", "rows with other numbers of visual tokens, some with none, several pictures in some; "
                      "padding on either side: each row as it is by itself")
@pytest.mark.parametrize("arranged, lowering", [
    (lambda prompt: prompt, "eager"), (on_the_right, "eager"), (lambda prompt: prompt, "inductor")],
    ids=["left", "right", "left, inductor"])
def test_rows_are_as_they_are_alone(model: Any, arranged: Callable, lowering: str) -> None:
    """Logits and whole caches of the pruned rows against the reference, those of the row without a picture against eager."""
    prompt = arranged(llava.prompt(model, ROWS))
    wanted, text = alone(model, prompt), prompt.row(2)
    plain = called(model, text.inputs)
    parvts_fx.compile(model, lowering=lowering, strict=True, **OPTIONS)
    output = called(model, prompt.with_positions)
    layers = output.past_key_values.layers
    longest = max(5 + 3, 7 + 3)
    assert output.logits.shape[1] == longest and {layer.keys.shape[2] for layer in layers} == {longest}
    for row, one in enumerate(wanted):
        logits = plain.logits[0] if one is None else one.logits
        assert relative_error(output.logits[row, -len(logits):], logits) <= TOLERANCE
        for index, layer in enumerate(layers):
            own = plain.past_key_values.layers[index] if one is None else one
            keys, values = (own.keys, own.values) if one is None else (own.keys[index], own.values[index])
            for held, ours in ((layer.keys, keys), (layer.values, values)):
                assert relative_error(held[row:row + 1, :, -ours.shape[2]:], ours) <= TOLERANCE
                assert not held[row, :, :-ours.shape[2]].any()
    record = parvts_fx.last_call(model)
    assert record.pruned and record.visual_tokens == (16, 32, 0) and record.kept_tokens == (3, 3, 0)
    assert output.past_key_values.get_seq_length() == prompt.visual.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "qwen3_vl", "qwen3_5", "lfm2_vl", "kimi_k25"])
def test_architectures(name: str) -> None:
    """generate with two pictures and a row of text, where rows have padding: each row as it is by itself."""
    built = BUILDERS[name]()
    built.inputs.setdefault("attention_mask", torch.ones_like(built.inputs["input_ids"]))
    given, rows = mixed(built.inputs)
    parvts_fx.compile(built.model, **COMPILED, keep_ratio=0.25, migration_depth=1, score=scattered)
    output = run_generate(built.model, given, 3)
    assert parvts_fx.last_call(built.model).pruned and parvts_fx.last_call(built.model).kept_tokens[2] == 0
    for row, own in enumerate(rows):
        single = run_generate(built.model, own, 3)
        assert max(logit_error(ours[row:row + 1], theirs) for ours, theirs in zip(output.logits, single.logits)) <= TOLERANCE


@pytest.fixture
def compiled(model: Any) -> Any:
    return parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)


def generated(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, **more)


def rows_generated(model: Any, prompt: llava.Prompt, **more: Any) -> list[list[int]]:
    """What each row's generate adds to it."""
    found = []
    for row in range(len(prompt.visual)):
        own = prompt.row(row).inputs
        found.append(generated(model, own, **more).sequences[0, own["input_ids"].shape[1]:].tolist())
    return found


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}], ids=str)
def test_generating(compiled: Any, more: dict) -> None:
    prompt = llava.prompt(compiled, ROWS[:2])
    tokens = generated(compiled, prompt.inputs, **more).sequences[:, prompt.visual.shape[1]:].tolist()
    assert tokens == rows_generated(compiled, prompt, **more)


@pytest.mark.slow
def test_further_turns(compiled: Any) -> None:
    """More text on a copy of the cache, from which one token was taken off."""
    prompt = llava.prompt(compiled, ROWS)

    def logits(given: llava.Prompt) -> torch.Tensor:
        rows, mask = len(given.visual), given.inputs["attention_mask"]
        first = given.with_positions["position_ids"].amax(1, keepdim=True) + 1
        step = {"input_ids": torch.full((rows, 2), 13), "position_ids": first + torch.arange(2),
                "attention_mask": torch.cat([mask, torch.ones(rows, 2).long()], 1)}
        cache = called(compiled, given.with_positions).past_key_values
        cache = copy.deepcopy(called(compiled, {**step, "past_key_values": cache}).past_key_values)
        for layer in cache.layers:  # what crop does; the meaning of its argument depends on transformers' version
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        more = {"input_ids": torch.tensor([[7, 9, 11]] * rows), "position_ids": first + 1 + torch.arange(3),
                "attention_mask": torch.cat([mask, torch.ones(rows, 4).long()], 1)}
        return called(compiled, {**more, "past_key_values": cache}).logits

    together = logits(prompt)
    for row in range(3):
        assert relative_error(together[row:row + 1], logits(prompt.row(row))) <= TOLERANCE


@pytest.mark.slow
def test_caches_whose_samples_are_chosen(compiled: Any) -> None:
    """The cache's own methods take its record of rows with them."""
    prompt = llava.prompt(compiled, ROWS)
    cache = called(compiled, prompt.with_positions).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    order = [0, 2, 2, 0]
    mask = torch.cat([prompt.inputs["attention_mask"][order], torch.ones(4, 1).long()], 1)
    positions = prompt.with_positions["position_ids"].amax(1, keepdim=True)[order] + 1
    given = {"input_ids": torch.full((4, 1), 13), "position_ids": positions}
    together = called(compiled, {**given, "past_key_values": cache, "attention_mask": mask}).logits
    for place, row in enumerate(order):
        one = prompt.row(row)
        own = called(compiled, one.with_positions).past_key_values
        step = called(compiled, {
            "input_ids": torch.full((1, 1), 13), "position_ids": positions[place:place + 1], "past_key_values": own,
            "attention_mask": torch.ones(1, one.visual.shape[1] + 1).long()})
        assert relative_error(together[place:place + 1], step.logits) <= TOLERANCE


@pytest.mark.slow
def test_masks_of_later_calls(compiled: Any) -> None:
    """None is made up for; one by position counts as well; one with four axes cannot be told."""
    prompt = llava.prompt(compiled, ROWS)
    ids, positions = torch.full((3, 1), 13), prompt.with_positions["position_ids"].amax(1, keepdim=True) + 1
    mask = torch.cat([prompt.inputs["attention_mask"], torch.ones(3, 1).long()], 1)

    def step(*given: Any, **named: Any) -> torch.Tensor:
        cache = called(compiled, prompt.with_positions).past_key_values
        with torch.no_grad():
            return compiled(*given, **named, past_key_values=cache, position_ids=positions).logits

    wanted = step(input_ids=ids, attention_mask=mask)
    assert torch.equal(step(input_ids=ids), wanted) and torch.equal(step(ids, None, mask), wanted)
    with pytest.raises(ValueError, match="attention_mask is not \\[batch, positions\\]"):
        step(input_ids=ids, attention_mask=torch.ones(3, 1, 1, mask.shape[1], dtype=torch.bool))


class Counted:
    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: GraphModule, example_inputs: Sequence[object]) -> Callable[..., Any]:
        self.graphs += any("sort" in str(node.target) for node in module.graph.nodes)
        return module.forward


@pytest.mark.slow
def test_one_compiled_form_for_all_rows(model: Any) -> None:
    lowering = Counted()
    parvts_fx.compile(model, lowering=lowering, strict=True, **OPTIONS)
    graphs = []
    for rows in ([[2, "image", 3], [4, "image", 1, "image"], [5]], [["image", "image", "image", 3], [9], [1, "image", 7]],
                 [[4], [6, "image", 2], [1, "image", "image", 1]]):
        prompt = llava.prompt(model, rows)
        generated(model, prompt.inputs)
        graphs.append(lowering.graphs)
    assert graphs == [1] * 3, "all is compiled by the first batch"


@pytest.mark.slow
def test_equal_rows_behind_batches_that_hardly_have_visual_tokens(model: Any) -> None:
    """Less than one a sample, in the prompts that the graph was captured for."""
    prompt = llava.prompt(model, [["image", 2], [1, "image", 3]])
    wanted = alone(model, prompt)
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    called(model, any_size(llava.prompt(model, [["image", 4, "image"], *[[2 + row] for row in range(33)]]).inputs))
    logits = called(model, prompt.inputs).logits
    assert parvts_fx.last_call(model).kept_tokens == (3, 3)
    assert all(relative_error(logits[row, -len(one.logits):], one.logits) <= TOLERANCE for row, one in enumerate(wanted))


@pytest.mark.slow
def test_everything_dynamic(model: Any) -> None:
    """With dynamic=True the floats of a model's modules are inputs, too."""
    rows = ([["image", 2, "image"], [6], ["image", 1]], [[3, "image", 5], ["image", 2]])
    prompts = [llava.prompt(model, each) for each in rows]
    wanted = [alone(model, prompt) for prompt in prompts]
    parvts_fx.compile(model, lowering="eager", strict=True, dynamic=True, **OPTIONS)
    for prompt, each in zip(prompts, wanted):
        logits = called(model, prompt.with_positions).logits
        assert all(one is None or relative_error(logits[row, -len(one.logits):], one.logits) <= TOLERANCE
                   for row, one in enumerate(each))


@pytest.mark.slow
def test_features_that_are_given_with_the_embeddings(model: Any) -> None:
    """Two pictures less than samples: no size tells how many tokens a row has."""
    prompt = llava.prompt(model, [[3, "image", 4], *[[2 + row] for row in range(20)]])
    wanted = alone(model, prompt)[0]
    parvts_fx.compile(model, lowering="eager", strict=True, **OPTIONS)
    output = called(model, prompt.with_positions)
    assert relative_error(output.logits[0, -len(wanted.logits):], wanted.logits) <= TOLERANCE
    even = llava.prompt(model, [[3, "image", 4], [2, "image", 2]])
    assert called(model, even.inputs).logits.shape[1] == 7 + 3


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[[3, "image", 5], [4]], [[2], [3, "image", 1], [4], [1]]], ids=["half", "a quarter"])
def test_what_samples_have_in_the_mean_decides_nothing(model: Any, rows: list) -> None:
    """Eight visual tokens a row, or four, of which ten would stay; then a batch of equal rows of the same sizes."""
    parvts_fx.compile(model, lowering="eager", strict=True, keep_tokens=10, migration_depth=1)
    prompt = llava.prompt(model, rows)
    called(model, prompt.inputs)
    assert parvts_fx.last_call(model).kept_tokens == tuple(10 if "image" in row else 0 for row in rows)
    even = llava.prompt(model, [["image", 3] for _ in rows])
    called(model, even.inputs)
    assert parvts_fx.last_call(model).kept_tokens == (10,) * len(rows)


def overwriting(module: GraphModule, example_inputs: Sequence[object], mode: str | None = None) -> Callable[..., Any]:
    """A lowering whose results live in memory of its own, as with CUDA graphs: the next call overwrites them."""
    memory: dict[Any, torch.Tensor] = {}

    def run(*inputs: Any) -> Any:
        results = []
        for place, made in enumerate(module(*inputs)):
            if isinstance(made, torch.Tensor):
                made = memory.setdefault((place, made.shape), torch.empty_like(made)).copy_(made)
            results.append(made)
        return results

    return run


@pytest.mark.slow
def test_results_that_the_next_call_overwrites(model: Any) -> None:
    prompt = llava.prompt(model, [[2, "image", 3], [3, "image", 2], [5]])
    wanted = alone(model, prompt)
    parvts_fx.compile(model, lowering=overwriting, strict=True, mode="reduce-overhead", **OPTIONS)
    logits = called(model, prompt.with_positions).logits
    for row, one in enumerate(wanted[:2]):
        assert relative_error(logits[row, -len(one.logits):], one.logits) <= TOLERANCE


# -- what stays whole ---------------------------------------------------------------------------------------------------------


def same_as_eager(model: Any, prompt: llava.Prompt, plain: Any, words: str, **more: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = called(model, prompt.inputs, **more)
    assert relative_error(output.logits, plain.logits) <= TOLERANCE
    told = [str(warning.message) for warning in caught if issubclass(warning.category, ParvtsWarning)]
    assert len(told) == 1 and words in told[0]


def test_the_plain_backend_says_what_prunes(model: Any) -> None:
    prompt = llava.prompt(model, ROWS)
    plain = called(model, prompt.inputs)
    model.compile(backend="parvts", options={"lowering": "eager", **OPTIONS})
    same_as_eager(model, prompt, plain, "parvts_fx.compile(model) prunes such batches")


class WithTuples(torch.nn.Module):
    """Returns keys and values in tuples."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        layers = tuple((layer.keys, layer.values) for layer in output.past_key_values.layers)
        return type(output)(logits=output.logits, hidden_states=layers)


@pytest.mark.slow
def test_a_cache_that_nobody_can_tell_which_rows_are_whose(model: Any) -> None:
    prompt = llava.prompt(model, ROWS)
    plain, told = called(model, prompt.inputs), []
    wrapped = parvts_fx.compile(WithTuples(model), lowering="eager", on_call=told.append, **OPTIONS)
    for _ in range(2):
        same_as_eager(wrapped, prompt, plain, "with a growing cache of transformers' Cache class")
    assert [record.pruned for record in told] == [False, False]
    assert called(wrapped, prompt.inputs, use_cache=True).hidden_states[0][0].shape[2] == prompt.visual.shape[1]


@pytest.mark.slow
def test_labels(model: Any) -> None:
    prompt = llava.prompt(model, ROWS)
    plain = called(model, prompt.inputs, labels=prompt.inputs["input_ids"])
    parvts_fx.compile(model, lowering="eager", **OPTIONS)
    same_as_eager(model, prompt, plain, "runs unrewritten", labels=prompt.inputs["input_ids"])


@pytest.mark.slow
def test_a_model_says_itself_that_places_and_features_do_not_match(model: Any) -> None:
    compiled, prompt = parvts_fx.compile(model, lowering="eager", **OPTIONS), llava.prompt(model, ROWS)
    called(compiled, prompt.inputs)
    given = {**prompt.inputs, "pixel_values": prompt.inputs["pixel_values"][:2]}
    with warnings.catch_warnings(), pytest.raises(Exception, match="(?i)image features|number of elements|u0|do not match"):
        warnings.simplefilter("ignore")
        called(compiled, given)


def test_all_tokens_kept(model: Any) -> None:
    prompt = llava.prompt(model, ROWS)
    plain = called(model, prompt.inputs)
    parvts_fx.compile(model, lowering="eager", strict=True, keep_ratio=1)
    assert relative_error(called(model, prompt.inputs).logits, plain.logits) <= TOLERANCE
    assert parvts_fx.last_call(model).reason == parvts_fx.runtime.record.KEPT_ALL


@pytest.mark.slow
def test_explain(model: Any) -> None:
    """It reports the samples' own graphs, and of the batch's why it is not rewritten."""
    graphs = parvts_fx.explain(model, options=OPTIONS, **llava.prompt(model, ROWS).inputs).graphs
    assert [graph.visual_tokens for graph in graphs if graph.status == "rewritten"] == [16, 32]
    assert [graph.reason for graph in graphs if graph.status == "unrewritten"] == [
        "the samples of this batch have different numbers of visual tokens: 16, 32, 0"]


@pytest.mark.slow
def test_inputs_stay(compiled: Any) -> None:
    prompt: llava.Prompt = llava.prompt(compiled, ROWS)
    before: Inputs = {name: held.clone() for name, held in prompt.inputs.items()}
    output = called(compiled, prompt.inputs)
    assert all(torch.equal(prompt.inputs[name], held) for name, held in before.items())
    assert all(torch.isfinite(held).all() for _, held in cache_tensors(output.past_key_values))
