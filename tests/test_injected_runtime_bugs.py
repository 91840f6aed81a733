"""Mistakes that the code around a rewritten graph may contain, put in one at a time: a comparison finds each.

What the graphs themselves may get wrong is in :mod:`tests.test_injected_bugs`. Here it is which form of a graph runs, what
the caches are said to hold, and what is told. None of the mistakes may raise: an error that a mistake in a patch causes
would pass for a bug that was found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import parvts_fx
from parvts_fx import scores
from parvts_fx.runtime import (
    by_sample,
    cached_rows,
    caches,
    call,
    compiled_call,
    dispatch,
    guards,
    merged_embeddings,
    pruned_caches,
)
from parvts_fx.runtime.by_sample import BySample
from parvts_fx.runtime.call import UNWATCHED, Call
from parvts_fx.runtime.dispatch import Dispatch
from parvts_fx.runtime.guards import Precondition
from tests import llava
from tests.comparing import pruned
from tests.plain import Plain, Prompt, Row, Specification, prompt
from tests.plain_reference import largest_error, reference
from tests.reference import relative_error
from tests.test_caches import NO_POSITIONS, Chat, prefilled
from tests.test_caches import OPTIONS as CHATTING
from tests.test_caches import prompt as chat_prompt

backend = sys.modules["parvts_fx.backends.parvts"]
rewriting = sys.modules["parvts_fx.rewriting"]

FOUND, TOLERANCE = 1e-3, 2e-5
CHOICE = dict(keep_tokens=2, migration_depth=1, merge=None)
OPTIONS = dict(CHOICE, lowering="eager", score=scores.diverse, skip_dead_rows=False)
SPEC = Specification(layers=2, attention="masked", length=13, rows=(Row(before=2), Row(before=4)), numbering="mask")
ONE_ROW = dataclasses.replace(SPEC, rows=(Row(before=2),), merge="choose")
TEXT = torch.tensor([[9, 8, 7, 6]])


def pruned_error(model: Plain, output: Any, given: Prompt, **choice: Any) -> float:
    return largest_error(output, reference(model, given, scores.diverse, **{**CHOICE, **choice}))


def whole_error(model: Plain, output: Any, given: Prompt) -> float:
    """Against the untouched model; infinite where fewer rows come out."""
    logits, pairs = model.forward(*given.arguments)
    keys = (relative_error(ours[0], theirs[0]) for ours, theirs in zip(output[1], pairs))
    return max([relative_error(output[0], logits), *keys])


def string(model: Plain, **choice: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="parvts", options={**OPTIONS, **choice})


BEFORE_LAYER_0 = dict(migration_depth=0)
"""With which a graph runs for another number of visual tokens than its own without an error."""


def even_rows() -> float:
    """Pruned, as the number of visual tokens in the sizes asks for."""
    model, given = Plain(SPEC), prompt(SPEC)
    return pruned_error(model, string(model)(*given.arguments), given)


def uneven_rows() -> float:
    """A batch of the same sizes whose rows hold four and six visual tokens, behind an even one."""
    model, given = Plain(SPEC), prompt(SPEC)
    call = string(model, **BEFORE_LAYER_0)
    call(*given.arguments)
    ids = given.ids.clone()
    ids[0, (ids[0] == 1).nonzero()[0]] = 5
    ids[1, (ids[1] == 1).nonzero()[-1] + 1] = 1
    uneven = dataclasses.replace(given, ids=ids)
    return whole_error(model, call(*uneven.arguments), uneven)


def padding_behind() -> float:
    """Keys are handed out, and padding stands behind the visual tokens."""
    model = llava.build(layers=1, patches=2)
    given = llava.prompt(model, [[3, "image", 4], [2, "image", 2]]).inputs
    order = given["attention_mask"].argsort(dim=1, descending=True, stable=True)
    given = {**given, **{name: given[name].gather(1, order) for name in ("input_ids", "attention_mask")}}
    wanted = model(**given).logits
    model.compile(backend="parvts", options={**CHOICE, "lowering": "eager"})
    return relative_error(model(**given).logits, wanted)


class Losing(Plain):
    """With a loss behind a graph break, of all rows that there are."""

    def forward(self, ids: Tensor, features: Tensor, mask: Tensor, labels: Tensor | None = None) -> Any:
        logits, pairs = super().forward(ids, features, mask)
        torch._dynamo.graph_break()
        return (logits, pairs) if labels is None else (logits.logsumexp(-1).mean()[None], pairs)


def labels() -> float:
    model, given = Losing(SPEC), prompt(SPEC)
    loss, _ = string(model)(*given.arguments, given.ids)
    return relative_error(loss, model.forward(*given.arguments, given.ids)[0])


def another_number() -> float:
    """Sizes do not tell the number of visual tokens: five, then four."""
    model, given = Plain(ONE_ROW), prompt(ONE_ROW)
    call = string(model, **BEFORE_LAYER_0)
    ids = given.ids.clone()
    ids[0, 2] = 5
    fewer = dataclasses.replace(given, ids=ids)
    return max([pruned_error(model, call(*one.arguments), one, **BEFORE_LAYER_0) for one in (given, fewer)])


class Outside(Plain):
    """Merges in code that Dynamo does not capture; then the ids alone tell what was merged."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.tokens

    def forward(self, ids: Tensor, features: Tensor, mask: Tensor) -> Any:
        self.features = features
        return self.decode(ids, mask, [])

    def behind_merge(self, x: Tensor) -> Tensor:
        return self._outside(x)

    @torch.compiler.disable
    def _outside(self, x: Tensor) -> Tensor:
        visual = (x == self.tokens.weight[1]).all(-1, keepdim=True)
        return x.masked_scatter(visual, self.projection(self.features))


