"""What a graph's matrix products and attention calls cost alone: no method that computes them can be faster."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from parvts_fx.analysis.values import fake_mode_of, value
from parvts_fx.backends.linear import prefers_onednn
from parvts_fx.capture import WithPrefix

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default: torch.mm, aten.addmm.default: torch.addmm, aten.bmm.default: torch.bmm,
             aten.baddbmm.default: torch.baddbmm}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A tensor without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    @property
    def matrix(self) -> Layout:
        """One of the matrices, where the layout is one matrix for every sample; else the layout itself."""
        shared = len(self.shape) == 3 and self.stride[0] == 0
        return Layout(self.shape[1:], self.stride[1:], self.dtype) if shared else self

    def allocate(self, device: torch.device) -> torch.Tensor:
        """Random numbers, or true, in this layout."""
        extent = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride))
        flat = torch.randn(extent, device=device).mul_(0.02).to(self.dtype) if self.dtype.is_floating_point else \
            torch.ones(extent, device=device, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclasses.dataclass(frozen=True)
class Call:
    """One matrix product or attention call: its function, and arguments with layouts in place of tensors."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Layout

    @property
    def is_attention(self) -> bool:
        return self.function is F.scaled_dot_product_attention


class _Products(TorchDispatchMode):
    """Notes the matrix products that run below it. Outer products are left out: compilers make them pointwise."""

    def __init__(self, calls: list[Call]):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _PRODUCTS and args[-1].shape[-2] > 1:
            self._calls.append(_call(_PRODUCTS[function], args, kwargs or {}, result))
        return result


def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: torch.Tensor) -> Call:
    def laid_out(held: Any) -> Any:
        return Layout.of(held) if isinstance(held, torch.Tensor) else held

    return Call(function, tuple(laid_out(held) for held in args), {k: laid_out(v) for k, v in kwargs.items()},
                Layout.of(result))


def list_calls(graph: GraphModule, shared_prefix: int = 0) -> list[Call]:
    """All matrix products and attention calls of a captured graph, in order; nothing is computed.

    Args:
        shared_prefix: with constant weights, how many leading positions both paths share.
    """
    calls: list[Call] = []

    class Reader(WithPrefix):
        def run_node(self, node: Node) -> Any:
            is_attention = node.target is F.scaled_dot_product_attention
            with contextlib.nullcontext() if is_attention else _Products(calls):
                result = super().run_node(node)
            if is_attention:
                args, kwargs = self.fetch_args_kwargs_from_env(node)
                calls.append(_call(F.scaled_dot_product_attention, args, kwargs, result))
            return result

    inputs = [value(node) for node in graph.graph.nodes if node.op == "placeholder"]
    with fake_mode_of(graph.graph), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        Reader(graph, shared_prefix).run(*inputs)
    return calls


class Floor:
    """Calling it runs a graph's matrix products and attention calls, back to back, and throws the results away.

    Operands that look like transposed weights are taken from the model's own, one after the other, so that every layer
    reads other memory, as in the model. Activations of one layout share a buffer, as they do in what Inductor writes.
    """

    def __init__(self, graph: GraphModule, weights: Sequence[torch.Tensor], quicker_products: bool = False,
                 shared_prefix: int = 0):
        self._quicker_products = quicker_products
        self.calls = list_calls(graph, shared_prefix)
        self._device = weights[0].device
        self._weights: dict[Layout, list[torch.Tensor]] = defaultdict(list)
        for weight in weights:
            if weight.dim() == 2:
                self._weights[Layout.of(weight.t())].append(weight.t())
        self._used: dict[Layout, int] = defaultdict(int)
        self._buffers: dict[tuple[object, Layout], torch.Tensor] = {}
        self.bound = [self._bind(call) for call in self.calls]

    def __call__(self) -> None:
        for function, args, kwargs in self.bound:
            function(*args, **kwargs)

    def _bind(self, call: Call) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
        args = [self._operand(role, held) for role, held in enumerate(call.arguments)]
        kwargs = {name: self._operand(name, held) for name, held in call.keywords.items()}
        if self._quicker_products and call.function is torch.mm and call.arguments[1] in self._weights:
            (rows, inner), (_, columns) = (held.shape for held in call.arguments)
            if prefers_onednn(rows, columns, inner, False, torch.get_num_threads()):
                return torch.ops.parvts_fx.linear, [args[0], args[1].t(), None], {}
        if not call.is_attention:
            kwargs["out"] = self._buffer("out", call.result)
        return call.function, args, kwargs

    def _operand(self, role: object, held: Any) -> Any:
        if not isinstance(held, Layout):
            return held
        matrix = held.matrix
        found = self._weights.get(matrix)
        if found is None:
            return self._buffer(role, held)
        self._used[matrix] += 1
        return found[(self._used[matrix] - 1) % len(found)].expand(held.shape)

    def _buffer(self, role: object, layout: Layout) -> torch.Tensor:
        if (role, layout) not in self._buffers:
            self._buffers[role, layout] = layout.allocate(self._device)
        return self._buffers[role, layout]


def decoder_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """The weights that a prefill multiplies by, in the order in which it does."""
    parts = (model.model.language_model.layers, model.lm_head)
    return [parameter.detach() for part in parts for parameter in part.parameters()]
