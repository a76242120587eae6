"""Windows of shards: they cover the text, in an order that is fair, computed, and the same for ever."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gemwright.data.shards import Shards
from gemwright.data.sources import Split
from gemwright.data.windows import Windows, order_key, permuted, target_weights


def whole_split(shards: Shards, split: Split) -> torch.Tensor:
    return torch.from_numpy(shards.read(split, 0, shards.manifest.splits[split].tokens))


def test_windows_cover_the_text_in_order(shards_folder: Path) -> None:
    shards = Shards.open(shards_folder)
    rows = torch.cat([rows for rows, _ in Windows(shards, "train", 64).all(batch_size=7)])
    whole = whole_split(shards, "train")
    assert rows.dtype == torch.int64
    assert torch.equal(rows[:, :-1].flatten(), whole[: len(rows) * 64])
    assert torch.equal(rows[:, 1:].flatten(), whole[1 : len(rows) * 64 + 1])
    assert 0 <= len(whole) - 1 - len(rows) * 64 < 64


def epoch_of(windows: Windows, epoch: int) -> list[tuple[int, ...]]:
    size = len(windows)
    return [tuple(windows.batch(place, 1)[0].tolist()) for place in range(epoch * size, (epoch + 1) * size)]


def test_each_epoch_is_a_new_permutation_of_every_window(shards_folder: Path) -> None:
    windows = Windows(Shards.open(shards_folder), "held_out", 32, seed=3)
    in_order = [tuple(row.tolist()) for row in torch.cat([rows for rows, _ in windows.all(8)])]
    first, second = epoch_of(windows, 0), epoch_of(windows, 1)
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert first != second
    assert first != in_order


def test_the_batch_size_cuts_one_and_the_same_sequence(shards_folder: Path) -> None:
    """So batches cross epochs without dropping a window, and a run resumes from a step alone."""
    windows = Windows(Shards.open(shards_folder), "held_out", 32, seed=3)
    steps = 3 * len(windows) // 70
    long = torch.cat([windows.batch(step, 70) for step in range(steps)])
    assert len(long) > 2 * len(windows)
    assert torch.equal(long, torch.cat([windows.batch(step, 10) for step in range(7 * steps)]))


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(shards_folder: Path) -> None:
    uninterrupted = Windows(Shards.open(shards_folder), "train", 64, seed=5)
    seen = [uninterrupted.batch(step, 8) for step in range(20)]
    resumed = Windows(Shards.open(shards_folder), "train", 64, seed=5)
    assert all(torch.equal(resumed.batch(step, 8), seen[step]) for step in range(12, 20))


def test_another_seed_is_another_order(shards_folder: Path) -> None:
    first, second = (Windows(Shards.open(shards_folder), "train", 64, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.batch(0, 16), second.batch(0, 16))


def test_the_order_is_pinned() -> None:
    """An order that changes with a release would break every resumed run."""
    index = np.arange(12, dtype=np.uint64)
    assert permuted(index, 12, order_key(7, np.zeros_like(index))).tolist() == PINNED


PINNED = [9, 4, 7, 0, 5, 8, 10, 2, 1, 3, 11, 6]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1_000])
def test_the_keyed_order_is_a_permutation_of_any_size(size: int) -> None:
    index = np.arange(size, dtype=np.uint64)
    for seed in range(5):
        order = permuted(index, size, order_key(seed, np.zeros_like(index)))
        assert sorted(order.tolist()) == list(range(size))


def test_every_window_comes_equally_often_in_every_place() -> None:
    """Ten windows over 20,000 epochs; a fair order gives 2,000 each, and five deviations are 212."""
    epochs, size = 20_000, 10
    epoch = np.repeat(np.arange(epochs, dtype=np.uint64), size)
    place = np.tile(np.arange(size, dtype=np.uint64), epochs)
    window = permuted(place, size, order_key(1, epoch))
    counts = np.zeros((size, size), int)
    np.add.at(counts, (place.astype(int), window.astype(int)), 1)
    assert np.abs(counts - epochs / size).max() < 212


def rows_of(windows: Windows) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for batch, _ in windows.all(16) for row in batch}


def test_runs_with_other_seeds_see_the_same_tokens_under_max_tokens(shards_folder: Path) -> None:
    shards = Shards.open(shards_folder)
    first, second = (Windows(shards, "train", 64, seed=seed, max_tokens=1_300) for seed in (0, 1))
    assert len(first) == 20
    assert first.tokens == 1_280
    assert rows_of(first) == rows_of(second) == set(epoch_of(first, 0)) == set(epoch_of(second, 4))
    assert rows_of(first) != rows_of(Windows(shards, "train", 64, max_tokens=1_300, subset_seed=1))


@pytest.mark.parametrize("max_tokens", [None, 1_300])
def test_a_batch_is_what_its_numbers_take(shards_folder: Path, max_tokens: int | None) -> None:
    """Numbers count the windows of the whole split, whatever is kept of them."""
    shards = Shards.open(shards_folder)
    windows, whole = Windows(shards, "train", 64, seed=4, max_tokens=max_tokens), whole_split(shards, "train")
    for step in range(6):
        numbers = windows.numbers(step, 7)
        expected = torch.stack([whole[int(n) * 64 : int(n) * 64 + 65] for n in numbers])
        assert torch.equal(windows.batch(step, 7), expected)
        assert torch.equal(windows.take(numbers), expected)


@pytest.mark.parametrize("max_tokens", [None, 1_300])
def test_the_windows_in_order_are_those_of_every_epoch(shards_folder: Path, max_tokens: int | None) -> None:
    windows = Windows(Shards.open(shards_folder), "train", 64, seed=4, max_tokens=max_tokens)
    numbers, size = windows.in_order(), len(windows)
    assert np.array_equal(numbers, np.unique(numbers)), "ascending, none twice"
    assert len(numbers) == size <= windows.total
    assert torch.equal(windows.take(numbers), torch.cat([rows for rows, _ in windows.all(16)]))
    for epoch in (0, 1):
        seen = windows.numbers(epoch, size)
        assert np.array_equal(np.sort(seen), numbers)
        assert not np.array_equal(seen, numbers)


def test_without_a_subset_the_windows_in_order_are_all_of_the_split(shards_folder: Path) -> None:
    windows = Windows(Shards.open(shards_folder), "train", 64)
    assert windows.in_order().tolist() == list(range(windows.total))


def test_a_smaller_subset_lies_inside_a_larger_one(shards_folder: Path) -> None:
    shards = Shards.open(shards_folder)
    assert rows_of(Windows(shards, "train", 64, max_tokens=640)) < rows_of(
        Windows(shards, "train", 64, max_tokens=6_400)
    )


def test_a_split_shorter_than_a_window_is_an_error(shards_folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"one window takes 1,000,001. Use more text, or a seq_len of at most"
    ):
        Windows(Shards.open(shards_folder), "train", 1_000_000)


def test_max_tokens_below_one_window_is_an_error(shards_folder: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens=63 holds no window of seq_len=64"):
        Windows(Shards.open(shards_folder), "train", 64, max_tokens=63)


def test_targets_are_weighed_as_drawn() -> None:
    """<bos>=2 begins a document, <eos>=1 ends it, <pad>=0 is nothing. A row of weights is one id shorter."""
    ids = torch.tensor(
        [
            [2, 9, 8, 7, 1, 2],
            [9, 1, 2, 2, 1, 2],
            [2, 9, 1, 0, 0, 0],
            [9, 9, 9, 9, 9, 9],
        ]
    )
    weights = [
        [1, 1, 1, 1, 0],
        [1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1],
    ]
    assert target_weights(ids).tolist() == weights
