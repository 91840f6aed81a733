"""The grammar of models, prompts and options that tests draw from: by hypothesis, or at random in any number.

Everything is chosen by one function, ``pick``, out of a sequence of which the first is the simplest.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from parvts_fx.stages import Stage, check_order
from tests.plain import Mixing, Row, Specification
from tests.plain_checking import RULES, Choice
from tests.reference import READINGS, kept, placed
from tests.token_mixers import CODES

T = TypeVar("T")
Pick = Callable[[Sequence[Any]], Any]

ATTENTIONS = ("causal", "masked", "written", "relative")
HEADS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (3, 3))
KINDS = tuple(kind for kind in CODES if kind != "positions")  # of that, what is right is not defined
COMBINED = ("add", "subtract", "gate", "divide", "replace")
LAYERS = ("all", "first", "last", "odd")
FEED = ("in", "hidden", "active", "gate", "out", "stream")
NORM = ("before first", "behind first", "before second", "behind second")
KEPT = (2, 1, 3, 4, 0.05, 1 / 9, 0.25, 0.5, 0.8, 1.0)
WEIGHTS = (0.25, 0.7, 0.0, 1.0)
MERGES = ("scatter", "scatter", "scatter", "assign", "put", "choose", "choose the text")


def chance(pick: Pick, one_in: int) -> bool:
    return pick(range(one_in)) == one_in - 1


def mixing(pick: Pick, places: Sequence[str], depth: int = 1) -> Mixing:
    """An expression of one or a few operations in which tokens meet."""
    place = pick(places)
    then = mixing(pick, (place,), depth + 1) if depth < 3 and chance(pick, 3) else None
    kind = pick(KINDS)
    return Mixing(kind, pick(range(len(CODES[kind]))), pick(COMBINED), place, then)


def _feed(pick: Pick, drawn: dict[str, Any]) -> dict[str, Any]:
    places = ("in", "out", "stream") if "experts" in drawn else FEED
    return {"feed_mixing": mixing(pick, places), "mixing_layers": pick(LAYERS)}


def _hybrid(pick: Pick, drawn: dict[str, Any]) -> dict[str, Any]:
    kind = pick(("convolution", "linear", "linear, masked", "linear, whole", "scan"))
    return {"hybrid": kind, "hybrid_layers": pick(("odd", "even", "first", "last", "all")), "states": chance(pick, 3)}


# What models have beside the base's; each is given what has been drawn before it.
FEATURES: tuple[Callable[[Pick, dict[str, Any]], dict[str, Any]], ...] = (
    lambda pick, drawn: {"experts": pick(("sorted", "added", "every"))},
    _feed,
    _feed,
    lambda pick, drawn: {"norm_mixing": mixing(pick, NORM), "mixing_layers": pick(LAYERS)},
    lambda pick, drawn: {"final_mixing": mixing(pick, ("before", "behind"))},
    _hybrid,
    lambda pick, drawn: {"pair": pick(("chain", "sum", "own"))},
    lambda pick, drawn: {"layout": pick(("heads first", "folded")), "flat": False},
    lambda pick, drawn: {"stream": "rows first", "flat": False},
    lambda pick, drawn: {"flat_feed": True},
    lambda pick, drawn: {"cache_form": pick(("flat", "stacked", "one")), "caches": True},
    lambda pick, drawn: {"video": True},
    lambda pick, drawn: {"sound": pick(range(1, 4)), "sound_first": chance(pick, 2)},
    lambda pick, drawn: {  # the last one: with attention alone, and a mask
        "past": pick((1, 2, 5, 11)), "attention": pick(ATTENTIONS[1:]), "layout": "", "pair": "", "hybrid": "", "states": False},
)


def base(pick: Pick, attention: str) -> Specification:
    """A model of the plain kind, with a prompt that has yet to be drawn."""
    heads, groups = pick(HEADS)
    return Specification(
        layers=pick(range(1, 5)), heads=heads, groups=groups, head_dim=pick((4, 6)), norm=pick(("rms", "layer")),
        place=pick(("pre", "post")), attention=attention, span=pick(("causal", "window", "images", "all")),
        reads_padding=pick((False, True)), scale=pick((None, 0.6)), positions=pick(("rotary", "learned")),
        numbering=pick(("index", "mask")), fused_qkv=chance(pick, 2), parallel=chance(pick, 2), flat=chance(pick, 2),
        caches=pick((True, True, False)), last_only=chance(pick, 2),
    )


def with_prompt(pick: Pick, spec: Specification, batch: int) -> Specification:
    """The specification with a prompt: its length, visual tokens, padding and places of the images."""
    visual = pick(range(3, 9))  # of two, all lie equally far from their mean: rounding would choose
    rows = tuple(Row(pick(range(4)), pick(range(4)), pick(range(3))) for _ in range(batch))
    least = max(row.padding + row.before + visual + row.between for row in rows) + spec.sound
    colliding = [size for size in (spec.hidden, spec.vocabulary, spec.mlp, 2 * visual, spec.head_dim) if size >= least]
    length = pick([least, least + 1, least + 4, *colliding])
    return dataclasses.replace(spec, length=length, visual=visual, rows=rows, pad_right=chance(pick, 2))


def with_padding_that_fits(spec: Specification) -> Specification:
    """The same with its padding in front where rows are cached: behind visual tokens it is refused there, since decode steps
    would read the prompt's mask at the wrong places."""
    return dataclasses.replace(spec, pad_right=spec.pad_right and not (spec.caches and spec.reads_padding))


