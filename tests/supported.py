"""The table of what holds in docs/supported.md, generated from the tests that show it; the README's count of architectures.

A test says what it shows with ``@pytest.mark.supports("area", "claim")``. ``python -m tests.supported`` writes the
table; a test fails when the page differs from it, and the suite fails when a claim does not hold.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.page import counts, load

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "supported.md"
BEGIN, END = "<!-- supported:begin -->", "<!-- supported:end -->"
MODELS = "<!-- models:begin -->", "<!-- models:end -->"


class Collect:
    """A pytest plugin that keeps the claims of the collected tests."""

    def __init__(self) -> None:
        self.claims: dict[tuple[str, str], dict[str, int]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("supports"):
                name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
                cases = self.claims.setdefault(tuple(mark.args), {})
                cases[name] = cases.get(name, 0) + 1


def table() -> str:
    """Markdown rows: area, what holds, the tests that show it and how many cases they have."""
    plugin = Collect()
    code = pytest.main(
        ["--collect-only", "--cases=all", "-o", "addopts=", "-p", "no:terminal", str(ROOT / "tests")], plugins=[plugin])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests cannot be collected ({code!r})")
    rows = ["| area | what holds | shown by (cases) |", "| --- | --- | --- |"]
    for (area, claim), tests in sorted(plugin.claims.items()):
        shown = ", ".join(f"`{name}` ({count})" for name, count in tests.items())
        rows.append(f"| {area} | {claim} | {shown} |")
    return "\n".join(rows)


def replaced(text: str, rows: str, begin: str = BEGIN, end: str = END) -> str:
    """A page's text with other lines between its markers."""
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{rows}\n{end}{tail}"


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text(), table()))
    README.write_text(replaced(README.read_text(), counts(load()), *MODELS))
