"""Integers of any width and whole blocks survive packing; what does not add up is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemwright.targets import packing
from gemwright.targets.packing import decode_sampled, decode_top, encode_sampled, encode_top, pack, unpack

WIDTHS = st.integers(0, 25)
VOCABULARIES = st.sampled_from([1, 2, 3, 700, 2_048, 65_536, 256_000])
SEEDS = st.integers(0, 2**32)


def peaked(seed: int, positions: int, samples: int, vocab_size: int) -> np.ndarray:
    """Draws from power laws, steep at some positions and flat at others, as language is."""
    draw = np.random.default_rng(seed)
    steepness = draw.uniform(1.25, 3.2, (positions, 1))
    ranks = (1 - draw.random((positions, samples))) ** (-1 / (steepness - 1))
    places = np.minimum(ranks, vocab_size).astype(np.int64) * 2_654_435_761
    return np.sort((places + draw.integers(0, vocab_size, (positions, 1))) % vocab_size, -1)


def random_top(seed: int, positions: int, k: int, vocab_size: int) -> tuple[np.ndarray, ...]:
    """Ids, log-probabilities and log tail of random distributions, the most probable first."""
    draw = np.random.default_rng(seed)
    ids = np.stack([draw.permutation(vocab_size)[:k] for _ in range(positions)])
    masses = np.sort(draw.exponential(size=(positions, k + 1)) ** 4, -1)[:, ::-1]
    masses /= masses.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        logs = np.log(masses).astype(np.float32)
    return ids, logs[:, :k], logs[:, k]


def decoded(block: np.ndarray, count: int, ids: np.ndarray, vocab_size: int) -> tuple[np.ndarray, ...]:
    positions, samples = ids.shape
    return decode_sampled(block, count, positions=positions, samples=samples, vocab_size=vocab_size)


def returned(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """The draws that a block gives back."""
    found, counts, begins = decoded(*encode_sampled(ids, vocab_size), ids, vocab_size)
    assert begins[0] == 0
    assert begins[-1] == len(found)
    assert (np.add.reduceat(counts, begins[:-1]) == ids.shape[1]).all()
    return np.repeat(found, counts).reshape(ids.shape)


@given(WIDTHS, st.data())
def test_integers_of_any_width_come_back(width: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40))
    packed = pack(np.array(values, np.int64), width)
    assert len(packed) == (len(values) * width + 7) // 8
    assert unpack(packed, 0, len(values), width).tolist() == values


@given(WIDTHS, st.integers(0, 9), SEEDS)
def test_unpacking_begins_anywhere_and_minds_nothing_around(width: int, start: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 2**width, 21)
    around = draw.integers(0, 256, 30).astype(np.uint8)
    buffer = np.concatenate([around[:start], pack(values, width), around])
    assert unpack(buffer, start, 21, width).tolist() == values.tolist()


def test_the_lowest_bit_comes_first() -> None:
    """An order that changes with a release would make every stored file unreadable."""
    assert pack(np.array([1, 2, 5]), 3).tolist() == [0b01_010_001, 0b1]


def test_a_buffer_that_ends_too_soon_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"9 values of 18 bits from byte 1 on end after the block does"):
        unpack(pack(np.arange(9), 18), 1, 9, 18)


@given(SEEDS, st.integers(1, 20), st.integers(1, 70), VOCABULARIES)
def test_sampled_blocks_come_back(seed: int, positions: int, samples: int, vocab_size: int) -> None:
    ids = peaked(seed, positions, samples, vocab_size)
    assert (returned(ids, vocab_size) == ids).all()


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 6, 50, 1_000])
def test_sampled_extremes_come_back(samples: int) -> None:
    """All draws one id, and no id twice; the first ids of the vocabulary, and its last."""
    last = 255_999
    one = np.full(samples, last)
    rows = [one, np.arange(samples), one - np.arange(samples)[::-1], np.zeros(samples, int), one]
    ids = np.stack(rows)
    assert (returned(ids, 256_000) == ids).all()


def test_an_id_of_a_large_vocabulary_takes_less_than_2_7_bytes() -> None:
    """All included: the index has 24 bytes a window."""
    ids = peaked(0, 1_024, 50, 256_000)
    block, count = encode_sampled(ids, 256_000)
    assert 11.5 < count / 1_024 < 12.5
    assert (len(block) + 24) / count < 2.7


@given(SEEDS, st.integers(1, 20), VOCABULARIES.filter(lambda size: size < 3_000), st.data())
def test_top_k_comes_back_within_its_step(
    seed: int, positions: int, vocab_size: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, min(vocab_size, 60)))
    ids, log_probs, log_tail = random_top(seed, positions, k, vocab_size)
    block = encode_top(ids, log_probs, log_tail, vocab_size)
    found, probs, tail = decode_top(block, positions=positions, k=k, vocab_size=vocab_size)
    assert (found == ids).all()
    assert (np.diff(probs, axis=-1) <= 0).all()
    # Half a step of its own, half a step of the sum that it is divided by, and e^-32.
    np.testing.assert_allclose(probs, np.exp(log_probs), rtol=5.5e-4, atol=2e-14)
    np.testing.assert_allclose(tail, np.exp(log_tail), rtol=5.5e-4, atol=2e-14)


@given(SEEDS, st.integers(1, 60))
def test_top_k_and_tail_sum_to_one(seed: int, k: int) -> None:
    block = encode_top(*random_top(seed, 8, k, 700), 700)
    _, probs, tail = decode_top(block, positions=8, k=k, vocab_size=700)
    np.testing.assert_allclose(probs.sum(-1) + tail, 1, atol=1e-6)


def test_a_probability_of_nothing_is_clipped() -> None:
    logs = np.array([[0.0, -np.inf, -1e30, -32.5]], np.float32)
    block = encode_top(np.arange(4)[None], logs, np.array([-np.inf], np.float32), 4)
    _, probs, tail = decode_top(block, positions=1, k=4, vocab_size=4)
    assert probs[0, 0] == 1
    np.testing.assert_allclose([*probs[0, 1:], *tail], np.exp(-65_535 / 2_048), rtol=1e-6)


def test_an_id_outside_the_vocabulary_is_an_error() -> None:
    ids = np.array([[0, 5], [3, 6]])
    with pytest.raises(ValueError, match="the id 6 lies outside a vocabulary of 6"):
        decoded(*encode_sampled(ids, 8), ids, 6)
    block = encode_top(ids, np.zeros((2, 2), np.float32), np.zeros(2, np.float32), 8)
    with pytest.raises(ValueError, match="the id 6 lies outside a vocabulary of 6"):
        decode_top(block, positions=2, k=2, vocab_size=6)


@pytest.mark.parametrize("change", [1, -1])
def test_a_block_of_another_length_is_an_error(change: int) -> None:
    ids = peaked(0, 8, 50, 700)
    block, count = encode_sampled(ids, 700)
    with pytest.raises(ValueError, match="block"):
        decoded(np.append(block, np.uint8(0))[: len(block) + change], count, ids, 700)
    block = encode_top(*random_top(0, 8, 5, 700), 700)
    with pytest.raises(ValueError, match="block"):
        decode_top(np.append(block, np.uint8(0))[: len(block) + change], positions=8, k=5, vocab_size=700)


@pytest.mark.parametrize(("positions", "samples"), [(2, 4), (4, 4), (4, 3), (6, 2), (12, 1)])
def test_counts_that_do_not_make_the_positions_are_an_error(positions: int, samples: int) -> None:
    """Three positions of four draws; the last three shapes are as many, and cut through an id's."""
    block, count = encode_sampled(np.array([[0, 0, 1, 1], [2, 2, 2, 2], [4, 5, 5, 5]]), 8)
    with pytest.raises(ValueError, match="counts"):
        decode_sampled(block, count, positions=positions, samples=samples, vocab_size=8)


def test_no_ids_are_no_positions() -> None:
    with pytest.raises(ValueError, match="counts do not make 3 positions of 50 draws"):
        decode_sampled(np.empty(0, np.uint8), 0, positions=3, samples=50, vocab_size=8)


def test_the_planes_hold_counts_up_to_three() -> None:
    """So a count that is larger, and only that, takes a number: here 47, of which 43 is left."""
    block, _ = encode_sampled(np.array([[0] * 47 + [1] * 3]), 4)
    ids, planes, rest = block[:1], block[1:4], block[4:]
    assert ids.tolist() == [0b01_00]
    assert planes.tolist() == [0b11, 0b11, 0b01]
    assert rest.tolist() == [43]
    assert packing.PLANES == 3
