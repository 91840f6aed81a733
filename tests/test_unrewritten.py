"""What must run unrewritten, or rewritten in an unusual setting: never a wrong answer, never a crash."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

import parvts_fx
from tests import llava, reference
from tests.comparing import (
    TOLERANCE,
    assert_equal_prefill,
    compile_with_parvts,
    expected,
    pruned,
    uncompile,
)


@pytest.fixture(scope="module")
def model():
    return llava.build(layers=2)


@pytest.fixture(scope="module")
def prompt(model):
    return llava.prompt(model, [[3, "image", 6], [2, "image", 3]])


@pytest.fixture(autouse=True)
def left_as_it_was(model):
    yield
    uncompile(model)


def reasons(caught) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, parvts_fx.ParvtsWarning)]


def run_both(model, inputs, **options):
    """(eager output, compiled output, reasons given) of the same call."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = model(**inputs)
        compile_with_parvts(model, strict=False, **options)
        output = model(**inputs)
    return plain, output, reasons(caught)


def assert_same_logits(output, plain):
    assert reference.relative_error(output.logits, plain.logits) <= TOLERANCE


@pytest.mark.supports("Left unrewritten", "rows of a batch with different numbers of visual tokens")
@pytest.mark.parametrize("rows", [[[3, "image", 2, "image", 4], [5]], [["image", 1, "image", 1], [1, "image", 3]],
                                  [[2, "image", "image", "image"], [4, "image"]]])
def test_uneven_rows(model, rows):
    prompt = llava.prompt(model, rows)
    plain, output, told = run_both(model, prompt.inputs)
    assert_same_logits(output, plain)
    assert len(told) == 1 and "different numbers of visual tokens" in told[0]


@pytest.mark.slow
def test_uneven_rows_after_even_ones_of_the_same_sizes(model):
    """The same compiled graph gets a prompt that it must not be used for, and then one that it may be used for."""
    even = llava.prompt(model, [[3, "image", 6], [4, "image", 5]])
    uneven = llava.prompt(model, [[3, "image", "image"], [4]])
    uneven.inputs["input_ids"], uneven.inputs["attention_mask"] = (
        torch.nn.functional.pad(t[:, -25:], (0, 0)) for t in (uneven.inputs["input_ids"], uneven.inputs["attention_mask"]))
    uneven.inputs["input_ids"][0] = torch.cat([torch.full((25,), 7)])
    uneven.inputs["input_ids"][0, :8], uneven.inputs["input_ids"][1, 1:25] = llava.IMAGE_TOKEN, llava.IMAGE_TOKEN
    uneven.inputs["attention_mask"][:] = 1
    with torch.no_grad():
        plain = model(**uneven.inputs)
    wanted = expected(model, even)
    compile_with_parvts(model, strict=False)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_equal_prefill(model(**even.inputs), wanted)
        assert_same_logits(model(**uneven.inputs), plain)
        assert_equal_prefill(model(**even.inputs), wanted)
    assert len(reasons(caught)) == 1


def test_uneven_rows_with_strict(model):
    compile_with_parvts(model, strict=True)
    with torch.no_grad(), pytest.raises(parvts_fx.NotRewritten, match="different numbers of visual tokens"):
        model(**llava.prompt(model, [[3, "image", "image"], [4]]).inputs)


@pytest.mark.slow
@pytest.mark.supports("Options", "keep_ratio=1 is the unmodified model")
@pytest.mark.parametrize("keep", [dict(keep_ratio=1), dict(keep_tokens=16), dict(keep_tokens=999, fusion=0.5)], ids=str)
def test_keeping_all_is_the_unmodified_model(model, prompt, keep):
    plain, output, told = run_both(model, prompt.inputs, **keep)
    assert torch.equal(output.logits, plain.logits) and told == []


def test_text_prompts_are_left_alone_silently(model):
    inputs = llava.prompt(model, [[9], [5]]).inputs
    plain, output, told = run_both(model, inputs)
    assert_same_logits(output, plain)
    assert told == []


@pytest.mark.slow
@pytest.mark.supports("Left unrewritten", "calls with labels")
def test_labels(model, prompt):
    inputs = {**prompt.inputs, "labels": prompt.inputs["input_ids"]}
    plain, output, told = run_both(model, inputs)
    assert_same_logits(output, plain)
    torch.testing.assert_close(output.loss, plain.loss)
    assert len(told) == 1 and "labels" in told[0]