def told_by_ids() -> float:
    model, given = Outside(SPEC), prompt(SPEC)
    parvts_fx.compile(model, **OPTIONS)
    return pruned_error(model, model(*given.arguments), given)


class Breaking(Plain):
    """The graph breaks between the merge and the decoder."""

    def behind_merge(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x


def handed_over() -> float:
    """Two prompts whose visual tokens stand elsewhere, through two graphs."""
    spec = dataclasses.replace(SPEC, rows=(Row(before=2),))
    model, given = Breaking(spec), prompt(spec)
    call = string(model)
    other = prompt(dataclasses.replace(spec, rows=(Row(before=5),)), seed=2)
    return max([pruned_error(model, call(*one.arguments), one) for one in (given, other)])


def _pictured(text: str = "llama") -> tuple[Any, llava.Prompt]:
    """A model, and a prompt with a picture from which a conversation may go on."""
    model = llava.build(text, layers=1, patches=3)
    return model, llava.prompt(model, [[3, "image", 4]])


def _compile(model: Any) -> None:
    parvts_fx.compile(model, **CHOICE, lowering="eager", strict=True, dynamic=False)  # symbols take longer to trace


def conversation(text: str = "llama", new: Tensor = TEXT, positional: bool = False) -> float:
    """Goes on from a pruned prompt's transformers cache, and counts positions by it; a warning counts as an error of 1."""
    model, first = _pictured(text)
    length = first.visual.shape[1]
    with pruned(model, **CHOICE):
        wanted = model(input_ids=new, past_key_values=model(**first.inputs).past_key_values,
                       position_ids=torch.arange(length, length + new.shape[1])[None]).logits
    _compile(model)
    cache = transformers.DynamicCache(config=model.config.text_config)
    given = {"past_key_values": cache} | first.inputs
    names = ("input_ids", "pixel_values", "attention_mask", "position_ids", "past_key_values") if positional else ()
    args = [given.pop(name, None) for name in names]
    model(*args, **given)
    with _said() as told:
        error = relative_error(model(input_ids=new, past_key_values=cache).logits, wanted)
    return error + len(told)


sliding_conversation = functools.partial(conversation, "mistral", TEXT[:, :1])
positional_conversation = functools.partial(conversation, positional=True)


def _text_behind(cache_of: Callable[[Any], Any]) -> float:
    """A text conversation behind a pruned prompt, on a cache made from that prompt's."""
    model, first = _pictured()
    text = llava.prompt(model, [[6]], seed=5).inputs
    wanted = model(input_ids=TEXT, past_key_values=model(**text).past_key_values).logits
    _compile(model)
    cache = cache_of(model(**first.inputs).past_key_values)
    cache = model(**text, past_key_values=cache).past_key_values
    return relative_error(model(input_ids=TEXT, past_key_values=cache).logits, wanted)


def _emptied(cache: Any) -> Any:
    cache.reset()
    return cache


text_after_picture = functools.partial(_text_behind, lambda cache: None)
emptied_cache = functools.partial(_text_behind, _emptied)


@contextlib.contextmanager
def _said() -> Iterator[list[str]]:
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told.extend(str(held.message) for held in caught if issubclass(held.category, parvts_fx.ParvtsWarning))


def warned(compile_it: Callable[[Chat], Any]) -> float:
    """0 if one warning is given where positions are counted from a cache in tuples, over two steps; else 1."""
    model = Chat("pairs")
    compile_it(model)
    with _said() as told:
        past, _ = prefilled(model)
        for token in (9, 10):
            past = model(torch.tensor([[token]]), past)[1]
    return float([NO_POSITIONS in one for one in told] != [True])


warned_by_string = functools.partial(warned, lambda model: model.compile(backend="parvts", options=CHATTING))
warned_in_place = functools.partial(warned, lambda model: parvts_fx.compile(model, **CHATTING))


def silent() -> float:
    """1 if logits of a pruned prompt, given to another graph with attention, are taken for a cache."""
    model = Chat("pairs")
    model.compile(backend="parvts", options=CHATTING)
    ids, features = chat_prompt()
    with _said() as told:
        logits = model(ids, None, features)[0]
        torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend="parvts", options=CHATTING)(logits)
    return float(len(told))


