"""What the small models of :mod:`tests.plain` can look like, in words, and the prompts that go with them.

A specification says what a model and its prompts look like, so that a property-based test that fails shrinks to words.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

IMAGE_FIRST = 2
"""Where the image stands in prompts whose features are joined in."""
IMAGE_TOKEN, PAD, FEATURES, POSITIONS, EPSILON = 1, 0, 5, 64, 1e-6
VOCABULARY = 23
VIDEO_TOKEN, SOUND_TOKEN = VOCABULARY - 1, VOCABULARY - 2


def words(record: Any) -> str:
    """A frozen record as an expression that makes it, without what is as by default."""
    if isinstance(record, tuple) and record and dataclasses.is_dataclass(record[0]):
        return f"({', '.join(map(words, record))},)"
    if not dataclasses.is_dataclass(record):
        return repr(record)
    given = (
        (field.name, getattr(record, field.name)) for field in dataclasses.fields(record)
        if getattr(record, field.name) != field.default
    )
    return f"{type(record).__name__}({', '.join(f'{name}={words(value)}' for name, value in given)})"


@dataclasses.dataclass(frozen=True)
class Row:
    """Where one sample's tokens lie: padding, then text, then the image; after it (and between its halves) text."""

    padding: int = 0
    before: int = 2
    between: int = 0
    """Text tokens between the first and the second half of the visual tokens; 0 for one image."""


@dataclasses.dataclass(frozen=True)
class Mixing:
    """An operation in which tokens meet, outside attention: what :mod:`tests.token_mixers` makes of it."""

    kind: str = "mean"
    """What is taken from the other tokens; a key of ``token_mixers.CODES``."""
    code: int = 0
    """In which form it is written, counted round the forms that there are."""
    combine: str = "subtract"
    """What becomes of it: "add", "subtract", "gate", "divide" (what came in by it) or "replace"."""
    place: str = "active"
    """In a feed-forward: "in", "hidden", "active", "gate", "out", "stream" (behind the residual sum). In norms:
    "before first", "behind first", "before second", "behind second". Behind the last layer: "before", "behind"."""
    then: Mixing | None = None
    """A further one, of what this one gives."""


@dataclasses.dataclass(frozen=True)
class Specification:
    layers: int = 2
    heads: int = 2
    groups: int = 1
    """Key and value heads; divides ``heads``."""
    head_dim: int = 6
    norm: str = "rms"
    """"rms" or "layer"."""
    place: str = "pre"
    """Norms in front of attention and MLP ("pre"), or behind each sum ("post")."""
    attention: str = "causal"
    """"causal" (fused, no mask: padding is seen), "masked" (fused, bool mask), "written" (softmax, float mask), "relative"
    (written out, with a bias by distance added to the scores), "counted" (a bias that each row chooses by distances which the
    layer counts in the rows it is given), "given" (the same by distances that all layers are given), "sinks" (a score for
    each row that belongs to no key) or "blocks" (fused, each row sees itself and the blocks of three rows that an index chooses;
    one sample, no padding). "counted", "given" and "sinks" not as "flat" and not "folded"."""
    span: str = "causal"
    """With a mask: "causal", "window" (of 5 tokens), "images" (visual tokens see each other in both directions) or
    "all" (so do all tokens)."""
    reads_padding: bool = True
    """False: one mask for all samples, in which padding is seen."""
    scale: float | None = None
    """Of the scores; None for one over the root of ``head_dim``."""
    positions: str = "rotary"
    """"rotary" or "learned"."""
    numbering: str = "index"
    """Position ids: "index" (0 .. seq-1, one row for all samples) or "mask" (counted without the padding)."""
    fused_qkv: bool = False
    parallel: bool = False
    """Attention and MLP read the same normalised rows (GPT-J)."""
    flat: bool = False
    """One function of other operations (einsum, permute, unflatten) in place of modules."""
    merge: str = "scatter"
    """How features enter: "scatter", "assign", "put", "choose" (where), "choose the text" or "join" (cat; one row)."""
    caches: bool = True
    last_only: bool = False
    """Logits of the last row alone."""
    length: int = 11
    visual: int = 5
    """Visual tokens per sample."""
    rows: tuple[Row, ...] = (Row(),)
    pad_right: bool = False
    feed_mixing: Mixing | None = None
    norm_mixing: Mixing | None = None
    final_mixing: Mixing | None = None
    """At the final norm: of the rows that are left."""
    mixing_layers: str = "all"
    """Which layers mix: "all", "first", "last" or "odd"."""
    hybrid: str = ""
    """What stands in place of attention in hybrid layers: "convolution", "linear", "linear, masked", "linear, whole" or
    "scan" (opaque)."""
    hybrid_layers: str = "odd"
    """Which: as ``mixing_layers``, or "even"; where that is all of them, the last is not."""
    states: bool = False
    """Linear layers hand out their state."""
    pair: str = ""
    """A second attention call in each attention layer: "own" (with a residual sum of its own), "chain" (it reads what
    the first gives) or "sum" (both read the same rows)."""
    layout: str = ""
    """Of queries, keys and values: "" (batch, heads, rows, dim), "heads first" or "folded" (batch * heads)."""
    kept: bool = False
    """Attention reads what every row chooses among the stream and what has entered every second layer in front; with norms in
    front alone, and not "flat"."""
    stream: str = ""
    """"" (batch, rows, hidden) or "rows first"."""
    flat_feed: bool = False
    """The feed-forward reads (batch * rows, hidden)."""
    experts: str = ""
    """In place of one feed-forward, two of four experts a row: "sorted", "added" (sorted, then index_add) or "every"
    (bmm over all, weighted)."""
    cache_form: str = "pairs"
    """"pairs" (a list of tuples), "flat", "stacked" (a tensor a call) or "one" (a tensor for all)."""
    video: bool = False
    """The second half of the visual tokens is another modality that is seen: a merge of its own."""
    sound: int = 0
    """Tokens per sample of something that is heard, merged by themselves: text to the pruning."""
    sound_first: bool = False
    """In front of the text and merged first; else behind the image and merged last."""
    past: int = 0
    """Rows that the cache holds already, all text: the prompt comes behind them."""

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    @property
    def mlp(self) -> int:
        return self.hidden + 7

    @property
    def vocabulary(self) -> int:
        return VOCABULARY

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def cached_calls(self) -> int:
        """Attention calls whose keys and values are handed out."""
        per_layer = 2 if self.pair else 1
        return sum(0 if self.is_hybrid(layer) else per_layer for layer in range(self.layers)) if self.caches else 0

    def mixes(self, layer: int) -> bool:
        return _among(self.mixing_layers, layer, self.layers)

    def is_hybrid(self, layer: int) -> bool:
        among = [index for index in range(self.layers) if _among(self.hybrid_layers, index, self.layers)]
        among = among[:-1] if len(among) == self.layers else among
        return bool(self.hybrid) and layer in among


