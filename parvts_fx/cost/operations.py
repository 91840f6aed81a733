"""What a graph does, whatever runs it: its kernels in order, their FLOPs and the bytes that they move.

FLOPs are torch's own count, of ``FlopCounterMode`` on fake tensors. What is moved is counted as a compiler moves it
(:mod:`parvts_fx.cost.fusing`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from parvts_fx.analysis.calls import fused_arguments, is_fused_attention
from parvts_fx.analysis.values import fake_mode_of, hint, value
from parvts_fx.capture import WithPrefix
from parvts_fx.cost.fusing import Kind, Operation, Ran, fuse
from parvts_fx.torch_private import FakeTensor, OperationCounter, is_traceable_wrapper_subclass, memory_of, tree_leaves

_PICKS = ("aten.embedding", "aten.index", "aten.index_select", "aten.gather")
"""Of what these are given they read as much as they write."""

_ALONE = (
    "aten.sort", "aten.topk", "aten.nonzero", "aten.masked_scatter", "aten.masked_select", "aten.cumsum", "aten.cumprod",
    "aten.index_put", "aten.index_put_", "aten.scatter", "aten.scatter_", "aten.scatter_add", "aten.index_add", "aten.bincount",
    "aten.histc", "aten.unique_dim", "aten._unique2", "aten.multinomial", "aten.item", "aten._local_scalar_dense",
)
"""What compilers have a kernel of its own for, of torch's operations; they know nothing of others' either."""


@dataclasses.dataclass(frozen=True)
class Tally:
    """All that a graph does."""

    flops: int
    """By torch's FlopCounterMode; attention as its two products over all pairs, causal or not."""

    operations: tuple[Operation, ...]

    @property
    def launches(self) -> int:
        """Kernels that are started."""
        return len(self.operations)

    @property
    def moved(self) -> int:
        """Bytes that all kernels read and write."""
        return sum(operation.moved for operation in self.operations)

    @property
    def dtype(self) -> torch.dtype:
        """What most is multiplied in."""
        products = [operation for operation in self.operations if operation.flops]
        return max(products, key=lambda operation: operation.flops).dtype if products else torch.get_default_dtype()


def count(module: GraphModule, shared_prefix: int = 0) -> Tally:
    """Run a captured graph on its fake example values, and note what it does.

    Args:
        module: every input of it has an example value (:func:`parvts_fx.capture.capture`).
        shared_prefix: with constant weights, how many leading positions both paths share. The graph finds that out when
            it runs; 0 gives the most that it may take.
    """
    inputs = [value(node) for node in module.graph.nodes if node.op == "placeholder"]
    notes = _Notes()
    for held in inputs:
        notes.see(held)
    with fake_mode_of(module.graph), torch.no_grad(), _counted(notes.tell) as counter:
        returned = _Reader(module, shared_prefix, notes).run(*inputs)
    return Tally(counter.get_total_flops(), notes.kernels(returned))


def count_flops(module: GraphModule, shared_prefix: int = 0) -> int:
    """Floating-point operations alone; see :func:`count`."""
    return count(module, shared_prefix).flops


def flops_of(call: Callable[[], Any]) -> tuple[int, Any]:
    """Floating-point operations of an eager call, by torch's FlopCounterMode, and its result."""
    with _counted(lambda *_: None) as counter:
        result = call()
    return counter.get_total_flops(), result


@contextlib.contextmanager
def _counted(tell: Callable[..., None]) -> Iterator[OperationCounter]:
    with (
        sdpa_kernel(SDPBackend.MATH),  # the counter knows bmm on every device, but not the CPU's fused attention
        OperationCounter(tell) as counter,
    ):
        yield counter


class _Reader(WithPrefix):
    """Runs a graph; an attention call is one operation, whatever it is made of below."""

    def __init__(self, module: GraphModule, shared_prefix: int, notes: _Notes):
        super().__init__(module, shared_prefix)
        self._notes = notes

    def run_node(self, node: Node) -> Any:
        if node.op == "get_attr":
            return self._notes.see(self._fake(super().run_node(node)))
        if not is_fused_attention(node):
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        with self._notes.as_one() as flops:
            result = super().run_node(node)
        causal = bool(fused_arguments(node)["is_causal"])
        self._notes.add("scaled_dot_product_attention", "attention", (args, kwargs), result, sum(flops), causal)
        return result

    def _fake(self, held: Any) -> Any:
        """A tensor that the graph's module holds, without its data: views of a real one would have other memory."""
        real = isinstance(held, torch.Tensor) and not isinstance(held, FakeTensor)
        return fake_mode_of(self.module.graph).from_tensor(held, static_shapes=True) if real else held


