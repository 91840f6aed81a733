"""What the analysis found: frozen records that the passes read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from parvts_fx.analysis.calls import is_fused_attention, is_softmax
from parvts_fx.analysis.values import concrete, value
from parvts_fx.errors import Refusal

if TYPE_CHECKING:
    from parvts_fx.analysis.modality import Origin
    from parvts_fx.analysis.period import Period
    from parvts_fx.analysis.tokens import TokenMap


@dataclasses.dataclass(frozen=True)
class Merge:
    """One place where features of some modality enter the prompt's embeddings."""

    output: Node
    """Embeddings [batch, seq, hidden] with these features in them."""

    mask: Node
    """Bool, [batch, seq, 1 or hidden] or [batch, seq]: true where such a feature stands."""

    features: Node | None
    """[tokens, hidden] or any shape of as many elements, or where not ``sized`` a row for every position; None if an earlier
    graph has merged them."""

    sized: bool
    """Whether the features' size tells the number of tokens."""

    origin: Origin
    """What the features are computed from, and which inputs tell."""

    prunable: bool = True


@dataclasses.dataclass(frozen=True)
class VisualMerge:
    """Where visual features enter the text embeddings: the anchor of the analysis."""

    output: Node
    """Merged embeddings [batch, seq, hidden]: the decoder's input, whatever was merged last."""

    masks: tuple[Node, ...]
    """One bool mask per visual merge, [batch, seq, 1 or hidden] or [batch, seq]: true where a visual token stands."""

    features: tuple[Node, ...]
    """The visual features that were merged, [visual tokens, hidden] or any shape of as many elements; empty if not in the
    graph, or if no size tells their number."""

    count: int | None = None
    """Visual tokens per sample where the features' sizes do not tell; the graph is then rewritten for that number."""

    merges: tuple[Merge, ...] = ()
    """All merges of the prompt in this graph in their order, visual or not."""

    @property
    def visual_tokens(self) -> int | torch.SymInt | None:
        """Visual tokens per sample; None or unbacked where they depend on data."""
        if self.count is not None or not self.features:
            return self.count
        return concrete(self.visual_features // value(self.output).shape[0])

    @property
    def visual_features(self) -> int | torch.SymInt:
        """Visual tokens of all samples, as the features' sizes tell."""
        hidden = value(self.output).shape[2]
        return concrete(sum(value(node).numel() // hidden for node in self.features))


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor that enters an attention call, with the axis along which its tokens lie."""

    node: Node
    axis: int


@dataclasses.dataclass(frozen=True)
class Attention:
    """One softmax attention call: a fused operation or the operations it was written out as."""

    nodes: tuple[Node, ...]
    """The call's own nodes in graph order; one for a fused call."""

    queries: tuple[Operand, ...]
    keys: tuple[Operand, ...]
    """Everything whose rows are indexed by key position: keys and values."""

    output: Node
    output_axis: int
    kind: str
    """One of "fused causal", "fused masked", "fused" or "written out"."""

    bindings: Mapping[Node, Mapping[int, object]]
    """For each own node, which of its argument leaves follow the query or key axis."""

    joins: frozenset[Node] = frozenset()
    """Own nodes that put cached rows in front of the prompt's keys and values; empty where the cache was empty."""

    others_behind: bool = False
    """Whether scores that belong to no key of the prompt stand behind those that do (sinks), and not in front (cached keys)."""

    @property
    def on_filled_cache(self) -> bool:
        return bool(self.joins)

    @property
    def is_causal(self) -> bool:
        return self.kind == "fused causal"

    @property
    def heart(self) -> Node:
        """The fused call, or else the softmax over the keys: what is in front of a fused call may have one of its own."""
        return next(filter(is_fused_attention, self.nodes), None) or next(filter(is_softmax, self.nodes))


@dataclasses.dataclass(frozen=True)
class Mixer:
    """One place where tokens meet."""

    reads: tuple[Node, ...]
    """What the rows that ask are computed from: an attention's queries, another mixer's inputs."""

    output: Node
    attention: Attention | None
    """None for a mixer that is no softmax attention: a convolution, a scan."""

    node: Node | None = None
    """The operation at which tokens meet, for a mixer that is no softmax attention."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A decoder layer: the token mixers between two links of the residual stream."""

    index: int
    input: Node
    """The link of the residual stream (a dominator of all that follows) that enters the layer."""

    mixers: tuple[Mixer, ...]

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return tuple(mixer.attention for mixer in self.mixers if mixer.attention is not None)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A multimodal decoder's prefill, as found in one graph."""

    merge: VisualMerge
    nodes: tuple[Node, ...]
    """Every node that depends on the merge, in graph order."""

    layers: tuple[Layer, ...]
    final: Node
    """The first link of the residual stream after the last attention: no token sees another one behind it."""

    output: Node | None
    """The link that leaves the last layer and enters the final norm; None where the layers' pattern does not tell."""

    tokens: TokenMap
    """Which axes of which tensors run along the prompt, and which integers count its positions."""

    window_caches_follow: bool = False
    """Whether sliding-window caches may be shortened: their own count of tokens is corrected after the prefill."""

    period: Period | None = None
    """What a layer was taken to be."""

    samples: TokenMap | None = None
    """Which axes of which tensors run along the batch; None for a batch of one."""

    sample_layouts: Mapping[Node, Mapping[int, int]] = dataclasses.field(default_factory=dict)
    """For axes with several entries a sample: how many of one sample follow one another."""

    entry: Node | None = None
    """What the first layer takes in: the merged embeddings, or what the model makes of them first (scaled, with positions
    added)."""

    unordered: frozenset[Node] = frozenset()
    """Whose rows are not their tokens' own, though those of what follows are: experts' sorts. None can be taken by itself."""

    grid: Node | None = None
    """[3 or 4, batch, seq] integers, of which the last two may be rows and columns of pictures: multimodal rotary positions."""

    numbered: frozenset[Node] = frozenset()
    """Tensors from outside the decoder that number the rows which are there, not the prompt's positions: the first rows of them
    are those of any rows."""

    kept: frozenset[Node] = frozenset()
    """States of the residual stream that are kept beside later ones, among which layers choose."""

    @property
    def visual_tokens(self) -> int | torch.SymInt:
        """Visual tokens per sample, once their number is known (:attr:`VisualMerge.count`).

        Raises:
            Refusal: it is not.
        """
        count = self.merge.visual_tokens
        if count is None:
            raise Refusal("the number of visual tokens depends on data", self.merge.output)
        return count