def _among(which: str, layer: int, layers: int) -> bool:
    return {
        "all": True, "first": layer == 0, "last": layer == layers - 1, "odd": layer % 2 == 1, "even": layer % 2 == 0,
    }[which]


@dataclasses.dataclass(frozen=True)
class Prompt:
    ids: Tensor
    features: Tensor
    mask: Tensor
    video: Tensor | None = None
    sound: Tensor | None = None
    cached: tuple[tuple[Tensor, Tensor], ...] = ()
    """Keys and values of each layer [batch, groups, past, head_dim]."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        further = (held for held in (self.video, self.sound) if held is not None)
        return self.ids, self.features, self.mask, *further, *([self.cached] if self.cached else [])

    @property
    def visual(self) -> Tensor:
        seen = self.ids == IMAGE_TOKEN
        return seen if self.video is None else seen | (self.ids == VIDEO_TOKEN)


def prompt(spec: Specification, seed: int = 1) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    special = 1 if spec.video and not spec.sound else 2 if spec.sound else 0
    ids = torch.randint(2, spec.vocabulary - special, (len(spec.rows), spec.length), generator=generator)
    mask = torch.ones_like(ids)
    half = spec.visual // 2
    for index, row in enumerate(spec.rows):
        padded = slice(spec.length - row.padding, None) if spec.pad_right else slice(0, row.padding)
        ids[index, padded], mask[index, padded] = PAD, 0
        start = 0 if spec.pad_right else row.padding
        if spec.sound and spec.sound_first:
            ids[index, start:start + spec.sound] = SOUND_TOKEN
            start += spec.sound
        start += row.before
        ids[index, start:start + half] = IMAGE_TOKEN
        second = start + half + row.between
        end = start + row.between + spec.visual
        ids[index, second:end] = VIDEO_TOKEN if spec.video else IMAGE_TOKEN
        if spec.sound and not spec.sound_first:
            ids[index, end:end + spec.sound] = SOUND_TOKEN

    def features(tokens: int) -> Tensor:
        return torch.randn(len(spec.rows) * tokens, FEATURES, generator=generator)

    seen = features(half if spec.video else spec.visual)
    video = features(spec.visual - half) if spec.video else None
    sound = features(spec.sound) if spec.sound else None
    shape = len(spec.rows), spec.groups, spec.past, spec.head_dim
    cached = tuple((torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
                   for _ in range(spec.layers if spec.past else 0))
    return Prompt(ids, seen, mask, video, sound, cached)
