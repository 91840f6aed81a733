"""What the installed version of transformers has, and can run."""

from __future__ import annotations

import pytest
import transformers

from tests.models.builders import BUILDERS
from tests.models.registry import Built

BROKEN = {("llama4", "5.24.0"): "the model's forward reads image_outputs, which its decoder does not return"}
"""What a version cannot run at all, compiled or not."""


def skip_broken(name: str) -> None:
    if (name, transformers.__version__) in BROKEN:
        pytest.skip(f"transformers {transformers.__version__}: {BROKEN[name, transformers.__version__]}")


def build(name: str) -> Built:
    """Skips the test for what the installed transformers does not have yet, and for what does not run in it."""
    skip_broken(name)
    try:
        return BUILDERS[name]()
    except AttributeError as error:
        if error.obj is not transformers:
            raise
        pytest.skip(f"transformers {transformers.__version__} has no {error.name}")
