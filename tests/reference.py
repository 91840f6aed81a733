"""The eager reference of any schedule: what a rewritten prefill must equal. No graph: eagerly, one sample at a time.

Works on any model whose decoder layers stand in a list and are called with keyword arguments whose token axes are the
prompt's length. One eager run records what every layer is called with; then the layers are run one by one on the rows
that live, with block masks in place of separate attention calls. :mod:`tests.plain_reference` places stages and chooses
tokens by the same functions, and shares nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from parvts_fx.places import places_of
from parvts_fx.scores import layers_ahead, reads_places, rule_named
from parvts_fx.stages import Stage
from tests.clusters_reference import Clusters, clusters_of, pictures_of

# Where tokens and samples lie in arguments that every transformers decoder names alike; others are cut by size.
_TOKEN_AXES = {"attention_mask": (-2, -1), "position_ids": (-1,), "position_embeddings": (-2,)}
_SAMPLE_AXIS = {"attention_mask": -4, "position_ids": -2, "position_embeddings": -3}

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls a cache: it has another name from 5.24 on, and takes both."""


Rule = Callable[..., Tensor]

READINGS: dict[str, tuple[str, Rule]] = {
    reads: (reads, lambda hidden, visual, attention: attention.mean(1).sum(1)) for reads in ("last_row", "text_rows")
}
"""Rules ``rule(hidden, visual, attention)``, and whose weights they read: the last text row's, or all text rows',
[1, heads, asked rows, rows that live]. Rows in front of the first visual token may be padding, and have zeros."""


@dataclasses.dataclass
class Prefill:
    """One sample's pruned prefill."""

    rows: Tensor
    """[rows that live at the end] positions in the padded prompt."""

    logits: Tensor
    """[rows, vocabulary]"""

    keys: list[Tensor]
    """Per layer [1, heads, rows, head dim]."""

    values: list[Tensor]

    gap: float = math.inf
    """How clear the least clear choice of tokens is: where that is about rounding, nothing can be compared."""


@dataclasses.dataclass(frozen=True)
class Placed:
    """A stage in a decoder of so many layers: both groups run in layers ``begin`` to ``end - 1``."""

    stage: Stage
    begin: int
    end: int

    @property
    def has_copies(self) -> bool:
        """Whether each path has text rows of its own."""
        return self.stage.fusion != "attention" and self.end > self.begin


def placed(stages: Sequence[Stage], layers: int) -> list[Placed]:
    """Raises ValueError where a stage has no place."""
    found: list[Placed] = []
    for stage in stages:
        begin, both = (math.floor(n * layers + 0.5) if isinstance(n, float) else n for n in (stage.at, stage.migrate))
        lowest = max(found[-1].end if found else 0, stage.rule in READINGS)  # what reads weights needs a layer in front
        if not lowest <= begin < layers or begin + both > layers:
            raise ValueError(f"{stage} has no place in {layers} layers")
        found.append(Placed(stage, begin, begin + both))
    return found


def one_stage(
    score: Rule, depth: int | float, keep_ratio: float | None = None, keep_tokens: int | None = None,
    fusion: str | float = "attention", paths: str = "parallel", merge: str | None = "auto",
) -> tuple[Stage]:
    """The short form. With depth 0 there is no second group, whatever is said of it."""
    if merge == "auto":
        merge = "clusters" if fusion == "attention" else None
    keep = keep_tokens if keep_tokens is not None else 1 / 9 if keep_ratio is None else float(keep_ratio)
    return (Stage(keep=keep, rule=score, merge=merge, **(dict(migrate=depth, fusion=fusion, paths=paths) if depth else {})),)


def subject_count(visual: int, keep_ratio: float | None = None, keep_tokens: int | None = None) -> int:
    if keep_tokens is not None:
        return min(visual, keep_tokens)
    return max(1, math.floor((1 / 9 if keep_ratio is None else keep_ratio) * visual + 0.5))


def kept(keep: int | float, live: int, original: int) -> int:
    """How many of the live visual tokens a stage keeps, of as many as there were at first."""
    return min(live, subject_count(original, **{"keep_tokens" if isinstance(keep, int) else "keep_ratio": keep}))


