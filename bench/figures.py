"""What has been measured as tables, for terminals and for pages: ``python -m bench.figures`` writes the latter.

Reads ``compare.json``, ``compile_time.json``, ``picture_sizes.json``, ``uneven_batches.json``, ``soak.json``, ``flops.json``,
``cost.json``, ``merging.json`` and ``merging_seed1.json`` in ``bench/results/``; a test fails when a page differs from them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from bench.methods import QUICKER
from bench.tables import Sheet, mebibytes, milliseconds, percent, seconds

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
PAGES = {
    ROOT / "README.md": ("speed", "accuracy in short"),
    ROOT / "docs" / "options.md": ("by kind",),
    ROOT / "docs" / "figures.md": (
        "methods", "kept", "lengths", "flops", "compile time", "picture sizes", "uneven batches", "soak", "gpu",
        "cuda kernels", "cost on cpu", "cost on gpus", "accuracy"),
}
"""The tables of each page, by the name in their markers."""

Row = dict[str, Any]

TITLES = {
    "inductor": "Inductor", "inductor + kernels": "Inductor + kernels",
    "downsampled image": "image downsampled to as many tokens", "random": "random choice before layer 0",
    "uniform": "evenly spread choice before layer 0", "diverse": "diverse choice before layer 0",
    "FastV": "FastV-style, K = 2", "joint": "joint: all tokens together, then pruned", "parvts": "**parvts**",
    "parvts with dead rows": "parvts without `skip_dead_rows`", "parvts fusion 0.5": "parvts, `fusion=0.5`",
    "parvts fusion 0.5, prefix twice": "parvts, `fusion=0.5` without `share_prefix`",
    "parvts + kernels": "**parvts + kernels (default)**",
}

IN_SHORT = ["inductor", "inductor + kernels", "FastV", "parvts", "parvts + kernels"]

ANSWERS = {
    "parvts, merged": "**parvts**", "parvts": "`merge=None`", "parvts, balanced": "the same, `score=\"balanced\"`",
    "pruned before layer 0": "pruned before layer 0", "FastV's schedule": "FastV's schedule",
    "PyramidDrop's schedule": "PyramidDrop's", "random": "random", "downsampled": "downsampled",
}
ANSWERS_IN_SHORT = {
    "parvts, merged": "**parvts**", "pruned before layer 0, merged": "`migration_depth=0`", "parvts": "`merge=None`",
    "FastV's schedule": "FastV's schedule", "FastV's schedule, merged": "the same, merged", "random": "random",
}
KINDS = {
    "subject": "the large thing", "ground": "the background", "summary": "both, in four words",
    "corner": "one small thing, by its place", "word": "letters of a patch each", "count": "small things, counted by colour",
    "relation": "where small things stand", "list": "four small things",
}
"""Of questions (:mod:`bench.accuracy.questions`), and what they ask for."""


def title(name: str) -> str:
    return TITLES.get(name, name)


def ratio(row: Row, equal: Row | None = None) -> str:
    """How much faster than Inductor; in brackets than Inductor with the same kernels, where these are others."""
    if row["method"] == "inductor":
        return ""
    same = "" if equal is None else f" ({equal['prefill']['median'] / row['prefill']['median']:.2f}x)"
    return f"{row['bound']['reached']:.2f}x{same}"


def allowed(row: Row) -> str:
    return f"{row['bound']['allowed']:.2f}x" if row["bound"]["allowed"] != 1 else ""


def methods(results: dict[str, Any]) -> list[Sheet]:
    """All methods, a table for each batch size."""
    sheets = []
    for batch in dict.fromkeys(row["batch"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["batch"] == batch]
        tokens, named = rows[0]["tokens"], {row["method"]: row for row in rows}
        equal = {f"parvts {QUICKER}": named.get(f"inductor {QUICKER}")}
        headings = [f"batch {batch}", "prefill", "ratio", "FLOPs allow", "products alone", "first token",
                    f"{tokens} tokens", "decode step", "peak memory", "KV cache", "first call"]
        sheets.append(Sheet(f"Medians of answers in turns, {rows[0]['visual']} visual tokens", headings, [[
            title(row["method"]), seconds(row["prefill"]), ratio(row, equal.get(row["method"])), allowed(row),
            seconds(row["floor"]), seconds(row["first_token"]), seconds(row["whole"]), milliseconds(row["step"]),
            mebibytes(row["peak_memory"]), mebibytes(row["cache_bytes"]),
            f"{row['compile_seconds']:.0f} s" if row["compile_seconds"] else "",
        ] for row in rows]))
    return sheets


def speed(results: dict[str, Any]) -> Sheet:
    """The prefill of a few methods, all batch sizes side by side."""
    batches = list(dict.fromkeys(row["batch"] for row in results["rows"]))
    of = {(row["method"], row["batch"]): row for row in results["rows"]}
    headings = ["prefill", *(heading for batch in batches for heading in (f"batch {batch}", "ratio"))]
    rows = []
    for name in IN_SHORT:
        first, equal = of[name, batches[0]], f"inductor {QUICKER}" if name == f"parvts {QUICKER}" else None
        cells = [cell for batch in batches for cell in (
            seconds(of[name, batch]["prefill"]), ratio(of[name, batch], of.get((equal, batch))))]
        rows.append([title(name), *cells, allowed(first), mebibytes(first["cache_bytes"])])
    return Sheet("Prefill", [*headings, "FLOPs allow", f"KV cache, batch {batches[0]}"], rows)


def kept(results: dict[str, Any]) -> Sheet:
    """Prefill by visual tokens kept; in brackets what the FLOPs allow."""
    points = list(dict.fromkeys(row["asked"] for row in results["rows"]))
    named = list(dict.fromkeys(row["method"] for row in results["rows"]))
    of = {(row["method"], row["asked"]): row for row in results["rows"]}
    return Sheet("Prefill by visual tokens kept (what the FLOPs allow)",
                 [f"kept of {results['rows'][0]['visual']}", *map(title, named)],
                 [[str(point), *(_prefill(of[name, point]) for name in named)] for point in points])


def lengths(results: dict[str, Any]) -> Sheet:
    """Prefill, decode step and memory by visual tokens of the prompt."""
    named = list(dict.fromkeys(row["method"] for row in results["rows"]))
    of = {(row["method"], row["visual"]): row for row in results["rows"]}
    columns: dict[str, Callable[[Row], str]] = {
        "prefill": _prefill, "decode step": lambda row: milliseconds(row["step"]),
        "peak memory of the prefill": lambda row: mebibytes(row["peak_memory"]),
        "KV cache": lambda row: mebibytes(row["cache_bytes"]),
    }
    rows = [[f"{visual} visual tokens: {what}", *(show(of[name, visual]) for name in named)]
            for visual in dict.fromkeys(row["visual"] for row in results["rows"]) for what, show in columns.items()]
    return Sheet("By length of the prompt: one sample, features given", ["", *map(title, named)], rows)


def _prefill(row: Row) -> str:
    if row["method"] == "inductor":
        return seconds(row["prefill"])
    return f"{seconds(row['prefill'])}, {ratio(row)} ({row['bound']['allowed']:.2f}x)"


def compile_time(results: dict[str, Any]) -> Sheet:
    """Rewriting alone, and whole first calls, by layers."""
    whole = {entry["layers"]: entry["seconds"] for entry in results["whole"]}
    rows = []
    for entry in results["rewriting"]:
        rows.append([str(entry["layers"]), f"{entry['seconds']:.2f} s", *_starts(whole.get(entry["layers"]))])
    return Sheet("What compiling costs", ["layers", "analysis, passes, checks", "first call, Inductor", "parvts", "ratio",
                                          "second process, Inductor", "parvts", "artifacts loaded, Inductor", "parvts"], rows)


def _starts(seconds: Mapping[str, Mapping[str, list[float]]] | None) -> list[str]:
    if seconds is None:
        return [""] * 7
    taken = {(start, kind): statistics.median(seconds[kind][start])
             for start in ("cold", "second", "carried") for kind in ("inductor", "parvts")}
    cells = [f"{held:.1f} s" for held in taken.values()]
    return [*cells[:2], f"{taken['cold', 'parvts'] / taken['cold', 'inductor']:.2f}x", *cells[2:]]


def picture_sizes(results: dict[str, Any]) -> Sheet:
    """Calls with pictures of other sizes, and the same ones again."""
    count = len(results["pictures"])
    headings = ["", "first picture", "second", f"each of the other {count - 2}", f"all {count}", "one of them again"]
    return Sheet("Pictures of many sizes, compiling included", headings, [[
        title(row["method"]), f"{row['first'][0]:.1f} s", f"{row['first'][1]:.1f} s",
        f"{statistics.median(row['first'][2:]):.2f} s (at most {max(row['first'][2:]):.2f})", f"{sum(row['first']):.0f} s",
        f"{statistics.median(row['again']):.2f} s (at most {max(row['again']):.2f})"] for row in results["rows"]])


def uneven_batches(results: dict[str, Any]) -> Sheet:
    """The first token of a batch of equal pictures, and of one whose pictures differ."""
    times = {(row["method"], row["batch"]): row["seconds"] for row in results["rows"]}
    cost = times["parvts", "uneven"]["median"] / times["parvts", "even"]["median"]
    return Sheet(f"First token of four prompts; with parvts the uneven batch costs {cost:.2f} times the even one",
                 ["", "batch", "time", "fastest to slowest", "ratio"], [
        [title(method), batch, f"{taken['median']:.2f} s", f"{taken['min']:.2f} to {taken['max']:.2f} s",
         f"{times['inductor', batch]['median'] / taken['median']:.2f}x" if method != "inductor" else ""]
        for (method, batch), taken in times.items()])


def soak(results: dict[str, Any]) -> Sheet:
    """What many calls of all kinds in one process have left behind."""
    first = results["settings"]["first"]
    return Sheet(f"{results['calls']} calls of all kinds in one process", ["", f"behind {first} calls", "in the end"], [
        ["calls with a wrong row", "", str(results["wrong"])],
        ["compiled forms", *map(str, results["forms"])],
        ["most memory so far, MiB", *(f"{held:.0f}" for held in results["mebibytes"])]])


def gpu(results: list[dict[str, Any]]) -> Sheet:
    """What ran on a GPU: prefills by Inductor and by parvts, and whole answers."""
    rows = []
    for result in results:
        if "failed" in result:
            rows.append([result["model"], str(result["batch"]), "", "prefill", "", "", f"failed: {result['failed']}", ""])
            continue
        plain, ours = result["rows"][0], result["rows"][-1]
        kind = "prefill" if "mode" in result else "whole"
        times = [row[kind]["median"] for row in (plain, ours)]
        what = f"answer, {result['tokens']} tokens" if kind == "whole" else \
            "prefill" if result["mode"] == "default" else f"prefill, mode={result['mode']}"
        rows.append([
            result.get("model") or result["answers"], str(result["batch"]), f"{result['kept']} of {result['visual']}", what,
            *(f"{1e3 * time:.1f} ms" for time in times), f"{times[0] / times[1]:.2f}x",
            f"{plain['flops'] / ours['flops']:.2f}x" if "flops" in ours else ""])
    names = sorted({result["machine"]["gpu"] for result in results})
    return Sheet(", ".join(names), ["", "batch", "tokens kept", "what", "Inductor", "parvts", "ratio", "FLOPs allow"], rows)


def cuda_kernels(results: dict[str, Any]) -> Sheet:
    """What prefills become on a GPU, counted without one."""
    settings = results["settings"]
    return Sheet(f"Lowered for an H100: {settings['layers']} layers of width {settings['width']}, K = {settings['depth']}", [
        "", "batch", "Triton kernels", "launches", "products", "attention calls", "most registers", "CUDA graphs"], [
            [title(row["method"]), str(row["batch"]), str(len(row["kernels"])), str(row["launches"]), str(row["products"]),
             str(row["cudnn"] + row["efficient"]), str(max(kernel["registers"] for kernel in row["kernels"])),
             row["no_graph_because"] or "yes"] for row in results["rows"]])


def flops(results: dict[str, Any]) -> Sheet:
    """FLOPs that are left of the full prompt's, by configuration and tokens kept."""
    rows = results["results"]
    points = list(dict.fromkeys(row["kept"] for row in rows))
    names = list(dict.fromkeys((row["model"], row["visual"]) for row in rows))
    of = {(row["model"], row["kept"]): row for row in rows}
    return Sheet("FLOPs left of the full prompt's", ["decoder", "visual tokens", *(f"{point} kept" for point in points)], [
        [name, str(visual), *(percent(of[name, point]["flops_after"] / of[name, point]["flops_before"]) for point in points)]
        for name, visual in names])


