"""Compiling without Python's search for cyclic garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Without it for a while: beside a captured model of 32 layers one search takes half a second, and they come in the dozens
    while a model is compiled. Whatever several threads do at once, it is on again behind the last of them if it was on."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
