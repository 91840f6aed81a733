"""What the site needs beside the pages: results of ``bench/``, and docstrings whose names are links (see ``mkdocs.yml``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parent / "bench" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Plots and numbers stay where they are written; the site has them in a folder of its own."""
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../bench/results/", "](results/")


class Roles(griffe.Extension):
    """Writes roles of docstrings, such as :func:`compile`, as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":(?:class|func|data|mod|meth):(`[^`]+`)", r"\1", obj.docstring.value)