def schedules(results: dict[str, Any]) -> Sheet:
    """Published schedules beside Inductor."""
    rows, machine = results["rows"], results["machine"]
    return Sheet(
        f"{results['settings']['visual']} visual tokens, prefill with the vision tower, {machine['threads']} threads",
        ["schedule", "kept", "the decoder's FLOPs", "prefill", "fastest to slowest", "ratio"],
        [[row["method"], str(row["kept"]), percent(row["flops_share"]), seconds(row["prefill"]),
          f"{row['prefill']['min']:.3f} to {row['prefill']['max']:.3f} s",
          f"{rows[0]['prefill']['median'] / row['prefill']['median']:.2f}x" if row is not rows[0] else ""] for row in rows])


def cost_on_cpu(results: dict[str, Any]) -> list[Sheet]:
    """Prefills measured and predicted by the model of cost, a table for each number of threads."""
    sheets = []
    for key in sorted(key for key in results if key.startswith("cpu")):
        rows = results[key]["rows"]
        threads = rows[0]["threads"]
        sheets.append(Sheet(key, [f"{threads} thread{'s' * (threads > 1)}", "prefill", "measured", "predicted", "apart"], [[
            f"{row['layers']} layers of {row['width']}, batch {row['batch']}", title(row["method"]), seconds(row["measured"]),
            seconds(row["predicted"]), f"{100 * row['apart']:+.0f} %"] for row in rows]))
    return sheets


