"""How a teacher's distribution becomes bytes, and bytes a distribution: fixed-width integers, bit by bit.

A *block* holds the positions of one window. Its streams follow each other, each beginning at a byte.

Sampled: M draws with replacement a position, kept as distinct ids, ascending, and how often each was drawn.

    ids       18 bits each at 256,000 pieces
    counts    plane 1, a bit for every id: count > 1; plane 2, a bit for each of those: count > 2; plane 3,
              again: count > 3; then what the planes leave of a count, count - 4, at a fixed width

How many ids a position has is not stored: its counts sum to M. The planes suit what is drawn from language:
most counts are 1, and the likeliest id may have nearly all of M. At M = 50 a count takes two to three bits
instead of 6 (two planes take a hundredth of a byte more an id, four the same), so an id with all that belongs
to it takes 2.5 to 2.65 bytes.

Top-k: k ids a position, the most probable first, then k log-probabilities and that of all other ids together
(the tail), each 16 bits in steps of 2^-11 nats; below e^-32 is clipped to e^-32. On reading, probabilities
and tail are scaled to sum to 1. Rounding to a step is off by up to 2.5e-4 of a probability, and scaling by
as much again.
"""

import numpy as np
from jaxtyping import Float32, Int, Int32, Integer, UInt8, UInt32

PLANES = 3
_STEP = 2.0**-11  # nats
_LOWEST = 2**16 - 1
_MOST_BITS = 25  # seven bits of a byte begun and these make the 32 that are read at once

_PROBABILITY = np.exp(-_STEP * np.arange(_LOWEST + 1))


def id_width(vocab_size: int) -> int:
    """Bits of an id."""
    return (vocab_size - 1).bit_length()


def pack(values: Integer[np.ndarray, " N"], width: int) -> UInt8[np.ndarray, " _"]:
    """Integers of `width` bits each (0 to 25), the lowest bit first, the last byte filled up with zeros."""
    assert 0 <= width <= _MOST_BITS, width
    assert not len(values) or 0 <= int(values.min()) <= int(values.max()) < 1 << width, width
    octets = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    bits = np.unpackbits(octets, axis=1, count=width, bitorder="little")
    return np.packbits(bits, axis=None, bitorder="little")


def unpack(buffer: UInt8[np.ndarray, " _"], start: int, count: int, width: int) -> UInt32[np.ndarray, " N"]:
    """What `pack` made: `count` integers of `width` bits, from byte `start` on. Never reads beyond them.

    Raises ValueError if the buffer ends before.
    """
    assert 0 <= width <= _MOST_BITS, width
    size = _bytes(count, width)
    if start + size > len(buffer):
        raise ValueError(f"{count:,} values of {width} bits from byte {start:,} on end after the block does.")
    if width == 0:
        return np.zeros(count, np.uint32)
    groups = (count + 7) // 8  # eight values begin and end with a byte: the same eight shifts serve them all
    padded = np.zeros(groups * width + 4, np.uint8)
    padded[:size] = buffer[start : start + size]
    words = np.ndarray(len(padded) - 3, "<u4", padded, strides=(1,))  # four bytes from every byte on
    values = np.empty((groups, 8), np.uint32)
    for place in range(8):
        byte, bit = divmod(place * width, 8)
        values[:, place] = words[byte::width][:groups] >> bit & (1 << width) - 1
    return values.reshape(-1)[:count]


