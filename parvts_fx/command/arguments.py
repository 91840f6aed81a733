"""The command line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from parvts_fx import __version__
from parvts_fx.command import explaining, listing, trying


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} ({self.prog} --help lists what there is)", file=sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """Of all commands; what is parsed has the command's function as ``run``."""
    made = _Parser(prog="parvts-fx", description="What pruning visual tokens does to a multimodal model.")
    made.add_argument("--version", action="version", version=f"parvts_fx {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _try(commands.add_parser("try", help="answer a prompt with all visual tokens and with few, timed side by side"))
    _explain(commands.add_parser("explain", help="print what is found in a model and done to it"))
    _models(commands.add_parser("models", help="print which architectures are supported"))
    return made


def _try(made: argparse.ArgumentParser) -> None:
    _prompt(made)
    _pruning(made)
    group = made.add_argument_group("what is measured")
    group.add_argument("--new-tokens", type=_count, default=32, metavar="N", help="longest answer (32)")
    group.add_argument("--repeats", type=_count, default=5, metavar="N", help="timed calls of each, behind two that warm up (5)")
    group.add_argument("--lowering", default="inductor", metavar="NAME",
                       help="what compiles both: inductor, eager, aot_eager, or another registered backend of torch.compile")
    group.add_argument("--linear-kernels", choices=("inductor", "auto"), default="inductor",
                       help="matrix products on CPU as plain Inductor's, so that pruning alone is measured, or as by default")
    _processors(group)
    group = made.add_argument_group("what is written")
    group.add_argument("--json", metavar="FILE", help="all results; - for standard output, and nothing else there")
    group.add_argument("--html", type=Path, metavar="FILE", help="one page with answers, pictures, tables and the plan")
    group.add_argument("--out", type=Path, default=Path("parvts_out"), metavar="FOLDER", help="for pictures (parvts_out)")
    made.set_defaults(run=trying.run)


def _explain(made: argparse.ArgumentParser) -> None:
    _prompt(made)
    _pruning(made)
    _processors(made)
    made.add_argument("--plan", type=Path, metavar="FILE", help="draw the plan; the ending says in which format")
    made.set_defaults(run=explaining.run)


def _models(made: argparse.ArgumentParser) -> None:
    made.add_argument("--verdict", metavar="WORD", help='only these: "rewritten", "unrewritten", ...')
    made.add_argument("--json", action="store_true", help="as JSON")
    made.set_defaults(run=listing.run, traceback=False)


def _prompt(made: argparse.ArgumentParser) -> None:
    made.add_argument("model", metavar="MODEL", help="a folder with a model and its processor, or a name on the hub")
    made.add_argument("--traceback", action="store_true", help="show where an error comes from")
    group = made.add_argument_group("the prompt")
    group.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture; may be given again")
    group.add_argument("--video", type=Path, metavar="FILE", help="a video, or a folder of frames")
    group.add_argument("--frames", type=_count, default=8, metavar="N", help="of the video, evenly spread (8)")
    group.add_argument("--prompt", required=True, metavar="TEXT", help="what is asked")
    group = made.add_argument_group("the model")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (cuda where there is one)")
    group.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"),
                       help="of the weights (float32 on CPU, elsewhere as they are stored)")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _processors(group: Any) -> None:
    group.add_argument("--processor", action="append", metavar="NAME",
                       help="predict the prefill's time there: cpu (this one), H100, H200, A100, L4; may be given again (all)")


def _pruning(made: argparse.ArgumentParser) -> None:
    group = made.add_argument_group("what is pruned (parvts_fx.Options; what is not given is parvts_fx's default)")
    group.add_argument("--keep-ratio", type=_number, metavar="R", help="share of the visual tokens kept, as 1/9 or 0.11")
    group.add_argument("--keep-tokens", type=int, metavar="N", help="a count in its place")
    group.add_argument("--migration-depth", type=_number, metavar="K", help="decoder layers in which both groups run, or a share")
    group.add_argument("--stages", metavar="NAME", help="a published schedule: fastv, pyramiddrop, divprune, visionzip, ...")
    group.add_argument("--fusion", type=_word_or_number, metavar="WORD", help='"attention", or a number between 0 and 1')
    group.add_argument("--score", metavar="NAME", help="the rule by which tokens are chosen")
    group.add_argument("--merge", choices=("auto", "none", "clusters"), help="what kept tokens take over of dropped ones")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _number(text: str) -> int | float:
    """A whole number, or a share as 1/9 or 0.11."""
    try:
        held = int(text) if text.lstrip("-").isdecimal() else float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        held = math.nan
    if not math.isfinite(held):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a fraction such as 1/9")
    return held


def _word_or_number(text: str) -> str | float:
    read: Callable[[str], Any] = _number
    return read(text) if text[:1].isdigit() or text[:1] in ".-" else text
