"""Architectures that differ in structure, through generate, against the eager reference."""

from __future__ import annotations

import pytest

from tests.comparing import TOLERANCE
from tests.models.builders import BUILDERS, IMAGE
from tests.models.generating import largest_error
from tests.reference import subject_count


@pytest.mark.supports("Architectures", ", ".join(sorted(BUILDERS)) + " (generate, both fusions)")
@pytest.mark.parametrize("fusion", ["attention", 0.4])
@pytest.mark.parametrize("name", BUILDERS)
def test_architectures(name, fusion):
    built = BUILDERS[name]()
    ids = built.inputs["input_ids"]
    visual = int((ids == IMAGE).sum())
    error, kept = largest_error(built.model, built.inputs, IMAGE, migration_depth=1, keep_ratio=0.25, fusion=fusion)
    assert error <= TOLERANCE
    assert kept == ids.shape[1] - visual + subject_count(visual, 0.25)