@pytest.mark.slow
def test_labels_after_a_call_without(model, prompt):
    with torch.no_grad():
        plain = model(**prompt.inputs, labels=prompt.inputs["input_ids"])
    compile_with_parvts(model, strict=False)
    with torch.no_grad(), pytest.warns(parvts_fx.ParvtsWarning, match="labels"):
        assert model(**prompt.inputs).logits.shape[1] < plain.logits.shape[1]
        torch.testing.assert_close(model(**prompt.inputs, labels=prompt.inputs["input_ids"]).loss, plain.loss)


@pytest.mark.slow
@pytest.mark.supports("Left unrewritten", "calls that record gradients")
def test_gradients(model, prompt):
    model.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compile_with_parvts(model, lowering="aot_eager", strict=False)
        output = model(**prompt.inputs)
    assert output.logits.shape[1] == prompt.visual.shape[1]
    assert any("gradients" in reason for reason in reasons(caught))
    output.logits.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.slow
@pytest.mark.supports("torch.compile", "no_grad and inference_mode")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(model, prompt, mode):
    wanted = expected(model, prompt)
    compile_with_parvts(model)
    with mode():
        assert_equal_prefill(model(**prompt.inputs), wanted)


@pytest.mark.slow
@pytest.mark.supports("Calls", "output_hidden_states, rewritten or left as it is")
def test_hidden_states(model, prompt):
    kept = len(expected(model, prompt)[0].rows)
    plain, output, told = run_both(model, {**prompt.inputs, "output_hidden_states": True})
    lengths = {state.shape[1] for state in output.hidden_states}
    assert len(output.hidden_states) == len(plain.hidden_states)
    if told:
        for ours, theirs in zip(output.hidden_states, plain.hidden_states):
            assert reference.relative_error(ours, theirs) <= TOLERANCE
    else:
        assert lengths == {kept}


