"""``parvts-fx explain``: what is found in a model, and what is done to it."""

from __future__ import annotations

import argparse

from rich.console import Console

import parvts_fx
from parvts_fx.command.errors import BadInput, because
from parvts_fx.command.measuring import prefill_of
from parvts_fx.command.preparing import prepare, processors, pruning
from parvts_fx.command.progress import progress


def run(given: argparse.Namespace) -> int:
    """
    Raises:
        BadInput: what was given cannot be used.
        ValueError: bad options.
    """
    options, names = pruning(given), processors(given)
    with progress(2) as advance:
        advance("load the model")
        prepared = prepare(given)
        advance("trace a call")
        with because("the model does not take this prompt"):
            inputs = prefill_of(prepared.model, prepared.inputs)
            report = parvts_fx.explain(prepared.model, options=options, processors=names, **inputs)
    console = Console()
    console.print(report)
    if given.plan is not None:
        if report.prefill is None or report.prefill.status != "rewritten":
            raise BadInput("--plan: there is no plan to draw, as nothing is rewritten")
        with because(f"--plan {given.plan}"):
            report.show(given.plan)
        console.print(f"Plan: {given.plan}", highlight=False, soft_wrap=True)
    return 0
