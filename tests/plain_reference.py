"""The eager reference for the models of :mod:`tests.plain`, and the comparison with it.

It shares the model's weights and none of its code: one sample at a time, one head at a time, rotary positions as
complex numbers, and no graph. Unlike :mod:`tests.reference` it knows the model, so it needs no hooks to follow it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.mixing_reference import filtered, linear_attention, mixed, scanned
from tests.plain import Plain, Prompt, Specification, read
from tests.plain_layers import CHOSEN, EXPERTS
from tests.plain_specification import IMAGE_TOKEN, SOUND_TOKEN, VIDEO_TOKEN
from tests.reference import Prefill, relative_error, subject_count, subjects_of


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


def steps_of(spec: Specification) -> list[tuple[str, int]]:
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
        counted = self.spec.numbering == "mask"
        self.positions = (mask.cumsum(0) - 1).clamp(min=0) if counted else torch.arange(self.length)
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

    def run(self, step: tuple[str, int], x: Tensor, rows: Tensor, allowed: Tensor) -> _Ran:
        """x [rows, hidden], allowed [seq, seq]; keys and values are [1, groups, rows, head dim]."""
        what, index = step
        layer, post = self.model.layers[index], self.spec.place == "post"

        def norm(module: torch.nn.Module, which: str, x: Tensor) -> Tensor:
            x = module(self._mixed(index, f"before {which}", x, rows))
            return self._mixed(index, f"behind {which}", x, rows)

        if what == "attend again":
            own = layer.further
            mixed, cached = self._attend(own, x if post else own.norm(x), rows, allowed)
            return _Ran(own.norm(x + mixed) if post else x + mixed, [cached])
        if what == "feed":
            x = norm(layer.second, "second", x + self._feed(index, x, rows)) if post else (
                x + self._feed(index, norm(layer.second, "second", x), rows))
            return _Ran(self._mixed(index, "stream", x, rows))
        inner = x if post else norm(layer.first, "first", x)
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
        first, cached = self._attend(layer, x, rows, allowed)
        if spec.pair not in ("chain", "sum") and not (spec.pair and spec.parallel):
            return _Ran(first, [cached])
        second, further = self._attend(layer.further, first if spec.pair == "chain" else x, rows, allowed)
        return _Ran(second if spec.pair == "chain" else first + second, [cached, further])

    def _attend(
        self, weights: torch.nn.Module, x: Tensor, rows: Tensor, allowed: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        spec = self.spec
        query, key, value = self._project(weights, x)
        query, key = self._turn(query, rows), self._turn(key, rows)
        heads = []
        for head in range(spec.heads):
            group = head // (spec.heads // spec.groups)
            scores = query[:, head] @ key[:, group].T * spec.score_scale
            if spec.attention == "relative":
                own = self.positions[rows]
                scores = scores + self.model.slopes[head] * (own[:, None] - own[None, :]).abs()
            scores = scores.masked_fill(~allowed[rows][:, rows], -math.inf)
            heads.append(torch.softmax(scores, 1) @ value[:, group])
        return weights.out(torch.cat(heads, dim=1)), (key.transpose(0, 1)[None], value.transpose(0, 1)[None])

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


def _pruned(sample: _Sample, subject: Tensor, begin: int, fusion: str | float, paths: str) -> PlainPrefill:
    """One sample with its subject group [seq] bool; behind ``begin`` steps the kept rows are alone."""
    other, steps = sample.is_visual & ~subject, steps_of(sample.spec)
    everything, rows_a, rows_b = torch.arange(sample.length), (~other).nonzero()[:, 0], (~subject).nonzero()[:, 0]
    cached, states, x = [], [], sample.start()

    def keep(ran: _Ran, rows: Tensor | None = None) -> Tensor:
        cut = slice(None) if rows is None else rows
        cached.extend((key[:, :, cut], value[:, :, cut]) for key, value in ran.cached)
        states.extend([] if ran.state is None else [ran.state])
        return ran.x

    if fusion == "attention" or not other.any():  # with all tokens kept, the unmodified model's result
        apart = sample.allowed.clone()
        if paths == "parallel":
            apart &= ~(subject[:, None] & other | other[:, None] & subject)
        for step in steps[:begin]:
            x = keep(sample.run(step, x, everything, apart), rows_a)
        x = x[rows_a]
    else:
        a, b = x[rows_a], x[rows_b]
        for step in steps[:begin]:
            a = keep(sample.run(step, a, rows_a, sample.allowed))
            b = sample.run(step, b, rows_b, sample.allowed).x
        x, text_a, text_b = a.clone(), ~sample.is_visual[rows_a], ~sample.is_visual[rows_b]
        if begin:
            x[text_a] = fusion * a[text_a] + (1 - fusion) * b[text_b]
    for step in steps[begin:]:
        x = keep(sample.run(step, x, rows_a, sample.allowed))
    keys, values = [key for key, _ in cached], [value for _, value in cached]
    return PlainPrefill(rows_a, sample.finish(x, rows_a), keys, values, states)


def reference(
    model: Plain,
    given: Prompt,
    score: Callable[[Tensor, Tensor], Tensor],
    *,
    migration_depth: int,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    fusion: str | float = "attention",
    paths: str = "parallel",
    begin: int | None = None,
) -> list[PlainPrefill]:
    """Each sample's pruned prefill as the design defines it, without a graph.

    Args:
        begin: the number of steps that both groups run, in place of the one that follows from the depth.
    """
    begin = begin_of(model.spec, migration_depth) if begin is None else begin
    results = []
    for index in range(len(given.ids)):
        sample = _Sample(model, given, index)
        visual = sample.is_visual.nonzero()[:, 0].tolist()
        scores = score(sample.merged[None], sample.is_visual[None])[0].tolist()
        chosen = subjects_of(scores, visual, subject_count(len(visual), keep_ratio, keep_tokens))
        subject = torch.zeros(sample.length, dtype=torch.bool)
        subject[chosen] = True
        results.append(_pruned(sample, subject, begin, fusion, paths))
    return results


def unpruned(model: Plain, given: Prompt) -> list[PlainPrefill]:
    """The model as it is, by the reference's own code: what holds the reference to the model."""
    samples = [_Sample(model, given, index) for index in range(len(given.ids))]
    return [_pruned(sample, sample.is_visual, 0, "attention", "parallel") for sample in samples]


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