def subjects_of(scores: Sequence[float], visual: Sequence[int], count: int) -> list[int]:
    """The highest-scoring visual positions; ties to the earlier one, NaN last."""
    ranked = sorted(visual, key=lambda p: (-math.inf if math.isnan(scores[p]) else scores[p]) * -1)
    return sorted(ranked[:count])


def gap(scores: Sequence[float], visual: Sequence[int], subject: Sequence[int]) -> float:
    """How far the choice is from another one, as a share of the largest score; infinite where exact ties decide."""
    known = [-math.inf if math.isnan(scores[p]) else scores[p] for p in visual]
    worst = min((score for p, score in zip(visual, known) if p in subject), default=math.inf)
    best = max((score for p, score in zip(visual, known) if p not in subject), default=-math.inf)
    largest = max((abs(score) for score in known if math.isfinite(score)), default=0.0)
    return (worst - best) / largest if math.isfinite(worst - best) and worst != best else math.inf


def chosen(
    stage: Stage, hidden: Tensor, rows: Tensor, prompt: Tensor, weights: Tensor | None = None, grid: Tensor | None = None,
    ahead: Sequence[Tensor] = (),
) -> tuple[Tensor, float]:
    """The subject group [rows] bool among the rows that live, and how clear the choice is.

    Args:
        hidden: [rows, hidden] at the input of the layer.
        rows: [rows] positions in the prompt.
        prompt: [seq] bool, where visual tokens stand in the whole prompt.
        weights: [heads, rows, rows] in the layer in front.
        grid: [3 or 4, 1, seq], positions that tell where in its picture a token stands, where the model has such.
        ahead: [heads, rows, rows] each, what the layers behind would look at from these states, for a rule that asks.
    """
    visual = prompt[rows]
    given = [hidden[None], visual[None]]
    if ahead:
        text = (~visual).nonzero()[:, 0]
        behind = (visual.cumsum(0) > 0)[text][:, None]
        given.append(torch.cat([torch.where(behind, held[:, text], 0.0) for held in ahead])[None])
    if stage.rule in READINGS:
        reads, rule = READINGS[stage.rule]
        text = (~visual).nonzero()[:, 0]
        asked = weights[:, text[-1:] if reads == "last_row" else text]
        if reads == "text_rows":
            asked = asked.masked_fill((visual.cumsum(0) == 0)[text][:, None], 0)
        given.append(asked[None])
    else:
        rule = rule_named(stage.rule) if isinstance(stage.rule, str) else stage.rule
        if reads_places(rule):
            given.append(places_of(prompt[None], grid)[:, rows])
    ranked = rule(*given)[0].double().tolist()
    positions = visual.nonzero()[:, 0].tolist()
    found = subjects_of(ranked, positions, kept(stage.keep, len(positions), int(prompt.sum())))
    subject = torch.zeros_like(visual)
    subject[found] = True
    return subject, gap(ranked, positions, found)


@dataclasses.dataclass
class Recorded:
    hidden: list[Tensor]
    outputs: list[Tensor]
    arguments: list[dict[str, Any]]


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


@contextlib.contextmanager
def watched() -> Iterator[list[Tensor]]:
    """The attention weights [batch, heads, rows, keys] of every call inside, in float32."""
    seen: list[Tensor] = []
    fused, softmax = F.scaled_dot_product_attention, F.softmax

    def noting_fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *further: Any,
                     scale: float | None = None, **named: Any) -> Tensor:
        assert attn_mask is not None, "the reference gives every layer its mask"
        each = key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = query.float() @ each.mT * (query.shape[-1]**-0.5 if scale is None else scale)
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if hidden else scores + attn_mask.float()
        seen.append(torch.softmax(scores, -1))
        return fused(query, key, value, attn_mask, *further, scale=scale, **named)

    def noting_written(scores: Tensor, *further: Any, **named: Any) -> Tensor:
        if scores.dim() == 4:
            seen.append(torch.softmax(scores.float(), -1))
        return softmax(scores, *further, **named)

    F.scaled_dot_product_attention, F.softmax = noting_fused, noting_written
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention, F.softmax = fused, softmax


def _cut(name: str, held: Any, rows: Tensor, length: int, sample: int, batch: int) -> Any:
    """One sample's rows of a layer argument."""
    if isinstance(held, (tuple, list)):
        return type(held)(_cut(name, item, rows, length, sample, batch) for item in held)
    if not isinstance(held, Tensor):
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


