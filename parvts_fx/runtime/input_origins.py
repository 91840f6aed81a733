"""Remembers across graph breaks what tensors are computed from.

Where Dynamo breaks a call into several graphs, the features that one of them merges are an input without a telling name.
The graphs that computed them did see the call's own inputs, so they note it of their results, by the identity of the
tensors (as :mod:`parvts_fx.runtime.merged_embeddings` does for merged embeddings).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from parvts_fx.analysis.modality import Origin, content_before, origin_by_name
from parvts_fx.analysis.values import is_tensor, output_node, value
from parvts_fx.runtime.call import UNWATCHED, current_call

TEXT = Origin(frozenset(("text",)))
"""Of embeddings that have been looked up by integers."""


def noted_origins(module: GraphModule, example_inputs: Sequence[object]) -> tuple[set[Node], dict[Node, Origin]]:
    """Of a graph's inputs, what earlier graphs have told: which are the prompt's embeddings, and what the others are."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    call = current_call()
    held = {node: call.origin_of(given) for node, given in zip(placeholders, example_inputs)}
    texts = {node for node, origin in held.items() if origin is TEXT}
    return texts, {node: origin for node, origin in held.items() if origin is not None and origin is not TEXT}


def noting_origins(
    module: GraphModule, example_inputs: Sequence[object], call: Callable[..., Any], merged: int | None = None
) -> Callable[..., Any]:
    """Wrap a compiled graph, such that it tells of its results what they are computed from, where that is known.

    A tower that several modalities share is one graph: what its inputs are is looked up at each call. Embeddings that are
    looked up by integers are noted as :data:`TEXT`.

    Args:
        merged: which result is the prompt's embeddings and no features.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    _, known = noted_origins(module, example_inputs)
    by_name = {node: origin_by_name(node) for node in placeholders}
    telling = {node for node in placeholders if node in known or by_name[node].modalities}
    results = output_node(module.graph).args[0]
    if not isinstance(results, (tuple, list)):
        return call
    texts = [] if merged is not None else [index for index, result in enumerate(results) if _is_text(result)]
    if not telling and not texts:
        return call
    telling |= {node for node in placeholders if is_tensor(node) and value(node).is_floating_point() and value(node).dim() > 1
                and not isinstance(value(node), torch.nn.Parameter)}
    position = {node: index for index, node in enumerate(placeholders)}
    sources: dict[int, list[tuple[int, Origin]]] = {}
    for index, result in enumerate(results):
        if is_tensor(result) and index != merged and value(result).is_floating_point() and value(result).dim() > 1:
            behind = content_before([result]) & telling
            if behind:
                sources[index] = [(position[node], by_name[node]) for node in behind]
    if not sources and not texts:
        return call

    def noting(*inputs: object) -> Any:
        outputs, here = call(*inputs), current_call()
        for index in texts:
            here.origins.note(outputs[index], TEXT)
            UNWATCHED.lost.clear()  # the next prompt: nothing else tells where one of those calls begins
        for index, behind in sources.items():
            origin = Origin()
            for place, name in behind:
                held = here.origin_of(inputs[place])
                origin |= name if held is None or held is TEXT else held
            if origin.modalities:
                here.origins.note(outputs[index], origin)
        return outputs

    return noting


def _is_text(result: object) -> bool:
    """Whether a result is embeddings [batch, seq, hidden] that depend on integers and weights alone."""
    if not is_tensor(result) or value(result).dim() != 3 or not value(result).is_floating_point():
        return False
    inputs = [node for node in content_before([result]) if node.op == "placeholder" and is_tensor(node)]
    given = [value(node) for node in inputs if value(node).dim() > 1 and not isinstance(value(node), torch.nn.Parameter)]
    return bool(given) and not any(example.is_floating_point() for example in given)
