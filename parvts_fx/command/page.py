"""One page that stands by itself: pictures are in it, and nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from parvts_fx.command import telling
from parvts_fx.command.results import Result
from parvts_fx.cost import telling as predicted

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } img { max-width: 100% } .verdict { font-weight: 600; font-size: 1.15rem }
blockquote { margin: .3rem 0 1rem; padding: .5rem 1rem; border-left: 4px solid #e08a2e; white-space: pre-wrap }
details { margin: 1rem 0 } pre { overflow-x: auto; background: #f5f5f5; padding: 1rem } .small { color: #555; font-size: .9rem }
"""


def html(result: Result) -> str:
    """The page of one run."""
    title = f"{result.settings['model']}: fewer visual tokens"
    parts = [
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>",
        f"<h1>{escape(result.settings['model'])}</h1>", f'<p class="verdict">{escape(result.verdict)}</p>',
        f"<p>{escape(result.settings['prompt'])}</p>",
        *(f"<h2>{escape(f'Answer, {name}')}</h2><blockquote>{escape(text)}</blockquote>"
          for name, text in telling.answers(result)),
        "<h2>Measured</h2>", _table(result), f'<p class="small">{escape(telling.settings(result))}</p>',
        *([f"<h2>{escape(predicted.TITLE)}</h2>", _cells(predicted.HEADINGS, predicted.rows(result.costs))]
          if result.costs else []),
        *_picture("Kept patches", "The pictures as the model sees them, and the patches whose tokens are kept", result.patches),
        *_picture("Plan", "Rows that run through each decoder layer", result.plan),
        *(f'<p class="small">Note: {escape(note)}</p>' for note in result.notes),
        "<details><summary>All results as JSON</summary>", f"<pre>{escape(json.dumps(result.as_json(), indent=1))}</pre>",
        "</details>", "</body>", "</html>",
    ]
    return "\n".join(parts) + "\n"


def _table(result: Result) -> str:
    return _cells(telling.headings(result), telling.rows(result))


def _cells(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _picture(heading: str, what: str, path: Path | None) -> list[str]:
    if path is None:
        return []
    data = base64.b64encode(path.read_bytes()).decode()
    return [f"<h2>{escape(heading)}</h2>", f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">']
