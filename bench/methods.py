"""What is compared: ways to prefill a prompt with fewer visual tokens.

All that prune do so as schedules through the same backend: they differ in their stages alone. So every layer caches the rows
that are left in the end, also for schedules whose authors keep all rows in the caches of the layers in front of a choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import parvts_fx
from bench.models import Scene
from parvts_fx.backends import lowering
from parvts_fx.backends.linear import pick_kernels
from parvts_fx.capture import capture
from parvts_fx.options import parse_options
from parvts_fx.schedules import SCHEDULES
from parvts_fx.stages import Stage

DEPTH = 3

SAVINGS: Mapping[str, Mapping[str, Any]] = {"with dead rows": {"skip_dead_rows": False}}
"""What the result without one exact saving is called, and the options that switch it off: each is a row of its own."""

QUICKER = "+ kernels"
"""Of methods whose matrix products run on the library that is quicker on this processor (linear_kernels="auto")."""

Backend = Callable[[GraphModule, list[object]], Callable[..., Any]]
Stages = Callable[[int], tuple[Stage, ...]]
"""From the number of visual tokens that are left in the end to a schedule."""


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


def own_inductor(module: GraphModule, example_inputs: list[object]) -> Callable[..., Any]:
    """Inductor as parvts calls it by default, but for the choice of matrix products."""
    return lowering.inductor(module, example_inputs, parse_options({"linear_kernels": "inductor"}))


LOWERINGS = {"inductor": inductor(), "eager": nothing}
OWN: Mapping[Backend, Backend] = {LOWERINGS["inductor"]: own_inductor}
"""What takes a lowering's place in methods that go through parvts: what their users run."""


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
    stages: Stages | None = None
    """For what goes through parvts_fx.compile."""

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else parvts_fx.compile is given."""

    compiled: bool = True
    downsamples: bool = False

    quicker_products: bool = False
    """Whether parvts chooses the kernels of the matrix products; without, all methods have Inductor's choice."""

    @property
    def keeps_all(self) -> bool:
        """Whether it computes the whole prompt whatever is asked for."""
        return self.stages is None and not self.downsamples

    def scene(self, scene: Scene, kept: int) -> Scene:
        """What the method is given: the scene, or the same with a smaller picture."""
        return scene.downsampled(kept) if self.downsamples else scene

    def lowering(self, backend: Backend) -> Backend:
        """The backend with the method's choice of kernels."""
        backend = backend if self.stages is None else OWN.get(backend, backend)
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
        if self.stages is None:
            return torch.compile(module, backend=backend, fullgraph=True, **arguments)
        pruning = {} if kept is None else {"stages": self.stages(kept)}
        return parvts_fx.compile(module, lowering=backend, strict=True, **pruning, **self.options, **arguments)


def scaled(schedule: Sequence[Stage], kept: int) -> tuple[Stage, ...]:
    """A schedule of shares with counts in the same proportions, of which the last one is ``kept``."""
    return tuple(dataclasses.replace(stage, keep=round(kept * stage.keep / schedule[-1].keep)) for stage in schedule)


def named(name: str) -> Stages:
    """A published schedule (:mod:`parvts_fx.schedules`) for any number of tokens."""
    return lambda kept: scaled(SCHEDULES[name], kept)


def before_layer_0(rule: str) -> Stages:
    """Tokens chosen in front of the first layer, and the others dropped there."""
    return lambda kept: (Stage(keep=kept, rule=rule),)


def methods(depth: int = DEPTH) -> tuple[Method, ...]:
    """All methods; "inductor" is what the others are compared with."""
    def migrating(**how: Any) -> Stages:
        return lambda kept: (Stage(keep=kept, migrate=depth, **how),)

    ours, weighed = migrating(merge="clusters"), migrating(fusion=0.5)
    return (
        Method("eager", compiled=False),
        Method("inductor"),
        Method(f"inductor {QUICKER}", quicker_products=True),
        Method("downsampled image", downsamples=True),
        *(Method(rule, before_layer_0(rule)) for rule in ("random", "uniform", "diverse")),
        Method("pruned before layer 0", before_layer_0("auto")),
        Method("FastV", named("fastv")),
        Method("PyramidDrop", named("pyramiddrop")),
        Method("joint", migrating(paths="joint")),
        Method("parvts", ours),
        Method("parvts, not merged", migrating()),
        *(Method(f"parvts {name}", ours, switch) for name, switch in SAVINGS.items()),
        Method("parvts fusion 0.5", weighed),
        Method("parvts fusion 0.5, prefix twice", weighed, {"share_prefix": False}),
        Method(f"parvts {QUICKER}", ours, quicker_products=True),
    )
