"""Which blocks of the residual stream are one layer."""

from __future__ import annotations

import pytest

from parvts_fx.analysis.blocks import Block
from parvts_fx.analysis.period import find_period

MATRICES = {
    "A": "qkvo", "B": "qkvo2", "M": "inout", "F": "updown", "G": "updown", "E": "experts", "H": "experts", "P": "qkvo updown",
    "Q": "inout updown", "R": "qkvo updown", "D": "qkv out", "S": "out experts", ".": "",
    "V": "router q kv o updown", "W": "q kv o updown", "X": "q o updown", "U": "router",
}
"""Attention, a second one, another mixer, a feed-forward, one in which tokens meet, experts, attention and another mixer
beside a feed-forward, attention beside one in which tokens meet, attention whose output's matrix has the shape of the router
of experts among which tokens meet; a norm over tokens; and layers whole, with keys of their own or shared ones, and what
mixes copies of the stream between them."""
BESIDE = {"P": "updown", "Q": "updown", "F": "updown", "E": "experts"}


def blocks(word: str) -> list[Block]:
    """A letter a block."""
    made: list[Block] = []
    group = 0
    for letter in word:
        mixes, weights = letter not in "FEU", MATRICES[letter].split()
        made.append(Block(group if mixes else None, frozenset(weights), frozenset(letter),
                          beside=frozenset(BESIDE.get(letter, "").split()), matrices=len(weights)))
        group += mixes
    return made


@pytest.mark.parametrize("word, starts", [
    ("AFAFAF", [0, 1, 2]), ("AAA", [0, 1, 2]), ("PPP", [0, 1, 2]),
    ("AGAGAG", [0, 2, 4]),  # tokens meet in every feed-forward
    ("AFAGAF", [0, 1, 3]), ("AGAFAF", [0, 2, 3]), ("AFAFAG", [0, 1, 2]),  # in some
    ("MFMFMFAF", [0, 1, 2, 3]), ("MGMGAG", [0, 2, 4]), ("QQQP", [0, 1, 2, 3]),  # hybrid layers
    ("ABFABFABF", [0, 2, 4]), ("AAFAAF", [0, 2]), ("ABGABG", [0, 3]),  # two calls a layer
    ("AFAFAS", [0, 1, 2]), ("AFAFAEAE", [0, 1, 2, 3]),  # experts from the third layer on
    ("AFAHAH", [0, 1, 3]), ("AFAFAHAHAH", [0, 1, 2, 4, 6]),  # among which tokens meet
    ("AAF", [0]),  # a single layer
    ("MAFAAF", [0, 2]), ("AAFMFAAG", [0, 2, 3]), ("AAGMGAAGMG", [0, 3, 5, 8]),  # two calls a layer, or another mixer
    ("VUWUXUX", [0, 1, 2, 3]),  # some layers share keys
    ("AFAF.", [0, 1]), ("A.FAFA.F", [0, 2, 3]), ("AFAF.AFAF.", [0, 1, 3, 4]), ("PP.PP.", [0, 1, 3, 4]),  # norms over tokens
    (".F.FAF", [0, 1, 2]), (".G.GAG", [0, 2, 4]),  # mixers without a matrix in place of attention
    ("DSDS", [0, 2]),  # a matrix of one shape in all blocks
    ("AGAFAGAF", [0, 2, 3, 5]), ("PRPR", [0, 1, 2, 3]),  # what repeats in twos and is one layer each
])
def test_layers(word, starts):
    mixing = sum(block.mixes for block in blocks(word))
    assert find_period(blocks(word), mixing).starts == starts


def test_no_period_is_told():
    assert "no period" in find_period(blocks("AMB"), 3).told_by
    assert find_period(blocks("AMB"), 3).starts == [0, 1, 2]
    assert find_period(blocks("MAEM"), 3).starts == [0, 1, 2]  # a layer each, feed-forwards too; these cannot begin one


def test_a_norm_over_tokens_behind_the_last_layer_alone_may_be_the_final_one():
    assert not find_period(blocks("AFAF."), 3).end_is_known
    assert find_period(blocks("AF.AF."), 4).end_is_known
    assert find_period(blocks("AFAF"), 2).end_is_known
