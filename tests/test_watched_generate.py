"""Models whose own generate merges visual features, uncompiled, and hands them to a part that generates."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import parvts_fx
from parvts_fx.runtime.merged_embeddings import hand_over, visual_rows
from parvts_fx.runtime.watched_generate import WatchedGenerate, _Noting
from tests.models.builders import BUILDERS
from tests.models.generating import Comparison, cache_lengths, run_generate

OPTIONS = dict(lowering="eager", migration_depth=1, keep_ratio=0.25)


@pytest.mark.supports("Models", "models whose generate merges visual features itself and calls a part's (BLIP-2)")
def test_generate_is_pruned():
    built = BUILDERS["blip-2"]()
    with Comparison(built) as compared:
        assert compared.generate(built.inputs) <= 2e-5


@pytest.mark.slow
def test_a_copy_generates_by_itself():
    """A deep copy and an unpickled model have a generate of their own; neither is compiled until asked for."""
    built = BUILDERS["blip-2"]()
    wanted = run_generate(built.model, built.inputs, 2)
    parvts_fx.compile(built.model, strict=True, **OPTIONS)
    for other in (copy.deepcopy(built.model), pickle.loads(pickle.dumps(built.model))):
        assert isinstance(other.generate, WatchedGenerate) and other.generate._model is other
        parvts_fx.compile(other, strict=True, **OPTIONS)
        ours = run_generate(other, built.inputs, 2)
        assert max(cache_lengths(ours.past_key_values)) < max(cache_lengths(wanted.past_key_values))


def test_beams():
    """Beams repeat the merged embeddings: every beam's prompt is pruned."""
    built = BUILDERS["blip-2"]()

    def run() -> object:
        with torch.no_grad():
            return built.model.generate(**built.inputs, max_new_tokens=2, min_new_tokens=2, num_beams=2, do_sample=False,
                                        return_dict_in_generate=True)

    plain = run()
    parvts_fx.compile(built.model, strict=True, **OPTIONS)
    assert max(cache_lengths(run().past_key_values)) < max(cache_lengths(plain.past_key_values))


def test_a_merge_that_no_part_takes_is_told():
    built = BUILDERS["blip-2"]()
    wanted = run_generate(built.model, built.inputs, 2)
    parvts_fx.compile(built.model, **OPTIONS)
    built.model.language_model._compiled_call_impl = None
    with pytest.warns(parvts_fx.ParvtsWarning, match="no compiled part of the model took the merged embeddings"):
        ours = run_generate(built.model, built.inputs, 2)
    assert ours.sequences.tolist() == wanted.sequences.tolist()


def test_what_is_noted():
    text, features, mask = torch.zeros(2, 5, 3), torch.ones(4, 3), torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 1:3] = True
    with _Noting():
        merged = text.masked_scatter(mask[..., None], features)
        copied, cut, repeated = merged.clone(), merged[:, 1:], merged.repeat_interleave(2, dim=0)
        moved, changed = merged + 1, merged.transpose(0, 1)
        written = text.clone()
        written[mask] = features
        chosen = torch.zeros(2, 5, 3).masked_scatter(torch.zeros(2, 5, 3, dtype=torch.bool), features)
    for held, rows in ((merged, mask), (copied, mask), (cut, mask[:, 1:]), (repeated, mask.repeat_interleave(2, 0)),
                       (written, mask), (chosen, torch.zeros_like(mask))):
        assert torch.equal(visual_rows(held, receive=False), rows)
    assert visual_rows(moved) is None and visual_rows(changed) is None and visual_rows(text) is None


def test_embeddings_are_forgotten_with_their_tensor():
    told = []
    embeddings = torch.zeros(1, 2, 3)
    hand_over(embeddings, torch.ones(1, 2, dtype=torch.bool), lambda: told.append(True))
    del embeddings
    assert told == [True]


def test_several_merges_are_noted_together():
    first, second = torch.tensor([[True, False, False, False]]), torch.tensor([[False, False, True, False]])
    with _Noting():
        x = torch.zeros(1, 4, 3).masked_scatter(first[..., None], torch.ones(1, 3))
        x = x.masked_scatter(second[..., None], torch.ones(1, 3))
        assert torch.equal(visual_rows(x, receive=False), first | second)
        x[torch.tensor([[False, True, False, False]])] = 2.0
        assert int(visual_rows(x, receive=False).sum()) == 3
