"""Scoring rules: which visual tokens form the subject group.

A rule is a function ``score(hidden, visual) -> scores``: hidden [batch, rows, hidden] is the residual stream where the
choice is made (the decoder's input after the merge, for a stage at layer 0), visual [batch, rows] bool tells where visual
tokens stand, scores [batch, rows] ranks them (higher is kept first; entries at text rows are ignored). Rows are those that
are left there. A rule that says so is given a third argument, the attention of the layer in front, [batch, heads, rows that
were asked, rows] float32: of the last text row (``reads="last_row"``) or of all text rows (``reads="text_rows"``; those in
front of the first visual token, which may be padding, are zeros). It is computed for these rows alone. With
``reads="ahead"`` the third argument is what all text rows would pay in the layers behind the choice, if the states were those at
hand: [batch, heads of all these layers, text rows, rows] float32, with zeros as above. With ``reads="places"`` the last argument
tells where in its picture each visual token stands: [batch, rows, 3] int64, the number of the picture, the row and the column,
both -1 where the picture's grid is not known.

A rule is traced into the graph. It must not let a sample's scores depend on other samples, nor on padding: text rows may be
padding, so the built-in rules look at visual rows alone, or at the text behind the first visual token (a prompt with padding
there runs unrewritten).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from parvts_fx.distances import differences, further_apart, spread_out
from parvts_fx.torch_private import make_fx

Rule = Callable[..., torch.Tensor]

ATTENDED = "attended"
"""The one rule that is no function of the decoder's input: the attention received inside the vision tower."""

READS = ("hidden", "text", "last_row", "text_rows", "ahead", "places")
"""What a rule may say that it reads: the rows alone, also the text behind the first visual token, attention weights, those
that layers ahead would have, or places in pictures."""

_WEIGHTS = frozenset({"last_row", "text_rows", "ahead"})

_RULES: dict[str, Rule] = {}
_READS: dict[str, frozenset[str]] = {}
_AHEAD: dict[str, int] = {}


def register_rule(
    name: str, reads: str | Sequence[str] = "hidden", reads_text: bool = False, layers: int = 3
) -> Callable[[Rule], Rule]:
    """Decorator that makes a rule available by its name: as ``score="name"``, or as a stage's ``rule``.

    Args:
        reads: what the scores depend on besides the visual rows, one or several of :data:`READS`. "text": also on the text
            behind the first visual token, and on no other text. "last_row", "text_rows": on attention weights in the layer in
            front, which are the rule's third argument; such a rule needs a layer in front. "ahead": on those that layers behind
            the choice would have, its third argument. "places": on where in their pictures tokens stand, its last argument.
        reads_text: the same as "text" in ``reads``.
        layers: how many layers a rule looks ahead that reads "ahead", as far as there are so many.

    Raises:
        ValueError: the name is taken, ``reads`` names something else, or ``layers`` is no count.
    """
    given = frozenset([reads] if isinstance(reads, str) else reads) | ({"text"} if reads_text else frozenset())
    unknown = sorted(given - set(READS))
    if unknown or len(given & _WEIGHTS) > 1:
        raise ValueError(f"parvts_fx: register_rule({name!r}, reads={reads!r}): expected names out of {', '.join(READS)}, and "
                         "one of last_row, text_rows and ahead at most")
    _check_layers(f"register_rule({name!r}, layers={layers!r})", layers)

    def register(rule: Rule) -> Rule:
        if name in known_rules():
            raise ValueError(f"parvts_fx: a scoring rule named {name!r} exists already; choose another name")
        _RULES[name], _READS[name], _AHEAD[name] = rule, given, layers if "ahead" in given else 0
        return rule

    return register


def _check_layers(call: str, layers: object) -> None:
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise ValueError(f"parvts_fx: {call}: expected how many layers the rule looks ahead, an int of at least 1")


def _name_of(rule: str | Rule) -> str:
    """Under which name a rule is registered; "look_ahead" for one that looks ahead another number of layers."""
    if isinstance(rule, str):
        return rule
    return next((name for name, known in _RULES.items() if known is rule), "look_ahead" if isinstance(rule, LookAhead) else "")


def _reads(rule: str | Rule) -> frozenset[str]:
    return _READS.get(_name_of(rule), frozenset())


def layers_ahead(rule: str | Rule) -> int:
    """How many layers a rule looks ahead; 0 for one that does not."""
    return rule.layers if isinstance(rule, LookAhead) else _AHEAD.get(_name_of(rule), 0)


def reads_text(rule: str | Rule) -> bool:
    """Whether a rule's scores depend on text; those of a callable that is not registered are taken not to."""
    return bool(_reads(rule) & ({"text"} | _WEIGHTS))


def reads_attention(rule: str | Rule) -> bool:
    """Whether a rule reads attention weights of the layer in front of the choice."""
    return bool(_reads(rule) & {"last_row", "text_rows"})


def asks_all_text(rule: str | Rule) -> bool:
    """Whether these are the weights of all text rows, and not of the last one alone."""
    return "text_rows" in _reads(rule)


def reads_places(rule: str | Rule) -> bool:
    """Whether a rule looks at where in its picture a token stands."""
    return "places" in _reads(rule)


