"""Without a GPU these tests fail: skipped they would look as if they had shown something."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("tests/gpu needs a GPU that torch can use (torch.cuda.is_available() is false)", pytrace=False)
    return torch.device("cuda")
