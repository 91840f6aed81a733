"""parvts beside what people use in its place, on one model and one prompt: ``python -m bench.compare``.

Three studies, each in one process, with everything that is compared taking turns: all methods with all columns, the
prefill against the number of visual tokens kept, and prefill and decode step against the length of the prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from bench import figures
from bench.demo import HEAD_DIM, build_model
from bench.floor import Floor, decoder_weights
from bench.measuring import (
    Built,
    Company,
    Times,
    answer,
    build,
    in_turns,
    machine,
    many_compiles,
    peak_memory,
    seconds,
    spread,
)
from bench.methods import DEPTH, LOWERINGS, QUICKER, methods
from bench.models import Scene, build_scene, cache_bytes
from bench.plots import plot_kept, plot_lengths
from bench.tables import progress, quieten
from parvts_fx.schedules import SCHEDULES

RESULTS = Path(__file__).parent / "results"
STUDIES = ("methods", "kept", "lengths")
KNOWN = tuple(method.name for method in methods())
FASTV_LAYERS = SCHEDULES["fastv"][0].at


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured. The defaults are the full run."""

    layers: int = 16
    width: int = 1024
    visual: int = 576
    depth: int = DEPTH
    batch: tuple[int, ...] = (1, 4)
    kept: int = 64
    sweep: tuple[int, ...] = (32, 64, 128, 192, 288)
    """Visual tokens kept, for the plot."""

    lengths: tuple[int, ...] = (144, 576, 1296, 2880)
    """Visual tokens of the prompt, for the other plot."""

    methods: tuple[str, ...] = KNOWN
    swept: tuple[str, ...] = ("inductor", "downsampled image", "FastV", "joint", "parvts", f"parvts {QUICKER}")
    """Methods of the plot by tokens kept."""

    lengthened: tuple[str, ...] = ("inductor", "FastV", "parvts", f"parvts {QUICKER}")
    """Methods of the plot by length. A smaller image has no place there: its time hangs on what is kept alone."""

    repeats: int = 7
    tokens: int = 32
    lowering: str = "inductor"
    fresh: bool = True
    """Whether every method compiles with empty caches of Inductor's."""

    def __post_init__(self) -> None:
        if self.width % HEAD_DIM:
            raise ValueError(f"--width: {self.width} is no multiple of {HEAD_DIM} (the size of a head)")
        if self.layers <= FASTV_LAYERS:
            raise ValueError(f"--layers: {self.layers} must be more than {FASTV_LAYERS}, behind which FastV chooses")
        if not 1 <= self.depth <= self.layers:
            raise ValueError(f"--depth: {self.depth} is not within 1 to --layers={self.layers}")
        for name, kept, visual in (("kept", self.kept, self.visual), ("sweep", max(self.sweep), self.visual),
                                   ("lengths", self.kept, min(self.lengths))):
            if kept > visual:
                raise ValueError(f"--{name}: cannot keep {kept} of {visual} visual tokens")
        for name in ("methods", "swept", "lengthened"):
            if not {"inductor", "parvts"} <= set(getattr(self, name)):
                raise ValueError(f"--{name}: inductor and parvts must be among them")
        if self.tokens < 2:
            raise ValueError("--tokens: at least 2, for a decode step to be measured")


SHORT = Settings(layers=4, width=512, batch=(1,), sweep=(64, 192), lengths=(144, 576),
                 methods=("eager", "inductor", "downsampled image", "random", "FastV", "joint", "parvts"),
                 swept=("inductor", "parvts"), lengthened=("inductor", "parvts"), repeats=3, tokens=8, fresh=False)
