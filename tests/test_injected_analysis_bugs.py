"""Mistakes that the analysis may contain, put in one at a time: the comparison with the reference finds each.

What the passes may get wrong is in :mod:`tests.test_injected_bugs`, the code around the graphs in
:mod:`tests.test_injected_runtime_bugs`. Here it is what a graph is taken for: where tokens meet, where layers begin,
which axes and numbers count rows and samples, what is merged. Each mistake comes out as wrong numbers. One that raises,
or whose patch fails where a search goes on after errors, or after which nothing is rewritten, would pass for a bug that
was found.

Not here, since they cannot come out as wrong numbers: keys taken for queries, and a mask's axes swapped. Wherever both
sides have other rows, sizes do not fit; where they have the same, nothing is wrong. Nor side inputs whose token axis is
missed: they do not fit either. Nor a mixer of keys alone taken for a layer's own: it reads from the same link as the queries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from parvts_fx.analysis import (
    attention,
    commuting,
    decoder,
    independence,
    layers,
    lengths,
    merge,
    mixers,
    modality,
    period,
    stream,
    tables,
)
from parvts_fx.analysis.commuting import Layout
from parvts_fx.analysis.extents import TOKENS, Scale
from parvts_fx.analysis.independence import Findings
from parvts_fx.analysis.probe import Probe
from parvts_fx.analysis.records import Decoder, VisualMerge
from parvts_fx.analysis.small_runs import SmallRuns
from parvts_fx.analysis.tokens import Count, TokenMap
from parvts_fx.analysis.values import hint_shape, is_tensor, value
from parvts_fx.runtime import prompt_merges
from tests import replaying
from tests.plain import Mixing, Row, Specification, build, prompt
from tests.plain_checking import RULES, TOLERANCE, Choice, answer, outcome
from tests.plain_layers import Layer, rotate
from tests.plain_reference import error_of, reference, unpruned

FOUND = 1e-3
SPEC = Specification(layers=3, length=13, rows=(Row(before=2, between=1), Row(padding=2, before=1)), attention="masked")
ALONE = dataclasses.replace(SPEC, layers=2, rows=(Row(before=2, between=1),))
VISUAL_FIRST = (Row(before=0, between=1), Row(before=0, between=2))
MEAN, SHIFT = Mixing(combine="add"), Mixing("previous", combine="add")


class Unmasked(Layer):
    def attend(self, x: Tensor, mask: Any, bias: Any, angles: Tensor, *further: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.parts(x)
        query, key = rotate(query, angles), rotate(key, angles)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.spec.scale, enable_gqa=True)
        return self.out(self.together(mixed)), key, value


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One model, prompt and choice of options, compiled and held against the reference."""

    spec: Specification = SPEC
    choice: Choice = Choice()
    unmasked: bool = False
    """Whether attention is given no mask, where the specification's allows everything."""

    def error(self) -> float:
        """
        Raises:
            AssertionError: nothing was rewritten.
        """
        model, given, choice = build(self.spec), prompt(self.spec), self.choice
        for layer in model.layers if self.unmasked else ():
            layer.__class__ = Unmasked
        with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=choice.data_in_sizes):
            if self.unmasked:
                captured = replaying.capture(model, given.arguments, choice.dynamic)
                assert captured is not None
                actual = captured.under(choice.options)
            else:
                actual = answer(self.spec, choice.options, choice.dynamic, choice.data_in_sizes)
            expected = reference(model, given, RULES[choice.rule], **choice.semantic)
            assert error_of(self.spec, actual, unpruned(model, given)) > TOLERANCE, "the unmodified model's answer"
        return error_of(self.spec, actual, expected)


def of(choice: Choice = Choice(depth=2), spec: Specification = SPEC, **features: Any) -> Comparison:
    return Comparison(dataclasses.replace(spec, **features), choice)


Patch = Callable[[pytest.MonkeyPatch, list[Exception]], None]
"""Puts a mistake in; the list is for errors that are the patch's own."""


