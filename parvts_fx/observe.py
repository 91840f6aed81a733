"""How to see what happened: a log line and, on request, a runnable dump of the graph per pass."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.fx import GraphModule

from parvts_fx.analysis.values import hint_shape, value
from parvts_fx.passes.base import PassRecord, State

log = logging.getLogger("parvts_fx")

DUMP_VARIABLE = "PARVTS_FX_DUMP"


def log_hook(record: PassRecord, state: State) -> None:
    """One line per pass, at level INFO; ``TORCH_LOGS="+parvts_fx"`` shows it."""
    log.info("%s", record)


def dump_hook(module: GraphModule, example_inputs: Sequence[object]) -> Callable[[PassRecord, State], None]:
    """A hook that writes ``graph<n>/<position>_<pass>.py`` below the folder named by the variable PARVTS_FX_DUMP."""
    root = os.environ.get(DUMP_VARIABLE)
    if not root:
        return lambda record, state: None
    folder = _fresh_folder(Path(root))
    _write(folder / "00_captured.py", module)

    def dump(record: PassRecord, state: State) -> None:
        _write(folder / f"{record.position:02d}_{record.name}.py", state.module)

    return dump


def _fresh_folder(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        folder = root / f"graph{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("counting does not end")


def _write(path: Path, module: GraphModule) -> None:
    """Write a graph as a Python file that runs on random inputs of the traced sizes."""
    module.recompile()
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    lines = []
    for node in inputs:
        example = value(node)
        if isinstance(example, torch.Tensor):
            shape = hint_shape(example)
            if example.is_floating_point():
                made = f"0.02 * torch.randn({shape}, dtype={example.dtype})"
            else:
                made = f"torch.ones({shape}, dtype={example.dtype})"
        else:
            made = repr(int(example)) if isinstance(example, (int, torch.SymInt)) else repr(example)
        lines.append(f"    {made},  # {node.name}")
    code = module.graph.python_code("self", verbose=False)
    imports = sorted(
        f"import {held.__name__.split('.')[0]}" if name == held.__name__.split(".")[0] else f"{name} = None  # {held!r}"
        for name, held in code.globals.items() if hasattr(held, "__name__") and isinstance(held, type(os))
    )
    text = "\n".join([
        '"""A graph of parvts_fx; run this file to evaluate it on random inputs."""', "",
        *sorted({"import torch", "from torch import device", "from math import inf, nan", *imports}), "",
        *(f"{name} = {_spell(held)}" for name, held in code.globals.items() if _spell(held)), "",
        code.src.replace("def forward(self, ", "def forward(self=None, *, _=None, " if not inputs else "def forward(self, "), "",
        "inputs = [", *lines, "]", "",
        'if __name__ == "__main__":', "    for result in forward(None, *inputs):",
        "        print(tuple(result.shape) if isinstance(result, torch.Tensor) else result)", "",
    ])
    path.write_text(text)


def _spell(held: object) -> str:
    """Source text for a global of generated code, or empty if the imports already bring it."""
    if isinstance(held, torch.dtype):
        return ""
    return ""