"""As few compilations as show every kind of method: they are what takes minutes."""


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[tuple[str, ...], Settings, Path]:
    """The command line: which studies, what to measure, and where results go."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", default=STUDIES, metavar="study",
                        help=f"{', '.join(STUDIES)}; the results of the others stay in the JSON")
    parser.add_argument("--short", action="store_true", help="a small model, one batch, few points: under five minutes")
    for name in ("layers", "width", "visual", "depth", "kept", "repeats", "tokens"):
        help = f"{getattr(Settings, name)}, with --short {getattr(SHORT, name)}"
        parser.add_argument(f"--{name}", type=int, help=help)
    for name in ("batch", "sweep", "lengths"):
        parser.add_argument(f"--{name}", type=int, nargs="+", help=" ".join(map(str, getattr(Settings, name))))
    for name in ("methods", "swept", "lengthened"):
        help = ", ".join(getattr(Settings, name))
        parser.add_argument(f"--{name}", nargs="+", choices=KNOWN, metavar="NAME", help=help)
    parser.add_argument("--lowering", choices=LOWERINGS, help="eager: nothing is compiled, to try the benchmark itself")
    parser.add_argument("--out", type=Path, help="folder for JSON and plots: bench/results, with --short demo_out")
    given = vars(parser.parse_args(arguments))
    short, out, studies = given.pop("short"), given.pop("out"), tuple(given.pop("studies"))
    if unknown := set(studies) - set(STUDIES):
        parser.error(f"unknown study {sorted(unknown)[0]!r}: choose from {', '.join(STUDIES)}")
    chosen = {name: tuple(held) if isinstance(held, list) else held for name, held in given.items() if held is not None}
    try:
        settings = dataclasses.replace(SHORT if short else Settings(), **chosen)
    except ValueError as error:
        parser.error(str(error))
    out = out or (Path("demo_out") if short else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    return studies, settings, out


class Study:
    """Builds and measures methods under one progress display."""

    def __init__(self, settings: Settings, model: torch.nn.Module, progress: Progress):
        self.settings, self.model, self._progress = settings, model, progress
        self._backend = LOWERINGS[settings.lowering]
        self._methods = {method.name: method for method in methods(settings.depth)}

    def all_methods(self) -> list[dict[str, Any]]:
        """Every method with every column, for every batch size."""
        torch.compile(torch.sin, backend=self._backend)(torch.ones(16, device=self.model.device))  # what a process pays once
        rows = []
        for batch in self.settings.batch:
            rows += self._all_methods(batch)
            torch._dynamo.reset()
        return rows

    def _all_methods(self, batch: int) -> list[dict[str, Any]]:
        settings, names = self.settings, self.settings.methods
        advance = self._begin(f"all methods, batch {batch}", len(names) + 1 + settings.repeats)
        scene, company = build_scene(self.model, settings.visual, batch), Company(self._backend)
        built = [self._build(name, scene, settings.kept, advance, company, settings.fresh) for name in names]
        return self._measure(built, settings.tokens, advance)

    def by_kept(self) -> list[dict[str, Any]]:
        """The prefill alone, for several numbers of visual tokens kept."""
        settings = self.settings
        points = sorted(set(settings.sweep) - {settings.visual})
        turns = 1 + settings.repeats
        advance = self._begin("visual tokens kept", len(points) * (len(settings.swept) - 1 + turns) + 1)
        scene, rows = build_scene(self.model, settings.visual), []
        whole = self._build("inductor", scene, settings.visual, advance)
        for kept in points:
            built = [whole, *(self._build(name, scene, kept, advance) for name in settings.swept if name != "inductor")]
            device = scene.ids.device
            calls = [functools.partial(seconds, one.run_prefill, device) for one in built]
            taken = in_turns(calls, settings.repeats, 1, advance)
            rows += [{"method": one.method.name, "visual": scene.visual, "asked": kept, "kept": one.kept,
                      "prefill": spread(times), "bound": bound(times, taken[0], one.flops, whole.flops),
                      "flops": one.flops} for one, times in zip(built, taken)]
        return rows

    def by_length(self) -> list[dict[str, Any]]:
        """Prefill and decode step for several lengths of the prompt, with the features given."""
        settings, rows = self.settings, []
        tokens = min(settings.tokens, 9)
        turns = 1 + settings.repeats
        advance = self._begin("length of the prompt", len(settings.lengths) * (len(settings.lengthened) + turns))
        company = Company(self._backend)
        for visual in settings.lengths:
            scene = build_scene(self.model, visual, tower=False)
            built = [self._build(name, scene, settings.kept, advance, company) for name in settings.lengthened]
            rows += self._measure(built, tokens, advance)
        return rows

    def _begin(self, title: str, total: int) -> Callable[..., None]:
        """A line of the progress display; returns what advances it and tells what is next."""
        task = self._progress.add_task(title, total=total)

        def advance(doing: str = "measuring", steps: int = 1) -> None:
            self._progress.update(task, description=f"{title}: {doing}", advance=steps)

        return advance

    def _build(self, name: str, scene: Scene, kept: int, advance: Callable[..., None], company: Company | None = None,
               fresh: bool = False) -> Built:
        advance(name, 0)
        built = build(self._methods[name], scene, kept, backend=self._backend, fresh=fresh)
        if company is not None:
            answer(company.join(built), 2)  # compiles tower and step where nobody has yet
        advance(name)
        return built

    def _measure(self, built: Sequence[Built], tokens: int, advance: Callable[..., None]) -> list[dict[str, Any]]:
        whole = next(one for one in built if one.method.name == "inductor")
        weights = decoder_weights(self.model)
        floors = [Floor(one.graph or whole.graph, weights, one.method.quicker_products, one.scene.first_visual) for one in built]
        device = weights[0].device

        def measure(one: Built, floor: Floor) -> tuple[Times, float]:
            return answer(one, tokens)[0], seconds(floor, device)

        calls = [lambda pair=pair: measure(*pair) for pair in zip(built, floors)]
        taken = in_turns(calls, self.settings.repeats, 1, advance)
        plain = [times.prefill for times, _ in taken[built.index(whole)]]
        rows = []
        for one, results in zip(built, taken):
            times, alone = zip(*results)
            prefill = [each.prefill for each in times]
            flops = whole.flops if one.graph is None else one.flops
            rows.append({
                "method": one.method.name, "batch": one.scene.batch, "prompt": one.scene.prompt,
                "visual": built[0].scene.visual, "kept": one.kept, "prefill": spread(prefill),
                "first_token": spread([each.first_token for each in times]) if one.tower is not None else None,
                "whole": spread([each.whole for each in times]) if one.tower is not None else None,
                "tokens": tokens, "step": spread([each.step for each in times]),
                "flops": flops, "bound": bound(prefill, plain, flops, whole.flops), "floor": spread(alone),
                "peak_memory": peak_memory(one.run_prefill, device), "cache_bytes": cache_bytes(one.run_prefill()[1]),
                "compile_seconds": one.compile_seconds,
            })
        return rows


def bound(times: Sequence[float], plain: Sequence[float], flops: int, plain_flops: int) -> dict[str, float]:
    """How much faster than Inductor the FLOPs allow, how much faster it is, and the seconds that the FLOPs allow."""
    allowed = plain_flops / flops
    typical = spread(plain)["median"]
    return {"allowed": allowed, "reached": typical / spread(times)["median"], "seconds": typical / allowed}


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run studies; prints tables, writes compare.json and plots, and returns what the JSON holds."""
    studies, settings, out = parse_arguments(arguments)
    quieten()
    console = Console()
    model = build_model(settings.layers, settings.width)
    path = out / "compare.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    with progress(console) as display, many_compiles():
        study = Study(settings, model, display)
        measures = {"methods": study.all_methods, "kept": study.by_kept, "lengths": study.by_length}
        for name in studies:
            rows = measures[name]()
            found[name] = {"machine": machine(model.device), "settings": dataclasses.asdict(settings), "rows": rows}
            path.write_text(json.dumps(found, indent=1) + "\n")
            torch._dynamo.reset()
    written = [path]
    if "methods" in studies:
        console.print(*figures.methods(found["methods"]))
    if "kept" in studies:
        console.print(figures.kept(found["kept"]))
        written.append(plot_kept(found["kept"]["rows"], out / "prefill_by_kept.png"))
    if "lengths" in studies:
        console.print(figures.lengths(found["lengths"]))
        written.append(plot_lengths(found["lengths"]["rows"], out / "by_length.png"))
    console.print("Written:", *map(str, written))
    return found


if __name__ == "__main__":
    main()