Patch = Callable[[pytest.MonkeyPatch], None]


def put(owner: Any, name: str, bug: Any) -> Patch:
    return lambda patch: patch.setattr(owner, name, bug)


def wrap(owner: Any, name: str, bug: Callable[..., Any]) -> Patch:
    """Replace ``owner.name`` by ``bug(original, ...)``."""
    original = getattr(owner, name)
    return put(owner, name, lambda *args, **kwargs: bug(original, *args, **kwargs))


class First(dict):
    """Holds one form, whatever it is asked for."""

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: object) -> Any:
        return next(iter(self.values()))


def one_form(original: Callable, self: Dispatch, *args: Any) -> None:
    original(self, *args)
    self._by_count = First(self._by_count)


def stale() -> Patch:
    """Where visual tokens stood in the first prompt is remembered for every tensor."""
    seen: list[Tensor] = []

    def bug(original: Callable, embeddings: Tensor, visual: Tensor, *rest: Any) -> None:
        seen.append(visual)
        original(embeddings, seen[0], *rest)

    return lambda patch: (seen.clear(), wrap(merged_embeddings, "hand_over", bug)(patch))


def next_rows(original: Callable, *given: Any) -> Tensor | None:
    rows = original(*given)
    return None if rows is None else rows.roll(1, 1)


def one_call() -> Patch:
    """What the graphs of one call have told is kept for the next."""
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        same = Call(UNWATCHED)

        @contextlib.contextmanager
        def begin() -> Iterator[Call]:
            token = call._CURRENT.set(same)
            try:
                yield same
            finally:
                call._CURRENT.reset(token)

        monkeypatch.setattr(compiled_call, "begin_call", begin)

    return patch


def windows_as_they_were(original: Callable, cache: Any, *given: Any, **named: Any) -> None:
    before = [getattr(layer, "cumulative_length", None) for layer in cache.layers]
    original(cache, *given, **named)
    for layer, length in zip(cache.layers, before):
        layer.cumulative_length = length


def without_reset(original: Callable, cache_class: type) -> type:
    counting = original(cache_class)
    return type(counting.__name__, (counting,), {"reset": cache_class.reset})


def counted_everywhere(original: Callable, *given: Any) -> Any:
    """The mask's query offset counts the dropped tokens too."""
    counting = original(*given)
    return type(counting.__name__, (counting,), {"get_query_offset": counting.get_seq_length})


def every_output(original: Callable, module: Any, *rest: Any) -> frozenset[int]:
    return frozenset(range(len(caches._results(module))))


def samples_that_differ() -> float:
    """A prompt of two rows and a step behind it, against each row by itself."""
    model = llava.build(layers=2, patches=2)
    given = llava.prompt(model, [[3, "image", 4], [2, "image", 1, "image", 2], [4]])
    parvts_fx.compile(model, lowering="eager", **{**CHOICE, "keep_tokens": 2})
    together = torch.cat(_prompt_and_step(model, given), 1)
    return max(
        relative_error(together[row:row + 1, -own.shape[1]:], own)
        for row in range(3) for own in [torch.cat(_prompt_and_step(model, given.row(row)), 1)])