@pytest.mark.slow
@pytest.mark.supports("Calls", "logits_to_keep")
@pytest.mark.parametrize("count", [1, 3])
def test_logits_to_keep(model, prompt, count):
    wanted = expected(model, prompt)
    compile_with_parvts(model)
    with torch.no_grad():
        logits = model(**prompt.inputs, logits_to_keep=count).logits
    for sample, one in enumerate(wanted):
        assert reference.relative_error(logits[sample], one.logits[-count:]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.supports("Calls", "inputs_embeds in place of input_ids")
def test_embeddings_in_place_of_ids(model, prompt):
    wanted = expected(model, prompt)
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(prompt.inputs["input_ids"])
        compile_with_parvts(model)
        inputs = {name: held for name, held in prompt.inputs.items() if name != "input_ids"}
        assert_equal_prefill(model(inputs_embeds=embeddings, **inputs), wanted)


@pytest.mark.supports("Left unrewritten", "attention weights asked for (attention written out, output_attentions=True)")
def test_attention_weights_asked_for():
    """Of all rows, as the model gives them."""
    model = llava.build(attention="eager")
    plain, output, told = run_both(model, {**llava.prompt(model, [[3, "image", 6]]).inputs, "output_attentions": True})
    assert_same_logits(output, plain)
    assert len(output.attentions) == 3
    assert all(reference.relative_error(*pair) <= TOLERANCE for pair in zip(output.attentions, plain.attentions))
    assert len(told) == 1 and "attention weights are an output of the graph" in told[0]


@pytest.mark.slow
@pytest.mark.supports("Calls", "generate without a cache: each step is a prompt of its own, whose tokens are chosen anew")
def test_generate_without_a_cache(model):
    first = llava.prompt(model, [[3, "image", 6]])
    parvts_fx.compile(model, lowering="eager", keep_ratio=0.25, migration_depth=1, strict=True)
    ids = first.inputs["input_ids"]
    with torch.no_grad():
        tokens = model.generate(**first.inputs, max_new_tokens=3, do_sample=False, use_cache=False)
        for _ in range(3):
            output = model(**{**first.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False)
            assert parvts_fx.last_call(model).pruned and output.logits.shape[1] == ids.shape[1] - 12
            ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, ids)


@pytest.mark.slow
@pytest.mark.supports("Calls", "a second turn on the filled cache")
def test_second_turn_on_a_filled_cache(model):
    """New tokens with their positions in the full conversation, on the short cache of the first turn."""
    first, second = llava.prompt(model, [[3, "image", 6]]), llava.prompt(model, [[5]], seed=9)
    length, more = first.visual.shape[1], second.visual.shape[1]
    inputs = {**second.inputs, "position_ids": torch.arange(length, length + more)[None]}
    inputs.pop("attention_mask")
    options = dict(keep_ratio=0.25, migration_depth=1)
    with torch.no_grad(), pruned(model, keep_ratio=0.25, migration_depth=1):
        cache = model(**first.inputs).past_key_values
        wanted = model(past_key_values=cache, **inputs)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compile_with_parvts(model, strict=False, **options)
        output = model(past_key_values=model(**first.inputs).past_key_values, **inputs)
    assert_same_logits(output, wanted)
    assert [layer.keys.shape[-2] for layer in output.past_key_values.layers] == [
        layer.keys.shape[-2] for layer in wanted.past_key_values.layers]
    assert all("a further prompt goes on" in reason for reason in reasons(caught)), reasons(caught)


@pytest.mark.slow
@pytest.mark.supports("Calls", "a warning where positions would be counted from a shortened cache")
@pytest.mark.parametrize("new, told", [(1, "is given no position_ids"), (4, "is given no position_ids")], ids=str)
def test_positions_are_never_shifted_silently(model, new, told):
    """The plain backend cannot correct the cache's count; without position_ids it says so."""
    first = llava.prompt(model, [[3, "image", 6]])
    compile_with_parvts(model)
    more = torch.arange(5, 5 + new)[None]
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = model(**first.inputs).past_key_values
        assert not reasons(caught)
        model(input_ids=more, past_key_values=cache)
        assert len(reasons(caught)) == 1 and told in reasons(caught)[0]
        model(input_ids=more, past_key_values=cache)
        assert len(reasons(caught)) == 1  # once a conversation, and not once a decode step


def test_generate_says_nothing_about_positions(model, prompt):
    compile_with_parvts(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False)
    assert not reasons(caught)


@pytest.mark.slow
@pytest.mark.supports("Calls", "generate: greedy, beams, sampling, several returned sequences, repetition penalty")
@pytest.mark.parametrize("how", [dict(num_beams=2), dict(num_beams=3, num_return_sequences=2),
                                 dict(do_sample=True, num_return_sequences=2), dict(repetition_penalty=1.3)], ids=str)
def test_ways_to_generate(model, prompt, how):
    with pruned(model, keep_ratio=0.25, migration_depth=1):
        torch.manual_seed(4)
        wanted = model.generate(**prompt.inputs, max_new_tokens=5, **how)
    compile_with_parvts(model, keep_ratio=0.25, migration_depth=1)
    torch.manual_seed(4)
    assert model.generate(**prompt.inputs, max_new_tokens=5, **how).tolist() == wanted.tolist()


@pytest.mark.supports("Left unrewritten", "static caches")
def test_static_cache_runs_unrewritten(model, prompt):
    wanted = model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False, cache_implementation="static")
    compile_with_parvts(model, strict=False)
    with pytest.warns(parvts_fx.ParvtsWarning, match="cache"):
        ids = model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert ids.tolist() == wanted.tolist()


@pytest.mark.supports("torch.compile", "fullgraph=True")
@pytest.mark.skipif(torch.__version__ < (2, 12), reason="torch 2.11's Dynamo cannot, with any backend")
def test_fullgraph(model, prompt):
    wanted = expected(model, prompt)
    model.compile(backend="parvts", fullgraph=True, options={"migration_depth": 2, "lowering": "eager", "strict": True})
    with torch.no_grad():
        assert_equal_prefill(model(**prompt.inputs), wanted)


@pytest.mark.slow
def test_a_compiled_wrapper_leaves_the_model_alone(model, prompt):
    wanted = expected(model, prompt)
    fast = torch.compile(model, backend="parvts", options={"migration_depth": 2, "lowering": "eager", "strict": True})
    with torch.no_grad():
        assert_equal_prefill(fast(**prompt.inputs), wanted)
        assert model(**prompt.inputs).logits.shape[1] == prompt.visual.shape[1]


class FailsMidway:
    """A pass that breaks after it has changed the graph."""

    name = "fails_midway"

    def run(self, work):
        merge = work.plan.decoder.merge
        merge.output.replace_all_uses_with(merge.masks[0])
        raise KeyError("midway")