def cost_on_gpus(results: dict[str, Any]) -> Sheet:
    """Kernels and whole calls that the model of cost predicts for GPUs, in milliseconds; in brackets what was measured."""
    named = list(dict.fromkeys(row["gpu"] for row in results["rows"]))
    of = {(row["model"], row["batch"], row["method"], row["gpu"]): row for row in results["rows"]}
    prompts = dict.fromkeys((row["model"], row["batch"], row["kept"], row["visual"]) for row in results["rows"])

    def cell(row: Row, what: str) -> str:
        known = f" ({1e3 * row['measured'][what]:.1f})" if row["measured"] else ""
        return f"{1e3 * row[what]:.1f}{known}"

    lines = []
    for model, batch, kept, visual in prompts:
        for method in ("inductor", "parvts"):
            each = [of[model, batch, method, gpu] for gpu in named]
            lines.append([f"{model}, batch {batch}", title(method) + (f", {kept} of {visual}" if method == "parvts" else ""),
                          str(each[0]["launches"]), *(f"{cell(row, 'kernels')}; {cell(row, 'call')}" for row in each)])
    return Sheet("Predicted ms of kernels; of a call that launches each (measured)", ["", "", "kernels", *named], lines)


def accuracy(results: dict[str, Any], named: dict[str, str]) -> Sheet:
    """Right answers in per cent of the full model's, by the share of visual tokens kept."""
    from bench.accuracy.results import share_of

    ways = {(way["name"], way["kept"]): way for way in results["ways"].values()}
    full = next(way for way in results["ways"].values() if way["name"] == "full")
    shares = [Fraction(part, 9) for part in (3, 2, 1)]
    return Sheet("Right answers, % of the full model's", ["visual tokens kept", *named.values()], [
        [str(share), *(f"{share_of(ways[name, int(share * full['kept'])], full, results['settings']['pictures']):.1f}"
                       for name in named)] for share in shares])


