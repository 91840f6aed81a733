"""Sizes that are data: each has a symbol of its own, and what no input of a graph tells is refused, not met in a call."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

import parvts_fx
from parvts_fx import scores
from parvts_fx.analysis.evaluation_cache import EvaluationCache
from parvts_fx.analysis.values import value
from parvts_fx.capture.editing import Editor
from parvts_fx.errors import Refusal
from parvts_fx.passes import Work
from parvts_fx.runtime import guards
from parvts_fx.runtime.guards import size_reader
from tests.plain import Plain, Row, Specification, prompt
from tests.plain_graphs import Call
from tests.plain_reference import largest_error, reference

SPEC = Specification(layers=2, attention="masked", length=13, rows=(Row(before=2),))


def evaluated(cache: EvaluationCache, function: Any, *args: Any) -> Any:
    return cache.evaluate("call_function", function, args, {}, lambda: function(*args))


def test_results_whose_size_is_data_are_not_shared() -> None:
    cache, mode = EvaluationCache(), FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True))
    with mode:
        one, other = (torch.empty(7, dtype=torch.bool) for _ in range(2))
        found = [evaluated(cache, torch.nonzero, mask) for mask in (one, other)]
        assert free_unbacked_symbols(found[0]).isdisjoint(free_unbacked_symbols(found[1]))
        assert evaluated(cache, torch.neg, found[0]).shape == found[0].shape
        held = len(cache._results)
        assert evaluated(cache, torch.neg, found[0]).shape == found[0].shape  # a size that its argument has
        assert evaluated(cache, torch.neg, found[1]).shape == found[1].shape
        assert (held, len(cache._results)) == (1, 2)
        evaluated(cache, torch.neg, one.float())
        assert len(cache._results) == 3


class Counting(Plain):
    """Asks twice for positions in masks that look alike: of padding and of words that are low numbers."""

    def forward(self, ids: Tensor, features: Tensor, mask: Tensor) -> Any:
        logits, pairs = super().forward(ids, features, mask)
        return logits, pairs, (ids > 6).nonzero(), (ids > 2).nonzero()


def test_two_sizes_that_are_data_through_the_rewriting() -> None:
    """The passes' own editor, in a graph that is being rewritten: two calls alike, two symbols; and the numbers are right."""
    given, model = prompt(SPEC), Counting(SPEC)
    found = []

    def ask_again(work: Work) -> None:
        editor = Editor(work.module)
        masks = [node for node in work.module.graph.nodes if node.op == "call_method" and node.target == "nonzero"]
        assert len(masks) == 2
        for node in masks:
            with work.module.graph.inserting_before(node.next):
                found.append(editor.copy(node, node.args, node.kwargs))
            node.replace_all_uses_with(found[-1])

    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        call = torch.compile(model, backend="parvts", fullgraph=True, options={
            "keep_tokens": 2, "migration_depth": 1, "lowering": "eager", "strict": True, "score": "diverse",
            "extra_passes": (Call(ask_again),)})
        logits, pairs, *places = call(*given.arguments)
    symbols = [free_unbacked_symbols(value(node)) for node in found]
    assert all(symbols) and symbols[0].isdisjoint(symbols[1])
    assert largest_error((logits, pairs), reference(
        model, given, scores.diverse, keep_tokens=2, migration_depth=1)) <= 2e-5
    assert [len(held) for held in places] == [int((given.ids > least).sum()) for least in (6, 2)]


def test_a_size_that_no_input_tells_is_refused() -> None:
    graphs = []

    def keep(module: Any, example_inputs: list) -> Any:
        chosen = next(node for node in module.graph.nodes if node.target == "nonzero")
        given = next(node for node in module.graph.nodes if node.op == "placeholder" and isinstance(value(node), Tensor))
        with pytest.raises(Refusal, match="do not tell"):
            size_reader(module, value(chosen).shape[0])
        graphs.append(size_reader(module, 2 * value(given).shape[0])(example_inputs))
        return module.forward

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.compile(lambda mask: mask.nonzero() + 1, backend=keep, dynamic=True, fullgraph=True)(torch.ones(5))
    assert graphs == [10]


def test_a_refusal_when_the_reader_is_made_leaves_the_prefill_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the user's call there is a warning, and the untouched model's answer."""
    given, model = prompt(SPEC), Plain(SPEC)
    read = guards.size_reader
    unknown = ShapeEnv().create_unbacked_symint()
    monkeypatch.setattr(guards, "size_reader", lambda module, size: read(module, unknown))
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = torch.compile(model, backend="parvts", options={"keep_tokens": 2, "migration_depth": 1, "lowering": "eager"})(
            *given.arguments)
        torch.testing.assert_close(ours[0], model(*given.arguments)[0])
    told = [str(held.message) for held in caught if issubclass(held.category, parvts_fx.ParvtsWarning)]
    assert len(told) == 1 and "do not tell" in told[0] and "Traceback" not in told[0]


@torch.no_grad()
def test_a_first_prompt_of_which_all_is_kept_decides_nothing_for_later_ones() -> None:
    """Three visual tokens, of which three stay; then five, in a prompt of the same sizes."""
    spec = Specification(layers=2, attention="masked", length=13, rows=(Row(before=2),), merge="choose")
    model, given, told = Plain(spec), prompt(spec), []
    parvts_fx.compile(model, lowering="eager", strict=True, keep_tokens=3, migration_depth=1, merge=None, on_call=told.append)
    fewer = given.ids.clone()
    fewer[0, (fewer[0] == 1).nonzero()[3:, 0]] = 5
    outputs = [model(ids, *given.arguments[1:]) for ids in (fewer, given.ids)]
    visual = int((given.ids == 1).sum())
    assert visual > 3 and [record.kept_tokens for record in told] == [(3,), (3,)]
    assert [record.pruned for record in told] == [False, True]
    assert outputs[1][1][0][0].shape[-2] == spec.length - visual + 3


@pytest.mark.slow
def test_what_was_written_for_one_kept_token_is_not_used_for_more() -> None:
    """A batch for whose mean one token would stay, then equal rows: which sizes a graph that is written late fits, no guard of
    Dynamo's tells."""
    spec = Specification(attention="masked", caches=False, length=17, visual=8, rows=(Row(), Row(before=3), Row(before=4)))
    model, given, choice = Plain(spec), prompt(spec), dict(keep_ratio=0.25, migration_depth=1, score=scores.diverse)
    ids = torch.randint(2, 9, (6, 19))
    ids[0, 2:12], ids[3, 4:6] = 1, 1
    uneven = ids, torch.randn(12, given.features.shape[1]), torch.ones_like(ids)
    for held, axes in zip(uneven, ((0, 1), (0,), (0, 1))):
        for axis in axes:
            torch._dynamo.maybe_mark_dynamic(held, axis)
    kept: list[tuple[int, ...]] = []
    parvts_fx.compile(model, lowering="eager", strict=True, on_call=lambda record: kept.append(record.kept_tokens), **choice)
    with torch.no_grad():
        model(*uneven)
        logits, _ = model(*given.arguments)
    assert kept == [(3, 0, 0, 1, 0, 0), (2, 2, 2)]
    assert largest_error((logits, []), reference(model, given, **choice), caches=False) <= 2e-5
