"""The README and docs say what the tests show and what was measured, and describe the options that exist."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from bench.figures import PAGES, fill
from parvts_fx import Options
from tests.models.page import counts, load
from tests.supported import MODELS, PAGE, README, ROOT, replaced


def test_the_readme_is_read_in_two_minutes():
    assert README.read_text().count("\n") < 150


def test_the_table_of_what_is_supported_is_up_to_date():
    text = PAGE.read_text()
    done = subprocess.run([sys.executable, "-c", "from tests.supported import table; print(table())"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = done.stdout[done.stdout.index("| area |"):].strip()
    assert rows.count("\n") > 10
    assert replaced(text, rows) == text, "run `python -m tests.supported`"


def test_the_counts_of_models_are_those_of_the_matrix():
    text = README.read_text()
    found = load()
    assert len(found) > 90
    assert not [name for name, entry in found.items() if entry.verdict == "wrong"]
    assert replaced(text, counts(found), *MODELS) == text, "run `python -m tests.supported`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_figures_are_those_that_were_measured(page):
    assert fill(page) == page.read_text(), "run `python -m bench.figures`"


def test_every_option_is_described():
    text = (ROOT / "docs" / "options.md").read_text()
    for field in dataclasses.fields(Options):
        assert f"| `{field.name}` |" in text, field.name


def test_every_page_is_in_the_sites_contents():
    contents = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in contents, page.name
