"""Tells which blocks of the residual stream make up one decoder layer.

A block lies between two links of the stream: attention and its sum, a feed-forward and its sum. A layer is what repeats:
one or more blocks in which tokens meet, and what follows them. Layers may differ (linear attention in three of four, experts
from the third on, a norm over tokens in some feed-forwards), so it is not enough to look for equal sequences.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from parvts_fx.analysis.blocks import Block


@dataclasses.dataclass(frozen=True)
class Period:
    """Which blocks make up a layer."""

    starts: list[int]
    """The groups of mixers with which layers begin."""

    told_by: str
    end_is_known: bool = True
    """Whether all that mixes behind the last layer's matrices is the layer's: else it may be a final norm over tokens."""


def find_period(blocks: Sequence[Block], count: int) -> Period:
    """Which of ``count`` groups of mixers begin layers."""
    starts, told_by = _find_starts(blocks, count)
    places = [place for place, block in enumerate(blocks) if block.group in starts and not block.is_bare]
    ends, last = [_bare_in_front(blocks, place) for place in places[1:]], _bare_in_front(blocks, len(blocks))
    return Period(starts, told_by, all(end == last for end in ends) if ends else not last)


def _bare_in_front(blocks: Sequence[Block], place: int) -> int:
    """How many bare blocks in a row stand there."""
    return len(list(itertools.takewhile(lambda block: block.is_bare, reversed(blocks[:place]))))


def _find_starts(blocks: Sequence[Block], count: int) -> tuple[list[int], str]:
    whole = [block for place, block in enumerate(blocks) if not block.is_bare or not place]
    for view in [whole] if len(whole) == len(blocks) else [blocks, whole]:
        # bare blocks are parts of what repeats, or else of the layer in front of them
        starts = _behind_feed_forwards(view)
        if _is_feed_forward(view[-1], view) and (len(starts) > 1 if view is whole else _is_regular(starts, view)):
            ends = [before for before, block in zip(view, view[1:]) if block.group in starts]
            others = ", or with one of the same matrices" if any(end.mixes for end in (*ends, view[-1])) else ""
            return starts, f"each ends with blocks in which tokens do not meet{others}"
        for period in range(1, len(view) // 2 + 1):
            found = _ending_alike(view, period)
            if found is not None:
                return found, f"{period} blocks of the residual stream, the last one alike in all layers"
    for period in range(2, len(whole) // 2 + 1):
        found = _beginning_alike(whole, period)
        if found is not None:
            return found, f"{period} blocks of the residual stream, the first one alike in all layers"
    for period in range(2, len(whole) // 2 + 1):
        found = _attending_first(whole, period)
        if found is not None:
            return found, f"{period} blocks of the residual stream, attention in the first one alone"
    found = _behind_those_like_the_last(whole)
    if found is not None:
        return found, "each ends with a block of the same matrices"
    if _is_regular(starts, whole) or _is_regular(starts, whole, mixing=False):
        return starts, "each begins behind blocks in which tokens do not meet"
    for period in range(1, len(whole) // 2 + 1):
        found = _repeating(whole, period)
        if found is not None:
            return found, f"{period} blocks of the residual stream, which repeat"
    chunks = _chunks(whole, 1)
    if chunks is not None and _shared(chunks):
        return _starts(chunks), "1 block of the residual stream, alike in part"
    if not whole[-1].mixes or count == 1:
        return [0], "one block in which tokens meet, or several and one in which they do not"
    return list(range(count)), "no period was found: every block in which tokens meet counts as a layer"


def _is_feed_forward(block: Block, blocks: Sequence[Block]) -> bool:
    """Whether tokens do not meet in a block, or it has the matrices of another one in which they do not."""
    return not block.mixes or any(
        (other.weights, other.matrices) == (block.weights, block.matrices) for other in blocks if not other.mixes)


def _behind_feed_forwards(blocks: Sequence[Block]) -> list[int]:
    starts = [0]
    for before, block in zip(blocks, blocks[1:]):
        if block.group is not None and _is_feed_forward(before, blocks):
            starts.append(block.group)
    return starts


def _behind_those_like_the_last(blocks: Sequence[Block]) -> list[int] | None:
    """Layers of any length that end with blocks of the same matrices, which no other block has; None where such a block would
    be a layer alone."""
    last = blocks[-1]
    ends = [place for place, block in enumerate(blocks) if (block.weights, block.matrices) == (last.weights, last.matrices)]
    begins = [0, *(end + 1 for end in ends[:-1])]
    others = frozenset().union(*(block.weights for place, block in enumerate(blocks) if place not in ends))
    if len(ends) < 2 or last.weights & others or any(begin == end for begin, end in zip(begins, ends)):
        return None
    mixing = [[block.group for block in blocks[begin:end + 1] if block.group is not None] for begin, end in zip(begins, ends)]
    return [groups[0] for groups in mixing] if all(mixing) else None


def _is_regular(starts: Sequence[int], blocks: Sequence[Block], mixing: bool = True) -> bool:
    """Whether there are several layers, all with as many blocks: of those that mix, or of all."""
    places = [place for place, block in enumerate(blocks) if block.group in starts]
    sizes = {
        sum(block.mixes or not mixing for block in blocks[begin:end]) for begin, end in zip(places, [*places[1:], len(blocks)])}
    return len(starts) > 1 and len(sizes) == 1


def _chunks(blocks: Sequence[Block], period: int) -> list[Sequence[Block]] | None:
    """Cut into as many blocks each as far as tokens meet; None where one chunk is short or without a mixer."""
    last = max(index for index, block in enumerate(blocks) if block.mixes)
    chunks = [blocks[start:start + period] for start in range(0, last + 1, period)]
    whole = len(chunks[-1]) == period and len(blocks) <= period * len(chunks)
    fits = whole and len(chunks) > 1 and all(any(block.mixes for block in chunk) for chunk in chunks)
    return chunks if fits else None


def _starts(chunks: Sequence[Sequence[Block]]) -> list[int]:
    return [next(block.group for block in chunk if block.group is not None) for chunk in chunks]


def _shared(chunks: Sequence[Sequence[Block]]) -> frozenset:
    """The matrices that the last blocks have in common."""
    return frozenset.intersection(*(chunk[-1].weights for chunk in chunks))


def _ending_alike(blocks: Sequence[Block], period: int) -> list[int] | None:
    """Layers whose last blocks share matrices (a feed-forward's) that no other block has.

    Where there are no other blocks, a matrix of that shape in all of them may be a coincidence: of attention's output and an
    expert's router, say. Then all blocks have the same matrices, or share those of a feed-forward beside what mixes.
    """
    chunks = _chunks(blocks, period)
    if chunks is None:
        return None
    shared = _shared(chunks)
    if period == 1:
        alike = len({(block.weights, block.matrices) for block in blocks}) == 1
        found = shared and (alike or frozenset.intersection(*(block.beside for block in blocks)))
        return _starts(chunks) if found else None
    others = [block for chunk in chunks for block in chunk[:-1]]
    return _starts(chunks) if shared and not any(shared <= block.weights for block in others) else None


def _beginning_alike(blocks: Sequence[Block], period: int) -> list[int] | None:
    """Layers whose first blocks (attention's) have the same matrices, which no other block has."""
    chunks = _chunks(blocks, period)
    if chunks is None:
        return None
    first = {(chunk[0].weights, chunk[0].matrices) for chunk in chunks}
    weights = chunks[0][0].weights
    others = [block for chunk in chunks for block in chunk[1:]]
    alike = len(first) == 1 and weights and not any(weights & block.weights for block in others)
    return _starts(chunks) if alike else None


def _attending_first(blocks: Sequence[Block], period: int) -> list[int] | None:
    """Layers whose first blocks alone attend, with matrices in common that no other block has."""
    chunks = _chunks(blocks, period)
    if chunks is None:
        return None
    others = [block for chunk in chunks for block in chunk[1:]]
    shared = frozenset.intersection(*(chunk[0].weights for chunk in chunks))
    alone = all(chunk[0].attends for chunk in chunks) and not any(block.attends for block in others)
    return _starts(chunks) if alone and shared and not any(shared & block.weights for block in others) else None


def _repeating(blocks: Sequence[Block], period: int) -> list[int] | None:
    chunks = _chunks(blocks, period)
    if chunks is None:
        return None

    def shape(chunk: Sequence[Block]) -> list:
        return [(block.mixes, block.weights, block.operations) for block in chunk]

    alike = all(shape(chunk) == shape(chunks[-1]) for chunk in chunks[1:-1])
    first = [block.weights for block in chunks[0]] == [block.weights for block in chunks[-1]]  # it begins with the embeddings
    return _starts(chunks) if alike and first else None
