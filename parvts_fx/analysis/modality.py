"""What merged features are: pictures, videos, sound, or nothing tells.

The evidence is what the features are computed from: the inputs of the call, by the names that such inputs
conventionally have, or what an earlier graph of the same call has computed from such inputs
(:mod:`parvts_fx.runtime.input_origins`). Where a tower runs in code that Dynamo does not capture, all that is left is
what the code calls the tensor that it merges: the same conventional words. Names of weights, modules, models and ids say
nothing here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import torch
from torch.fx import Node

from parvts_fx.analysis.values import is_tensor, value

IMAGE, VIDEO, AUDIO, UNKNOWN = "image", "video", "audio", "unknown"
MODALITIES = (IMAGE, VIDEO, AUDIO, UNKNOWN)
VISUAL = frozenset((IMAGE, VIDEO, UNKNOWN))
"""What is pruned unless the user says otherwise: what nothing tells is taken for visual."""

_WORDS = {
    AUDIO: {"audio", "audios", "speech", "sound", "sounds", "voice", "waveform", "waveforms", "wav", "mel", "spectrogram",
            "input features", "input values"},
    VIDEO: {"video", "videos"},
    IMAGE: {"image", "images", "img", "imgs", "picture", "pictures", "pixel", "pixels", "vision", "visual"},
}
"""By modality the words, or pairs of words, of an input's name; the first match counts (``pixel_values_videos``)."""

_HELD_BY_MODULES = ("_modules", "_parameters", "_buffers", "l_self_", "L['self']")
_LOOKS_ONLY = ("to", "type_as", "view_as", "expand_as", "reshape_as")
"""Methods that take no content from any tensor but the first."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What something is computed from."""

    modalities: frozenset[str] = frozenset()
    evidence: tuple[str, ...] = ()
    """The inputs' names that tell."""

    def __or__(self, other: Origin) -> Origin:
        return Origin(self.modalities | other.modalities, tuple(dict.fromkeys((*self.evidence, *other.evidence))))


def named(name: str) -> Origin:
    """What the name of a call's input says about it."""
    words = re.findall("[a-z]+", name.lower())
    said = {*words, *(f"{first} {second}" for first, second in zip(words, words[1:]))}
    modality = next((modality for modality, known in _WORDS.items() if said & known), None)
    return Origin() if modality is None else Origin(frozenset((modality,)), (name,))


def origin_by_name(node: Node) -> Origin:
    """What a graph's input is called where the graph is from: Dynamo's source, else the placeholder's own name."""
    if not _is_data(node):
        return Origin()
    captured = node.meta.get("grapharg")
    source = getattr(captured, "source", None)
    name = getattr(source, "name", None)
    name = name() if callable(name) else name or node.name
    return Origin() if any(part in name for part in _HELD_BY_MODULES) else named(_short(name))


def _short(name: str) -> str:
    """``L['kwargs']['mm_encoder_outputs']['image'].pooler_output`` as ``mm_encoder_outputs.image.pooler_output``."""
    parts = re.findall(r"\w+", name)
    return ".".join(part for part in parts if part not in ("L", "G", "kwargs", "args")) or name


def _is_data(node: Node) -> bool:
    return node.op == "placeholder" and is_tensor(node) and value(node).dim() > 1 and not isinstance(
        value(node), torch.nn.Parameter)


def origin_of(roots: Sequence[Node], known: Mapping[Node, Origin] | None = None) -> Origin:
    """What nodes are computed from. Inputs of numbers tell before inputs of integers (sizes of pictures, say).

    Args:
        known: of some placeholders, what earlier graphs have told; that counts before their names.
    """
    told = {True: Origin(), False: Origin()}
    for node in content_before(roots):
        if _is_data(node):
            told[value(node).is_floating_point()] |= (known or {}).get(node) or origin_by_name(node)
    if told[True].modalities or told[False].modalities:
        return told[True] if told[True].modalities else told[False]
    return _called(roots)


def _called(roots: Sequence[Node]) -> Origin:
    """What the code calls features, or the one tensor that each is cast or reshaped from: Dynamo keeps variables' names."""
    for node in roots:
        while node.op.startswith("call"):
            origin = named(node.name)
            if origin.modalities:
                return origin
            sources = [source for source in node.all_input_nodes if is_tensor(source)]
            if len(sources) != 1:
                break
            node = sources[0]
    return Origin()


def content_before(roots: Sequence[Node], without: frozenset[Node] | set[Node] = frozenset()) -> set[Node]:
    """The nodes and all tensors whose content they depend on; what stands before ``without`` is left out."""
    seen: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in without:
            continue
        sources = node.all_input_nodes
        if node.op == "call_method" and node.target in _LOOKS_ONLY:
            sources = [node.args[0]]
        stack.extend(source for source in sources if not isinstance(value(source), (int, torch.SymInt)))
    return seen
