"""A plan as a picture: layers against the rows that run through them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parvts_fx.report import GraphReport

_COLOURS = {
    "text": "#4878a8", "subject": "#e08a2e", "non-subject": "#c9c9c9", "subject path": "#e08a2e",
    "non-subject path": "#c9c9c9", "all": "#7a9e7e", "kept": "#b9a1c9",
}


def draw(graph: GraphReport, path: str | Path | None = None) -> Any:
    """Draw one bar a layer, as long as there are rows per sample, from the first layer at the top to the last.

    Args:
        graph: of a rewritten prefill, as :func:`parvts_fx.explain` returns it.
        path: where to save the picture; its ending says in which format.

    Returns:
        the matplotlib figure.

    Raises:
        ValueError: nothing was rewritten in this graph.
        ImportError: matplotlib is missing (it comes with ``pip install parvts_fx[demo]``).
    """
    if not graph.layers:
        raise ValueError(f"parvts_fx: this graph has no plan to draw: it is {graph.status} ({graph.reason})")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.28 * len(graph.layers)), layout="constrained")
    axes = figure.add_subplot()
    seen: set[str] = set()
    for layer in graph.layers:
        start = 0
        for name, count in layer.rows.items():
            axes.barh(layer.index, count, left=start, height=0.8, color=_COLOURS.get(name, "#888888"),
                      label=None if name in seen else name)
            seen.add(name)
            start += count
        notes = [f"chosen by {layer.chooses}"] * bool(layer.chooses) + [f"{layer.leaving} have left"] * bool(layer.leaving)
        if notes:
            axes.annotate(", ".join(notes), (start, layer.index), xytext=(5, 0), textcoords="offset points", va="center",
                          fontsize=8)
    axes.axvline(graph.tokens_kept, color="black", linewidth=0.8, linestyle=":", label=f"caches: {graph.tokens_kept} rows")
    axes.set(xlabel="rows per sample", ylabel="decoder layer", xlim=(0, 1.35 * graph.prompt_tokens))
    axes.set_yticks([layer.index for layer in graph.layers])
    axes.invert_yaxis()
    axes.legend(loc="lower right", fontsize=8)
    if path is not None:
        figure.savefig(path)
    return figure
