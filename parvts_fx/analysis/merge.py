"""Finds where features of pictures, videos and sound enter the text embeddings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet

import torch
from torch.fx import Graph, Node

from parvts_fx.analysis.modality import VISUAL, Origin, content_before, origin_of
from parvts_fx.analysis.records import Merge, VisualMerge
from parvts_fx.analysis.values import ancestors, concrete, has_target, is_tensor, value
from parvts_fx.errors import Refusal

_FUNCTIONS = (torch.masked_scatter, torch.ops.aten.masked_scatter.default)
_METHODS = ("masked_scatter",)
CHOICES = (torch.where, torch.ops.aten.where.self)


def _is_signal(node: Node) -> bool:
    """An input of floating-point numbers that is no weight: pixels, or features."""
    return node.op == "placeholder" and is_tensor(node) and value(node).is_floating_point() and not isinstance(
        value(node), torch.nn.Parameter) and value(node).dim() > 1


def is_visual(node: Node) -> bool:
    """Whether something depends on an input of floating-point numbers: features, of whatever modality."""
    return any(map(_is_signal, ancestors([node])))


def _operands(node: Node) -> tuple[Node, Node, Node]:
    named = {**dict(zip(("self", "mask", "source"), node.args)), **node.kwargs}
    return named.get("self", named.get("input")), named["mask"], named["source"]


def is_merge(node: Node) -> bool:
    """Whether a node scatters rows of floating-point numbers; where they come from is another question."""
    if not has_target(node, _FUNCTIONS, _METHODS) or not is_tensor(node):
        return False
    into, mask, source = _operands(node)
    return (
        all(is_tensor(operand) for operand in (into, mask, source))
        and value(node).dim() == 3
        and value(node).is_floating_point()
        and value(mask).dtype == torch.bool
        and value(mask).dim() in (2, 3)
    )


def enters_a_layer(node: Node, attentions: AbstractSet[Node]) -> bool:
    """Whether a merge writes into something that attention has touched, leaving aside where merged features come from."""
    seen: set[Node] = set()
    stack = [_operands(node)[0]]
    while stack:
        source = stack.pop()
        if source in attentions:
            return True
        if source not in seen:
            seen.add(source)
            stack.extend([_operands(source)[0]] if is_merge(source) else filter(is_tensor, source.all_input_nodes))
    return False


class Stream:
    """The prompt's embeddings on their way through the merges, which are told to it in graph order.

    Args:
        attentions: nodes of all attention calls; a merge into their results belongs to a layer, not to the prompt.
        handed: an input that holds embeddings into which an earlier graph has merged.
        texts: inputs that hold embeddings which an earlier graph has looked up.
    """

    def __init__(self, attentions: AbstractSet[Node], handed: Node | None = None, texts: Collection[Node] = ()):
        self.attentions = attentions
        self.handed = handed
        self.texts = {handed, *texts} - {None}
        self.into: dict[Node, Node] = {}
        """By merge, the embeddings that it merges into."""

    def before(self, node: Node) -> Iterator[Node]:
        """What embeddings are made of, leaving aside where merged features and their masks come from."""
        seen: set[Node] = set()
        stack = [node]
        while stack:
            source = stack.pop()
            if source not in seen:
                seen.add(source)
                yield source
                if source not in self.texts:
                    stack.extend([self.into[source]] if source in self.into else source.all_input_nodes)

    def is_prompt(self, node: Node) -> bool:
        """Embeddings looked up by integers or handed over, which no attention and no input of other numbers has touched."""
        looked_up = False
        for source in self.before(node):
            if source in self.attentions or _is_signal(source) and source not in self.texts:
                return False
            looked_up |= source in self.texts or (
                source.op == "placeholder" and is_tensor(source) and not value(source).is_floating_point())
        return looked_up

    def is_update(self, into: Node, source: Node) -> bool:
        """Whether what is written into merged embeddings is computed from them: an update of rows, and no features."""
        behind_merges = [node for node in self.before(into) if node in self.into or node is self.handed]
        return bool(behind_merges) and not content_before([source]).isdisjoint(behind_merges)

    def accept(self, node: Node) -> tuple[Node, Node, bool] | None:
        """(mask, features, whether their size tells the number of tokens) if a node merges, which is then remembered."""
        if is_merge(node):
            into, mask, features = _operands(node)
            if enters_a_layer(node, self.attentions) or self.is_update(into, features):
                return None
            self.into[node] = into
            return mask, features, True
        if self._chooses(node):
            mask, features, self.into[node] = node.args
            return mask, features, False
        return None

    def _chooses(self, node: Node) -> bool:
        """Whether a node is ``where(mask, features, text)`` of whole rows, whose number of features no size tells."""
        if not has_target(node, CHOICES) or len(node.args) != 3 or not all(map(is_tensor, node.args)):
            return False
        mask, features, text = node.args
        shape = value(node).shape
        return len(shape) == 3 and value(mask).dim() in (2, 3) and value(mask).shape[-1] == 1 and value(
            features).shape == value(text).shape == shape and is_visual(features) and self.is_prompt(
            text) and not self.is_update(text, features)


def find_merge(
    graph: Graph,
    attentions: AbstractSet[Node],
    *,
    handed: Merge | None = None,
    texts: Collection[Node] = (),
    origins: Mapping[Node, Origin] | None = None,
    prunes: Callable[[str], bool] = VISUAL.__contains__,
) -> VisualMerge | None:
    """All merges into the stream of embeddings that the last merge outside of any layer writes into.

    Args:
        attentions: nodes of all attention calls; a merge into their results belongs to a layer, not to the prompt.
        handed: what an earlier graph has merged; then only merges into that stream are looked for.
        texts: inputs that hold embeddings which an earlier graph has looked up.
        origins: what earlier graphs have told of other placeholders.
        prunes: whether tokens of a modality may be dropped; those of the others are like text.

    Returns:
        None if nothing is merged. ``masks`` is empty if nothing that is merged may be dropped.

    Raises:
        Refusal: one merge takes in features of which some may be dropped and some not; or embeddings grow between merges.
    """
    stream = Stream(attentions, handed and handed.output, texts)
    found: dict[Node, tuple[Node, Node, bool]] = {}
    for node in graph.nodes:
        held = stream.accept(node)
        if held is not None and (handed is None or handed.output in stream.before(node)):
            found[node] = held
    if not found:
        return None if handed is None else _visual((handed,))
    output = next(reversed(found))
    passed = set(stream.before(output))
    chain = [] if handed is None else [handed]
    for node, (mask, features, sized) in found.items():
        if node in passed:
            origin = origin_of([features], origins)
            chain.append(Merge(node, mask, features, sized, origin, _prunable(node, origin, prunes)))
    return _visual(tuple(chain))


def _visual(merges: tuple[Merge, ...]) -> VisualMerge:
    output = merges[-1].output
    size = concrete(value(output).shape[1])
    if any(concrete(value(merge.output).shape[1]) != size for merge in merges):
        raise Refusal("embeddings grow between two merges of features", output)
    visual = [merge for merge in merges if merge.prunable]
    features = tuple(merge.features for merge in visual if merge.features is not None)
    sized = all(merge.sized for merge in visual)
    return VisualMerge(output, tuple(merge.mask for merge in visual), features if sized else (), None, merges)


def _prunable(node: Node, origin: Origin, prunes: Callable[[str], bool]) -> bool:
    """
    Raises:
        Refusal: yes for some of its modalities, no for others.
    """
    answers = {prunes(modality) for modality in origin.modalities or ("unknown",)}
    if len(answers) > 1:
        raise Refusal(f"one merge takes in {' and '.join(sorted(origin.modalities))} together ({', '.join(origin.evidence)}), "
                      "of which not all may be pruned (option prune)", node)
    return answers.pop()


def flatten_mask(mask: torch.Tensor) -> torch.Tensor:
    """[batch, seq, anything] or [batch, seq] bool to [batch, seq]."""
    return mask[..., 0] if mask.dim() == 3 else mask
