"""What is compared: ways to prefill a prompt with fewer visual tokens, each as fast as its author would write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.fx import GraphModule

import parvts_fx
from bench.models import Prefill, Scene
from parvts_fx.backends.linear import pick_kernels
from parvts_fx.capture import capture

FASTV_LAYERS = 2
DEPTH = 3

SAVINGS: Mapping[str, Mapping[str, Any]] = {"with dead rows": {"skip_dead_rows": False}}
"""What the result without one exact saving is called, and the options that switch it off: each is a row of its own."""


QUICKER = "+ kernels"
"""Of methods whose matrix products run on the library that is quicker on this processor (linear_kernels="auto")."""

Backend = Callable[[GraphModule, list[object]], Callable[..., Any]]


def inductor(mode: str | None = None) -> Backend:
    """Inductor as torch.compile calls it, in one of its modes."""
    wrapper = torch._TorchCompileInductorWrapper(mode, None, None)
    return lambda module, example_inputs: wrapper(module, list(example_inputs))


def nothing(module: GraphModule, example_inputs: list[object]) -> Callable[..., Any]:
    """A backend that compiles nothing, to try the benchmark itself."""
    return module.forward


def quicker_products(backend: Backend) -> Backend:
    """A backend whose float32 matrix products on CPU run on the quicker library, as with linear_kernels="auto"."""
    return lambda module, example_inputs: backend(pick_kernels(module), example_inputs)


LOWERINGS = {"inductor": inductor(), "eager": nothing}


class Recorder:
    """A backend that keeps the graphs it hands on: what they cost can be counted, and replayed in parts."""

    def __init__(self, backend: Backend):
        self.graphs: list[GraphModule] = []
        self._backend = backend

    def __call__(self, module: GraphModule, example_inputs: list[object]) -> Callable[..., Any]:
        self.graphs.append(capture(module, example_inputs))
        return self._backend(module, example_inputs)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to prefill."""

    name: str
    make: Callable[[Scene, int], nn.Module]
    """From the scene and the number of visual tokens kept: a module with Prefill's inputs and results."""

    options: Mapping[str, Any] | None = None
    """Of parvts_fx.compile, for what goes through it."""

    compiled: bool = True
    downsamples: bool = False

    quicker_products: bool = False
    """Whether parvts chooses the kernels of the matrix products; without, all methods have Inductor's choice."""

    keeps_all: bool = False
    """Whether it computes the whole prompt whatever is asked for."""

    def scene(self, scene: Scene, kept: int) -> Scene:
        """What the method is given: the scene, or the same with a smaller picture."""
        return scene.downsampled(kept) if self.downsamples else scene

    def lowering(self, backend: Backend) -> Backend:
        """The backend with the method's choice of kernels."""
        return quicker_products(backend) if self.quicker_products else backend

    def compile(self, module: nn.Module, backend: Backend, kept: int | None = None,
                **arguments: Any) -> Callable[..., Any]:
        """A module as this method's user would run it: eagerly, compiled, or compiled through parvts.

        Args:
            backend: what lowers the graph.
            kept: visual tokens to keep; None for a module that prunes nothing, such as a decode step.
            arguments: torch.compile's.
        """
        if not self.compiled:
            return module
        if self.options is None:
            return torch.compile(module, backend=backend, fullgraph=True, **arguments)
        count = {} if kept is None else {"keep_tokens": kept}
        return parvts_fx.compile(module, lowering=backend, strict=True, **count, **self.options, **arguments)


def methods(depth: int = DEPTH) -> tuple[Method, ...]:
    """All methods; "inductor" is what the others are compared with."""
    def whole(scene: Scene, kept: int) -> nn.Module:
        return Prefill(scene.model)

    def ours(name: str, **options: Any) -> Method:
        return Method(name, whole, options={"migration_depth": depth, **options})

    return (
        Method("eager", whole, compiled=False, keeps_all=True),
        Method("inductor", whole, keeps_all=True),
        Method(f"inductor {QUICKER}", whole, keeps_all=True, quicker_products=True),
        Method("downsampled image", whole, downsamples=True),
        Method("random", lambda scene, kept: RandomChoice(scene, kept)),
        Method("FastV", lambda scene, kept: FastV(scene, kept)),
        ours("joint", paths="joint"),
        ours("parvts"),
        *(ours(f"parvts {name}", **switch) for name, switch in SAVINGS.items()),
        ours("parvts fusion 0.5", fusion=0.5),
        ours("parvts fusion 0.5, prefix twice", fusion=0.5, share_prefix=False),
        dataclasses.replace(ours(f"parvts {QUICKER}"), quicker_products=True),
    )