def encode_sampled(ids: Int[np.ndarray, "T M"], vocab_size: int) -> tuple[UInt8[np.ndarray, " _"], int]:
    """The block of a window from M draws a position, ascending, and how many distinct ids it holds."""
    positions, samples = ids.shape
    assert samples
    is_first = np.ones((positions, samples), bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = np.flatnonzero(is_first)
    streams = [pack(ids.reshape(-1)[starts], id_width(vocab_size))]
    left = np.diff(starts, append=ids.size) - 1
    for _ in range(PLANES):
        streams.append(pack(np.minimum(left, 1), 1))
        left = left[left > 0] - 1
    streams.append(pack(left, _rest_width(samples)))
    return np.concatenate(streams), len(starts)


def decode_sampled(
    block: UInt8[np.ndarray, " _"], count: int, *, positions: int, samples: int, vocab_size: int
) -> tuple[UInt32[np.ndarray, " N"], Int32[np.ndarray, " N"], Int[np.ndarray, " {positions+1}"]]:
    """A window's `count` distinct ids, how often each was drawn, and where each position begins among them.

    The last beginning is where the last position ends. Raises ValueError for a block that does not add up.
    """
    ids, at = unpack(block, 0, count, id_width(vocab_size)), _bytes(count, id_width(vocab_size))
    counts, more = np.ones(count, np.int32), np.arange(count)
    for _ in range(PLANES):
        # Twice as fast as `unpack`; where the block is too short it reads zeros, and the check below tells.
        plane = np.unpackbits(block[at : at + _bytes(len(more), 1)], count=len(more), bitorder="little")
        at += _bytes(len(more), 1)
        more = more[np.flatnonzero(plane)]
        counts[more] += 1
    counts[more] += unpack(block, at, len(more), _rest_width(samples)).astype(np.int32)
    _check_block(block, at + _bytes(len(more), _rest_width(samples)), ids, vocab_size)
    drawn, due = np.cumsum(counts), samples * np.arange(1, positions + 1)
    ends = np.searchsorted(drawn, due)
    if (drawn[-1] if count else 0) != positions * samples or (drawn[ends] != due).any():
        raise ValueError(f"the counts do not make {positions:,} positions of {samples:,} draws each.")
    return ids, counts, np.append(0, ends + 1)


def encode_top(
    ids: Int[np.ndarray, "T k"],
    log_probs: Float32[np.ndarray, "T k"],
    log_tail: Float32[np.ndarray, " T"],
    vocab_size: int,
) -> UInt8[np.ndarray, " _"]:
    """The block of a window from k ids a position; log-probabilities in nats, a tail of -inf is allowed."""
    nats = np.column_stack([log_probs, log_tail]).astype(np.float64)
    codes = np.rint(np.clip(nats / -_STEP, 0, _LOWEST)).astype("<u2")
    return np.concatenate([pack(ids.reshape(-1), id_width(vocab_size)), codes.reshape(-1).view(np.uint8)])


def decode_top(
    block: UInt8[np.ndarray, " _"], *, positions: int, k: int, vocab_size: int
) -> tuple[UInt32[np.ndarray, "T k"], Float32[np.ndarray, "T k"], Float32[np.ndarray, " T"]]:
    """A window's ids, their probabilities and the tail's, which sum to 1 at every position.

    Raises ValueError for a block of another length, or an id outside the vocabulary.
    """
    count, width = positions * k, id_width(vocab_size)
    ids, at = unpack(block, 0, count, width), _bytes(count, width)
    _check_block(block, at + 2 * positions * (k + 1), ids, vocab_size)
    codes = block[at:].view("<u2").reshape(positions, k + 1)
    masses = _PROBABILITY[codes]
    masses = (masses / masses.sum(-1, keepdims=True)).astype(np.float32)
    return ids.reshape(positions, k), masses[:, :k], masses[:, k]


def _bytes(count: int, width: int) -> int:
    return (count * width + 7) // 8


def _rest_width(samples: int) -> int:
    """Bits of what the planes leave of a count."""
    return max(samples - PLANES - 1, 0).bit_length()


def _check_block(block: np.ndarray, end: int, ids: np.ndarray, vocab_size: int) -> None:
    if end != len(block):
        raise ValueError(f"the block has {len(block):,} bytes, and its streams end after {end:,}.")
    if len(ids) and int(ids.max()) >= vocab_size:
        raise ValueError(f"the id {int(ids.max()):,} lies outside a vocabulary of {vocab_size:,}.")
