"""What the graphs of one call tell, and what is left of it when the call ends."""

from __future__ import annotations

import contextvars

import pytest
import torch

from parvts_fx.analysis.modality import Origin
from parvts_fx.runtime.call import UNWATCHED, Conversation, TensorTable, begin_call, current_call
from parvts_fx.runtime.merged_embeddings import hand_over, received, visual_rows

ROWS = torch.tensor([[False, True, True]])


def test_a_table_knows_tensors_by_identity_until_they_die():
    table, died = TensorTable[int](), []
    first, second = torch.zeros(2), torch.zeros(2)
    table.note(first, 1, died.append)
    table.note(second, 2, died.append)
    table.note(first, 3, died.append)
    assert (table.get(first), table.get(second), table.get(torch.zeros(2)), table.get("no tensor")) == (3, 2, None, None)
    assert [known for _, known in table] == [3, 2]
    del first
    assert died == [3] and table.get(second) == 2
    table.drop(second)
    del second
    assert died == [3] and not table


def test_what_moves_is_forgotten_where_it_went():
    one, other, died = TensorTable[int](), TensorTable[int](), []
    tensor = torch.zeros(2)
    one.note(tensor, 1, died.append)
    one.move_to(other)
    assert not one and other.get(tensor) == 1
    del tensor
    assert not other and died == [1]


def test_calls_are_nested():
    assert current_call() is UNWATCHED and not UNWATCHED.is_watched
    with begin_call() as outer:
        outer.told_by_ids = lambda embeddings: ROWS
        with begin_call() as inner:
            assert current_call() is inner and inner.surrounding is outer
            assert inner.rows_told_by_ids(torch.zeros(1, 3, 4)) is None  # its own ids tell nothing
            inner.tell_pruning(5)
            inner.tell_merge()
        assert inner.dropped == [5] and outer.dropped == []
        assert outer.has_merged and outer.rows_told_by_ids(torch.zeros(1, 3, 4)) is None
    current_call().tell_pruning(3)
    assert UNWATCHED.dropped == []


def test_a_call_ends_with_an_error_too():
    with pytest.raises(ZeroDivisionError), begin_call():
        raise ZeroDivisionError
    assert current_call() is UNWATCHED


def test_tensors_that_outlive_a_call_stay_known():
    embeddings, feature, cached = torch.zeros(1, 3, 4), torch.zeros(2, 4), torch.zeros(1, 2, 3, 4)
    origin, conversation = Origin(frozenset(("image",))), Conversation()
    with begin_call() as outer:
        with begin_call() as inner:
            hand_over(embeddings, ROWS)
            inner.origins.note(feature, origin)
            inner.shortened.note(cached, conversation)
        assert outer.handed.get(embeddings) is not None and not inner.handed
    call = current_call()
    assert torch.equal(visual_rows(embeddings, receive=False), ROWS) and call.origin_of(feature) is origin
    assert call.conversation_of((feature, None, cached)) is conversation
    with begin_call() as later:
        assert not received(embeddings) and torch.equal(visual_rows(embeddings), ROWS) and received(embeddings)
        later.correct(cached)
    assert call.conversation_of((cached,)) is None


def test_merges_that_none_took_are_lost_in_their_call_alone():
    with begin_call() as first:
        embeddings, other = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
        hand_over(embeddings, ROWS)
        assert first.has_lost(other) and not first.has_lost(embeddings) and not first.has_lost(torch.zeros(2, 3, 4))
        with begin_call() as part:
            assert not part.has_lost(other)
        del embeddings
        assert first.lost == {(1, 3)} and first.has_lost(other)
    with begin_call() as second:
        taken, sound = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
        hand_over(taken, ROWS)
        visual_rows(taken)
        hand_over(sound, torch.zeros_like(ROWS), merged=ROWS)
        del taken, sound
        assert not second.has_lost(other)
    assert not UNWATCHED.lost


def test_a_tensor_is_handed_over_once():
    """Later merges take the place of earlier ones, in whichever call these were."""
    told, embeddings = [], torch.zeros(1, 3, 4)
    hand_over(embeddings, ROWS, lambda: told.append("first"))
    with begin_call():
        hand_over(embeddings, ~ROWS, lambda: told.append("second"))
        assert torch.equal(visual_rows(embeddings, receive=False), ~ROWS)
    del embeddings
    assert told == ["second"]


def test_another_context_has_a_call_of_its_own():
    with begin_call() as here:
        assert contextvars.Context().run(current_call) is UNWATCHED
        assert contextvars.copy_context().run(current_call) is here
