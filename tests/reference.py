"""The eager reference of ParVTS: what a rewritten prefill must equal. No FX, no compilation, one sample at a time.

Works on any model whose decoder layers stand in a list and are called with keyword arguments whose token axes are the
prompt's length. One eager run records what every layer is called with; then the layers are run one by one on chosen
rows, with block masks in place of separate attention calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

# Where tokens and samples lie in arguments that every transformers decoder names alike; others are cut by size.
_TOKEN_AXES = {"attention_mask": (-2, -1), "position_ids": (-1,), "position_embeddings": (-2,)}
_SAMPLE_AXIS = {"attention_mask": -4, "position_ids": -2, "position_embeddings": -3}

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls a cache: it has another name from 5.24 on, and takes both."""


@dataclasses.dataclass
class Prefill:
    """One sample's pruned prefill."""

    rows: torch.Tensor
    """[path A] positions in the padded prompt."""

    logits: torch.Tensor
    """[path A, vocabulary]"""

    keys: list[torch.Tensor]
    """Per layer [1, heads, path A, head dim]."""

    values: list[torch.Tensor]


@dataclasses.dataclass
class Recorded:
    hidden: list[torch.Tensor]
    outputs: list[torch.Tensor]
    arguments: list[dict[str, Any]]


def subject_count(visual: int, keep_ratio: float | None = None, keep_tokens: int | None = None) -> int:
    if keep_tokens is not None:
        return min(visual, keep_tokens)
    return max(1, math.floor((1 / 9 if keep_ratio is None else keep_ratio) * visual + 0.5))


def subjects_of(scores: Sequence[float], visual: Sequence[int], count: int) -> list[int]:
    """The highest-scoring visual positions; ties to the earlier one, NaN last."""
    ranked = sorted(visual, key=lambda p: (-math.inf if math.isnan(scores[p]) else scores[p]) * -1)
    return sorted(ranked[:count])


def record(model: torch.nn.Module, layers: Sequence[torch.nn.Module], inputs: dict[str, Any]) -> Recorded:
    """Run the model eagerly and keep what enters and leaves every layer."""
    kept = Recorded([], [], [])

    def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        kept.hidden.append(args[0] if args else kwargs["hidden_states"])
        kept.arguments.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

    def after(module: torch.nn.Module, args: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        kept.outputs.append(output.clone())  # a model may add to it in place before the next layer

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(after) for layer in layers]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def _cut(name: str, held: Any, rows: torch.Tensor, length: int, sample: int, batch: int) -> Any:
    """One sample's rows of a layer argument."""
    if isinstance(held, (tuple, list)):
        return type(held)(_cut(name, item, rows, length, sample, batch) for item in held)
    if not isinstance(held, torch.Tensor):
        return held
    axes = _TOKEN_AXES.get(name) or [axis for axis, size in enumerate(held.shape) if size == length]
    for axis in axes:
        if held.shape[axis] == length:
            held = held.index_select(axis, rows)
    if batch > 1:
        axis = _SAMPLE_AXIS.get(name)
        if axis is None:
            axis = next((i for i, size in enumerate(held.shape[:-1]) if size == batch and i not in axes), None)
        if axis is not None and held.shape[axis] == batch:
            held = held.narrow(axis, sample, 1)
    return held


def _mask(given: torch.Tensor | None, allowed: torch.Tensor, sample: int) -> torch.Tensor:
    """The model's mask (causal where it gave none) with what the paths forbid taken out: [1, 1, seq, seq]."""
    if given is None:
        return (allowed & torch.ones_like(allowed).tril())[None, None]
    own = given[min(sample, given.shape[0] - 1)][None]
    if own.dtype == torch.bool:
        return own & allowed
    return own.masked_fill(~allowed, torch.finfo(own.dtype).min)


