"""The eager reference for the models of :mod:`tests.plain`, and the comparison with it.

It shares the model's weights and none of its code: one sample at a time, one head at a time, rotary positions as
complex numbers, and no graph. Unlike :mod:`tests.reference` it knows the model, so it needs no hooks to follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.plain import IMAGE_TOKEN, Plain, Prompt
from tests.reference import Prefill, relative_error, subject_count, subjects_of


class _Sample:
    """One sample's eager decoder, on any choice of its positions."""

    def __init__(self, model: Plain, given: Prompt, index: int):
        self.model, self.spec = model, model.spec
        ids, mask = given.ids[index], given.mask[index].bool()
        self.length = len(ids)
        self.is_visual = ids == IMAGE_TOKEN
        first = int((given.ids[:index] == IMAGE_TOKEN).sum())
        self.merged = model.tokens.weight[ids].clone()
        own = given.features[first:first + int(self.is_visual.sum())]
        self.merged[self.is_visual] = own @ model.projection.weight.T + model.projection.bias
        counted = self.spec.numbering == "mask"
        self.positions = (mask.cumsum(0) - 1).clamp(min=0) if counted else torch.arange(self.length)
        self.allowed = torch.zeros(self.length, self.length, dtype=torch.bool)
        for query in range(self.length):
            for key in range(self.length):
                sees = key <= query
                if self.spec.attention != "causal":
                    sees = sees and (self.spec.span != "window" or query - key < 5)
                    both = bool(self.is_visual[query] and self.is_visual[key])
                    real = bool(mask[key]) or not self.spec.reads_padding
                    sees = (sees or self.spec.span == "images" and both or self.spec.span == "all") and real or query == key
                self.allowed[query, key] = sees

    def start(self) -> Tensor:
        if self.spec.positions == "learned":
            return self.merged + self.model.learned.weight[self.positions]
        return self.merged

    def _turn(self, x: Tensor, rows: Tensor) -> Tensor:
        if self.spec.positions != "rotary":
            return x
        angle = self.positions[rows][:, None, None] * self.model.frequencies
        pair = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pair.real, pair.imag], dim=-1)

    def layer(self, index: int, x: Tensor, rows: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [rows, hidden], allowed [seq, seq]; returns the output, keys and values [1, groups, rows, head dim]."""
        layer, spec = self.model.layers[index], self.spec
        inner = x if spec.place == "post" else layer.first(x)
        query, key, value = layer.qkv(inner).split([spec.hidden] + 2 * [spec.groups * spec.head_dim], dim=1)
        query, key = (self._turn(part.reshape(len(rows), -1, spec.head_dim), rows) for part in (query, key))
        value = value.reshape(len(rows), -1, spec.head_dim)
        mixed = []
        for head in range(spec.heads):
            group = head // (spec.heads // spec.groups)
            scores = query[:, head] @ key[:, group].T * spec.score_scale
            if spec.attention == "relative":
                own = self.positions[rows]
                scores = scores + self.model.slopes[head] * (own[:, None] - own[None, :]).abs()
            scores = scores.masked_fill(~allowed[rows][:, rows], -math.inf)
            mixed.append(torch.softmax(scores, 1) @ value[:, group])
        mixed = layer.out(torch.cat(mixed, dim=1))
        if spec.parallel:
            x = x + mixed + layer.feed(inner)
            x = layer.first(x) if spec.place == "post" else x
        elif spec.place == "post":
            x = layer.first(x + mixed)
            x = layer.second(x + layer.feed(x))
        else:
            x = x + mixed
            x = x + layer.feed(layer.second(x))
        return x, key.transpose(0, 1)[None], value.transpose(0, 1)[None]


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
) -> list[Prefill]:
    """Each sample's pruned prefill as the design defines it, without a graph."""
    results = []
    for index in range(len(given.ids)):
        sample = _Sample(model, given, index)
        visual = sample.is_visual.nonzero()[:, 0].tolist()
        scores = score(sample.merged[None], sample.is_visual[None])[0].tolist()
        chosen = subjects_of(scores, visual, subject_count(len(visual), keep_ratio, keep_tokens))
        subject = torch.zeros(sample.length, dtype=torch.bool)
        subject[chosen] = True
        other = sample.is_visual & ~subject
        everything, rows_a, rows_b = torch.arange(sample.length), (~other).nonzero()[:, 0], (~subject).nonzero()[:, 0]
        keys, values, x = [], [], sample.start()
        if fusion == "attention" or not other.any():  # with all tokens kept, the unmodified model's result
            apart = sample.allowed.clone()
            if paths == "parallel":
                apart &= ~(subject[:, None] & other | other[:, None] & subject)
            for layer in range(migration_depth):
                x, key, value = sample.layer(layer, x, everything, apart)
                keys.append(key[:, :, rows_a])
                values.append(value[:, :, rows_a])
            x = x[rows_a]
        else:
            a, b = x[rows_a], x[rows_b]
            for layer in range(migration_depth):
                a, key, value = sample.layer(layer, a, rows_a, sample.allowed)
                b, _, _ = sample.layer(layer, b, rows_b, sample.allowed)
                keys.append(key)
                values.append(value)
            x, text_a, text_b = a.clone(), ~sample.is_visual[rows_a], ~sample.is_visual[rows_b]
            if migration_depth:
                x[text_a] = fusion * a[text_a] + (1 - fusion) * b[text_b]
        for layer in range(migration_depth, model.spec.layers):
            x, key, value = sample.layer(layer, x, rows_a, sample.allowed)
            keys.append(key)
            values.append(value)
        logits = model.head(model.norm(x[-1:] if model.spec.last_only else x))
        results.append(Prefill(rows_a, logits, keys, values))
    return results


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
