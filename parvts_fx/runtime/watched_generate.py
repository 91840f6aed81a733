"""Notes merges that a model's own ``generate`` does uncompiled, in front of a part of it that is compiled.

Some models merge visual features in ``generate`` and hand the embeddings to their text model's ``generate``. No graph
holds that merge. While such a method runs, a torch function mode sees the operations that merge, and the text model's
graph recognises the embeddings (:mod:`parvts_fx.runtime.merged_embeddings`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from parvts_fx.errors import tell_unrewritten
from parvts_fx.options import Options
from parvts_fx.runtime.call import begin_call
from parvts_fx.runtime.merged_embeddings import hand_over, received, visual_rows
from parvts_fx.runtime.record import CallRecord, OnCall, keep_record, last_call
from parvts_fx.torch_private import current_function_mode, pop_mode_temporarily

_SCATTERS = (torch.Tensor.masked_scatter, torch.masked_scatter, torch.Tensor.masked_scatter_)
_SETTERS = (torch.Tensor.__setitem__, torch.Tensor.index_put_)
_COPIES = (torch.Tensor.clone, torch.clone, torch.Tensor.contiguous, torch.Tensor.detach, torch.Tensor.to)
_CHOICES = (torch.Tensor.__getitem__, torch.Tensor.repeat_interleave, torch.Tensor.index_select)
"""What generate cuts a prompt with, or repeats its samples for beams."""


class _Noting(TorchFunctionMode):
    """Remembers which rows of embeddings hold visual features, through the operations that merge them and copies."""

    def __init__(self) -> None:
        super().__init__()
        self.merged: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        earlier = visual_rows(args[0], receive=False) if func in (*_SCATTERS, *_SETTERS) and args else None
        result = func(*args, **(kwargs or {}))
        if func in _SCATTERS and len(args) == 3:
            self._note(result, args[1], earlier)
        elif func in _SETTERS and len(args) == 3:
            index = args[1]
            self._note(args[0], index[0] if isinstance(index, tuple) and len(index) == 1 else index, earlier)
        elif func in _COPIES or func in _CHOICES:
            visual = visual_rows(args[0], receive=False)
            if visual is not None:
                everywhere = visual[..., None].expand(args[0].shape)
                self._note(result, everywhere if func in _COPIES else func(everywhere, *args[1:], **(kwargs or {})))
        return result

    def _note(self, embeddings: object, mask: object, earlier: torch.Tensor | None = None) -> None:
        """``mask`` bool: [batch, seq], or with a last axis of one entry or of the embeddings' width. ``earlier`` [batch, seq]:
        what had been merged before."""
        if not (isinstance(embeddings, torch.Tensor) and isinstance(mask, torch.Tensor) and mask.dtype == torch.bool):
            return
        if embeddings.dim() != 3 or not embeddings.is_floating_point() or mask.dim() not in (2, 3):
            return
        rows = mask if mask.dim() == 2 else mask.any(-1)
        if rows.shape == embeddings.shape[:2]:
            self.merged.append(embeddings)
            hand_over(embeddings, rows if earlier is None else rows | earlier)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Leave the mode for the duration of a compiled call: Dynamo would trace it."""
    with pop_mode_temporarily() if isinstance(current_function_mode(), _Noting) else contextlib.nullcontext():
        yield


def calls_forward(model: torch.nn.Module) -> bool:
    """Whether it is known of a model's ``generate`` that it calls the model as a whole: what transformers gives its models does.
    Others may merge visual features by themselves, and call parts."""
    generation = sys.modules.get("transformers.generation")  # whoever has such a model has imported it
    return generation is not None and isinstance(model, generation.GenerationMixin)


class WatchedGenerate:
    """A model's ``generate`` under the mode. An object and not a closure, so that the model can be copied and pickled.

    Raises (when called):
        NotRewritten: with ``strict=True``, for a merge that no compiled part took.
    """

    def __init__(self, model: torch.nn.Module, options: Options, on_call: OnCall | None = None):
        self._model, self._options, self._on_call = model, options, on_call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Noting() as noting, begin_call() as call:
            generate: Any = type(self._model).generate  # type: ignore[attr-defined]  # whoever makes this has looked
            result = generate(self._model, *args, **kwargs)
        if noting.merged and not call.has_merged and not any(map(received, noting.merged)):
            self._tell()
        elif call.record is not None and last_call(self._model) is not call.record:  # that of a part's own call
            keep_record(self._model, call.record, self._on_call)
        return result

    def _tell(self) -> None:
        reason = ("generate merges visual features outside of any graph, and no compiled part of the model took the merged "
                  "embeddings as they were")
        keep_record(self._model, CallRecord(False, reason), self._on_call)
        tell_unrewritten(reason, self._options.strict)
