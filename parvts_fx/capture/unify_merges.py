"""Write every way of merging visual features into text embeddings as the one that the analysis knows."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import ClassVar

import torch
from torch.fx import Node

from parvts_fx.analysis.merge import CHOICES, Stream, is_visual
from parvts_fx.analysis.modality import Origin, origin_of
from parvts_fx.analysis.values import ancestors, has_target, is_tensor, storage_of, value
from parvts_fx.capture.editing import Editor
from parvts_fx.pipeline import PassResult, Work

_PUTS = (torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default, torch.index_put)
_PUT_METHODS = ("index_put", "index_put_")
_CATS = (torch.cat, torch.concat, torch.concatenate, torch.ops.aten.cat.default)


@dataclasses.dataclass(frozen=True)
class UnifyMerges:
    """Merges by assignment and by concatenation become scattering.

    ``h[mask] = features``                ==>  ``h' = h.masked_scatter(mask[..., None], features)``
    ``h = cat([text, features, text], 1)``  ==>  ``h' = cat([text, 0, text], 1).masked_scatter(their place, features)``

    ``where(mask, text, features)``         ==>  ``where(~mask, features, text)``

    Only where the features depend on an input that is neither ids nor a weight, and where no attention has touched the
    text, whatever has been merged into it before. What is joined to text and is of several modalities is scattered
    modality by modality. The values computed stay the same.
    """

    name: ClassVar[str] = "unify_merges"
    attentions: AbstractSet[Node] = frozenset()
    handed: Node | None = None
    """An input that holds embeddings into which an earlier graph has merged."""

    texts: Collection[Node] = ()
    """Inputs that hold embeddings which an earlier graph has looked up."""

    origins: Mapping[Node, Origin] = dataclasses.field(default_factory=dict)
    """What earlier graphs have told of other placeholders."""

    def run(self, work: Work) -> PassResult:
        editor, stream = Editor(work.module), Stream(self.attentions, self.handed, self.texts)
        count = 0
        for node in list(work.module.graph.nodes):
            if not node.op.startswith("call"):
                continue
            merged = (_scatter_assignment(editor, node, stream) or _scatter_joint(editor, node, stream, self.origins)
                      or _turn_choice(editor, node, stream))
            count += bool(merged)
            for new in merged or [node]:
                stream.accept(new)
        return PassResult(count)


def _scatter_assignment(editor: Editor, node: Node, stream: Stream) -> list[Node]:
    if node.op == "call_function" and node.target is operator.setitem:
        target, index, features = node.args
    elif has_target(node, _PUTS, _PUT_METHODS) and len(node.args) == 3 and len(node.args[1]) == 1:
        target, (index,), features = node.args
    else:
        return []
    if not (is_tensor(target) and is_tensor(index) and is_tensor(features)):
        return []
    if value(index).dtype != torch.bool or value(index).dim() != 2 or value(target).dim() != 3 or value(features).dim() < 2:
        return []
    if not is_visual(features) or not stream.is_prompt(target) or stream.is_update(target, features):
        return []
    shared = [user for user in target.users if is_tensor(user) and user < node and storage_of(user) == storage_of(target)]
    if shared:  # what is made behind the assignment reads the merged rows instead
        return []
    graph = editor.graph
    with graph.inserting_before(node):
        mask = editor.method("unsqueeze", index, -1)
        cast = editor.method("to", features, value(target).dtype)
        merged = editor.method("masked_scatter", target, mask, cast)
    if node.users:
        node.replace_all_uses_with(merged)
    for user in [user for user in target.users if node < user]:
        user.replace_input_with(target, merged)
    graph.erase_node(node)
    return [merged]


def _scatter_joint(editor: Editor, node: Node, stream: Stream, origins: Mapping[Node, Origin]) -> list[Node]:
    if not has_target(node, _CATS) or not is_tensor(node) or value(node).dim() != 3:
        return []
    axis = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else 0))
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    if axis not in (1, -2) or not value(node).is_floating_point():
        return []
    visual = [part for part in parts if is_visual(part) and not stream.is_prompt(part)]
    text = [part for part in parts if part not in visual and stream.is_prompt(part)]
    if not visual or not text or len(visual) + len(text) != len(parts) or _goes_elsewhere(text, node):
        return []
    groups: dict[frozenset[str], list[Node]] = {}
    for part in visual:
        groups.setdefault(origin_of([part], origins).modalities, []).append(part)
    merged: list[Node] = []
    with editor.graph.inserting_before(node.next):
        into = editor.inline(functools.partial(_text_alone, [part in visual for part in parts]), *parts)
        for group in groups.values():
            mask = editor.inline(functools.partial(_stand, [part in group for part in parts]), *parts)
            into = editor.method("masked_scatter", into, mask, editor.inline(_gathered, *group))
            merged.append(into)
    node.replace_all_uses_with(into)
    editor.graph.erase_node(node)
    return merged


def _stand(places: Sequence[bool], *tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat([
        tensor.new_full(tensor.shape[:2], place, dtype=torch.bool) for place, tensor in zip(places, tensors)
    ], 1)[..., None]


def _text_alone(places: Sequence[bool], *tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat([
        torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) if place else tensor
        for place, tensor in zip(places, tensors)
    ], 1)


def _gathered(*features: torch.Tensor) -> torch.Tensor:
    return torch.cat(features, 1) if len(features) > 1 else features[0].clone()


def _goes_elsewhere(text: list[Node], joint: Node) -> bool:
    """Whether numbers that the text is made of go on beside the joint: then it is keys that are joined with cached ones."""
    before = ancestors([joint])
    return any(
        is_tensor(user) and value(user).is_floating_point() and user not in before
        and not has_target(user, (torch.zeros_like, torch.ones_like, torch.empty_like), ("new_zeros", "new_ones"))
        for node in ancestors(text) if node.op.startswith("call") and is_tensor(node) and value(node).is_floating_point()
        for user in node.users)


def _turn_choice(editor: Editor, node: Node, stream: Stream) -> list[Node]:
    if not has_target(node, CHOICES) or len(node.args) != 3 or not all(map(is_tensor, node.args)):
        return []
    mask, chosen, other = node.args
    if value(node).dim() != 3 or value(other).shape != value(node).shape or not is_visual(other):
        return []
    if stream.is_prompt(other) or not stream.is_prompt(chosen) or stream.is_update(chosen, other):
        return []
    with editor.graph.inserting_before(node):
        turned = editor.call(torch.where, editor.call(torch.logical_not, mask), other, chosen)
    node.replace_all_uses_with(turned)
    editor.graph.erase_node(node)
    return [turned]
