"""What is said where something that was given cannot be used, and the silence of libraries beside it."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import torch
import transformers

_LONGEST = 400


class BadInput(Exception):
    """Something that the user gave cannot be used; the message says what, and what to do, in one line."""


def first_line(error: BaseException) -> str:
    """An error as one line: its own first one, behind the name of its type where that is not ours."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    text = text if len(text) <= _LONGEST else text[:_LONGEST].rstrip() + " ..."
    ours = isinstance(error, BadInput) or text.startswith("parvts_fx")
    return text if ours else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def because(what: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Errors of other libraries as ours: ``what`` cannot be done, and their first line. Some raise a bare Exception."""
    try:
        yield
    except BadInput:
        raise
    except kinds as error:
        raise BadInput(f"{what}: {first_line(error)}") from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Leave the terminal to what is told on purpose: no warnings, for what they say of a prompt is in its record; of what
    libraries log, errors alone (TORCH_LOGS asks for more)."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    disabled = logging.root.manager.disable
    if not os.environ.get("TORCH_LOGS"):
        logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