def reads_hidden(rule: str | Rule) -> bool:
    """Whether a rule that reads attention looks at its first argument too: found out by tracing it on a few numbers."""
    if not reads_attention(rule):
        return True
    given = [torch.rand(1, 2, 2 if asks_all_text(rule) else 1, 4)]
    given += [torch.zeros(1, 4, 3, dtype=torch.int64)] if reads_places(rule) else []
    try:
        traced = make_fx(rule_named(rule))(torch.rand(1, 4, 3), torch.tensor([[False, True, True, False]]), *given)
    except Exception:  # said where it is traced into the graph
        return True
    return bool(next(iter(traced.graph.nodes)).users)


def rule_named(name: str | Rule) -> Rule:
    """A registered function of the decoder's input; a callable is returned as it is."""
    return _RULES[name] if isinstance(name, str) else name


def known_rules() -> tuple[str, ...]:
    """The names that ``score`` and a stage's ``rule`` take."""
    return (*_RULES, ATTENDED)


@register_rule("norm")
def norm(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """The length of each token's embedding."""
    return hidden.float().norm(dim=-1)


@register_rule("distinct")
def distinct(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """How far a token is from the sample's average visual token."""
    return differences(hidden, visual).norm(dim=-1)


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
    centred = differences(hidden, visual)
    return spread_out(centred.norm(dim=-1), centred, visual)


@register_rule("balanced")
def balanced(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """As "diverse", with the root of the distinctness: more weight on being different from what is better."""
    centred = differences(hidden, visual)
    return spread_out(centred.norm(dim=-1).sqrt(), centred, visual)


@register_rule("placed", reads="places")
def placed(hidden: torch.Tensor, visual: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """As "balanced", but what is alike and far apart in the picture is no longer redundant.

    To the cosine distance of two tokens comes up to 0.3 for how far apart they stand: ``0.3 (1 - exp(-g^2 / 2 s^2))``, with g
    in patches and s a quarter of the side of a square as large as the grid; all of it between two pictures, nothing where a grid
    is not known.
    """
    centred = differences(hidden, visual)
    return spread_out(centred.norm(dim=-1).sqrt(), centred, visual, *further_apart(places))


@register_rule("peaks")
def peaks(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Density times the distance to the nearest token in a denser place: the centres of clusters, large ones first.

    After density-peak clustering (Rodriguez and Laio, Science 344, 2014), with the similarity to all visual tokens as
    density.
    """
    direction = F.normalize(differences(hidden, visual), dim=-1)
    density = (torch.exp(4 * (direction @ direction.transpose(1, 2) - 1)) * visual[:, None, :]).sum(-1)
    return spread_out(density, direction, visual)


@register_rule("question", reads="text")
def question(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """The greatest similarity to a word behind the first visual token."""
    direction = F.normalize(differences(hidden, visual), dim=-1)
    words = F.normalize(hidden.float(), dim=-1)
    asked = ~visual & (visual.long().cumsum(1) > 0)
    return (direction @ words.transpose(1, 2)).masked_fill(~asked[:, None, :], -1.0).amax(dim=-1)


@register_rule("question_diverse", reads="text")
def question_diverse(hidden: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Similarity to the question times the distance to the nearest token that is more similar to it."""
    return spread_out(1 + question(hidden, visual), differences(hidden, visual), visual)


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


@register_rule("last_row", reads="last_row")
def last_row(hidden: torch.Tensor, visual: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """The attention that the last text row pays to each token in the layer in front, averaged over heads.

    As FastV ranks tokens (Chen et al., ECCV 2024, arXiv 2403.06764).
    """
    return attention[:, :, 0].mean(1)


@register_rule("text_rows", reads="text_rows")
def text_rows(hidden: torch.Tensor, visual: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """The attention that all text rows behind the first visual token pay to each token in the layer in front, averaged over
    heads and summed over these rows."""
    return attention.mean(1).sum(1)


@dataclasses.dataclass(frozen=True)
class LookAhead:
    """The rule "look_ahead", for any number of layers: ``Stage(at=3, rule=LookAhead(2), merge="clusters")``.

    The root of the largest share that a token would have in what one row of text pays to all visual tokens, averaged over the
    heads of the layers ahead; times the distance of the rule "placed" to the nearest token that is ranked higher. The text's
    states must know what is asked: choose behind a few layers that all tokens run through.

    Raises:
        ValueError: ``layers`` is no count.
    """

    layers: int = 3
    """How many layers, beginning with the one at whose input the choice is made; as far as there are so many."""

    def __post_init__(self) -> None:
        _check_layers(f"LookAhead({self.layers!r})", self.layers)

    def __call__(
        self, hidden: torch.Tensor, visual: torch.Tensor, ahead: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        paid = ahead * visual[:, None, None]
        relevance = (paid / paid.sum(-1, keepdim=True).clamp(min=1e-6)).mean(1).amax(1).sqrt()
        return spread_out(relevance, differences(hidden, visual), visual, *further_apart(places))


register_rule("look_ahead", reads=("ahead", "places"))(LookAhead())

AUTO = "placed"
"""The rule behind "auto", chosen by bench/accuracy (docs/merging.md)."""

register_rule("auto", reads="places")(placed)
