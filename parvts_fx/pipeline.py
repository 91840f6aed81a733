"""What a pass is, and the runner."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

from torch.fx import GraphModule

if TYPE_CHECKING:
    from parvts_fx.passes.plan import Plan
    from parvts_fx.passes.written import Written


@dataclasses.dataclass
class Work:
    """What a pipeline works on: first a graph, then a plan, then the graph that was written by it."""

    module: GraphModule
    plan: Plan | None = None
    """None until the decoder is known."""

    written: Written | None = None
    """What the emitter wrote; None in front of it."""

    hooks: Sequence[Hook] = ()
    """Called after each pass: verification, logging, dumps."""

    records: list[PassRecord] = dataclasses.field(default_factory=list)
    """One for each pass that has run."""


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass did: how often its pattern was found, and anything worth telling."""

    matches: int
    notes: str = ""


class PlanPass(Protocol):
    """Refines the plan; the graph stays as it is until the emitter writes it. Its fields are its options."""

    name: ClassVar[str]

    def plan(self, plan: Plan) -> tuple[Plan, PassResult]: ...


class GraphPass(Protocol):
    """Rewrites the graph in ``work.module``.

    The graph is valid before and after it, and every node that it adds carries ``meta["example_value"]``. A third party's
    pass is any object with a ``name`` and a ``run`` (or a ``plan``); name it in the option ``extra_passes``, or hand a whole
    pipeline to :func:`parvts_fx.rewrite`.
    """

    name: ClassVar[str]

    def run(self, work: Work) -> PassResult: ...


Pass = PlanPass | GraphPass


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """One line of the pipeline's log."""

    position: int
    name: str
    matches: int
    nodes_added: int
    nodes_removed: int
    milliseconds: float
    notes: str
    changes_graph: bool = True
    """Whether it is a pass that may change the graph, and not the plan alone."""

    def __str__(self) -> str:
        line = (f"{self.position:2d} {self.name}: {self.matches} matches, +{self.nodes_added} -{self.nodes_removed} nodes, "
                f"{self.milliseconds:.1f} ms")
        return f"{line} ({self.notes})" if self.notes else line


Hook = Callable[[PassRecord, Work], None]


def run_pipeline(passes: Sequence[Pass], work: Work) -> None:
    """Run passes in order; after each one, call every hook."""
    for given in passes:
        before, graph, plans = set(work.module.graph.nodes), work.module.graph, hasattr(given, "plan")
        start = time.perf_counter()
        if plans and work.written is not None:
            raise RuntimeError(f"parvts_fx: pass {given.name} refines the plan, and stands behind emit, which has written it")
        result: PassResult
        if plans:
            work.plan, result = cast("PlanPass", given).plan(cast("Plan", work.plan))
        else:
            result = cast("GraphPass", given).run(work)
        elapsed = 1e3 * (time.perf_counter() - start)
        after = set(work.module.graph.nodes)
        kept = len(before & after) if work.written is None or work.module.graph is graph else work.written.copied
        work.records.append(PassRecord(
            len(work.records) + 1, given.name, result.matches, len(after) - kept, len(before) - kept, elapsed, result.notes,
            not plans))
        for hook in work.hooks:
            hook(work.records[-1], work)