class _Notes:
    """What has run so far. A tensor is known by its memory, and by how often that has been written to."""

    def __init__(self) -> None:
        self._ran: list[Ran] = []
        self._numbers: dict[object, int] = {}
        self._whole: dict[int, int] = {}
        self._weights: set[int] = set()
        self._kept: list[torch.Tensor] = []
        self._attended: set[int] = set()
        self._made: dict[object, list[int]] = {}
        self._inner: list[int] | None = None

    def see(self, held: Any) -> Any:
        """An input or a parameter of the graph, which comes back."""
        if isinstance(held, torch.Tensor):
            number = self._number(held)
            if isinstance(held, torch.nn.Parameter):
                self._weights.add(number)
        return held

    @contextlib.contextmanager
    def as_one(self) -> Iterator[list[int]]:
        """Note nothing of what runs inside; the FLOPs of each come back."""
        self._inner = []
        try:
            yield self._inner
        finally:
            self._inner = None

    def tell(self, name: str, given: Any, result: Any, flops: int | None) -> None:
        """What the counter calls for every operation; ``flops`` is None of those that it does not count."""
        if self._inner is not None:
            self._inner.append(flops or 0)
        elif not name.endswith("_") and _is_free(name, given, result):
            return
        elif flops is None and (known := self._same(name, given)) is not None:
            for held, source in zip(_tensors(result), known):
                self._numbers[_memory(held)] = source
                self._kept.append(held)
        else:
            alone = name in _ALONE or not name.startswith(("aten.", "prims."))
            self.add(name, "product" if flops is not None else "alone" if alone else "fused", given, result, flops or 0)

    def _same(self, name: str, given: Any) -> list[int] | None:
        """The tensors that an operation computes once more, or copies although compilers do not: an attention call's result has
        the layout that is wanted already, and what is put behind an empty cache stays where it is."""
        taken = [self._number(held) for held in _tensors(given) if _elements(held)]
        if len(taken) == 1 and (name == "aten.cat" or name == "aten.clone" and taken[0] in self._attended):
            return taken
        return self._made.get(self._key(name, given))

    def _key(self, name: str, given: Any) -> object:
        """Equal for the same operation on the same tensors; None for what differs each time."""
        leaves = [(self._number(leaf), hint(leaf.storage_offset()), *map(str, (leaf.shape, leaf.stride())))
                  if isinstance(leaf, torch.Tensor) else str(leaf) for leaf in tree_leaves(given)]
        return None if name.endswith("_") or not _tensors(given) else (name, *leaves)

    def add(self, name: str, kind: Kind, given: Any, result: Any, flops: int, causal: bool = False) -> None:
        taken, made = _tensors(given), _tensors(result)
        picks, most = name in _PICKS, sum(map(_bytes, made))
        reads: dict[tuple[int, int], int] = {}
        for held in taken:
            place = self._number(held), hint(held.storage_offset()) or 0
            reads[place] = max(reads.get(place, 0), min(_bytes(held), most) if picks else _bytes(held))
        key = self._key(name, given)
        writes = {self._number(held, new=True): _bytes(held) for held in made}
        if key is not None:
            self._made[key] = list(writes)
        if kind == "attention":
            self._attended.update(writes)
        wide, narrow = (max((_elements(held) for held in side), default=0) for side in (taken, made))
        multiplies = kind in ("product", "attention")
        typed, (rows, columns) = (taken if multiplies and taken else made)[0], _matrix(name, made[0]) if multiplies else (0, 0)
        self._ran.append(Ran(name, kind, reads, writes, narrow if picks else max(wide, narrow), typed.dtype, flops, rows, columns,
                             picks, narrow < wide and not picks, causal))

    def kernels(self, returned: Any) -> tuple[Operation, ...]:
        return fuse(self._ran, self._whole, self._weights, {self._number(held) for held in _tensors(returned)})

    def _number(self, held: torch.Tensor, new: bool = False) -> int:
        memory = _memory(held)
        if new or memory not in self._numbers:
            self._kept.append(held)  # its memory must not be another tensor's while this runs
            self._numbers[memory] = len(self._whole)
            self._whole[self._numbers[memory]] = max(_bytes(held), _stored(held))
        return self._numbers[memory]


def _is_free(name: str, given: Any, result: Any) -> bool:
    """Whether no tensor is computed: there is none, or all are memory of what was given. (So they are behind what writes into
    it, which has a name with "_" behind it.)"""
    taken = {_memory(held) for held in _tensors(given)}
    return name == "aten.lift_fresh" or all(_memory(held) in taken for held in _tensors(result))


def _matrix(name: str, result: torch.Tensor) -> tuple[int, int]:
    """(rows, columns) of what a product makes, or of each in a batch; a convolution has a row for each place in each sample."""
    shape = [hint(size) or 1 for size in result.shape]
    columns = shape[1] if "conv" in name else shape[-1]
    return _elements(result) // columns if "conv" in name else shape[-2] if len(shape) > 1 else 1, columns


def _tensors(held: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor)]


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor holds its data in: itself, unless it is made of others (quantised weights)."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    flatten: Callable[[], Any] = getattr(tensor, "__tensor_flatten__")  # noqa: B009
    return [part for name in flatten()[0] for part in _parts(getattr(tensor, name))]


def _memory(tensor: torch.Tensor) -> int:
    try:
        return memory_of(_parts(tensor)[0])
    except (NotImplementedError, RuntimeError):  # tensors inside vmap and sparse ones have none of their own
        return id(tensor)


def _elements(tensor: torch.Tensor) -> int:
    """0 where the size depends on data."""
    return hint(tensor.numel()) or 0


def _bytes(tensor: torch.Tensor) -> int:
    """Of the view at hand, and no more than there are: an expanded one holds less than its size says."""
    return sum(min(_elements(part) * part.element_size(), _stored(part)) for part in _parts(tensor))


def _stored(tensor: torch.Tensor) -> int:
    try:
        return sum(hint(part.untyped_storage().nbytes()) or 0 for part in _parts(tensor))
    except (NotImplementedError, RuntimeError):
        return _elements(tensor) * tensor.element_size()