@pytest.mark.supports("Left unrewritten", "a pass that fails midway")
def test_a_pass_that_fails_leaves_the_unrewritten_model(model, prompt, monkeypatch):
    rewriting = sys.modules["parvts_fx.rewriting"]
    build = rewriting.build_pipeline
    monkeypatch.setattr(rewriting, "build_pipeline", lambda options: (*build(options)[:2], FailsMidway()))
    weights = {name: held.clone() for name, held in model.state_dict().items()}
    plain, output, told = run_both(model, prompt.inputs)
    assert_same_logits(output, plain)
    assert len(told) == 1 and "Traceback" in told[0] and "midway" in told[0]
    assert all(torch.equal(held, weights[name]) for name, held in model.state_dict().items())
    uncompile(model)
    torch._dynamo.reset()
    compile_with_parvts(model, strict=True)
    with torch.no_grad(), pytest.raises(parvts_fx.NotRewritten, match="midway"):
        model(**prompt.inputs)


@pytest.mark.slow
@pytest.mark.supports("Calls", "with parvts_fx.compile, conversations that go on from a pruned prompt, by generate or by hand")
@pytest.mark.parametrize("by_hand", [False, True], ids=["generate", "by hand"])
def test_conversation_goes_on(model, by_hand):
    """Positions and the new part of the conversation count the full prompt, not the shortened cache."""
    first = llava.prompt(model, [[3, "image", 6]])
    steps, more = 3, torch.tensor([[9, 8, 7, 6]])
    with pruned(model, keep_ratio=0.25, migration_depth=1), torch.no_grad():
        cache = model(**first.inputs).past_key_values
        length = first.visual.shape[1]
        wanted = []
        new = more
        for _ in range(steps):
            logits = model(input_ids=new, past_key_values=cache,
                           position_ids=torch.arange(length, length + new.shape[1])[None]).logits[:, -1]
            length += new.shape[1]
            new = logits.argmax(-1, keepdim=True)
            wanted.append(int(new))
    parvts_fx.compile(model, lowering="eager", keep_ratio=0.25, migration_depth=1, strict=True)
    with torch.no_grad():
        cache = model(**first.inputs).past_key_values
        assert cache.layers[0].keys.shape[-2] == 13 and cache.get_seq_length() == 25
        if by_hand:  # no position ids: the model counts on from the cache
            new, tokens = more, []
            for _ in range(steps):
                new = model(input_ids=new, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(int(new))
        else:  # the whole conversation again: generate itself finds what is new
            ids = torch.cat([first.inputs["input_ids"], more], 1)
            tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
                                    max_new_tokens=steps, do_sample=False)[0, -steps:].tolist()
    assert tokens == wanted


def moved_to_the_right(prompt: llava.Prompt) -> dict[str, torch.Tensor]:
    """The prompt with its padding behind the text."""
    order = prompt.inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
    return {**prompt.inputs, **{name: prompt.inputs[name].gather(1, order) for name in ("input_ids", "attention_mask")}}


@pytest.mark.slow
@pytest.mark.supports("Left unrewritten", "padding behind visual tokens, where keys are handed out")
def test_padding_behind_visual_tokens(model, prompt):
    """A decode step would read the mask's columns, which are the full prompt's, at the pruned cache's places."""
    inputs = moved_to_the_right(prompt)
    plain, output, told = run_both(model, inputs)
    assert_same_logits(output, plain)
    assert len(told) == 1 and "padding stands behind visual tokens" in told[0]
    assert output.past_key_values.layers[0].keys.shape[-2] == inputs["input_ids"].shape[1]


