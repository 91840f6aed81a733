"""What :func:`parvts_fx.compile` arranges around a compiled call, for the duration of the call and nowhere else."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from parvts_fx.errors import BeginAgain, NamesAreNeeded, NotRewritten, tell_unrewritten
from parvts_fx.options import Options
from parvts_fx.runtime.cached_rows import can_follow, given_mask, rows_by_mask, with_cached_columns
from parvts_fx.runtime.caches import find_caches, has_stream, with_own_caches
from parvts_fx.runtime.call import Call, TensorTable, begin_call
from parvts_fx.runtime.closed_modules import ClosedModules
from parvts_fx.runtime.garbage import no_collections
from parvts_fx.runtime.joined_features import JoinedFeatures
from parvts_fx.runtime.pruned_caches import remember_pruned
from parvts_fx.runtime.read_call import read_call, rows_of_none_of
from parvts_fx.runtime.record import NO_VISUALS, CallRecord, OnCall, keep_record
from parvts_fx.runtime.static_caches import lend_growing_cache
from parvts_fx.runtime.unseen import Unseen
from parvts_fx.runtime.watched_generate import paused
from parvts_fx.torch_private import (
    GuardOnDataDependentSymNode,
    TorchDynamoException,
    as_newer_torch,
    count_graph_breaks,
    dynamo_config,
    messages_while_capturing,
    sizes_in_strings,
    told_of_compiling,
    tree_leaves,
    uncompiled_call,
)

_SETTINGS: tuple[dict[str, bool], ...] = (
    {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True},
    {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": False},
    {"capture_scalar_outputs": False, "capture_dynamic_output_shape_ops": False},
)
_NAMED = {"assume_static_by_default": False, "specialize_float": True}
"""So that all sizes have names, and other numbers stay what they are."""

MOVES = "its cache moves layers between devices as it is filled, and is not empty: such calls run uncompiled"
_RECOMPILE_LIMIT = 128  # Dynamo itself stops at 256 per code object, whatever the limit


def watched_call(
    call: Callable[..., Any], options: Options, model: torch.nn.Module, on_call: OnCall | None = None, once: bool = False,
    disabled: bool = False, anew: Callable[[], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Run a compiled call under settings of Dynamo's that keep it in one piece, and keep its cache's count right.

    Checks on data (``.item()``, boolean indexing) otherwise break the graph between the merge and the decoder, or
    between the decoder's layers. Models of one library share code objects, and with them Dynamo's recompile limit.

    Args:
        on_call: given the record of every call with a prompt (:mod:`parvts_fx.runtime.record`).
        once: there will be a single call, in which nothing is tried out for later ones.
        disabled: torch.compile was told to compile nothing.
        anew: compiles the call once more, so that nothing that is compiled already is used for it.

    Raises (the result):
        NotRewritten: with ``strict=True``, for a call with visual inputs that no captured graph merges.
    """
    watched = _Watched(call, options, model, on_call, once, disabled, anew)

    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        return watched(args, kwargs)

    return run


