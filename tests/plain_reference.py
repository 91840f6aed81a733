"""The eager reference for the models of :mod:`tests.plain`, and the comparison with it.

It shares the model's weights and none of its code: one sample at a time, one head at a time, rotary positions as
complex numbers, and no graph. Unlike :mod:`tests.reference` it knows the model, so it needs no hooks to follow it, and
counts in steps: what ends in a residual sum.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parvts_fx.scores import layers_ahead
from parvts_fx.stages import Stage
from tests.clusters_reference import Clusters, clusters_of, pictures_of
from tests.mixing_reference import filtered, linear_attention, mixed, scanned
from tests.plain import Plain, Prompt, Specification, read
from tests.plain_layers import BLOCK, BLOCKS, CHOSEN, EXPERTS
from tests.plain_specification import IMAGE_TOKEN, SOUND_TOKEN, VIDEO_TOKEN
from tests.reference import Placed, Prefill, Rule, chosen, one_stage, placed, relative_error

Steps = list[tuple[str, int]]


@dataclasses.dataclass
class PlainPrefill(Prefill):
    states: list[Tensor] = dataclasses.field(default_factory=list)
    """Of linear layers that hand them out, [1, heads, dim, dim] each."""


@dataclasses.dataclass
class _Ran:
    """What one step leaves."""

    x: Tensor
    cached: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    state: Tensor | None = None
    weights: Tensor | None = None
    """[heads, rows, rows] of the last attention call."""


def steps_of(spec: Specification) -> Steps:
    """What follows what along the residual stream, with its layer: each ends in a residual sum."""
    if spec.parallel:
        return [("whole", layer) for layer in range(spec.layers)]
    return [
        (what, layer) for layer in range(spec.layers) for what in ("attend", "attend again", "feed")
        if what != "attend again" or spec.pair == "own" and not spec.is_hybrid(layer)
    ]


def begin_of(spec: Specification, depth: int) -> int:
    """The step with which the layer of this number begins, wherever in it tokens meet."""
    steps = steps_of(spec)
    return [*(at for at, (what, _) in enumerate(steps) if what in ("attend", "whole")), len(steps)][depth]


class _Sample:
    """One sample's eager decoder, on any choice of its positions."""

    def __init__(self, model: Plain, given: Prompt, index: int):
        self.model, self.spec = model, model.spec
        ids, mask = given.ids[index], given.mask[index].bool()
        self.length = len(ids)
        self.is_visual = given.visual[index]
        self.merged = model.tokens.weight[ids].clone()
        sources = [(IMAGE_TOKEN, given.features, "projection"), (VIDEO_TOKEN, given.video, "projection"),
                   (SOUND_TOKEN, given.sound, "hearing")]
        for token, features, name in sources:
            if features is not None:
                first, place, linear = int((given.ids[:index] == token).sum()), ids == token, getattr(model, name)
                own = features[first:first + int(place.sum())]
                self.merged[place] = own @ linear.weight.T + linear.bias
        counted, past = self.spec.numbering == "mask", self.spec.past
        self.positions = past + ((mask.cumsum(0) - 1).clamp(min=0) if counted else torch.arange(self.length))
        self.past = [[part[index] for part in pair] for pair in given.cached]
        """Of each layer, [groups, past, head dim]."""

        in_window = torch.arange(self.length)[:, None] + past - torch.arange(past) < 5
        self.sees_past = in_window if self.spec.span == "window" else torch.ones(self.length, past, dtype=torch.bool)
        self.allowed = torch.zeros(self.length, self.length, dtype=torch.bool)
        for query in range(self.length):
            for key in range(self.length):
                self.allowed[query, key] = self._sees(query, key, mask)

    def _sees(self, query: int, key: int, mask: Tensor) -> bool:
        sees, span = key <= query, self.spec.span
        if self.spec.attention == "causal":
            return sees
        sees = sees and (span != "window" or query - key < 5)
        both = bool(self.is_visual[query] and self.is_visual[key])
        real = bool(mask[key]) or not self.spec.reads_padding
        return (sees or span == "images" and both or span == "all") and real or query == key

    def start(self) -> Tensor:
        if self.spec.positions == "learned":
            return self.merged + self.model.learned.weight[self.positions]
        return self.merged

    def run(self, step: tuple[str, int], path: _Path, allowed: Tensor) -> _Ran:
        """allowed [seq, seq]; keys and values are [1, groups, rows, head dim]."""
        x, rows, self.sizes = path.x, path.rows, path.sizes
        what, index = step
        layer, post = self.model.layers[index], self.spec.place == "post"

        def norm(module: torch.nn.Module, which: str, x: Tensor) -> Tensor:
            x = module(self._mixed(index, f"before {which}", x, rows))
            return self._mixed(index, f"behind {which}", x, rows)

        if what == "attend again":
            own = layer.further
            mixed, cached, weights = self._attend(own, x if post else own.norm(x), rows, allowed)
            return _Ran(own.norm(x + mixed) if post else x + mixed, [cached], weights=weights)
        if what == "feed":
            x = norm(layer.second, "second", x + self._feed(index, x, rows)) if post else (
                x + self._feed(index, norm(layer.second, "second", x), rows))
            return _Ran(self._mixed(index, "stream", x, rows))
        inner = x if post else norm(layer.first, "first", _chosen((*path.kept, x)))
        ran = self._attention(index, inner, rows, allowed)
        x = x + ran.x + (self._feed(index, inner, rows) if what == "whole" else 0)
        x = norm(layer.first, "first", x) if post else x
        return dataclasses.replace(ran, x=self._mixed(index, "stream", x, rows) if what == "whole" else x)

    def _mixed(self, index: int, place: str, x: Tensor, rows: Tensor) -> Tensor:
        for mixing in (self.spec.feed_mixing, self.spec.norm_mixing):
            if mixing is not None and mixing.place == place and self.spec.mixes(index):
                x = mixed(mixing, x, rows)
        return x

    def _turn(self, x: Tensor, rows: Tensor) -> Tensor:
        if self.spec.positions != "rotary":
            return x
        angle = self.positions[rows][:, None, None] * self.model.frequencies
        pair = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pair.real, pair.imag], dim=-1)

    def _project(self, weights: torch.nn.Module, x: Tensor) -> list[Tensor]:
        """[rows, heads or groups, dim] each."""
        spec = self.spec
        parts = weights.qkv(x).split([spec.hidden] + 2 * [spec.groups * spec.head_dim], dim=1)
        return [part.reshape(len(x), -1, spec.head_dim) for part in parts]

    def _attention(self, index: int, x: Tensor, rows: Tensor, allowed: Tensor) -> _Ran:
        """What stands between the first norm and the first residual sum."""
        layer, spec = self.model.layers[index], self.spec
        if spec.is_hybrid(index):
            return self._replaced(layer, x)
        first, cached, weights = self._attend(layer, x, rows, allowed, self.past[index] if self.past else ())
        if spec.pair not in ("chain", "sum") and not (spec.pair and spec.parallel):
            return _Ran(first, [cached], weights=weights)
        second, further, weights = self._attend(layer.further, first if spec.pair == "chain" else x, rows, allowed)
        return _Ran(second if spec.pair == "chain" else first + second, [cached, further], weights=weights)

    def _attend(
        self, own: torch.nn.Module, x: Tensor, rows: Tensor, allowed: Tensor, past: Sequence[Tensor] = ()
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """``past``: cached keys and values [groups, past, head dim], which every row sees that its window lets."""
        spec = self.spec
        query, key, value = self._project(own, x)
        query, key = self._turn(query, rows), self._turn(key, rows)
        heads, weights = [], []
        allowed = allowed[rows][:, rows]
        if spec.attention == "blocks":
            allowed = torch.stack([_blocks(row, query[row].mean(0), key[:, 0], sees) for row, sees in enumerate(allowed)])
        for head in range(spec.heads):
            group = head // (spec.heads // spec.groups)
            scores = query[:, head] @ key[:, group].T * spec.score_scale
            if spec.attention == "relative":
                at = self.positions[rows]
                scores = scores + self.model.slopes[head] * (at[:, None] - at[None, :]).abs()
            if spec.attention == "counted":
                scores = scores + _counted(query[:, head])
            scores[~self.is_visual[rows]] += self.sizes.log().float()  # of text: keys may stand for several tokens
            scores = scores.masked_fill(~allowed, -math.inf)
            values = value[:, group]
            if past:
                before = query[:, head] @ past[0][group].T * spec.score_scale
                if spec.attention == "relative":
                    before = before + self.model.slopes[head] * (self.positions[rows][:, None] - torch.arange(spec.past)).abs()
                scores = torch.cat([before.masked_fill(~self.sees_past[rows], -math.inf), scores], 1)
                values = torch.cat([past[1][group], values])
            if spec.attention == "sinks":
                scores = torch.cat([scores, query[:, head, :1]], 1)
            seen = torch.softmax(scores, 1)[:, :len(values)]
            weights.append(seen[:, spec.past:])
            heads.append(seen @ values)
        cached = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
        return own.out(torch.cat(heads, dim=1)), cached, torch.stack(weights)

    def _replaced(self, layer: torch.nn.Module, x: Tensor) -> _Ran:
        query, key, value = self._project(layer, x)
        if not self.spec.hybrid.startswith("linear"):
            inner = query.flatten(1)
            return _Ran(layer.out(scanned(inner) if self.spec.hybrid == "scan" else filtered(inner)))
        each = [
            linear_attention(self.spec.hybrid, query[:, head], *(part[:, head * self.spec.groups // self.spec.heads]
                                                                 for part in (key, value)))
            for head in range(self.spec.heads)
        ]
        heads, states = zip(*each)
        return _Ran(layer.out(torch.cat(heads, 1)), state=torch.stack(states)[None])

    def _feed(self, index: int, x: Tensor, rows: Tensor) -> Tensor:
        layer = self.model.layers[index]
        x = self._mixed(index, "in", x, rows)
        if self.spec.experts:
            x = torch.stack([self._experts(layer, row) for row in x])
        else:
            held = self._mixed(index, "hidden", layer.up(x), rows)
            active = self._mixed(index, "active", F.gelu(held), rows)
            if self.spec.feed_mixing is not None and self.spec.feed_mixing.place == "gate":
                active = active * torch.sigmoid(self._mixed(index, "gate", held, rows))
            x = layer.down(active)
        return self._mixed(index, "out", x, rows)

    def _experts(self, layer: torch.nn.Module, row: Tensor) -> Tensor:
        shares = torch.softmax(layer.router(row), 0).tolist()
        best = sorted(range(EXPERTS), key=lambda expert: -shares[expert])[:CHOSEN]
        return sum(shares[expert] * (F.gelu(row @ layer.wide[expert]) @ layer.narrow[expert]) for expert in best)

    def finish(self, x: Tensor, rows: Tensor) -> Tensor:
        final = self.spec.final_mixing
        x = mixed(final, x, rows) if final is not None and final.place == "before" else x
        x = self.model.norm(x)
        x = mixed(final, x, rows) if final is not None and final.place == "behind" else x
        return self.model.head(x[-1:] if self.spec.last_only else x)


def _chosen(states: Sequence[Tensor]) -> Tensor:
    """[rows, hidden]: what :func:`tests.plain.chosen` makes of a row's states."""
    shares = torch.softmax(torch.stack([state.sum(1) for state in states]) / states[0].shape[1] ** 0.5, 0)
    return sum(share[:, None] * state for share, state in zip(shares, states))


def _counted(query: Tensor) -> Tensor:
    """[rows, rows]: what :func:`tests.plain_layers.counted` adds to the scores of rows that are there."""
    bias = torch.zeros(len(query), len(query))
    for row in range(len(query)):
        for distance in range(min(query.shape[1], row + 1)):
            bias[row, row - distance] = query[row, distance] * (row + 1) ** 0.5
    return bias


def _blocks(row: int, query: Tensor, keys: Tensor, sees: Tensor) -> Tensor:
    """[rows] bool: of what a row may see, itself and those blocks whose keys, added up, fit it best."""
    whole = sees.nonzero()[:, 0].split(BLOCK)
    best = sorted((block for block in whole if len(block) == BLOCK), key=lambda block: -float(query @ keys[block].sum(0)))
    chosen = torch.zeros_like(sees)
    for place in (row, *best[:BLOCKS]):
        chosen[place] = True
    return chosen


@dataclasses.dataclass
class _Path:
    """Some of a sample's rows on their way through the steps, with all that they have left in caches and states."""

    rows: Tensor
    x: Tensor
    sizes: Tensor
    """[rows]: how many tokens each stands for."""
    cached: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)
    states: list[Tensor] = dataclasses.field(default_factory=list)
    weights: Tensor | None = None
    """Of the last attention call, as :class:`_Ran` has them."""
    kept: tuple[Tensor, ...] = ()
    """[rows, hidden] each: what has entered layers in front, where later ones choose among that."""

    def only(self, at: Tensor) -> _Path:
        """The rows where ``at`` [rows] bool is true. States stay: the others have left their trace there."""
        cached = [(key[:, :, at], value[:, :, at]) for key, value in self.cached]
        weights = None if self.weights is None else self.weights[:, at][:, :, at]
        kept = tuple(state[at] for state in self.kept)
        return _Path(self.rows[at], self.x[at], self.sizes[at], cached, self.states, weights, kept)

    def merged(self, found: Clusters, step: Tensor, visual: Tensor) -> _Path:
        """With what kept rows take over of the stream [rows, hidden], and of cached values."""
        cached = [(key, found.shifted(value, visual)) for key, value in self.cached]
        return dataclasses.replace(self, x=self.x + step, sizes=found.sizes, cached=cached)

    def behind(self, sample: _Sample, steps: Steps, allowed: Tensor) -> _Path:
        path = self
        for step in steps:
            ran = sample.run(step, path, allowed)
            states = path.states if ran.state is None else [*path.states, ran.state]
            weights = path.weights if step[0] == "feed" else ran.weights
            begins = sample.spec.kept and step[0] in ("attend", "whole") and step[1] % 2 == 0
            kept = (*path.kept, path.x) if begins else path.kept
            path = _Path(path.rows, ran.x, path.sizes, path.cached + ran.cached, states, weights, kept)
        return path


def _migrated(sample: _Sample, path: _Path, steps: Steps, turn: Placed, subject: Tensor, found: Clusters | None) -> _Path:
    """The path behind a stage's steps, without the rows that are neither text nor ``subject`` [rows] bool.

    With ``found``, what kept rows take over is that with which all rows have entered their last layer.
    """
    text = ~sample.is_visual[path.rows]
    other = ~(text | subject)
    if turn.stage.fusion != "attention" and steps and other.any():  # with all kept, the unmodified model's result
        a, b = (path.only(at).behind(sample, steps, sample.allowed) for at in (~other, ~subject))
        x, text_a, text_b, share = a.x.clone(), text[~other], text[~subject], turn.stage.fusion
        x[text_a] = share * a.x[text_a] + (1 - share) * b.x[text_b]
        return dataclasses.replace(a, x=x)
    group = torch.zeros(sample.length, dtype=torch.long)
    group[path.rows[subject]], group[path.rows[other]] = 1, -1
    apart = group[:, None] * group == -1 if turn.stage.paths == "parallel" else torch.zeros(()).bool()
    last = next((at for at in reversed(range(len(steps))) if steps[at][0] in ("attend", "whole")), 0)
    entering = path.behind(sample, steps[:last], sample.allowed & ~apart)
    path = entering.behind(sample, steps[last:], sample.allowed & ~apart)
    if found is not None and other.any():
        started = sample.merged[path.rows] if turn.end == 0 else entering.x  # where rows leave at once, not yet with positions
        step = found.taken_over(started) - started if turn.end < sample.spec.layers else torch.zeros(())
        path = path.merged(found, step, ~text)
    return path.only(~other)


def _ahead(sample: _Sample, path: _Path, steps: Steps, turn: Placed) -> list[Tensor]:
    """[heads, rows, rows] of each layer with attention that the rule looks ahead to, were the stream at hand its input."""
    end = min(sample.spec.layers, turn.begin + layers_ahead(turn.stage.rule))
    spans = [steps[begin_of(sample.spec, layer):begin_of(sample.spec, layer + 1)] for layer in range(turn.begin, end)]
    each = [dataclasses.replace(path, weights=None).behind(sample, span, sample.allowed).weights for span in spans]
    return [held for held in each if held is not None]


def _prefill(sample: _Sample, turns: Sequence[Placed], end: int | None = None) -> PlainPrefill:
    """One sample; the last stage's other rows leave in front of step ``end``, where that is given."""
    spec, steps, done, clear = sample.spec, steps_of(sample.spec), 0, math.inf
    path = _Path(torch.arange(sample.length), sample.start(), torch.ones(sample.length))
    for turn in turns:
        first, last = begin_of(spec, turn.begin), begin_of(spec, turn.end)
        last = end if turn is turns[-1] and end is not None else last
        path = path.behind(sample, steps[done:first], sample.allowed)
        hidden = path.x if first else sample.merged[path.rows]  # the merge's output, not yet with learned positions
        visual = sample.is_visual[path.rows]
        subject, gap = chosen(
            turn.stage, hidden, path.rows, sample.is_visual, path.weights, ahead=_ahead(sample, path, steps, turn))
        found = None
        if turn.stage.merge is not None:
            found = clusters_of(hidden, visual, subject, pictures_of(sample.is_visual)[path.rows], path.sizes)
            gap = min(gap, found.gap)
        path, done, clear = _migrated(sample, path, steps[first:last], turn, subject, found), last, min(clear, gap)
    path = path.behind(sample, steps[done:], sample.allowed)
    keys, values = [key for key, _ in path.cached], [value for _, value in path.cached]
    if sample.past:
        keys, values = ([torch.cat([pair[which][None], held], 2) for pair, held in zip(sample.past, new)]
                        for which, new in enumerate((keys, values)))
    return PlainPrefill(path.rows, sample.finish(path.x, path.rows), keys, values, clear, path.states)


def reference(
    model: Plain, given: Prompt, score: Rule | None = None, *, stages: Sequence[Stage] = (), begin: int | None = None,
    migration_depth: int = 0, **short: Any,
) -> list[PlainPrefill]:
    """Each sample's pruned prefill as the design defines it, without a graph.

    Args:
        score, migration_depth, short: where there are no stages, as :func:`one_stage` takes them.
        begin: the step in front of which the (last stage's) other rows leave, in place of what follows from the depth.
    """
    depth = migration_depth if begin is None else 1  # any, as long as there is a second group
    turns = placed(stages or one_stage(score, depth, **short), model.spec.layers)
    return [_prefill(_Sample(model, given, index), turns, begin) for index in range(len(given.ids))]


def unpruned(model: Plain, given: Prompt) -> list[PlainPrefill]:
    """The model as it is, by the reference's own code: what holds the reference to the model."""
    return [_prefill(_Sample(model, given, index), ()) for index in range(len(given.ids))]


def largest_error(
    actual: tuple[Tensor, list[tuple[Tensor, Tensor]]], expected: list[Prefill], caches: bool = True
) -> float:
    """The largest relative error over the logits and every layer's keys and values; infinite where shapes differ."""
    logits, cache = actual
    errors = [relative_error(logits, torch.stack([sample.logits for sample in expected]))]
    if caches and len(cache) != len(expected[0].keys):
        return math.inf
    for layer, (key, value) in enumerate(cache):
        errors.append(relative_error(key, torch.cat([sample.keys[layer] for sample in expected])))
        errors.append(relative_error(value, torch.cat([sample.values[layer] for sample in expected])))
    return max(errors)


def error_of(spec: Specification, output: Any, expected: list[PlainPrefill]) -> float:
    """:func:`largest_error` of what a model of any layout gives, states included."""
    logits, caches, states = read(spec, output)
    errors = [largest_error((logits, caches), expected, spec.caches)]
    if len(states) != (len(expected[0].states) if spec.states else 0):
        return math.inf
    errors += [
        relative_error(state, torch.cat([sample.states[at] for sample in expected])) for at, state in enumerate(states)
    ]
    return max(errors)
