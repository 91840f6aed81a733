"""What docs/recipes.md and examples/ tell, run."""

from __future__ import annotations

import runpy
from typing import Any

from tests.supported import ROOT


def example(name: str) -> dict[str, Any]:
    """What a file of examples/ defines; by its path, for packages of others are called "examples" as well."""
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
