"""What ``parvts-fx try`` prints, and the rows that its page shows as well."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parvts_fx.command.measuring import Spread
from parvts_fx.command.results import Result
from parvts_fx.cost import telling as predicted


def rows(result: Result) -> list[tuple[str, str, str, str]]:
    """What was measured: a heading, with all tokens, with few, and the ratio."""
    whole, few, flops = result.whole, result.few, result.flops
    visual, kept = result.visual_tokens, result.kept_tokens
    found = []
    if visual is not None and kept is not None:
        found.append(("visual tokens", str(visual), str(kept), ""))
        found.append(("tokens in the caches", str(result.prompt_tokens), str(result.prompt_tokens - visual + kept), ""))
    else:
        found.append(("tokens of the prompt", str(result.prompt_tokens), str(result.prompt_tokens), ""))
    if flops is not None:
        found.append(("FLOPs to the first token", _flops(flops.whole), _flops(flops.pruned), f"{flops.allow:.2f}x"))
    found.append(("first token", time(whole.first_token), time(few.first_token), f"{result.first_token_ratio:.2f}x"))
    if whole.step is not None and few.step is not None:
        found.append(("decode step", time(whole.step), time(few.step), f"{result.step_ratio:.2f}x"))
    if whole.peak_bytes and few.peak_bytes:
        found.append(("peak memory to the first token", _mebibytes(whole.peak_bytes), _mebibytes(few.peak_bytes),
                      f"{whole.peak_bytes / few.peak_bytes:.2f}x"))
    return found


def headings(result: Result) -> tuple[str, str, str, str]:
    name = "Inductor" if result.settings["lowering"] == "inductor" else f'lowering "{result.settings["lowering"]}"'
    return "", f"all tokens ({name})", "few (parvts)", "all / few"


def settings(result: Result) -> str:
    """What the times are of."""
    given = result.settings
    threads = f", {given['threads']} threads" if given["device"] == "cpu" else ""
    versions = f"torch {given['torch']}, transformers {given['transformers']}"
    return (f"Medians of {given['repeats']} calls of each in turns, behind two that warm up; in brackets the fastest and "
            f"the slowest. {given['device']}{threads}, {given['dtype']}, {versions}.")


def answers(result: Result) -> list[tuple[str, str]]:
    same = "the same" if result.equal else "another answer"
    return [("all tokens", result.whole.answer), (f"few ({same})" if result.pruned else "parvts", result.few.answer)]


def tell(console: Console, result: Result) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=result.settings["model"], title_justify="left")
    for number, heading in enumerate(headings(result)):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(Text(settings(result)))
    if result.costs:
        console.print(predicted.table(result.costs))
    for name, text in answers(result):
        console.print(Text(f"Answer, {name}: ", style="bold"), Text(text), sep="")
    for what, path in (("Kept patches", result.patches), ("Plan", result.plan)):
        if path is not None:
            console.print(Text(f"{what}: {path}"), soft_wrap=True)
    for note in result.notes:
        console.print(Text(f"Note: {note}"))
    console.print(Text(result.verdict, style="bold"))


def time(spread: Spread) -> str:
    scale, unit, digits = (1, "s", 3) if spread.median >= 1 else (1e3, "ms", 1)
    return (f"{spread.median * scale:.{digits}f} {unit} "
            f"({spread.least * scale:.{digits}f} to {spread.most * scale:.{digits}f})")


def _flops(count: int) -> str:
    return f"{count / 1e9:.3g} G" if count < 1e12 else f"{count / 1e12:.3g} T"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