def _prompt_and_step(model: Any, given: llava.Prompt) -> list[Tensor]:
    first = model(**given.with_positions)
    mask = given.inputs["attention_mask"]
    step = model(
        input_ids=torch.full((len(mask), 1), 13), past_key_values=first.past_key_values,
        attention_mask=torch.cat([mask, torch.ones_like(mask[:, :1])], 1),
        position_ids=given.with_positions["position_ids"].amax(1, keepdim=True) + 1)
    return [first.logits, step.logits]


def padded_turns() -> float:
    """Two rows, and further turns of other lengths, against each row by itself."""
    model = llava.build(layers=2, patches=2)
    parvts_fx.compile(model, lowering="eager", **{**CHOICE, "keep_tokens": 2})
    first, more = llava.prompt(model, [[3, "image", 4], [1, "image", 6]]), llava.prompt(model, [[2], [4]], seed=2)
    together = _turn(model, [first, more])
    return max(relative_error(together[row:row + 1], _turn(model, [first.row(row), more.row(row)])) for row in range(2))


def _turn(model: Any, turns: list[llava.Prompt]) -> Tensor:
    """The last row's logits behind the last turn."""
    cache, mask = None, torch.zeros(len(turns[0].visual), 0, dtype=torch.int64)
    for given in turns:
        mask = torch.cat([mask, given.inputs["attention_mask"]], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -given.visual.shape[1]:]
        output = model(**{**given.inputs, "attention_mask": mask}, position_ids=positions, past_key_values=cache)
        cache = output.past_key_values
    return output.logits[:, -1]


def turns_that_differ() -> float:
    """A turn of text, and one whose rows have other numbers of visual tokens, against each row by itself."""
    model = llava.build(layers=2, patches=2)
    parvts_fx.compile(model, lowering="eager", **{**CHOICE, "keep_tokens": 2})
    turns = [llava.prompt(model, [[3], [5]]), llava.prompt(model, [[2, "image", 4], [1, "image", "image", 1]], seed=2),
             llava.prompt(model, [[2], [4]], seed=3)]
    together = _turn(model, turns)
    return max(relative_error(together[row:row + 1], _turn(model, [turn.row(row) for turn in turns])) for row in range(2))


def static_where_samples_differ() -> float:
    """Logits of the prompt and of steps on a static cache, against those on a growing one."""
    model = llava.build(layers=2, patches=2)
    given = llava.prompt(model, [[3, "image", 4], [2, "image", 1, "image", 2], [4]])
    parvts_fx.compile(model, lowering="eager", **{**CHOICE, "keep_tokens": 2})
    how = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    growing, static = (model.generate(**given.inputs, **how, **more) for more in ({}, dict(cache_implementation="static")))
    return max(map(relative_error, static.logits, growing.logits))


def of_the_first_sample(original: Callable, self: BySample, merged: Any, sides: Any, visual: Tensor, sample: int) -> Any:
    """Masks and positions of another sample, which is as long."""
    changed = [held if side.samples is None else held.narrow(side.samples, 0, 1).expand_as(held)
               for side, held in zip(self._parted.sides, sides)]
    return original(self, merged, changed, visual, sample)


def embeddings_of_the_first(original: Callable, self: BySample, merged: Tensor, *rest: Any) -> Any:
    return original(self, merged[:1].expand_as(merged), *rest)