def ends_in_mixing(spec: Specification) -> bool:
    """Whether tokens meet on the stream between the last sum and the final norm.

    No graph tells whether that is still the last layer, so that what K = layers means is not defined.
    """
    ends = ("before first", "behind first") if spec.parallel else ("before second", "behind second")
    last = spec.mixes(spec.layers - 1)
    return (
        spec.final_mixing is not None and spec.final_mixing.place == "before"
        or last and spec.feed_mixing is not None and spec.feed_mixing.place == "stream"
        or last and spec.place == "post" and spec.norm_mixing is not None and spec.norm_mixing.place in ends
    )


def choice(pick: Pick, spec: Specification) -> Choice:
    kind, depths = pick(("attention", "weight", "joint")), spec.layers
    # Where a single layer ends cannot be told from what follows it; constant weights need that end for K = layers.
    deepest = depths - 1 if kind == "weight" and depths == 1 or ends_in_mixing(spec) else depths
    return Choice(
        depth=pick([*range(1, deepest + 1), 0]), keep=pick(KEPT),
        fusion=pick(WEIGHTS) if kind == "weight" else "attention",
        paths="joint" if kind == "joint" else "parallel", rule=pick(list(RULES)), data_in_sizes=not chance(pick, 2),
        skip_dead_rows=not chance(pick, 4), merge=None if kind == "weight" else pick((None, "clusters")),
    )


def schedule(pick: Pick, spec: Specification) -> tuple[Stage, ...]:
    """Two or three stages anywhere in the layers, each of any kind."""
    stages: list[Stage] = []
    begin, layers, count = 0, spec.layers - ends_in_mixing(spec), pick((2, 3))
    for number in range(count):
        if begin >= spec.layers:
            break
        at = pick(range(begin, min(begin + 3, spec.layers)))
        kind = pick(("at once", "attention", "weight", "joint")) if at < layers else "at once"
        most = layers - at if number == count - 1 else min(2, layers - at)
        both = 0 if kind == "at once" else pick(range(1, most + 1))
        least = {type(stage.keep): stage.keep for stage in stages}
        keep = pick([keep for keep in KEPT if keep <= least.get(type(keep), keep)])
        live = live_tokens(stages, spec)
        stages.append(Stage(
            at=_of_layers(pick, at, spec.layers), keep=keep, rule=pick(_rules(spec, at, live)),
            migrate=_of_layers(pick, both, spec.layers), paths="joint" if kind == "joint" else "parallel",
            fusion=pick(WEIGHTS) if kind == "weight" else "attention",
            merge=None if kind == "weight" else pick((None, "clusters"))))
        begin = at + both
    return tuple(stages)


def _of_layers(pick: Pick, count: int, layers: int) -> int | float:
    return count / layers if 0 < count < layers and chance(pick, 4) else count


def _rules(spec: Specification, at: int, live: int) -> list[str]:
    """The rules by which so many tokens can be told apart at the input of a layer; simple ones first."""
    rules = [rule for rule in RULES if live > 2 or rule not in ("diverse", "distinct")]
    reading = [] if at == 0 or spec.is_hybrid(at - 1) else [*READINGS]
    ahead = ["look_ahead"] if live > 2 and not all(map(spec.is_hybrid, range(at, min(at + 3, spec.layers)))) else []
    return [*rules, *reading, *reading, *ahead, *ahead]


