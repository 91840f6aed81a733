"""What brings a graph into the form that the analysis reads, and what holds a prefill together over several graphs."""

from __future__ import annotations

import dataclasses
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import parvts_fx
from parvts_fx import scores
from parvts_fx.analysis.calls import attention_nodes
from parvts_fx.analysis.merge import is_merge
from parvts_fx.analysis.values import changed_in_place
from parvts_fx.capture import capture as captured_copy
from parvts_fx.capture.invert_permutations import InvertPermutations
from parvts_fx.capture.spread_masked_updates import SpreadMaskedUpdates
from parvts_fx.capture.unify_merges import UnifyMerges
from parvts_fx.capture.version_writes import VersionWrites
from parvts_fx.capture.write_out_sizes import WriteOutSizes
from parvts_fx.pipeline import Work
from parvts_fx.runtime.read_call import rows_of_none_of
from tests.comparing import TOLERANCE
from tests.models.builders import BUILDERS
from tests.models.generating import Comparison, cache_lengths, run_generate
from tests.models.prompts import longer, second
from tests.plain import Plain, Row, Specification, prompt
from tests.plain_graphs import capture
from tests.plain_reference import largest_error, reference

PER_DATA = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}


def rewritten_alike(function, inputs, rewrite) -> int:
    """Apply a normalising pass to a captured function; the values stay. Returns what the pass returns."""
    with torch._dynamo.config.patch(**PER_DATA):
        module, examples = capture(function, *inputs)
    work = captured_copy(module, examples)
    count = rewrite(work)
    work.graph.lint()
    work.recompile()
    torch.testing.assert_close(work(*examples), module(*examples), rtol=0, atol=0)
    return count


def unsorted_rows(x: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor]:
    order = torch.sort(keys)[1]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return (x[order].cumsum(0)[inverse],)


def rows_by_other_indices(x: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor]:
    inverse = torch.zeros_like(keys)
    inverse[keys] = torch.arange(keys.shape[0])
    return (x[inverse],)


@pytest.mark.parametrize("function, count", [(unsorted_rows, 1), (rows_by_other_indices, 0)])
def test_inversions_of_a_sort_become_sorts(function, count):
    inputs = torch.randn(6, 3), torch.tensor([2, 0, 5, 1, 4, 3])
    assert rewritten_alike(function, inputs, lambda module: InvertPermutations().run(Work(module)).matches) == count


def added_to_rows(x: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor]:
    x = x.masked_scatter(mask[..., None], features)
    x = nn.functional.scaled_dot_product_attention(x, x, x).clone()
    update = x[mask] + 2 * features
    x[mask] = update
    return (x,)


def scattered_to_rows(x: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor]:
    x = x.masked_scatter(mask[..., None], features)
    x = nn.functional.scaled_dot_product_attention(x, x, x)
    return (x.masked_scatter(mask[..., None], (x[mask] + features).view(-1)),)


def mixed_rows(x: torch.Tensor, mask: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor]:
    x = x.masked_scatter(mask[..., None], features)
    x = nn.functional.scaled_dot_product_attention(x, x, x).clone()
    x[mask] = x[mask].flip(0)
    return (x,)


@pytest.mark.parametrize("function, count", [(added_to_rows, 1), (scattered_to_rows, 1), (mixed_rows, 0)])
def test_updates_of_masked_rows_are_spread(function, count):
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 1:3], mask[1, 2:4] = True, True

    def rewrite(module):
        merge = next(node for node in module.graph.nodes if is_merge(node))
        return SpreadMaskedUpdates(merge, attention_nodes(module.graph)).run(Work(module)).matches

    assert rewritten_alike(function, (torch.randn(2, 5, 4), mask, torch.randn(4, 4)), rewrite) == count


def written_then_read(x: torch.Tensor) -> tuple[torch.Tensor]:
    y = x * 2
    y[1:] += 1
    return (y.sum(-1),)


def view_read_later(x: torch.Tensor) -> tuple[torch.Tensor]:
    y = x * 2
    view = y[0]
    y[1:] += 1
    return (y.sum(-1), view.sum())