BUGS: dict[str, tuple[Patch, Callable[[], float]]] = {
    "samples: columns of the prompt for cached rows": (
        put(compiled_call, "with_cached_columns", lambda _, args, kwargs: (args, kwargs)), samples_that_differ),
    "samples: what fills shorter ones is seen": (
        wrap(compiled_call, "remember_pruned", lambda original, *given, rows: original(
            *given, rows=None if rows is None else torch.ones_like(rows))), samples_that_differ),
    "samples: shorter ones stand in front": (
        put(by_sample, "_filling", lambda sizes, shape: [
            entry for own, wanted in zip(reversed(sizes), reversed(shape)) for entry in (0, wanted - own)]),
        samples_that_differ),
    "samples: the first one's embeddings": (wrap(BySample, "_given", embeddings_of_the_first), samples_that_differ),
    "samples: the first one's masks and positions": (wrap(BySample, "_given", of_the_first_sample), samples_that_differ),
    "padded turns not noticed": (put(cached_rows, "_pads_a_turn", lambda *_: False), padded_turns),
    "a prompt's columns counted in full": (
        wrap(cached_rows, "_columns", lambda original, mask, prompts, positions: original(
            mask, [dataclasses.replace(prompt, dropped=0) for prompt in prompts], positions)), padded_turns),
    "samples: zeros in front of cached rows": (
        wrap(by_sample, "_joined", lambda original, samples, result: original(
            samples, dataclasses.replace(result, behind_cached=None))), turns_that_differ),
    "samples: columns of cached rows for the prompt's": (
        put(by_sample, "_chosen", lambda tensor, axis, rows, size: tensor.index_select(axis, torch.cat(
            [torch.arange(tensor.shape[axis] - size), rows]))), turns_that_differ),
    "samples: generate's masks by position": (
        put(cached_rows.MasksOfGenerate, "__call__", lambda self, *args, **kwargs: cached_rows._noted(
            transformers.masking_utils.create_masks_for_generate(*args, **kwargs))), static_where_samples_differ),
    "guard always true": (put(Precondition, "holds", lambda *_: True), uneven_rows),
    "guard reads another size": (
        wrap(guards, "size_reader", lambda original, module, size: original(module, module_rows(module))), even_rows),
    "padding check off": (put(rewriting, "padding_check", lambda *_: None), padding_behind),
    "labels not noticed": (put(guards, "_has_labels", lambda: False), labels),
    "labels seen everywhere": (put(guards, "_has_labels", lambda: True), even_rows),
    "compiled form of another number": (wrap(Dispatch, "__init__", one_form), another_number),
    "a merge handed over for another tensor": (stale(), handed_over),
    "rows of features off by one": (wrap(compiled_call, "rows_of_none_of", next_rows), told_by_ids),
    "dropped count off by one": (
        wrap(Call, "tell_pruning", lambda original, call, dropped: original(call, dropped + 1)), conversation),
    "cache count not corrected": (put(compiled_call, "remember_pruned", lambda *_, **__: None), conversation),
    "cache count corrected twice": (
        wrap(compiled_call, "remember_pruned", lambda original, *given, rows: (original(*given), original(*given))),
        conversation),
    "positional caches not found": (
        wrap(compiled_call, "find_caches", lambda original, *given: original(given[-1])),
        positional_conversation),
    "dropped keys counted as keys": (wrap(pruned_caches, "_counting", counted_everywhere), conversation),
    "window counts not corrected": (wrap(compiled_call, "remember_pruned", windows_as_they_were), sliding_conversation),
    "count kept by an emptied cache": (wrap(pruned_caches, "_counting", without_reset), emptied_cache),
    "one object for all calls": (one_call(), text_after_picture),
    "short caches not noted": (put(dispatch, "note_short_caches", lambda *_: None), warned_by_string),
    "positions not warned about": (put(caches, "_warn_of_positions", lambda *_: None), warned_in_place),
    "other caches not watched in place": (
        wrap(backend, "watch_short_caches", lambda original, call, *_, counts_kept: call), warned_in_place),
    "corrected caches warned about": (put(Call, "correct", lambda *_: None), conversation),
    "logits taken for a cache": (wrap(dispatch, "cache_outputs", every_output), silent),
}


def module_rows(module: Any) -> Any:
    """The size of the prompt, in place of its number of visual tokens."""
    return next(node.meta["example_value"].shape[1] for node in module.graph.nodes
                if node.op == "placeholder" and node.meta["example_value"].dtype == torch.int64)


def error(compare: Callable[[], float]) -> float:
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        warnings.simplefilter("ignore")
        return compare()


@pytest.mark.slow
@pytest.mark.parametrize("patch, compare", BUGS.values(), ids=BUGS.keys())
def test_bug_is_found(monkeypatch: pytest.MonkeyPatch, patch: Patch, compare: Callable[[], float]) -> None:
    patch(monkeypatch)
    assert error(compare) > FOUND


COMPARISONS = {compare: name for name, held in globals().copy().items() for _, compare in BUGS.values() if held is compare}


@pytest.mark.slow
@pytest.mark.parametrize("compare", COMPARISONS, ids=COMPARISONS.values())
def test_comparison_passes_without_the_bug(compare: Callable[[], float]) -> None:
    assert error(compare) < TOLERANCE