def test_padding_behind_visual_tokens_without_a_cache(model, prompt):
    """Nothing reads the mask again, so it is pruned, and each sample's logits are what they are with left padding."""
    inputs = moved_to_the_right(prompt)
    wanted = expected(model, prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_with_parvts(model)
        with torch.no_grad():
            output = model(**inputs, use_cache=False)
    assert output.logits.shape[1] == len(wanted[0].rows) < inputs["input_ids"].shape[1]
    for sample, one in enumerate(wanted):
        padding = int((prompt.inputs["attention_mask"][sample] == 0).sum())
        count = len(one.rows) - padding
        error = reference.relative_error(output.logits[sample, :count], one.logits[padding:])
        assert error <= 1e-4  # positions are shifted by the padding, which rotary embeddings feel in rounding alone


def test_rules_that_read_text_refuse_padding_there(model, prompt):
    inputs = moved_to_the_right(prompt)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = model(**inputs, use_cache=False)
        compile_with_parvts(model, strict=False, score="question")
        assert_same_logits(model(**inputs, use_cache=False), plain)
    assert len(reasons(caught)) == 1 and "the scoring rule reads text there" in reasons(caught)[0]


@pytest.mark.slow
@pytest.mark.supports("Left unrewritten", "prompts that generate hands over in chunks")
@pytest.mark.parametrize("compiled", [
    lambda model: model.compile(backend="parvts", options={"lowering": "eager", "migration_depth": 1}),
    lambda model: parvts_fx.compile(model, lowering="eager", migration_depth=1)], ids=["string", "compile"])
def test_chunks(compiled):
    """One that holds the whole picture, and text in the next; a prompt of one chunk is pruned."""
    model = llava.build()
    if not hasattr(type(model), "_supports_mm_encoder_outputs"):
        pytest.skip("this version's generate does not hand pictures over in chunks")
    prompt = llava.prompt(model, [[2, "image", 20]])
    given = dict(max_new_tokens=4, do_sample=False)
    wanted = model.generate(**prompt.inputs, **given, prefill_chunk_size=24)
    compiled(model)
    with pytest.warns(parvts_fx.ParvtsWarning, match="in chunks"):
        tokens = model.generate(**prompt.inputs, **given, prefill_chunk_size=24)
    assert torch.equal(tokens, wanted)
    one = model.generate(**prompt.inputs, **given, prefill_chunk_size=64, return_dict_in_generate=True)
    assert one.past_key_values.layers[0].keys.shape[2] < 22 + 16


def no_gather(graph, inputs, **_):
    """A compiler that fails on whatever chooses tokens."""
    if any(node.target in (torch.gather, "gather") for node in graph.graph.nodes):
        raise RuntimeError("no kernel for this")
    return graph.forward


@pytest.mark.slow
def test_a_rewritten_graph_that_does_not_compile(model, prompt):
    """The compiler behind fails on it: the prefill runs whole, with its reason once; strict lets the compiler's error through."""
    plain, output, told = run_both(model, prompt.inputs, lowering=no_gather)
    assert_same_logits(output, plain)
    assert len(told) == 1 and "does not compile: RuntimeError: no kernel for this" in told[0]
    uncompile(model)
    torch._dynamo.reset()
    compile_with_parvts(model, lowering=no_gather)
    with torch.no_grad(), pytest.raises(Exception, match="no kernel for this"):
        model(**prompt.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_weights_stay_where_they_are(model, prompt, dynamic):
    """What is lowered says so of them: with CUDA graphs all others are copied at every call."""
    handed = []

    def lowering(graph, inputs, **_):
        handed.append(graph)
        return graph.forward

    compile_with_parvts(model, lowering=lowering, dynamic=dynamic)
    with torch.no_grad():
        model(**prompt.inputs)
    graph = max(handed, key=lambda graph: len(graph.graph.nodes))
    inputs = graph.graph.find_nodes(op="placeholder")
    weights = [node for node in inputs if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")]
    assert len(weights) >= len(list(model.model.language_model.layers.parameters()))
    assert graph._param_name_to_source is not None and all(hasattr(node, "_dynamo_source") for node in inputs)


@pytest.mark.slow
def test_what_is_written_for_a_later_batch_does_not_compile(model):
    """The first batch has samples that differ, so that the graph is rewritten for the second one: which runs whole, twice, with
    its reason once."""
    uneven, even = (llava.prompt(model, rows) for rows in ([[2, "image", "image"], [34]], [[2, "image", 16], [2, "image", 16]]))
    plain, _, told = run_both(model, uneven.inputs, lowering=no_gather)
    assert len(told) == 1 and "different numbers of visual tokens" in told[0]
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output, again = model(**even.inputs), model(**even.inputs)
    (reason,) = reasons(caught)
    assert "does not compile: RuntimeError: no kernel for this" in reason
    uncompile(model)
    with torch.no_grad():
        wanted = model(**even.inputs)
    assert_same_logits(output, wanted)
    assert_same_logits(again, wanted)