class Layers(Prefill):
    """The decoder layer by layer, for methods that change the rows on the way. Llama's layers, no padding.

    Without a mask the attention calls are causal by flag, which stays right for rows left out in order.
    """

    def __init__(self, scene: Scene, kept: int):
        super().__init__(scene.model)
        self.kept, self.visual, self.first = kept, scene.visual, scene.first_visual

    def run(self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], cache: Any, start: int,
            stop: int) -> torch.Tensor:
        """Rows [batch, rows, width] through layers start to stop - 1."""
        for layer in self.model.model.language_model.layers[start:stop]:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, past_key_values=cache,
                           use_cache=True)
        return hidden

    def finish(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the last row, [batch, vocabulary]."""
        return self.model.lm_head(self.model.model.language_model.norm(hidden[:, -1]))

    def rows_with(self, chosen: torch.Tensor, prompt: int) -> torch.Tensor:
        """Positions of text and chosen visual tokens, in order; chosen [batch, kept] counts visual tokens from 0."""
        everywhere = torch.arange(prompt, device=chosen.device).expand(chosen.shape[0], -1)
        visual = chosen.sort(-1).values + self.first
        return torch.cat([everywhere[:, :self.first], visual, everywhere[:, self.first + self.visual:]], 1)


class RandomChoice(Layers):
    """A random choice of visual tokens, before layer 0; positions stay those of the full prompt."""

    def __init__(self, scene: Scene, kept: int, seed: int = 0):
        super().__init__(scene, kept)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.stack([torch.randperm(scene.visual, generator=generator)[:kept] for _ in range(scene.batch)])
        rows = self.rows_with(chosen, scene.prompt)
        features = chosen.sort(-1).values + torch.arange(scene.batch)[:, None] * scene.visual
        self.register_buffer("rows", rows.to(scene.ids.device))
        self.register_buffer("taken", features.flatten().to(scene.ids.device))

    def forward(self, ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, Any]:
        text = self.model.model.language_model
        hidden = self.merge(ids.gather(1, self.rows), features[self.taken])
        cache = transformers.DynamicCache(config=text.config)
        hidden = self.run(hidden, text.rotary_emb(hidden, self.rows), cache, 0, len(text.layers))
        return self.finish(hidden), cache


class FastV(Layers):
    """FastV (arXiv 2403.06764) with K = 2: behind the second layer go on with the visual tokens most attended to there.

    Written from the paper's description. Where it leaves a choice, the faster one is taken: the attention that the
    prompt's last row pays, averaged over heads (as in the authors' code), so that no attention map is materialised:
    that row's weights are computed again, from its query and the layer's cached keys.
    """

    def forward(self, ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, Any]:
        text = self.model.model.language_model
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        hidden = self.merge(ids, features)
        cosine, sine = text.rotary_emb(hidden, positions)
        cache = transformers.DynamicCache(config=text.config)
        before = self.run(hidden, (cosine, sine), cache, 0, FASTV_LAYERS - 1)
        hidden = self.run(before, (cosine, sine), cache, FASTV_LAYERS - 1, FASTV_LAYERS)
        rows = self.rows_with(self.choose(before, cosine, sine, cache), ids.shape[1])
        hidden = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
        rotary = (cosine[0][rows], sine[0][rows])
        hidden = self.run(hidden, rotary, cache, FASTV_LAYERS, len(text.layers))
        return self.finish(hidden), cache

    def choose(self, entering: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, cache: Any) -> torch.Tensor:
        """The visual tokens with the most attention, [batch, kept], counted from 0.

        Args:
            entering: what the ranking layer was given, [batch, prompt, width].
            cosine, sine: [1, prompt, head size].
        """
        layer = self.model.model.language_model.layers[FASTV_LAYERS - 1]
        attention, keys = layer.self_attn, cache.layers[FASTV_LAYERS - 1].keys
        query = attention.q_proj(layer.input_layernorm(entering[:, -1:]))
        query = query.view(*query.shape[:-1], -1, attention.head_dim).transpose(1, 2)
        half = attention.head_dim // 2
        turned = torch.cat([-query[..., half:], query[..., :half]], -1)
        query = query * cosine[:, None, -1:] + turned * sine[:, None, -1:]
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
        weights = (query @ keys.transpose(2, 3) * attention.scaling).softmax(-1, dtype=torch.float32)
        received = weights[:, :, 0, self.first:self.first + self.visual].mean(1)
        return received.topk(self.kept, dim=-1).indices
