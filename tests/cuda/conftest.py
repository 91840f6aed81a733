"""These tests need a build of torch for CUDA, and no GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def build_for_cuda() -> None:
    if torch.version.cuda is None:
        pytest.skip("the installed torch is a build for CPU, which cannot lower for a GPU (make check-cuda installs another)")