def by_kind(seeds: list[dict[str, Any]]) -> Sheet:
    """Right answers of the defaults by kind of question, of each trained model."""
    from bench.accuracy.results import share_of_kinds

    points, cells = [(Fraction(1, 3), 48), (Fraction(2, 9), 32), (Fraction(1, 9), 16), (Fraction(1, 18), 8)], {}
    for _, kept in points:
        for results in seeds:
            way = next(way for way in results["ways"].values() if (way["name"], way["kept"]) == ("parvts, merged", kept))
            full = next(way for way in results["ways"].values() if way["name"] == "full")
            for kind, share in share_of_kinds(way, full, results["settings"]["pictures"]).items():
                cells.setdefault((kind, kept), []).append(f"{share:.0f}")
    headings = ["kind", "asks for", *(f"{share} kept" for share, _ in points)]
    return Sheet("Right answers by kind, % of the full model's", headings, [
        [kind, what, *(" / ".join(cells[kind, kept]) for _, kept in points)] for kind, what in KINDS.items()])


def tables() -> dict[str, str]:
    """The tables by the name in their markers."""
    compared = json.loads((RESULTS / "compare.json").read_text())
    answers, others = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("merging", "merging_seed1"))
    predicted = json.loads((RESULTS / "cost.json").read_text())
    return {
        "speed": speed(compared["methods"]).markdown(),
        "methods": "\n\n".join(sheet.markdown() for sheet in methods(compared["methods"])),
        "kept": kept(compared["kept"]).markdown(), "lengths": lengths(compared["lengths"]).markdown(),
        "compile time": compile_time(json.loads((RESULTS / "compile_time.json").read_text())).markdown(),
        "picture sizes": picture_sizes(json.loads((RESULTS / "picture_sizes.json").read_text())).markdown(),
        "uneven batches": uneven_batches(json.loads((RESULTS / "uneven_batches.json").read_text())).markdown(),
        "soak": soak(json.loads((RESULTS / "soak.json").read_text())).markdown(),
        "cuda kernels": cuda_kernels(json.loads((RESULTS / "cuda_kernels.json").read_text())).markdown(),
        "gpu": gpu(json.loads((RESULTS / "gpu.json").read_text())).markdown(),
        "cost on cpu": "\n\n".join(sheet.markdown() for sheet in cost_on_cpu(predicted)),
        "cost on gpus": cost_on_gpus(predicted["gpu"]).markdown(),
        "flops": flops(json.loads((RESULTS / "flops.json").read_text())).markdown(),
        "accuracy": accuracy(answers, ANSWERS).markdown(), "accuracy in short": accuracy(answers, ANSWERS_IN_SHORT).markdown(),
        "by kind": by_kind([answers, others]).markdown(),
    }


def fill(page: Path) -> str:
    """A page's text with its tables as they have been measured."""
    from tests.supported import replaced

    text, found = page.read_text(), tables()
    for name in PAGES[page]:
        text = replaced(text, found[name], f"<!-- {name}:begin -->", f"<!-- {name}:end -->")
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page))
