"""What the graphs of one call tell: each other, and whoever has made the call.

Where Dynamo breaks a call into several graphs, each of them knows something that the others need: where visual features
were merged, what tensors are computed from, how many tokens were dropped. It is kept in the :class:`Call` that surrounds
them, by the identity of the tensors that pass between them. :func:`parvts_fx.compile` begins one for each call of a model and
of a watched ``generate``. Under the plain backend nobody does: then one object stands for all calls, and sees none of them
begin or end.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch

from parvts_fx.analysis.modality import Origin
from parvts_fx.runtime.record import CallRecord
from parvts_fx.torch_private import WeakReference, count_graph_breaks, disable_current_modes

Known = TypeVar("Known")


class TensorTable(Generic[Known]):
    """What is known of tensors that are alive, by their identity."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Callable[[], torch.Tensor | None], Known, Callable[[Known], None] | None]] = {}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Known]]:
        for reference, known, _ in list(self._entries.values()):
            tensor = reference()
            if tensor is not None:
                yield tensor, known

    def get(self, tensor: object) -> Known | None:
        entry = self._entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def note(self, tensor: torch.Tensor, known: Known, died: Callable[[Known], None] | None = None) -> None:
        """Args: ``died``, what to do with it when the tensor is gone."""
        key, entries = id(tensor), self._entries

        def forget(_: object) -> None:
            if entries.pop(key, None) is not None and died is not None:
                with disable_current_modes():  # garbage may be collected while Dynamo or a rule is being traced
                    died(known)

        entries[key] = WeakReference(tensor, forget), known, died

    def drop(self, tensor: object) -> None:
        if self.get(tensor) is not None:
            del self._entries[id(tensor)]

    def clear(self) -> None:
        self._entries.clear()

    def move_to(self, other: TensorTable[Known]) -> None:
        for reference, known, died in list(self._entries.values()):
            tensor = reference()
            if tensor is not None:
                other.note(tensor, known, died)
        self.clear()


@dataclasses.dataclass(eq=False)
class Handed:
    """Merged embeddings on their way to a decoder in another graph."""

    visual: torch.Tensor
    """[batch, seq] bool: visual tokens."""

    merged: torch.Tensor
    """The same for features of any modality, sound as well."""

    by_graph: bool
    """Whether a graph has merged them, whose report lists what they are."""

    call: Call
    """In which call."""

    received: bool = False
    """Whether a decoder's graph has taken them."""


@dataclasses.dataclass(eq=False)
class Conversation:
    """What goes on from one shortened prompt."""

    told: set[str] = dataclasses.field(default_factory=set)
    """The warnings that it has had: one of each, and not one a decode step."""


