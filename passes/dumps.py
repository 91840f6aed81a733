"""How to see what happened: a log line per pass and, on request, a runnable dump of the graph after each pass."""

from __future__ import annotations

import itertools
import logging
import os
import textwrap
import types
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.fx import GraphModule

from parvts_fx.analysis.records import VisualMerge
from parvts_fx.analysis.values import ancestors, hint, hint_shape, is_equality, value
from parvts_fx.capture.graphs import copy_graph_module
from parvts_fx.passes.describe import describe
from parvts_fx.pipeline import PassRecord, Work

log = logging.getLogger("parvts_fx")

DUMP_VARIABLE = "PARVTS_FX_DUMP"


def log_hook(record: PassRecord, work: Work) -> None:
    """One line per pass, at level INFO; ``TORCH_LOGS="+parvts_fx"`` shows it."""
    log.info("%s", record)


class Dump:
    """A hook that writes ``graph<n>/<position>_<pass>`` below the folder that the variable PARVTS_FX_DUMP names.

    A ``.py`` file for a graph, which runs; a ``.txt`` for a plan. Nothing is written for a graph that has no merge.
    """

    def __init__(self, module: GraphModule):
        root = os.environ.get(DUMP_VARIABLE)
        self._root = Path(root) if root else None
        self._folder: Path | None = None
        self._stand_ins: Mapping[str, str] = {}
        self._waiting: dict[str, GraphModule] = {"00_captured": copy_graph_module(module)} if root else {}
        """Graphs of which it is not known yet whether they have a merge, and which inputs make tokens visual."""

    def __call__(self, record: PassRecord, work: Work) -> None:
        name = f"{record.position:02d}_{record.name}"
        if self._root is None:
            return
        if self._folder is None:
            self._waiting[name] = copy_graph_module(work.module)
        elif record.changes_graph:
            (self._folder / f"{name}.py").write_text(as_program(work.module, self._stand_ins))
        elif work.plan is not None:
            (self._folder / f"{name}.txt").write_text(f"{describe(work.plan)}\n")

    def tell(self, merge: VisualMerge, visual_tokens: int) -> None:
        """What is merged, and how many visual tokens a sample has: from now on there is something to write."""
        if self._root is None:
            return
        self._folder = _fresh_folder(self._root)
        self._stand_ins = _visual_stand_ins(merge, visual_tokens)
        for name, module in self._waiting.items():
            (self._folder / f"{name}.py").write_text(as_program(module, self._stand_ins))
        self._waiting.clear()


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


def _visual_stand_ins(merge: VisualMerge, count: int) -> dict[str, str]:
    """Inputs that make the first ``count`` positions of each prompt visual, which random ones would not."""
    needed = ancestors(merge.masks)
    tokens = [leaf for node in needed if is_equality(node) for leaf in node.args if isinstance(leaf, int)]
    made = {}
    for node in needed:
        example = value(node)
        if node.op != "placeholder" or not isinstance(example, torch.Tensor) or example.dim() < 2:
            continue
        shape = hint_shape(example)
        visual = f"(torch.arange({shape[1]}) < {count}).view(1, -1{', 1' * (len(shape) - 2)}).expand({shape})"
        if example.dtype == torch.bool:
            made[node.name] = visual
        elif tokens and not example.is_floating_point():
            made[node.name] = f"torch.where({visual}, {tokens[0]}, {tokens[0]} - 1)"
    return made


def as_program(module: GraphModule, stand_ins: Mapping[str, str] | None = None) -> str:
    """A graph as the text of a Python program that runs on random inputs of the traced sizes.

    Weights and inputs are random, ids and positions are one, masks are false: the program shows what is computed on
    which shapes, not the user's data. Submodules that the graph calls are left out; Dynamo's graphs have none.

    Args:
        stand_ins: source text for some inputs, by placeholder, where those would not do.
    """
    code = module.graph.python_code("self", verbose=False)
    held = {node.target: _attribute(module, node.target) for node in module.graph.nodes if node.op == "get_attr"}
    inputs = [(node.name, value(node)) for node in module.graph.nodes if node.op == "placeholder"]
    imports = {"import torch", *(_import(name, entry) for name, entry in code.globals.items())}
    constants = [f"        attach(self, {name!r}, {_spell(entry)})" for name, entry in held.items()]
    return "\n".join([
        '"""A graph of parvts_fx: run this file to evaluate it on random inputs."""', "", *sorted(imports), "", "",
        "def attach(module, path, held):",
        '    *parents, name = path.split(".")',
        "    for parent in parents:",
        "        if not hasattr(module, parent):",
        "            setattr(module, parent, torch.nn.Module())",
        "        module = getattr(module, parent)",
        "    setattr(module, name, held)", "", "",
        "class Graph(torch.nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        *constants,
        textwrap.indent(code.src, "    "), "",
        "inputs = [",
        *(f"    {(stand_ins or {}).get(name) or _spell(example)},  # {name}" for name, example in inputs),
        "]", "",
        'if __name__ == "__main__":',
        "    with torch.no_grad():",
        "        results = Graph()(*inputs)",
        "    for result in results if isinstance(results, (tuple, list)) else [results]:",
        "        print(tuple(result.shape) if isinstance(result, torch.Tensor) else result)", "",
    ])


def _attribute(module: GraphModule, path: str) -> object:
    held: object = module
    for name in path.split("."):
        held = getattr(held, name)
    return held


def _import(name: str, held: object) -> str:
    """The import that binds one of the generated code's globals."""
    if isinstance(held, types.ModuleType):
        return f"import {held.__name__}" if held.__name__ == name else f"import {held.__name__} as {name}"
    if isinstance(held, float):
        return f"from math import {name}"  # inf and nan are all that FX binds
    owner, own = getattr(held, "__module__", None), getattr(held, "__name__", None)
    if owner is None or own is None:
        return f"{name} = None  # {held!r} cannot be written down"
    if owner == "builtins" and own == "NoneType":
        return f"{name} = type(None)"
    return f"from {owner} import {own} as {name}"


def _spell(example: object) -> str:
    """Source text that makes a stand-in for an example value."""
    if isinstance(example, torch.Tensor):
        shape, dtype = hint_shape(example), example.dtype
        if dtype.is_floating_point:
            return f"0.02 * torch.randn({shape}, dtype={dtype})" if example.dim() else f"torch.ones((), dtype={dtype})"
        return f"torch.{'zeros' if dtype == torch.bool else 'ones'}({shape}, dtype={dtype})"
    return repr(hint(example)) if isinstance(example, torch.SymInt) else repr(example)
