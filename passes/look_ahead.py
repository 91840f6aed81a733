"""Writes what the text would attend to in the layers behind a choice, if the states were those where the choice is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from parvts_fx.analysis.records import Attention
from parvts_fx.analysis.values import changed_in_place, is_tensor, storage_of, value
from parvts_fx.errors import Refusal
from parvts_fx.passes.attend import attention_weights
from parvts_fx.passes.paths import Path
from parvts_fx.passes.plan import Choice

if TYPE_CHECKING:
    from parvts_fx.passes.emit import Emitter


def look_ahead(emitter: Emitter, choice: Choice, asking: str, here: str) -> Node:
    """[batch, heads, rows that ask, rows that are left] float32: the heads of one layer behind those of another.

    Of each layer only what leads from its input to the weights of its attention is computed: the queries for the rows that
    ask, the keys for all.

    Args:
        asking: the name of the rows that ask.
        here: that of the rows that are left where the choice is made.
    """
    path = AheadPath(emitter, choice, asking, here)
    weights = [attention_weights(path, attention, asking, here) for attention in choice.ahead]
    return emitter.editor.call(torch.cat, weights, dim=1)


class AheadPath(Path):
    """The way from one state of the stream to the queries and keys of several layers, each of which takes it for its input."""

    def __init__(self, emitter: Emitter, choice: Choice, asking: str, here: str):
        plan = emitter.plan
        self.source, self.inputs = choice.link, _inputs(emitter, choice)
        if choice.stage.at == 0 and plan.decoder.entry is not None:
            self.source = plan.decoder.entry  # what the model makes of the embeddings is made once
        own, queries = (_between(emitter, choice, ends) for ends in (
            [*_keys(choice), *({self.source} - self.inputs)], _queries(choice)))
        for node in sorted(queries - own):  # of what comes in parts, queries beside keys, each has all rows
            if any(source in own and isinstance(value(source), (tuple, list)) for source in node.all_input_nodes):
                own.add(node)
        written = {storage_of(target) for node in own | queries if (target := changed_in_place(node)) is not None}
        buffers = {node for node in emitter.fresh if is_tensor(node) and storage_of(node) in written}
        super().__init__(
            emitter, own | queries | buffers, lambda node: here if node in own else asking, lambda node: here, emitter.main)
        others = {storage_of(node) for node in emitter.decoder.nodes if is_tensor(node) and node not in self.nodes and (
            node in self.inputs or not choice.behind < node)}
        for node in sorted(self.nodes):
            target = changed_in_place(node)
            if target is not None and storage_of(target) in others:
                raise Refusal("looking ahead would write into memory that is read without it, too", node)
            self.write(node)

    def read(self, node: Node, name: str) -> Any:
        if node in self.inputs and node is not self.emitter.decoder.merge.output:
            node = self.source
        return super().read(node, name)


def _inputs(emitter: Emitter, choice: Choice) -> set[Node]:
    """The residual stream at the inputs of all layers behind a choice."""
    return {emitter.plan.link(layer) for layer in range(choice.stage.at, len(emitter.plan.layers))}


def _queries(choice: Choice) -> Iterator[Node]:
    for attention in choice.ahead:
        yield from (operand.node for operand in attention.queries)


def _keys(choice: Choice) -> Iterator[Node]:
    """What the weights of the attention calls are computed from, but for their queries."""
    for attention in choice.ahead:
        asking = {operand.node for operand in attention.queries} - {operand.node for operand in attention.keys}
        yield from (operand.node for operand in attention.keys)
        yield from (source for source in _read_by(attention) if source not in asking)


def _read_by(attention: Attention) -> Iterator[Node]:
    """What its own nodes read, as far as its weights need it."""
    own = set(attention.nodes)
    for node in attention.nodes[:attention.nodes.index(attention.heart) + 1]:
        yield from (source for source in node.all_input_nodes if source not in own)


def _between(emitter: Emitter, choice: Choice, ends: Iterable[Node]) -> set[Node]:
    """What stands behind the choice and is needed for some nodes, back to the inputs of layers."""
    seen, found, stack = _inputs(emitter, choice), set[Node](), list(ends)
    writes = {node: storage_of(target) for node in emitter.decoder.nodes
              if choice.behind < node and (target := changed_in_place(node)) is not None}
    while stack:
        node = stack.pop()
        if node not in emitter.inside:
            _have(emitter, node)
        elif node not in seen and choice.behind < node:
            seen.add(node)
            stack.extend(node.all_input_nodes)
            if node in emitter.fresh:  # made where it is read
                continue
            found.add(node)
            memory = storage_of(node) if is_tensor(node) else None
            stack.extend(write for write, written in writes.items() if written == memory)
    return found


def _have(emitter: Emitter, node: Node) -> None:
    """A node outside the decoder, copied now if its turn comes later."""
    if node not in emitter.outside:
        if node.is_impure():
            raise Refusal("looking ahead needs what comes of an operation with effects behind the choice", node)
        for source in node.all_input_nodes:
            _have(emitter, source)
        emitter.copy_outside(node)