def prefill(
    model: torch.nn.Module,
    layers: Sequence[torch.nn.Module],
    finish: Callable[[torch.Tensor], torch.Tensor],
    inputs: dict[str, Any],
    visual: torch.Tensor,
    *,
    depth: int,
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    fusion: str | float = "attention",
    paths: str = "parallel",
) -> list[Prefill]:
    """The reference's pruned prefill, per sample.

    Args:
        layers: the decoder layers.
        finish: final norm and head, [1, rows, hidden] to [1, rows, vocabulary].
        visual: [batch, seq] bool.
        depth: the migration depth K.
    """
    kept = record(model, layers, inputs)
    batch, length = visual.shape
    results = []
    for sample in range(batch):
        hidden = kept.hidden[0][sample:sample + 1]
        positions = visual[sample].nonzero()[:, 0].tolist()
        count = subject_count(len(positions), keep_ratio, keep_tokens)
        scores = score(hidden, visual[sample:sample + 1])[0].double().tolist()
        chosen = set(subjects_of(scores, positions, count))
        is_subject = torch.tensor([p in chosen for p in range(length)])
        is_visual = visual[sample]
        rows_a = (~is_visual | is_subject).nonzero()[:, 0]
        rows_b = (~is_subject).nonzero()[:, 0]
        everything = torch.arange(length)
        cache = DynamicCache()

        def run(index: int, hidden: torch.Tensor, rows: torch.Tensor, allowed: torch.Tensor, cache: DynamicCache):
            arguments = {
                name: _cut(name, held, rows, length, sample, batch) for name, held in kept.arguments[index].items()
                if name not in ("attention_mask", CACHE)
            }
            mask = _mask(kept.arguments[index].get("attention_mask"), allowed, sample)
            arguments["attention_mask"] = mask.index_select(2, rows).index_select(3, rows)
            output = layers[index](hidden, past_key_values=cache, **arguments)
            output = output[0] if isinstance(output, tuple) else output
            if index + 1 < len(layers):  # what the model adds between layers
                extra = kept.hidden[index + 1][sample:sample + 1] - kept.outputs[index][sample:sample + 1]
                output = output + extra[:, rows]
            return output

        free = torch.ones(length, length, dtype=torch.bool)
        with torch.no_grad():
            if fusion == "attention":
                allowed = free.clone()
                if paths == "parallel":
                    other = is_visual & ~is_subject
                    allowed[is_subject[:, None] & other[None, :]] = False
                    allowed[other[:, None] & is_subject[None, :]] = False
                for index in range(depth):
                    hidden = run(index, hidden, everything, allowed, cache)
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, rows_a], layer.values[:, :, rows_a]
                hidden = hidden[:, rows_a]
            else:
                a, b, scratch = hidden[:, rows_a], hidden[:, rows_b], DynamicCache()
                for index in range(depth):
                    a = run(index, a, rows_a, free, cache)
                    b = run(index, b, rows_b, free, scratch)
                text_a, text_b = ~is_visual[rows_a], ~is_visual[rows_b]
                hidden = a.clone()
                if depth:
                    hidden[:, text_a] = fusion * a[:, text_a] + (1 - fusion) * b[:, text_b]
            for index in range(depth, len(layers)):
                hidden = run(index, hidden, rows_a, free, cache)
            logits = finish(hidden)[0]
        results.append(Prefill(rows_a, logits, [c.keys for c in cache.layers], [c.values for c in cache.layers]))
    return results


def generate(
    model: torch.nn.Module, done: Prefill, attention_mask: torch.Tensor, steps: int
) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of the untouched model on one sample's short cache, and the logits of every step.

    Args:
        attention_mask: [seq] of this sample. Generated tokens take the positions that follow the full prompt.
    """
    cache = DynamicCache()
    for index, (keys, values) in enumerate(zip(done.keys, done.values)):
        cache.update(keys, values, index)
    position = int(attention_mask.sum())
    mask = attention_mask[done.rows][None]
    logits, tokens, all_logits = done.logits[-1], [], [done.logits[-1]]
    with torch.no_grad():
        for step in range(steps):
            tokens.append(int(logits.argmax()))
            if step == steps - 1:
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = model(input_ids=torch.tensor([[tokens[-1]]]), past_key_values=cache, attention_mask=mask,
                        position_ids=torch.tensor([[position + step]]), use_cache=True)
            logits = out.logits[0, -1]
            all_logits.append(logits)
    return tokens, torch.stack(all_logits)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute entry, in float64; NaN and wrong shapes are infinite."""
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.double(), expected.double()
    if not bool(torch.isfinite(actual).all()) or not bool(torch.isfinite(expected).all()):
        return math.inf
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


@contextlib.contextmanager
def pruned(model: torch.nn.Module, run: Callable[[dict[str, Any]], list[Prefill]], token: int):
    """While active, the eager model prefills multimodal prompts as the reference does, so that anything may call it.

    Args:
        run: the reference's prefill of given inputs.
        token: the id of visual tokens.
    """
    forward = model.forward

    @functools.wraps(forward)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        ids, cache = kwargs.get("input_ids"), kwargs.get(CACHE)
        started = cache is not None and cache.get_seq_length() > 0
        if ids is None or started or not bool((ids == token).any()):
            return forward(*args, **kwargs)
        model.forward = forward
        inputs = {name: held for name, held in kwargs.items() if name not in (CACHE, "logits_to_keep")}
        try:
            done = run(inputs)
        finally:
            model.forward = replaced
        cache = DynamicCache() if cache is None else cache
        for index in range(len(done[0].keys)):
            cache.update(torch.cat([d.keys[index] for d in done]), torch.cat([d.values[index] for d in done]), index)
        return CausalLMOutputWithPast(logits=torch.stack([d.logits for d in done]), past_key_values=cache)

    model.forward = replaced
    try:
        yield model
    finally:
        del model.forward