def _mask(given: Tensor | None, allowed: Tensor, sample: int) -> Tensor:
    """The model's mask (causal where it gave none) with what the paths forbid taken out: [1, 1, seq, seq]."""
    if given is None:
        return (allowed & torch.ones_like(allowed).tril())[None, None]
    own = given[min(sample, given.shape[0] - 1)][None]
    if own.dtype == torch.bool:
        return own & allowed
    return own.masked_fill(~allowed, torch.finfo(own.dtype).min)


def _counting(mask: Tensor, path: _Path, visual: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask with log n for the keys that stand for several, where rows of text ask."""
    if not bool((path.sizes > 1).any()):
        return mask
    held = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask.clone()
    text = (~visual[path.rows]).nonzero()[:, 0]
    held[:, :, text] += path.sizes.log().to(held.dtype)
    return held


@dataclasses.dataclass
class _Path:
    """Some of a sample's rows on their way through the layers."""

    rows: Tensor
    hidden: Tensor
    """[1, rows, hidden]"""
    cache: DynamicCache
    sizes: Tensor
    """[rows]: how many tokens each stands for."""
    weights: Tensor | None = None
    """[heads, rows, rows] in the layer behind which they stand, where that was watched."""

    def only(self, at: Tensor) -> _Path:
        """The rows where ``at`` [rows] bool is true."""
        at, cache = at.nonzero()[:, 0], DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[:, :, at], layer.values[:, :, at], index)
        weights = None if self.weights is None else self.weights[:, at][:, :, at]
        return _Path(self.rows[at], self.hidden[:, at], cache, self.sizes[at], weights)

    def merged(self, found: Clusters, hidden: Tensor | None, visual: Tensor) -> _Path:
        """With what kept rows take over: of the states with which all entered their last layer, and of cached values.
        Behind the model's last layer there are no such states."""
        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            cache.update(layer.keys, found.shifted(layer.values, visual), index)
        step = 0 if hidden is None else found.taken_over(hidden) - hidden
        return dataclasses.replace(self, hidden=self.hidden + step, cache=cache, sizes=found.sizes)


