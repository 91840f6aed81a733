"""Which blocks of the residual stream are one layer."""

from __future__ import annotations

import pytest

from parvts_fx.analysis.period import Block, find_period

MATRICES = {
    "A": "qkvo", "B": "qkvo2", "M": "inout", "F": "updown", "G": "updown", "E": "experts", "P": "qkvo updown",
    "Q": "inout updown",
}
"""Attention, a second one, another mixer, a feed-forward, one in which tokens meet, experts, attention and another mixer
beside a feed-forward."""


def blocks(word: str) -> list[Block]:
    """A letter a block; a dot behind one for a norm over tokens behind it."""
    made: list[Block] = []
    group = 0
    for letter in word:
        if letter == ".":
            made[-1] = Block(made[-1].group, made[-1].weights, made[-1].operations, loose=1)
            group += 1
            continue
        mixes = letter not in "FE"
        made.append(Block(group if mixes else None, frozenset(MATRICES[letter].split()), frozenset(letter)))
        group += mixes
    return made


@pytest.mark.parametrize("word, starts", [
    ("AFAFAF", [0, 1, 2]), ("AAA", [0, 1, 2]), ("PPP", [0, 1, 2]),
    ("AGAGAG", [0, 2, 4]),  # tokens meet in every feed-forward
    ("AFAGAF", [0, 1, 3]), ("AGAFAF", [0, 2, 3]), ("AFAFAG", [0, 1, 2]),  # in some
    ("MFMFMFAF", [0, 1, 2, 3]), ("MGMGAG", [0, 2, 4]), ("QQQP", [0, 1, 2, 3]),  # hybrid layers
    ("ABFABFABF", [0, 2, 4]), ("AAFAAF", [0, 2]), ("ABGABG", [0, 3]),  # two calls a layer
    ("AFAFAEAE", [0, 1, 2, 3]),  # experts from the third layer on
    ("AAF", [0]),  # a single layer
    ("AFAF.", [0, 1]), ("A.FAFA.F", [0, 2, 3]),  # norms over tokens
])
def test_layers(word, starts):
    mixing = sum(block.mixes + block.loose for block in blocks(word))
    assert find_period(blocks(word), mixing).starts == starts


def test_no_period_is_told():
    assert "no period" in find_period(blocks("AMB"), 3).told_by
    assert find_period(blocks("AMB"), 3).starts == [0, 1, 2]


def test_a_norm_over_tokens_behind_the_last_layer_alone_may_be_the_final_one():
    assert not find_period(blocks("AFAF."), 3).end_is_known
    assert find_period(blocks("AF.AF."), 4).end_is_known
    assert find_period(blocks("AFAF"), 2).end_is_known