@pytest.mark.parametrize("function, count", [(written_then_read, 1), (view_read_later, 0)])
def test_a_tensor_has_a_new_name_behind_a_write(function, count):
    def rewrite(module):
        first = next(node for node in module.graph.nodes if node.op == "call_function")
        return VersionWrites(first).run(Work(module)).matches

    assert rewritten_alike(function, (torch.randn(3, 4, 4),), rewrite) == count


def test_sizes_are_written_out():
    """A size that is a value of its own goes into the operations that take it; one that is returned stays."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.Size, ([2, 3, 4],))
    graph.output((graph.call_method("view", (x, size)), graph.call_function(operator.getitem, (size, 1)), size))
    module = torch.fx.GraphModule({}, graph)
    assert WriteOutSizes().run(Work(module)).matches == 1
    module.graph.lint()
    module.recompile()
    view = next(node for node in module.graph.nodes if node.op == "call_method")
    assert tuple(view.args[1]) == (2, 3, 4)
    shaped, middle, whole = module(torch.arange(24))
    assert (shaped.shape, middle, whole) == ((2, 3, 4), 3, (2, 3, 4))


def features_in_front(features: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.cat([features * 2, F.embedding(ids, table)], 1).sum(-1),)


def cached_keys_in_front(features: torch.Tensor, ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    hidden = F.embedding(ids, table)
    keys = torch.cat([features, hidden * 2], 1)
    return (hidden + keys.sum(1, keepdim=True), keys)


@pytest.mark.parametrize("function, count", [(features_in_front, 1), (cached_keys_in_front, 0)])
def test_what_is_joined_with_text_is_visual_where_all_goes_on_from_there(function, count):
    inputs = (torch.randn(1, 4, 6), torch.arange(3)[None], nn.Parameter(torch.randn(9, 6), requires_grad=False))
    assert rewritten_alike(function, inputs, lambda module: UnifyMerges().run(Work(module)).matches) == count


def test_rows_that_the_ids_do_not_explain():
    """Where Dynamo skips the merge: rows of the decoder's input that are not the ids' embeddings."""
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 6)

        def get_input_embeddings(self) -> nn.Module:
            return self.table

    model, ids = Embedding(), torch.tensor([[3, 19, 25, 4], [0, 5, 19, 19]])
    other = torch.ones(2, 4, dtype=torch.int64)
    with torch.no_grad():
        model.table.weight[0] = 0
        plain = model.table(ids.clamp(max=19))
        wanted = (ids == 19) | (ids == 25)
        merged = torch.where(wanted[..., None], torch.randn(2, 4, 6), plain)
    assert torch.equal(rows_of_none_of(model, [other, ids], merged), wanted)
    assert rows_of_none_of(model, [ids], plain) is None  # nothing is merged
    unfilled = torch.where(wanted[..., None], model.table.weight[7], plain)
    assert rows_of_none_of(model, [ids], unfilled) is None  # another id's embedding stands in until they are
    assert rows_of_none_of(model, [ids], 2 * merged) is None  # scaled behind the table: padding alone is alike
    assert rows_of_none_of(model, [ids[:, :3]], merged) is None
    assert rows_of_none_of(nn.Linear(2, 2), [ids], merged) is None


def test_only_writes_are_writes():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.zeros(2, dtype=torch.bool)
    assert changed_in_place(graph.call_function(operator.and_, (x, x))) is None
    assert changed_in_place(graph.call_function(operator.iand, (x, x))) is x
    assert changed_in_place(graph.call_method("add_", (x, 1))) is x


class Broken(Plain):
    """The plain model with a graph break behind the merge, or between its layers."""

    def __init__(self, spec: Specification, where: str):
        super().__init__(spec)
        self.where = where
        if where == "layers":
            self.layers[1].register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())

    def behind_merge(self, x: torch.Tensor) -> torch.Tensor:
        if self.where == "merge":
            torch._dynamo.graph_break()
        return x


SPEC = Specification(layers=3, length=13, rows=(Row(before=2), Row(before=4)), attention="masked")
OPTIONS = dict(migration_depth=1, keep_tokens=2, score="norm", lowering="eager")


@pytest.mark.slow
@pytest.mark.supports("Graphs", "a graph break between the merge and the decoder")
@pytest.mark.parametrize("by_string", [True, False], ids=["string", "compile"])
def test_a_break_behind_the_merge(by_string):
    model = Broken(SPEC, "merge").eval().requires_grad_(False)
    if by_string:
        model.compile(backend="parvts", options=OPTIONS | {"strict": True})
    else:
        parvts_fx.compile(model, **OPTIONS, strict=True)
    for visual, seed in ((5, 1), (5, 2), (4, 3)):
        given = prompt(dataclasses.replace(SPEC, visual=visual), seed)
        with torch.no_grad():
            wanted = reference(model, given, scores.norm, migration_depth=1, keep_tokens=2)
            actual = model(*given.arguments)
        assert actual[0].shape[1] == SPEC.length - visual + 2
        assert largest_error(actual, wanted, True) <= TOLERANCE


@pytest.mark.supports("Left unrewritten", "a graph that breaks between the decoder's layers")
def test_a_break_between_layers():
    model = Broken(SPEC, "layers").eval().requires_grad_(False)
    given = prompt(SPEC)
    with torch.no_grad():
        wanted = model(*given.arguments)[0]
        parvts_fx.compile(model, **OPTIONS)
        with pytest.warns(parvts_fx.ParvtsWarning, match="between the decoder's layers"):
            actual = model(*given.arguments)[0]
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6)


@pytest.mark.supports("Left unrewritten", "visual features that never enter the decoder's sequence, with the reason")
def test_features_that_never_enter_the_sequence():
    built = BUILDERS["mllama"]()
    with torch.no_grad():
        wanted = built.model(**built.inputs).logits
        parvts_fx.compile(built.model, lowering="eager", migration_depth=1)
        with pytest.warns(parvts_fx.ParvtsWarning, match="cross-attention"):
            actual = built.model(**built.inputs).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error", parvts_fx.ParvtsWarning)
            built.model(**built.inputs)  # said once
        torch.testing.assert_close(actual, wanted)


@pytest.mark.slow
@pytest.mark.supports("torch.compile", "five architectures in one process all stay compiled")
def test_five_models_stay_compiled():
    # behind another model torch 2.11's Dynamo fails at InternVL's remainder by a fraction, with any backend
    second_one = "internvl" if torch.__version__ >= (2, 13) else "idefics3"
    compared = [Comparison(BUILDERS[name]()) for name in ("llava", second_one, "qwen2_vl", "paligemma", "mistral3")]
    for one in compared:
        one.__enter__()
    for change in (dict, longer, second, dict):
        for one in compared:
            inputs = change(one.built.inputs)
            with one.generating.installed():
                run_generate(one.model, inputs, 1)
            lengths = cache_lengths(one.run_compiled(inputs, 1).past_key_values)
            assert set(lengths) == {one.kept}


@pytest.mark.slow
@pytest.mark.supports("Left unrewritten", "flex_attention, with the result of the lowering alone")
def test_flex_attention():
    built = BUILDERS["llava"]()
    built.model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        wanted = built.model(**built.inputs).logits
        parvts_fx.compile(built.model, lowering="eager", migration_depth=1)
        with pytest.warns(parvts_fx.ParvtsWarning, match="flex_attention|neither scaled_dot_product_attention"):
            actual = built.model(**built.inputs).logits
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.supports("Left unrewritten", "with the string backend, what Dynamo's default settings break into one graph a layer")
def test_one_graph_a_layer():
    built = BUILDERS["qwen3_vl"]()
    wanted = run_generate(built.model, built.inputs, 2)
    built.model.compile(backend="parvts", options=dict(lowering="eager", migration_depth=1))
    with pytest.warns(parvts_fx.ParvtsWarning, match="parvts_fx.compile"):
        actual = run_generate(built.model, built.inputs, 2)
    assert actual.sequences.tolist() == wanted.sequences.tolist()
    torch.testing.assert_close(actual.logits, wanted.logits)
