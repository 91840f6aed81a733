"""Whether padding stands behind a visual token, where decode steps would misread the prompt's mask.

A decode step is given a mask over the full prompt, and the model takes as many of its columns as the cache has rows, from
the front. That is right as long as nothing has been dropped in front of a padded position: left padding, as generate
asks for. Elsewhere the pruned cache's rows would be masked by other rows' columns, so such a prompt runs unrewritten.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from parvts_fx.analysis.calls import fused_arguments, is_fused_attention
from parvts_fx.analysis.masks import Mask, all_masks
from parvts_fx.analysis.records import Decoder
from parvts_fx.analysis.values import ancestors, is_tensor, needed_for, output_node, reads_sizes_alone, value
from parvts_fx.errors import Refusal
from parvts_fx.runtime.guards import size_reader
from parvts_fx.torch_private import is_functorch_wrapped_tensor


def padding_check(module: GraphModule, decoder: Decoder, reads_text: bool = False) -> Callable[..., bool] | None:
    """A function of the [batch, seq] bool mask of visual tokens and the graph's inputs; None if no check is needed.

    None where the graph hands out no keys, or where no attention mask depends on data.

    Args:
        reads_text: the scores of visual tokens depend on the text behind them, so that padding there matters in any case.
    """
    if not (reads_text or _hands_out_keys(module, decoder)):
        return None
    masks, everywhere = _masks(decoder)
    needed, cuts = _needed(module, [mask.node for mask in masks])
    graph, copies = Graph(), {}
    data: list[int] = []
    for position, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder"):
        copies[node] = graph.node_copy(node)
        if node in needed and is_tensor(node) and not value(node).is_floating_point():
            data.append(position)
    if not data:
        return None
    for node in cuts:
        copies[node] = graph.placeholder(f"{node.name}_zeros")
    for node in module.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[mask.node] for mask in masks))
    evaluate = GraphModule(module, graph)
    zeros = [_zeros_like(module, node) for node in cuts]

    @torch.no_grad()
    def padding_behind_visual(visual: torch.Tensor, *inputs: Any) -> bool:
        if all(inputs[position].all() for position in data):
            return False  # nothing is masked, and no word has the id 0
        held = evaluate(*inputs, *(make(inputs) for make in zeros))
        behind = visual.cumsum(1) > 0
        padded = [_padded(mask, values, *visual.shape) for mask, values in zip(masks, held)]
        by_nobody = [functools.reduce(torch.logical_and, (unseen for _, unseen in padded))] if everywhere else []
        return any(bool((hidden & behind).any()) for hidden in (*by_nobody, *(hidden for hidden, _ in padded)))

    return padding_behind_visual


def _hands_out_keys(module: GraphModule, decoder: Decoder) -> bool:
    links = {layer.input for layer in decoder.layers}
    outputs = set(output_node(module.graph).all_input_nodes) & set(decoder.nodes) - links
    keys = [operand.node for layer in decoder.layers for attention in layer.attentions for operand in attention.keys]
    return bool(outputs & ancestors(keys))


def _masks(decoder: Decoder) -> tuple[list[Mask], bool]:
    """The masks of all attention calls, and whether each of them may have one: a fused call without sees every key."""
    without = (is_fused_attention(node) and fused_arguments(node)["attn_mask"] is None
               for layer in decoder.layers for attention in layer.attentions for node in attention.nodes)
    return all_masks(decoder.layers), not any(without)


def _padded(mask: Mask, values: torch.Tensor, batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch or 1, seq] bool, twice: keys that not even their own rows see, and keys that nobody else sees. In front of the
    second one's last key, behind which there is nobody. Of a filled cache the prompt's keys, which are the last.

    Padding may see itself. What nobody else sees is padding if that holds in all layers: the last row of a chunk is seen by
    none in layers that attend by chunks.
    """
    own, others = mask.seen(values.narrow(mask.key_axis, values.shape[mask.key_axis] - size, size))
    others = torch.cat([others[..., :-1], torch.ones_like(others[..., -1:])], -1)
    leading = math.prod(own.shape[:-1])
    rows = batch if leading % batch == 0 else 1
    return (~own).reshape(rows, -1, size).all(1), (~others).reshape(rows, -1, size).all(1)


def _needed(module: GraphModule, masks: Sequence[Node]) -> tuple[set[Node], list[Node]]:
    """What masks are computed from, and the features among it whose content does not matter, for zeros to stand in.

    Features whose size is data are computed after all: no zeros could be made in that size.
    """
    graph = module.graph
    all_needed = needed_for(graph, masks)
    featured: set[Node] = set()
    for node in graph.nodes:
        if node in all_needed and is_tensor(node) and value(node).is_floating_point():
            if node.op in ("placeholder", "get_attr") or any(source in featured for source in node.all_input_nodes):
                featured.add(node)
    needed, cuts = set[Node](), dict[Node, None]()
    stack = [node for node in all_needed if node in masks or not node.users]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        shape_only = reads_sizes_alone(node)
        for source in node.all_input_nodes:
            tensors = [given for given in source.all_input_nodes if is_tensor(given)]
            feature = source in featured and source.op not in ("placeholder", "get_attr")
            unread = feature and (shape_only or all(given in featured for given in tensors))
            if unread and _has_known_size(module, source):
                cuts[source] = None
            else:
                stack.append(source)
    needed -= cuts.keys()
    if any(is_functorch_wrapped_tensor(value(node)) for node in needed if is_tensor(node)):
        # all of them, so that every vmap that is entered is left
        needed |= ancestors(filter(_enters_or_leaves_vmap, graph.nodes)) - cuts.keys()
    return needed, list(cuts)


def _enters_or_leaves_vmap(node: Node) -> bool:
    return (node.op == "call_function" and not any(map(is_tensor, node.all_input_nodes))
            and "functorch" in str(getattr(node.target, "__module__", "")))


def _has_known_size(module: GraphModule, node: Node) -> bool:
    try:
        _zeros_like(module, node)
    except Refusal:
        return False
    return True


def _zeros_like(module: GraphModule, node: Node) -> Callable[[Sequence[Any]], torch.Tensor]:
    example = value(node)
    sizes = [size_reader(module, size) for size in example.shape]
    return lambda inputs: torch.zeros([read(inputs) for read in sizes], dtype=example.dtype, device=example.device)

