"""One builder per architecture: a small model with random weights, and inputs for one prompt with an image.

``BUILDERS`` holds them under the names of transformers' image-text-to-text models, with what sets a further form of the
same model apart in brackets. They are grouped by structure, and register themselves when they are imported.
"""

from __future__ import annotations

from tests.models import (  # noqa: F401
    any_size,
    cross_attention,
    deepstack,
    encoder_decoder,
    experts,
    other_merges,
    plain_causal,
    recurrent,
    rotary,
    shared_keys,
    sparse,
    windows,
)
from tests.models.registry import BUILDERS, IMAGE, Built

__all__ = ["BUILDERS", "IMAGE", "Built"]