def live_tokens(stages: Sequence[Stage], spec: Specification) -> int:
    """How many visual tokens a sample still has."""
    live = spec.visual
    for stage in stages:
        live = kept(stage.keep, live, spec.visual)
    return live


def case(pick: Pick, features: int | None = None, staged: bool = False) -> tuple[Specification, Choice]:
    """A model with so many features beside the base's (none to three where that is not said), and options for it.

    Args:
        staged: with a schedule of several stages, and layers enough for it.
    """
    spec = base(pick, pick(ATTENTIONS))
    count = pick(range(4)) if features is None else features
    drawn: dict[str, Any] = {"merge": pick(MERGES)}
    for at in sorted({pick(range(len(FEATURES))) for _ in range(count)}):
        drawn.update(FEATURES[at](pick, drawn))
    if not drawn.keys().isdisjoint(("feed_mixing", "norm_mixing", "pair")):
        drawn["layers"] = max(2, spec.layers)  # with one layer nothing repeats: no graph tells where it would end
    spec = with_prompt(pick, dataclasses.replace(spec, **drawn), pick(range(1, 4)))
    options = choice(pick, spec)
    if staged:
        spec = dataclasses.replace(spec, layers=pick((3, 4, 5)))
        options = Choice(stages=schedule(pick, spec), data_in_sizes=options.data_in_sizes,
                         skip_dead_rows=options.skip_dead_rows)
    return spec, options


def random_case(seed: int, staged: bool | None = None) -> tuple[Specification, Choice]:
    """Every third seed has several stages, if nothing is said of that; its model is the same but for its layers."""
    return case(random.Random(seed).choice, staged=seed % 3 == 0 if staged is None else staged)


def simpler(record: Any) -> list[Any]:
    """A frozen record with one field, or one part of a field, as by default: what may fail alike and says more."""
    others = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name == "rows":
            others += [dataclasses.replace(record, rows=rows) for rows in ((Row(),), value[:1], value[1:]) if rows]
        elif field.default is not dataclasses.MISSING and value != field.default:
            others.append(dataclasses.replace(record, **{field.name: field.default}))
        if field.name == "stages":
            others += [dataclasses.replace(record, stages=stages) for stages in _simpler_stages(value)]
        if isinstance(value, Mixing):
            parts = filter(None, (value.then, *simpler(value)))
            others += [dataclasses.replace(record, **{field.name: part}) for part in parts]
    return [other for other in others if other != record]


def _simpler_stages(stages: tuple[Stage, ...]) -> list[tuple[Stage, ...]]:
    """A stage less, or a stage with a field as by default."""
    others = [stages[:at] + stages[at + 1:] for at in range(len(stages)) if len(stages) > 1]
    for at, stage in enumerate(stages):
        fields = [field for field in dataclasses.fields(stage) if getattr(stage, field.name) != field.default]
        for field in fields:
            changes = {field.name: field.default}
            if field.name == "migrate":  # what goes with it, too
                changes |= {"paths": "parallel", "fusion": "attention"}
            if field.name == "rule":
                changes = {"rule": next(iter(RULES))}
            others.append((*stages[:at], dataclasses.replace(stage, **changes), *stages[at + 1:]))
    return others


def is_sound(spec: Specification, options: Choice) -> bool:
    """Whether a simplified case can be built and run."""
    if options.stages and not _are_sound(options.stages, spec):
        return False
    if spec.heads % spec.groups or options.depth > spec.layers or spec.flat and (spec.layout or spec.stream):
        return False
    least = max(row.padding + row.before + spec.visual + row.between for row in spec.rows) + spec.sound
    if ends_in_mixing(spec) and options.depth == spec.layers:
        return False
    if spec.past and (spec.attention == "causal" or spec.layout or spec.pair or spec.hybrid):
        return False
    if spec.layers == 1 and (spec.feed_mixing or spec.norm_mixing or spec.pair):
        return False
    return spec.length >= least and not (spec.cache_form == "one" and not spec.cached_calls)


def _are_sound(stages: tuple[Stage, ...], spec: Specification) -> bool:
    try:
        check_order(stages)
        turns = placed(stages, spec.layers)
    except ValueError:
        return False
    if any(turn.end == spec.layers and turn.stage.migrate for turn in turns) and ends_in_mixing(spec):
        return False
    live = [live_tokens(stages[:number], spec) for number in range(len(stages))]
    return all(turn.stage.rule in _rules(spec, turn.begin, left) for turn, left in zip(turns, live))