def wrap(owner: Any, name: str, bug: Callable[..., Any]) -> Patch:
    """Replace ``owner.name`` by ``bug(original, ...)``."""
    original = getattr(owner, name)

    def patch(monkeypatch: pytest.MonkeyPatch, faults: list[Exception]) -> None:
        usual: list[Exception] = []

        def known(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except Exception as error:
                usual.append(error)
                raise

        def changed(*args: Any, **kwargs: Any) -> Any:
            try:
                return bug(known, *args, **kwargs)
            except Exception as error:
                if not any(error is one for one in usual):
                    faults.append(error)
                raise

        monkeypatch.setattr(owner, name, changed)

    return patch


def put(owner: Any, name: str, bug: Any) -> Patch:
    return lambda monkeypatch, faults: monkeypatch.setattr(owner, name, bug)


def always(owner: Any, name: str, answer: Any) -> Patch:
    return put(owner, name, lambda *args, **kwargs: answer)


def result(owner: Any, name: str, change: Callable[[Any], Any]) -> Patch:
    """Change what a function returns, unless that is nothing."""

    def bug(original: Callable, *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return found if found is None else change(found)

    return wrap(owner, name, bug)


# -- where tokens meet -----------------------------------------------------------------------------------------------


def meetings(change: Callable[[list[Node]], list[Node]]) -> Patch:
    def bug(found: Findings) -> Findings:
        return dataclasses.replace(found, meeting=change(found.meeting))

    return result(mixers, "find_meetings", bug)


def row_by_row(original: Callable, self: Any, node: Node) -> bool:
    """Whatever the proof says."""
    if original(self, node) or not is_tensor(node):
        return is_tensor(node)
    self._accept(node, {None: dict.fromkeys(self.runs.tokens.axes.get(node, {}), 1)})
    return True


def without_numbers(original: Callable, self: Any, node: Node) -> tuple:
    """``x.mean(1)`` is taken for ``x.mean(-1)``, of which something has been proven."""
    label, op, target, described, *_ = original(self, node)
    return label, op, target, described[:1]


def choices(*rows: tuple[int, ...]) -> Patch:
    return put(commuting, "_CHOICES", {**commuting._CHOICES, TOKENS: rows})


MIXERS: dict[str, tuple[Patch, Comparison]] = {
    "all mixers missed": (meetings(lambda found: []), of(feed_mixing=SHIFT)),
    "all mixers missed, with dead rows": (
        meetings(lambda found: []), of(Choice(depth=3, skip_dead_rows=False), feed_mixing=MEAN)),
    "the first mixer missed": (meetings(lambda found: found[1:]), of(Choice(depth=1), feed_mixing=MEAN)),
    "the last mixer missed": (meetings(lambda found: found[:-1]), of(Choice(depth=3), feed_mixing=MEAN)),
    "an operation by itself taken for row by row": (
        wrap(independence._Search, "_alone", row_by_row), of(feed_mixing=MEAN)),
    "a region closed too early": (
        wrap(independence._Search, "_closes", row_by_row), of(feed_mixing=Mixing("share", 1, "gate", "hidden", SHIFT))),
    "only the first rows chosen": (choices((0, 1, 2), (0, 1, 2, 3, 4)), of(feed_mixing=Mixing("scan"))),
    "the first row always chosen": (choices((0, 1, 2), (0, 2, 5)), of(
        Choice(depth=2, keep=1, rule="norm"), feed_mixing=Mixing("first", combine="add"), rows=VISUAL_FIRST)),
    "too few rows to choose from": (put(independence, "_ROWS", 1), of(feed_mixing=MEAN)),
    "shapes compared in place of numbers": (
        wrap(commuting.Together, "_equal", lambda original, self, one, other: one.shape == other.shape),
        of(feed_mixing=SHIFT)),
    "too large a tolerance": (put(Scale, "tolerance", property(lambda self: 1.0)), of(feed_mixing=MEAN)),
    "proven for other numbers": (
        wrap(independence._Search, "_key", without_numbers),
        of(feed_mixing=Mixing(combine="add", place="in"), flat=True, attention="written")),
    "taken for the prompt's last rows": (always(mixers, "keeps_rows_apart", True), of(feed_mixing=SHIFT)),
    "an attention call missed": (result(decoder, "find_attentions", lambda found: found[1:]), of()),
    "a written attention call missed": (
        result(decoder, "find_attentions", lambda found: found[1:]), of(attention="written")),
    **{f"every second attention call missed, {pair}": (
        result(decoder, "find_attentions", lambda found: found[::2]), of(pair=pair))
       for pair in ("own", "chain", "sum")},
}

UNMASKED = Comparison(
    dataclasses.replace(SPEC, rows=(Row(before=3), Row(before=4)), scale=0.6, span="all", reads_padding=False),
    Choice(depth=2, fusion=0.25), unmasked=True)
MIXERS["attention without a mask taken for causal"] = (
    result(attention, "_fused", lambda found: dataclasses.replace(found, kind="fused causal")), UNMASKED)

# -- where layers begin and end --------------------------------------------------------------------------------------


def starts(change: Callable[[list[int]], list[int]]) -> Patch:
    return result(
        layers, "find_period", lambda found: dataclasses.replace(found, starts=change(found.starts)))


def attention_alone(original: Callable, module: Any, nodes: Any, found: list, *rest: Any) -> Any:
    return original(module, nodes, [mixer for mixer in found if mixer.attention is not None], *rest)


def before_the_feed_forward(found: tuple) -> tuple:
    """Layers begin one residual sum early."""
    first, *others = found[0]
    return [first, *(dataclasses.replace(layer, input=layer.input.all_input_nodes[0]) for layer in others)], *found[1:]


def end_at(place: int) -> Patch:
    """The last layer ends at that one of the links behind its attention."""
    return wrap(layers, "_output_of_last_layer", lambda original, chain, found: layers._links_behind(
        chain, found[-1], None)[place])


def behind_what_does_not_mix(original: Callable, found: list, count: int) -> tuple[list[int], str]:
    pairs = zip(found, found[1:])
    return [0, *(block.group for before, block in pairs if block.mixes and not before.mixes)], "blocks that do not mix"


EVERY_MIXER = wrap(period, "_find_starts", lambda original, blocks, count: (list(range(count)), "every mixer"))
LOUD = dict(scale=1.5, heads=4, span="all")
"""With which the paths differ by more than a little, so that it matters where they are fused."""
LAYERS: dict[str, tuple[Patch, Comparison]] = {
    "layers merged in pairs": (starts(lambda found: found[::2]), of(Choice(depth=1), layers=4)),
    "the first layer missed": (starts(lambda found: found[1:]), of(Choice(depth=1))),
    "the second layer missed": (starts(lambda found: [0, *found[2:]]), of(Choice(depth=1))),
    "a mixing feed-forward taken for a layer": (EVERY_MIXER, of(Choice(depth=1), feed_mixing=MEAN)),
    "a second attention call taken for a layer": (EVERY_MIXER, of(Choice(depth=1), pair="own")),
    "layers taken to begin behind what mixes no tokens, and nowhere else": (
        wrap(period, "_find_starts", behind_what_does_not_mix), of(feed_mixing=MEAN, mixing_layers="odd")),
    "feed-forwards' mixers left out of layers": (wrap(decoder, "find_layers", attention_alone), of(feed_mixing=MEAN)),
    "layers without attention left out": (wrap(decoder, "find_layers", attention_alone), of(
        Choice(depth=1, skip_dead_rows=False), hybrid="convolution")),
    "layers begin with the feed-forward before": (
        result(decoder, "find_layers", before_the_feed_forward), of(Choice(depth=1), feed_mixing=MEAN)),
    "layers begin with the feed-forward before, weights": (
        result(decoder, "find_layers", before_the_feed_forward), of(Choice(keep=1, fusion=0.5), **LOUD)),
    "the end of the last layer taken too early": (end_at(0), of(Choice(depth=3, keep=1, fusion=0.5), **LOUD)),
    "the end of the last layer taken too late": (end_at(-1), of(Choice(depth=3, keep=1, fusion=0.5), **LOUD)),
    "links within the first layer taken for the stream's": (
        put(stream, "_leads_around", lambda *args: True),
        of(parallel=True, mixing_layers="first", norm_mixing=Mixing(
            "last", combine="replace", place="before first", then=Mixing("whole norm", place="before first")))),
}

# -- which axis holds the samples, and in which order ----------------------------------------------------------------


def first_axis_of_that_size(found: Decoder) -> Decoder:
    axes = dict(found.samples.axes)
    for node in filter(is_tensor, axes):
        shape = hint_shape(value(node))
        axes[node] = {shape.index(shape[axis]): kind for axis, kind in axes[node].items()}
    return dataclasses.replace(found, samples=dataclasses.replace(found.samples, axes=axes))


def other_order(original: Callable, runs: SmallRuns, *rest: Any) -> dict[Node, Layout]:
    """Of samples and heads in one axis."""

    def entries(node: Node, axis: int) -> int:
        kinds = runs.samples.axes.get(node, {})
        return kinds[axis].multiple if axis in kinds else 1

    return {node: {axis: entries(node, axis) // abs(inner) or 1 for axis, inner in layout.items()}
            for node, layout in original(runs, *rest).items()}


FIRST_AXIS, OTHER_ORDER = result(decoder, "Decoder", first_axis_of_that_size), wrap(decoder, "_apart", other_order)
LIVE = Choice(depth=1, skip_dead_rows=False)
SAMPLES: dict[str, tuple[Patch, Comparison]] = {
    "heads taken for samples": (FIRST_AXIS, of(layout="heads first")),
    "heads taken for samples, causal": (FIRST_AXIS, of(layout="heads first", attention="causal")),
    "heads taken for samples, rows first": (FIRST_AXIS, of(layout="heads first", stream="rows first")),
    "heads taken for samples, written": (FIRST_AXIS, of(layout="heads first", attention="written")),
    "keys and values taken for samples": (FIRST_AXIS, of(LIVE, cache_form="stacked")),
    "layers taken for samples": (FIRST_AXIS, of(LIVE, cache_form="one", layers=2)),
    "samples within heads": (OTHER_ORDER, of(layout="folded", attention="causal")),
    "samples within heads, rows first": (OTHER_ORDER, of(layout="folded", attention="causal", stream="rows first")),
    "samples within heads, weights": (
        OTHER_ORDER,
        of(Choice(depth=2, fusion=0.4, data_in_sizes=False), layout="folded", attention="causal", heads=4)),
    "a batch taken for one sample": (always(decoder, "_sample_axes", None), of()),
}

# -- which numbers count rows ----------------------------------------------------------------------------------------


def counts(change: Callable[[Count], Count]) -> Patch:
    """What a mean divides by."""

    def bug(found: TokenMap) -> TokenMap:
        for node, bindings in found.bindings.items():
            if getattr(node.target, "__name__", "") == "truediv":
                bindings.update({at: change(held) for at, held in bindings.items() if isinstance(held, Count)})
        return found

    return result(decoder, "_token_axes", bug)


WHOLE = always(Probe, "_keeps_tokens_whole", True)
SYMBOLS = Comparison(dataclasses.replace(ALONE, feed_mixing=Mixing("mean", 1, "add")), Choice(dynamic=True))
SIZES: dict[str, tuple[Patch, Comparison]] = {
    "a number of rows off by one": (counts(lambda held: dataclasses.replace(held, offset=held.offset - 1)), SYMBOLS),
    "a number of rows twice as large": (
        counts(lambda held: dataclasses.replace(held, multiple=2 * held.multiple)), SYMBOLS),
    "the feed-forward's size taken for the number of rows": (
        WHOLE, of(LIVE, ALONE, length=19, flat_feed=True, feed_mixing=MEAN)),
    "the heads' size taken for the number of rows": (WHOLE, of(LIVE, ALONE, length=6, visual=3, hybrid="linear")),
    "distances of rows taken for those of positions": (
        always(decoder, "find_numbered", frozenset()), of(attention="counted")),
}

# -- what is merged --------------------------------------------------------------------------------------------------


def merges(change: Callable[[VisualMerge], VisualMerge]) -> Patch:
    return result(prompt_merges, "find_merge", change)


def prunable(which: Callable[[bool, frozenset[str]], bool]) -> Patch:
    return wrap(merge, "_prunable", lambda original, node, origin, prunes: which(
        original(node, origin, prunes), origin.modalities))


LAST_ROW = dict(last_only=True, caches=False)
"""All that comes out has the same size, however many rows are kept."""
ONE_KEPT = Choice(depth=2, keep=1)
PICTURE_AND_VIDEO = of(ONE_KEPT, video=True, visual=6, **LAST_ROW)
SOUND, SOUND_FIRST = of(ONE_KEPT, sound=3, **LAST_ROW), of(ONE_KEPT, sound=3, sound_first=True, **LAST_ROW)
AS_MUCH_SOUND = of(ONE_KEPT, sound=5, length=15, **LAST_ROW)
MERGES: dict[str, tuple[Patch, Comparison]] = {
    "the first merge missed": (
        merges(lambda held: dataclasses.replace(held, masks=held.masks[1:], features=held.features[1:])),
        PICTURE_AND_VIDEO),
    "the last merge missed": (
        merges(lambda held: dataclasses.replace(held, masks=held.masks[:-1], features=held.features[:-1])),
        PICTURE_AND_VIDEO),
    "a video taken for text": (prunable(lambda answer, names: answer and "video" not in names), PICTURE_AND_VIDEO),
    "sound taken for visual": (prunable(lambda answer, names: True), SOUND),
    "sound not known by its name": (put(modality, "_WORDS", {**modality._WORDS, modality.AUDIO: set()}), SOUND),
    "the mask of another merge": (
        merges(lambda held: dataclasses.replace(held, masks=(held.merges[-1].mask,))), AS_MUCH_SOUND),
    "sound pruned in place of the picture": (prunable(lambda answer, names: not answer), SOUND_FIRST),
}
BUGS = {**MIXERS, **LAYERS, **SAMPLES, **SIZES, **MERGES}

# -- what a refusal keeps from being read wrongly --------------------------------------------------------------------


def looked_at(**changes: bool) -> Patch:
    return result(tables.Tables, "_look", lambda found: dataclasses.replace(found, **changes))


def mixed(kind: str, code: int) -> Comparison:
    return of(feed_mixing=Mixing(kind, code, "add"))


FINAL = {place: of(Choice(depth=3), final_mixing=Mixing(combine="add", place=place)) for place in ("before", "behind")}
END_KNOWN = result(layers, "find_period", lambda found: dataclasses.replace(found, end_is_known=True))
MISSING_CHECKS: dict[str, tuple[Patch, Comparison]] = {
    **{f"numbers not checked, {kind} {code}": (always(decoder, "check_numbers", None), mixed(kind, code))
       for kind, code in (("count", 0), ("mean", 1), ("mean", 2))},
    "one over a number not checked": (
        wrap(lengths, "may_count", lambda original, leaf, length: isinstance(leaf, int) and original(leaf, length)),
        mixed("count", 1)),
    "every number taken for a size": (always(lengths, "_is_a_value", False), mixed("count", 0)),
    "tables not checked": (always(tables.Tables, "check", None), mixed("running mean", 0)),
    "tables taken for positions": (looked_at(counts=False), mixed("running mean", 0)),
    "all taken for attention's tables": (always(tables.Tables, "ends_in", True), mixed("running mean", 0)),
    "tables taken for as good for any length": (looked_at(extends=True), mixed("mean", 5)),
    **{f"a mixer at the final norm taken for the last layer's, {place}": (END_KNOWN, comparison)
       for place, comparison in FINAL.items()},
}


@pytest.mark.slow
@pytest.mark.parametrize("patch, comparison", [*BUGS.values(), *MISSING_CHECKS.values()], ids=[*BUGS, *MISSING_CHECKS])
def test_bug_is_found(monkeypatch: pytest.MonkeyPatch, patch: Patch, comparison: Comparison) -> None:
    faults: list[Exception] = []
    patch(monkeypatch, faults)
    assert FOUND < comparison.error() < math.inf
    assert not faults


def by_comparison(bugs: dict[str, tuple[Patch, Comparison]]) -> Any:
    """Each comparison once, under the name of the first bug that it finds."""
    names: dict[Comparison, str] = {}
    for name, (_, comparison) in bugs.items():
        names.setdefault(comparison, name)
    return pytest.mark.parametrize("comparison", names.keys(), ids=names.values())


@pytest.mark.slow
@by_comparison(BUGS)
def test_comparison_passes_without_the_bug(comparison: Comparison) -> None:
    assert comparison.error() < TOLERANCE


@by_comparison(MISSING_CHECKS)
def test_refused_with_the_check(comparison: Comparison) -> None:
    came = outcome(comparison.spec, comparison.choice)
    assert came.kind == "refused" and not came.is_internal, came