class _Sample:
    """One sample's way through the recorded layers."""

    def __init__(self, recorded: Recorded, layers: Sequence[torch.nn.Module], visual: Tensor, sample: int,
                 grid: Tensor | None = None):
        self.grid = None if grid is None else grid[:, sample:sample + 1]
        self.recorded, self.layers, self.sample, self.batch = recorded, layers, sample, len(visual)
        self.visual, self.length = visual[sample], visual.shape[1]
        self.clear = math.inf

    def run(self, path: _Path, begin: int, end: int, apart: Tensor | None = None, watch: bool = False) -> _Path:
        """The path behind layer ``end - 1``; ``apart`` [seq, seq] is what the groups do not see of each other."""
        allowed = torch.ones(self.length, self.length, dtype=torch.bool, device=self.visual.device)
        for index in range(begin, end):
            given, sample = self.recorded.arguments[index], self.sample
            arguments = {
                name: _cut(name, held, path.rows, self.length, sample, self.batch) for name, held in given.items()
                if name not in ("attention_mask", CACHE)
            }
            mask = _mask(given.get("attention_mask"), allowed if apart is None else ~apart, sample)
            mask = mask.index_select(2, path.rows).index_select(3, path.rows)
            arguments["attention_mask"] = _counting(mask, path, self.visual, path.hidden.dtype)
            with watched() if watch and index == end - 1 else contextlib.nullcontext([]) as seen:
                output = self.layers[index](path.hidden, past_key_values=path.cache, **arguments)
            output = output[0] if isinstance(output, tuple) else output
            if index + 1 < len(self.layers):  # what the model adds between layers
                before, behind = self.recorded.outputs[index], self.recorded.hidden[index + 1]
                output = output + (behind - before)[sample:sample + 1, path.rows]
            path = dataclasses.replace(path, hidden=output, weights=seen[-1][0] if seen else None)
        return path

    def migrated(self, path: _Path, turn: Placed, subject: Tensor, watch: bool) -> _Path:
        """The path behind a stage, the non-subject rows gone; ``subject`` is [rows] bool."""
        text, stays = ~self.visual[path.rows], ~self.visual[path.rows] | subject
        if turn.has_copies and not stays.all():  # with all tokens kept, the unmodified model's result
            a, b = (self.run(path.only(at), turn.begin, turn.end, watch=watch) for at in (stays, ~subject))
            hidden, share = a.hidden.clone(), turn.stage.fusion
            hidden[:, text[stays]] = share * a.hidden[:, text[stays]] + (1 - share) * b.hidden[:, text[~subject]]
            return dataclasses.replace(a, hidden=hidden)
        apart = torch.zeros(self.length, self.length, dtype=torch.bool, device=self.visual.device)
        if turn.stage.paths == "parallel":
            one, other = path.rows[subject], path.rows[~stays]
            apart[one[:, None], other] = apart[other[:, None], one] = True
        last = max(turn.begin, turn.end - 1)
        found = None if turn.stage.merge is None or stays.all() else clusters_of(
            path.hidden[0], self.visual[path.rows], subject, pictures_of(self.visual)[path.rows], path.sizes)
        path = self.run(path, turn.begin, last, apart)
        entering = path.hidden
        path = self.run(path, last, turn.end, apart, watch)
        if found is not None:
            path = path.merged(found, entering if turn.end < len(self.layers) else None, self.visual[path.rows])
        self.clear = min(self.clear, math.inf if found is None else found.gap)
        return path.only(stays)

    def ahead(self, path: _Path, turn: Placed) -> list[Tensor]:
        """[heads, rows, rows] of each layer that the rule looks ahead to, were these states its input."""
        end = min(len(self.layers), turn.begin + layers_ahead(turn.stage.rule))
        each = [self.run(dataclasses.replace(path, cache=copy.deepcopy(path.cache)), layer, layer + 1, watch=True).weights
                for layer in range(turn.begin, end)]
        return [held for held in each if held is not None]

    def prefill(self, stages: Sequence[Placed], finish: Callable[[Tensor], Tensor]) -> Prefill:
        whole = self.recorded.hidden[0][self.sample:self.sample + 1]
        path = _Path(torch.arange(self.length, device=self.visual.device), whole, DynamicCache(),
                     torch.ones(self.length))
        done, clear, ends = 0, math.inf, [turn.begin for turn in stages if turn.stage.rule in READINGS]
        for turn in stages:
            path = self.run(path, done, turn.begin, watch=turn.begin in ends)
            subject, found = chosen(
                turn.stage, path.hidden[0], path.rows, self.visual, path.weights, self.grid, self.ahead(path, turn))
            path = self.migrated(path, turn, subject, watch=turn.end in ends)
            done, clear = turn.end, min(clear, found)
        path = self.run(path, done, len(self.layers))
        keys, values = ([getattr(layer, name) for layer in path.cache.layers] for name in ("keys", "values"))
        return Prefill(path.rows, finish(path.hidden)[0], keys, values, min(clear, self.clear))


def prefill(
    model: torch.nn.Module,
    layers: Sequence[torch.nn.Module],
    finish: Callable[[Tensor], Tensor],
    inputs: dict[str, Any],
    visual: Tensor,
    *,
    stages: Sequence[Stage] = (),
    depth: int | float = 0,
    score: Rule | None = None,
    grid: Tensor | None = None,
    **short: Any,
) -> list[Prefill]:
    """The reference's pruned prefill, per sample.

    Args:
        layers: the decoder layers.
        finish: final norm and head, [1, rows, hidden] to [1, rows, vocabulary].
        visual: [batch, seq] bool.
        grid: [3 or 4, batch, seq], positions of visual tokens on a grid, where the model has them.
        depth, score, short: where there are no stages, as :func:`one_stage` takes them.
    """
    assert not (stages and (score or short)), "one form or the other"
    recorded, turns = record(model, layers, inputs), placed(stages or one_stage(score, depth, **short), len(layers))
    with torch.no_grad(), visual.device:
        return [_Sample(recorded, layers, visual, sample, grid).prefill(turns, finish) for sample in range(len(visual))]


def generate(
    model: torch.nn.Module, done: Prefill, attention_mask: Tensor, steps: int
) -> tuple[list[int], Tensor]:
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
    with torch.no_grad(), mask.device:
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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute entry, in float64; NaN and wrong shapes are infinite."""
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.double(), expected.double()
    if not bool(torch.isfinite(actual).all()) or not bool(torch.isfinite(expected).all()):
        return math.inf
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
