"""``parvts-fx try``: one prompt with all visual tokens and with few, side by side."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import parvts_fx
from parvts_fx.command import measuring, page, telling
from parvts_fx.command.errors import BadInput, because, first_line
from parvts_fx.command.preparing import Prepared, prepare, processors, pruning
from parvts_fx.command.progress import progress
from parvts_fx.command.results import Result
from parvts_fx.command.visuals import as_seen
from parvts_fx.patches import draw_patches, kept_patches
from parvts_fx.report import Report

PATCHES, PLAN = "kept_patches.png", "plan.png"


def run(given: argparse.Namespace) -> int:
    """
    Raises:
        BadInput: what was given cannot be used.
        ValueError: bad options.
    """
    options, names = pruning(given), processors(given)
    for path in (given.html, None if given.json in (None, "-") else Path(given.json)):
        if path is not None and not path.parent.is_dir():
            raise BadInput(f"there is no folder {path.parent} for {path.name}")
    with progress(5 + measuring.WARM_UP + given.repeats) as advance:
        advance("load the model")
        prepared = prepare(given)
        advance("trace a call")
        report, why_none = _explained(prepared, options, given.linear_kernels, names)
        flops = measuring.count_flops(prepared.model, prepared.inputs, report)
        whole, pruned = measuring.twin_of(prepared.model), prepared.model
        measuring.compile_plainly(whole, given.lowering)
        parvts_fx.compile(pruned, lowering=given.lowering, linear_kernels=given.linear_kernels, **options)
        with measuring.many_compiles():
            sides = measuring.compare(
                whole, pruned, prepared.inputs, given.new_tokens, given.repeats, prepared.text_of, advance)
        record = parvts_fx.last_call(pruned)
        assert record is not None, "the model has been called with a prompt"
        advance("draw")
        drawn = _draw(given.out, prepared, record, report)
    notes = [note for note in (why_none, *drawn.notes) if note]
    result = Result.of(_settings(given, prepared, options), prepared.inputs["input_ids"], record, flops, sides, drawn.patches,
                       drawn.plan, notes, report.prefill.costs if report is not None and report.prefill is not None else ())
    _write(given, result)
    return 0


def _explained(
    prepared: Prepared, options: dict[str, Any], linear_kernels: str, names: Sequence[str] | None
) -> tuple[Report | None, str]:
    """What pruning does to a call, or why that cannot be told: some models' ``generate`` does what no call of theirs does."""
    inputs = measuring.prefill_of(prepared.model, prepared.inputs)
    try:
        return parvts_fx.explain(
            prepared.model, options=options | {"linear_kernels": linear_kernels}, processors=names, **inputs), ""
    except (ValueError, RuntimeError, TypeError, LookupError) as error:
        if str(error).startswith("parvts_fx: option"):
            raise
        return None, f"no plan and no FLOPs: {first_line(error)}"


def _settings(given: argparse.Namespace, prepared: Prepared, options: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and with what."""
    device = prepared.inputs["input_ids"].device
    return {
        "model": given.model, "prompt": given.prompt, "images": [str(path) for path in given.image],
        "video": None if given.video is None else str(given.video), "options": options, "lowering": given.lowering,
        "linear_kernels": given.linear_kernels, "new_tokens": given.new_tokens, "repeats": given.repeats,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(), "dtype": str(prepared.model.dtype).removeprefix("torch."),
        "torch": torch.__version__, "transformers": transformers.__version__, "parvts_fx": parvts_fx.__version__,
    }


@dataclasses.dataclass(frozen=True)
class _Drawn:
    patches: Path | None
    plan: Path | None
    notes: list[str]


def _draw(folder: Path, prepared: Prepared, record: parvts_fx.CallRecord, report: Report | None) -> _Drawn:
    """The pictures that can be drawn, and why others cannot."""
    made: dict[str, Path] = {}
    notes = []
    with because(f"--out {folder}"):
        folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def noting() -> Any:
        try:
            yield
        except (ValueError, ImportError) as error:
            notes.append("no picture: " + str(error).removeprefix("parvts_fx.show: ").removeprefix("parvts_fx: "))

    if record.pruned and record.visual is not None and record.kept is not None and prepared.pictures:
        with noting():
            pictures = as_seen(prepared.pictures, prepared.inputs, prepared.processor)
            kept = kept_patches(record.visual, record.kept, [one.shape[:2] for one in pictures])
            draw_patches(pictures, kept, folder / PATCHES)
            made[PATCHES] = folder / PATCHES
    if report is not None and report.prefill is not None and report.prefill.status == "rewritten":
        with noting():
            report.show(folder / PLAN)
            made[PLAN] = folder / PLAN
    return _Drawn(made.get(PATCHES), made.get(PLAN), notes)


def _write(given: argparse.Namespace, result: Result) -> None:
    if given.html is not None:
        with because(f"--html {given.html}"):
            given.html.write_text(page.html(result), encoding="utf-8")
    text = json.dumps(result.as_json(), indent=1)
    if given.json == "-":
        print(text)
        return
    if given.json is not None:
        with because(f"--json {given.json}"):
            Path(given.json).write_text(text + "\n", encoding="utf-8")
    telling.tell(Console(), result)
    for what, path in (("Page", given.html), ("JSON", given.json)):
        if path is not None:
            Console().print(f"{what}: {path}", highlight=False, soft_wrap=True, markup=False)