class Call:
    """One call. What it knows of tensors that outlive it is left to what surrounds it."""

    def __init__(self, surrounding: Call | None = None) -> None:
        self.surrounding = surrounding
        self.dropped: list[int] = []
        """Tokens per sample that each rewritten prefill dropped."""

        self.by_sample = False
        """Whether samples may be pruned one by one: somebody tells later calls which cached rows are whose."""

        self.names_sizes = False
        """Whether the call is captured again, with names for sizes, where a graph asks for that."""

        self.mask_rows: frozenset[int] | None = None
        """How many rows its prompt may have by the columns of its attention mask, behind what a cache holds with or without its
        dropped tokens; None where the mask does not tell."""

        self.rows: torch.Tensor | None = None
        """[batch, rows] bool: which of the rows that a batch's caches hold are a sample's own, where samples were."""

        self.has_merged = False
        """Whether a graph has merged visual features into embeddings, rewritten or not."""

        self.breaks_before = 0
        """How often Dynamo had broken graphs when the call began, or was first tried."""

        self.merges_behind: int | None = None
        """How often Dynamo had broken graphs when the first one handed a merge on; None where none has."""

        self.record: CallRecord | None = None
        """What has become of its prompt, once a graph has told."""

        self.lost: set[tuple[int, ...]] = set()
        """[batch, seq] of merged embeddings that died before a graph took them."""

        self.told_by_ids: Callable[[torch.Tensor], torch.Tensor | None] = lambda embeddings: None
        """Which rows [batch, seq] of embeddings [batch, seq, hidden] are not those of the call's ids; None if none can be
        told."""

        self.can_begin_again: Callable[[], bool] = lambda: False
        """Asked where a graph cannot be rewritten: whether there is another way to capture the call."""

        self.handed: TensorTable[Handed] = TensorTable()
        self.origins: TensorTable[Origin] = TensorTable()
        self.shortened: TensorTable[Conversation] = TensorTable()
        """Cache tensors that a rewritten prefill has shortened, and whose count nobody has corrected."""

    @property
    def is_watched(self) -> bool:
        """Whether somebody notices at its end what its graphs have not done."""
        return self.surrounding is not None

    def around(self) -> Iterator[Call]:
        """This call and those that surround it, inside out."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.surrounding

    def tell_pruning(self, dropped: int) -> None:
        """Told by a rewritten prefill each time it has run."""
        if self.is_watched:
            self.dropped.append(dropped)

    def tell_record(self, record: CallRecord) -> None:
        """Told by every graph that merges visual features: whether its prompt is pruned. That it was outweighs that another
        graph of the same call was not."""
        if self.is_watched and not (self.record is not None and self.record.pruned and not record.pruned):
            self.record = record

    def tell_merge(self) -> None:
        """Told by every graph that merges visual features, each time it runs."""
        self.has_merged = True

    def rows_told_by_ids(self, embeddings: torch.Tensor) -> torch.Tensor | None:
        """Rows of embeddings that differ from those of the ids, as long as no graph has merged anything."""
        return None if self.has_merged else self.told_by_ids(embeddings)

    # -- merged embeddings ----------------------------------------------------------------------------------------------

    def hand_over(self, embeddings: torch.Tensor, handed: Handed, unreceived: Callable[[], None] | None) -> None:
        """Args: ``unreceived``, called if they are forgotten before any graph has taken them, and if any is visual."""
        def died(handed: Handed) -> None:
            if not handed.received and handed.visual.any():
                handed.call.lost.add(tuple(handed.visual.shape))
                if unreceived is not None:
                    unreceived()

        if self.is_watched and self.merges_behind is None:
            self.merges_behind = count_graph_breaks()
        for call in self.around():
            call.handed.drop(embeddings)
        self.handed.note(embeddings, handed, died)

    def handed_over(self, embeddings: object) -> Handed | None:
        return next((held for call in self.around() if (held := call.handed.get(embeddings)) is not None), None)

    def has_lost(self, embeddings: torch.Tensor) -> bool:
        """Whether one of its graphs has merged visual features into others of this [batch, seq] that none took, or none has
        taken yet."""
        size = tuple(embeddings.shape[:2])
        return size in self.lost or any(
            handed.call is self and not handed.received and tuple(handed.visual.shape) == size and bool(handed.visual.any())
            for tensor, handed in self.handed if tensor is not embeddings)

    # -- what tensors are computed from, and shortened caches -------------------------------------------------------------

    def origin_of(self, held: object) -> Origin | None:
        return next((found for call in self.around() if (found := call.origins.get(held)) is not None), None)

    def conversation_of(self, inputs: tuple[Any, ...]) -> Conversation | None:
        """That of the first shortened cache among the inputs of a graph."""
        tables = [call.shortened for call in self.around() if call.shortened]
        return next((found for held in inputs for table in tables if (found := table.get(held)) is not None), None)

    def correct(self, cached: torch.Tensor) -> None:
        """Somebody counts the dropped tokens of the cache that holds this tensor."""
        for call in self.around():
            call.shortened.drop(cached)

    def leave(self) -> None:
        """At its end."""
        if self.surrounding is not None:
            self.surrounding.has_merged |= self.has_merged
            if self.record is not None:
                self.surrounding.tell_record(self.record)
            self.handed.move_to(self.surrounding.handed)
            self.origins.move_to(self.surrounding.origins)
            self.shortened.move_to(self.surrounding.shortened)


UNWATCHED = Call()
"""Where nobody surrounds a call, and what is left of the others."""

_CURRENT: contextvars.ContextVar[Call] = contextvars.ContextVar("parvts_fx_call", default=UNWATCHED)


def current_call() -> Call:
    return _CURRENT.get()


@contextlib.contextmanager
def begin_call() -> Iterator[Call]:
    """Collect, for the duration of a call, what its graphs tell."""
    call = Call(_CURRENT.get())
    token = _CURRENT.set(call)
    try:
        yield call
    finally:
        _CURRENT.reset(token)
        call.leave()
