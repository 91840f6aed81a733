"""Scoring rules: which visual tokens form the subject group.

A rule is a function ``score(hidden, visual) -> scores``: hidden [batch, seq, hidden] is the decoder's input after the
merge, visual [batch, seq] bool tells where visual tokens stand, scores [batch, seq] ranks them (higher is kept first;
entries at text positions are ignored). It is traced into the graph. A rule must not let a sample's scores depend on
other samples, nor on padding: text rows may be padding, so the built-in rules look at visual rows alone, or at the text
behind the first visual token (a prompt with padding there runs unrewritten).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from parvts_fx.analysis.records import VisualMerge
from parvts_fx.analysis.values import ancestors, concrete, hint, is_tensor, value
from parvts_fx.analysis.tower import trace_attended

if TYPE_CHECKING:
    from torch.fx import Node

    from parvts_fx.capture.editing import Editor

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ATTENDED = "attended"
"""The one rule that is no function of the decoder's input: the attention received inside the vision tower."""

_RULES: dict[str, Rule] = {}
_READ_TEXT: set[str] = set()
"""Rules whose scores depend on the text behind the first visual token."""


def register_rule(name: str, reads_text: bool = False) -> Callable[[Rule], Rule]:
    """Decorator that makes a rule available as ``score="name"``.

    Args:
        reads_text: the scores depend on the text behind the first visual token, and on no other text.

    Raises:
        ValueError: the name is taken.
    """

    def register(rule: Rule) -> Rule:
        if name in known_rules():
            raise ValueError(f"parvts_fx: a scoring rule named {name!r} exists already; choose another name")
        _RULES[name] = rule
        if reads_text:
            _READ_TEXT.add(name)
        return rule

    return register


def reads_text(rule: str | Rule) -> bool:
    """Whether a rule's scores depend on text; a callable's are taken not to."""
    return rule in _READ_TEXT


def rule_named(name: str | Rule) -> Rule:
    """A registered function of the decoder's input; a callable is returned as it is."""
    return _RULES[name] if isinstance(name, str) else name


def known_rules() -> tuple[str, ...]:
    """The names that ``score`` takes."""
    return (*_RULES, ATTENDED)


@register_rule("norm")
def norm(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """The length of each token's embedding."""
    return hidden.float().norm(dim=-1)


@register_rule("distinct")
def distinct(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """How far a token is from the sample's average visual token."""
    return _centred(hidden, visual).norm(dim=-1)


@register_rule("typical")
def typical(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """The similarity that a token receives from the sample's visual tokens, on average."""
    direction = F.normalize(hidden.float(), dim=-1) * visual[..., None]
    return (direction * direction.sum(1, keepdim=True)).sum(-1)


@register_rule("diverse")
def diverse(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Distinctness times the distance to the nearest token that is more distinct.

    Ranks as a greedy choice of relevant and mutually different tokens would, without a loop over the kept tokens.
    """
    centred = _centred(hidden, visual)
    return _spread_out(centred.norm(dim=-1), centred, visual)


@register_rule("balanced")
def balanced(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """As "diverse", with the root of the distinctness: more weight on being different from what is better."""
    centred = _centred(hidden, visual)
    return _spread_out(centred.norm(dim=-1).sqrt(), centred, visual)


@register_rule("peaks")
def peaks(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Density times the distance to the nearest token in a denser place: the centres of clusters, large ones first.

    After density-peak clustering (Rodriguez and Laio, Science 344, 2014), with the similarity to all visual tokens as
    density.
    """
    direction = F.normalize(_centred(hidden, visual), dim=-1)
    density = (torch.exp(4 * (direction @ direction.transpose(1, 2) - 1)) * visual[:, None, :]).sum(-1)
    return _spread_out(density, direction, visual)


@register_rule("question", reads_text=True)
def question(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """The greatest similarity to a word behind the first visual token."""
    direction = F.normalize(_centred(hidden, visual), dim=-1)
    words = F.normalize(hidden.float(), dim=-1)
    asked = ~visual & (visual.long().cumsum(1) > 0)
    return (direction @ words.transpose(1, 2)).masked_fill(~asked[:, None, :], -1.0).amax(dim=-1)


@register_rule("question_diverse", reads_text=True)
def question_diverse(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Similarity to the question times the distance to the nearest token that is more similar to it."""
    return _spread_out(1 + question(hidden, visual), _centred(hidden, visual), visual)


@register_rule("uniform")
def uniform(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Evenly spread: a fixed pseudo-random order that fills gaps first (the golden-ratio sequence)."""
    rank = visual.long().cumsum(1)
    return -torch.frac(rank * 0.6180339887498949)


@register_rule("random")
def random(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """A fixed pseudo-random order, the same for every sample: a baseline."""
    rank = visual.long().cumsum(1)
    return torch.frac(torch.sin(rank * 12.9898) * 43758.5453)


AUTO = "balanced"
"""The rule behind "auto", chosen by bench/accuracy (docs/accuracy.md)."""

register_rule("auto")(balanced)


def _spread_out(relevance: torch.Tensor, vectors: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Relevance [batch, seq] times the cosine distance (0 to 2) to the nearest visual token that is more relevant."""
    direction = F.normalize(vectors, dim=-1)
    distance = 1 - direction @ direction.transpose(1, 2)
    position = torch.arange(visual.shape[1], device=visual.device)
    ahead = (relevance[:, None, :] > relevance[:, :, None]) | (
        (relevance[:, None, :] == relevance[:, :, None]) & (position < position[:, None])
    )
    return relevance * distance.masked_fill(~(ahead & visual[:, None, :]), 2.0).amin(dim=-1)


def _centred(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    tokens = hidden.float()
    weight = visual[..., None].float()
    mean = (tokens * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return (tokens - mean) * weight


def _refuse_data_dependent_sizes(nodes: set[Node]) -> None:
    for node in nodes:
        shape = value(node).shape if is_tensor(node) else [value(node)]
        if any(isinstance(size, torch.SymInt) and hint(size) is None for size in shape):
            raise TypeError(f"the size of {node.name} depends on data")


def trace_rule(editor: Editor, rule: str | Rule, merge: VisualMerge, visual: Node) -> Node:
    """Write a rule into the graph.

    Args:
        visual: [batch, seq] bool.

    Raises:
        ValueError: the rule cannot be traced, or does not return a [batch, seq] tensor of real numbers.
    """
    if rule == ATTENDED:
        return trace_attended(editor, merge, visual)
    hidden = merge.output
    name = rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)
    function = rule_named(rule)
    returned: list[object] = []

    def traced(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        returned.append(function(hidden, visual))
        return returned[-1]

    try:
        node = editor.inline(traced, hidden, visual)
        _refuse_data_dependent_sizes(ancestors([node]) - ancestors([hidden, visual]))
    except Exception as error:
        if returned and not isinstance(returned[-1], torch.Tensor):
            node = None  # not even a tensor: said below
        else:
            raise ValueError(
                f"parvts_fx: option score={name!r}: the rule cannot be traced into the graph ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''}). Use tensor operations only: no .item(), no branch "
                "on a tensor's values, no data-dependent sizes, no tensors created outside the rule.") from error
    result = returned[-1]
    expected = tuple(value(visual).shape)
    if not isinstance(result, torch.Tensor) or result.is_complex() or [concrete(s) for s in result.shape] != [
            concrete(s) for s in expected]:
        got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
        raise ValueError(f"parvts_fx: option score={name!r}: the rule must return a real tensor [batch, seq] = "
                         f"{expected}, one score per position, and returned {got}.")
    return node
