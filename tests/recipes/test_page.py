"""The page of ``parvts-fx try --html``, opened in headless Chromium."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("PySide6.QtWebEngineCore", exc_type=ImportError,
                    reason="needs Chromium as Qt brings it along (make test-recipes installs it)")

from bench.accuracy.ways import WEIGHTS  # noqa: E402
from parvts_fx.cost import telling  # noqa: E402
from tests.supported import ROOT  # noqa: E402

HEADLESS = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}  # there is no sandbox for root


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def opened(page: Path) -> dict[str, Any]:
    return json.loads(run(sys.executable, "-m", "tests.recipes.chromium", page, **HEADLESS).splitlines()[-1])


def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """Both pictures and all tables are shown, nothing is fetched but the page itself, nothing is complained about."""
    picture, page, kept = tmp_path / "square.png", tmp_path / "page.html", tmp_path / "found.json"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(picture)
    run(sys.executable, "-m", "parvts_fx", "try", WEIGHTS, "--image", picture, "--prompt", "what <b> & colour",
        "--lowering", "eager", "--repeats", 1, "--new-tokens", 2, "--out", tmp_path / "out", "--html", page, "--json", kept)
    told, shown = json.loads(kept.read_text()), opened(page)
    assert shown["requests"] == [page.as_uri(), *(url for url in shown["requests"][1:] if url.startswith("data:"))]
    assert shown["console"] == []
    assert shown["tables"] >= 2 and len(shown["pictures"]) == 2
    assert all(width > 90 and across > 90 for width, across in shown["pictures"])
    width, height, window = shown["size"]
    assert height > 500 and width <= window  # nothing to scroll sideways
    assert telling.TITLE in shown["text"]
    for text in (told["verdict"], "what <b> & colour", told["all"]["answer"], told["few"]["answer"]):
        assert text in shown["text"]


def test_what_a_broken_page_looks_like(tmp_path: Path) -> None:
    """The test above can fail: a picture that is none, one that is fetched, and a script that throws are all seen."""
    page = tmp_path / "broken.html"
    page.write_text('<title>broken</title><img src="data:image/png;base64,AAAA"><img src="missing.png">'
                    "<script>nothing.is.there()</script>")
    shown = opened(page)
    assert [width for width, _ in shown["pictures"]] == [0, 0]
    assert any(url.endswith("missing.png") for url in shown["requests"]) and len(shown["console"]) > 0