class _Watched:
    """One model's compiled call, and what is known of its calls so far."""

    def __init__(
        self, call: Callable[..., Any], options: Options, model: torch.nn.Module, on_call: OnCall | None, once: bool,
        disabled: bool, anew: Callable[[], Callable[..., Any]] | None,
    ) -> None:
        self._call, self._model, self._on_call, self._anew = call, model, on_call, anew
        self._strict = options.strict
        self._frames = _Frames()
        self._closed = ClosedModules(model)
        self._unseen = Unseen(disabled)
        self._told: set[str] = set()
        self._returned: TensorTable[bool] = TensorTable()
        self._features = JoinedFeatures()
        self._by_sample, self._names_sizes = True, True
        self._tries = not once

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        prompts, has_pictures, is_step = read_call(args, kwargs, self._returned)
        breaks = count_graph_breaks()
        args, kwargs = with_cached_columns(self._model.forward, args, kwargs)
        lent, mask = (lend_growing_cache(kwargs), given_mask(self._model.forward, args, kwargs)) if has_pictures else (None, None)
        given = kwargs if lent is None else lent.kwargs
        if self._tries:
            self._features.try_out(given, functools.partial(self._try_uncompiled, args))
        joined = self._features.joined(given)
        moves = any(map(has_stream, find_caches(args, joined)))
        output, caches, told = self._run(
            moves, args, joined, prompts if has_pictures else [], mask,
            lent is None or can_follow(mask))
        if lent is not None:
            output, caches = lent.give_back(output, sum(told.dropped[-1:])), [lent.own]
        self._note(output, caches, told)
        unseen = has_pictures and not told.has_merged
        self._record(told, "" if not unseen else MOVES if moves else self._unseen.reason(told, breaks), is_step)
        return self._features.parted(output, given, joined)

    def _run(
        self, moves: bool, args: Sequence[Any], kwargs: Mapping[str, Any], prompts: Sequence[torch.Tensor], mask: Any,
        by_sample: bool,
    ) -> tuple[Any, list[Any], Call]:
        """What the call returns, the caches that it leaves, and what its graphs have told.

        Args:
            moves: whether the model runs as it is.
            prompts: what may be the ids, if they come with pictures.
            mask: that of a prompt.
            by_sample: False where nobody puts the columns of later calls' masks in place.
        """
        breaks = count_graph_breaks()
        if self._anew is not None and self._closed.open_changed():
            self._call, self._frames = self._anew(), _Frames()
        while True:
            try:
                with paused(), no_collections(), self._closed, self._frames.capturing(), begin_call() as told:
                    told.breaks_before = breaks
                    if self._anew is not None:
                        told.can_begin_again = functools.partial(self._closed.can_close, breaks)
                    if prompts:
                        told.told_by_ids = functools.partial(rows_of_none_of, self._model, prompts)
                        told.mask_rows = rows_by_mask(mask, find_caches(args, kwargs))
                    told.by_sample, told.names_sizes = by_sample and self._by_sample, self._names_sizes
                    output = (self._run_uncompiled if moves else self._call)(*args, **kwargs)
                    caches = find_caches(output, args, kwargs)
                    if told.rows is None or caches or not told.shortened:
                        return output, caches, told
                    self._by_sample, told.record = False, None  # a cache that nobody can tell which rows are whose
            except (TorchDynamoException, GuardOnDataDependentSymNode) as error:
                if isinstance(getattr(error, "inner_exception", error), NamesAreNeeded):
                    self._names_sizes = self._frames.name_sizes() or self._captured_with_names()
                elif not self._frames.relax():
                    raise
            except BeginAgain:
                assert self._anew is not None, "or nobody had begun again"
                if self._closed.close(lambda: self._try_uncompiled(args, with_own_caches(kwargs))):
                    self._call, self._frames = self._anew(), _Frames()
            except NotRewritten as error:
                keep_record(self._model, told.record or CallRecord(False, error.reason), self._on_call)
                raise
            except RuntimeError as error:
                if prompts and not isinstance(error, torch.OutOfMemoryError):
                    self._raise_own(error, args, kwargs)
                raise

    def _captured_with_names(self) -> bool:
        """Have every frame of the call captured again with names for sizes: the one that was compiled last is made of a graph
        in which an earlier capture wrote numbers. False if they were already."""
        if self._anew is None or not self._frames.name_all_sizes():
            return False
        self._call = self._anew()
        return True

    @torch.compiler.disable
    def _raise_own(self, error: RuntimeError, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise the model's own error in place of one from a check that was captured, which has lost its words."""
        own_caches = with_own_caches(kwargs)
        try:
            uncompiled_call(self._model)(*args, **own_caches)
        except (RuntimeError, ValueError, TypeError, IndexError) as own:
            raise own from error

    def _try_uncompiled(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A call that is a trial."""
        with paused(), begin_call():
            return self._run_uncompiled(*args, **kwargs)

    @torch.compiler.disable
    def _run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        return uncompiled_call(self._model)(*args, **kwargs)

    def _note(self, output: Any, caches: Sequence[Any], told: Call) -> None:
        """What later calls need to know of caches, and which numbers have been returned."""
        record = told.record
        for cache in caches if told.dropped else ():
            assert record is not None and record.visual is not None, "what was pruned has been told"
            remember_pruned(cache, record.visual.shape[1], told.dropped[-1], record.visual, rows=told.rows)
        for held in tree_leaves(output):
            if isinstance(held, torch.Tensor) and held.dim() > 2:
                self._returned.note(held, True)

    def _record(self, told: Call, unseen: str, is_step: bool) -> None:
        """Args: ``unseen``, why no graph has told what became of pictures; empty where one has, or where there are none."""
        record = told.record
        if record is None and not told.has_merged and (unseen or not is_step):
            record = CallRecord(False, unseen or NO_VISUALS)
        if record is not None:
            keep_record(self._model, record, self._on_call)
        if unseen and (self._strict or unseen not in self._told):
            self._told.add(unseen)
            tell_unrewritten(unseen, self._strict)


class _Frames:
    """Dynamo's capture settings, frame by frame.

    A frame whose own code cannot be captured with the first settings (it branches on data) is captured with the next
    ones when the call is tried again; all other frames keep theirs.
    """

    def __init__(self) -> None:
        self._levels: dict[str, int] = {}
        self._named: set[str] = set()
        self._captured: set[str] = set()
        self._current: str | None = None

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        self._current = None
        config = dynamo_config()
        limit, ignored = max(_RECOMPILE_LIMIT, config.recompile_limit), config.ignore_logging_functions
        self._sizes = {name: getattr(config, name) for name in _NAMED}
        settings = config.patch(
            **_SETTINGS[0], **self._sizes, recompile_limit=limit, ignore_logging_functions=ignored)  # puts it back
        with told_of_compiling(self._start), settings, as_newer_torch(), sizes_in_strings:
            yield

    def _start(self, given: Any) -> None:
        self._current = str(given.compile_id).partition("/")[0]
        self._captured.add(self._current)
        settings = _SETTINGS[self._levels.get(self._current, 0)] | (_NAMED if self._current in self._named else self._sizes)
        for name, held in {**settings, "ignore_logging_functions": messages_while_capturing()}.items():
            setattr(dynamo_config(), name, held)

    def relax(self) -> bool:
        """Weaken the settings of the frame that was compiled last; False if there is nothing left to weaken."""
        if self._current is None or self._levels.get(self._current, 0) + 1 == len(_SETTINGS):
            return False
        self._levels[self._current] = self._levels.get(self._current, 0) + 1
        return True

    def name_sizes(self) -> bool:
        """Have the frame that was compiled last captured with names for sizes; False if it was already."""
        if self._current is None or self._current in self._named:
            return False
        self._named.add(self._current)
        return True

    def name_all_sizes(self) -> bool:
        """The same for every frame that any call has compiled; False if they were all so."""
        unnamed = self._captured - self._named
        self._named |= unnamed
        return bool(unnamed)
