"""What training and evaluation read of shards: fixed windows, in an order that is computed and not stored.

Batch number `step` is a function of the seed and `step` alone, so a place in a run is one integer, and
resuming is exact. The order is a keyed permutation of all windows, anew in each epoch.

A mixture gives each source the share that one wants of it, and in another stage of the run another share:
Gemma 1 raises "the weight of relevant, high-quality data towards the end of training" (arXiv 2403.08295), and
Gemma 2 filters and mixes its way (report, section 3.1). The shares are told nowhere, so they are the user's.
Which source a place of the run belongs to, and how often that source had its turn before, has a closed form.
A source goes through its windows by a permutation of its own, from stage to stage on: none comes twice before
all came once.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Annotated, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from pydantic import AfterValidator, Field, NonNegativeFloat, field_validator
from torch import Tensor

from gemwright.config import Config, nearest
from gemwright.data.shards import Shards
from gemwright.data.sources import Split
from gemwright.tokenizer.tokenizer import SPECIAL

_SHARE_BITS = 28  # shares are whole multiples of 2^-28: products with 2^35 places stay exact


class MixtureStage(Config):
    """A stretch of a run, and how sources are mixed in it."""

    until: float = Field(gt=0, le=1)
    """Where it ends, as a share of the run."""
    weights: dict[str, NonNegativeFloat]
    """Windows of each source, relative to the others; a source that is not named gets none."""

    @field_validator("weights")
    @classmethod
    def _something_is_read(cls, weights: dict[str, float]) -> dict[str, float]:
        if not sum(weights.values()):
            raise ValueError("every weight is 0, so nothing would be read. Give some source a weight.")
        return weights


def _one_after_another(stages: tuple[MixtureStage, ...]) -> tuple[MixtureStage, ...]:
    ends = [stage.until for stage in stages]
    if ends and (ends != sorted(set(ends)) or ends[-1] != 1):
        raise ValueError(
            f"the stages end at {', '.join(map(str, ends))} of the run, and each must end later than the one "
            "before it, the last at 1. Correct their `until`."
        )
    return stages


Mixture = Annotated[tuple[MixtureStage, ...], AfterValidator(_one_after_another)]
"""The stages of a run, in order. Empty: every source by its share of the text."""


@runtime_checkable
class Rows(Protocol):
    """What training reads: rows of `seq_len + 1` ids, by number, and which of them an update takes."""

    @property
    def split(self) -> Split:
        """The split that they are of."""
        ...

    @property
    def seq_len(self) -> int:
        """Inputs a row, and targets."""
        ...

    @property
    def total(self) -> int:
        """Rows that there are."""
        ...

    def __len__(self) -> int:
        """Rows of an epoch."""
        ...

    def numbers(self, step: int, batch_size: int) -> UInt64[np.ndarray, " B"]:
        """Which rows batch number `step` takes: a function of a seed and `step` alone."""
        ...

    def in_order(self) -> UInt64[np.ndarray, " N"]:
        """The numbers of an epoch's rows, ascending."""
        ...

    def take(self, numbers: UInt64[np.ndarray, " N"]) -> Int[Tensor, "N T1"]:
        """Rows by their numbers, int64."""
        ...


class Windows:
    """Fixed windows of `seq_len + 1` ids, `seq_len` apart: input `w[:-1]`, target `w[1:]`.

    So every id but a split's first is a target once; what does not fill a last window is left out.
    """

    def __init__(
        self,
        shards: Shards,
        split: Split,
        seq_len: int,
        *,
        seed: int = 0,
        max_tokens: int | None = None,
        subset_seed: int = 0,
        mixture: tuple[MixtureStage, ...] = (),
        total_windows: int | None = None,
    ) -> None:
        """Choose the windows.

        Args:
            seed: orders the windows anew in each epoch.
            max_tokens: keep a random subset with at most so many targets. It hangs on `subset_seed` alone, so
                runs that differ in `seed` see the same tokens, and a smaller subset lies inside a larger one.
            mixture: how sources are mixed. It draws on the windows that are kept and do not straddle sources.
            total_windows: the length of the run, of which the stages of a mixture are shares.
        Raises:
            ValueError: the split, or `max_tokens`, is shorter than one window; or the mixture names a source
                that is not there or has no window.
        """
        self.shards = shards
        self.split: Split = split
        self.seq_len = seq_len
        self._seed = seed
        tokens = shards.manifest.splits[split].tokens
        self.max_tokens, self.subset_seed = max_tokens, subset_seed
        self.total = (tokens - 1) // seq_len
        """Windows in the split, those not kept included."""
        if self.total < 1:
            raise ValueError(
                f"{shards.folder}: {split} has {tokens:,} tokens, and one window takes {seq_len + 1:,}. "
                f"Use more text, or a seq_len of at most {tokens - 1:,}."
            )
        if max_tokens is not None and max_tokens < seq_len:
            raise ValueError(f"max_tokens={max_tokens:,} holds no window of seq_len={seq_len:,}. Raise it.")
        self._kept = self.total if max_tokens is None else min(self.total, max_tokens // seq_len)
        self._mixed: _Mixed | None = None
        if mixture:
            assert total_windows is not None, mixture
            self._mixed = _Mixed(self, mixture, total_windows, seed)

    def __len__(self) -> int:
        """Windows that are kept: one epoch, where nothing is mixed."""
        return self._kept

    @property
    def tokens(self) -> int:
        """Distinct targets that training can meet: windows times `seq_len`."""
        return (self._mixed.windows if self._mixed else self._kept) * self.seq_len

    def batch(self, step: int, batch_size: int) -> Int[Tensor, "B {self.seq_len+1}"]:
        """Batch number `step`, int64: a function of the seed and `step` alone."""
        return self.take(self.numbers(step, batch_size))

    def numbers(self, step: int, batch_size: int) -> UInt64[np.ndarray, " B"]:
        """Which windows of the split batch number `step` takes.

        Epochs follow each other without a gap: the batch that ends one begins the next, and none is dropped.
        """
        assert step >= 0, step
        place = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)
        if self._mixed:
            return self._mixed.at(place)
        return self._chosen(in_turn(place, self._kept, self._seed))

    def in_order(self) -> UInt64[np.ndarray, " N"]:
        """The numbers of all windows that are kept, in the order of the text."""
        return np.sort(self._chosen(np.arange(self._kept, dtype=np.uint64)))

    def take(self, numbers: UInt64[np.ndarray, " N"]) -> Int[Tensor, "N {self.seq_len+1}"]:
        """Windows of the split by their numbers, int64."""
        starts = [int(number) * self.seq_len for number in numbers]
        rows = [self.shards.read(self.split, start, start + self.seq_len + 1) for start in starts]
        return torch.from_numpy(np.stack(rows))

    def all(self, batch_size: int) -> Iterator[tuple[Int[Tensor, "B T1"], Float[Tensor, "B T"]]]:
        """Every window that is kept, once, with the weights of its targets, in the order of the text.

        The last batch may be short.
        """
        index = self.in_order()
        for start in range(0, self._kept, batch_size):
            rows = self.take(index[start : start + batch_size])
            yield rows, target_weights(rows)

    def _chosen(self, index: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
        """From a window's number among those kept to its number in the split."""
        if self._kept == self.total:
            return index
        return permuted(index, self.total, order_key(self.subset_seed, np.zeros_like(index)))


class _Mixed:
    """Which window each place of a run takes, where sources are mixed."""

    def __init__(self, windows: Windows, mixture: tuple[MixtureStage, ...], places: int, seed: int) -> None:
        self._kept = windows.in_order() if len(windows) < windows.total else None
        ranges = _ranges(windows, self._kept)
        weights = [[stage.weights.get(name, 0.0) for name in ranges] for stage in mixture]
        read = {name for stage in mixture for name, weight in stage.weights.items() if weight}
        for name in sorted({name for stage in mixture for name in stage.weights}):
            if name not in ranges:
                raise ValueError(
                    f"the mixture names {name!r}, which is no source of {windows.shards.folder}. "
                    f"{nearest(name, ranges)}"
                )
            if name in read and not len(ranges[name]):
                raise ValueError(
                    f"the mixture wants {name!r}, and what {windows.shards.folder} has of it holds no whole "
                    f"window of {windows.seq_len + 1:,} tokens. Leave it out, or lower seq_len."
                )
        self.windows = sum(len(ranges[name]) for name in read)
        """Windows of the sources that are read."""
        self._ranges, self._seed = [*ranges.values()], seed
        self._shares = [_shares(stage) for stage in weights]
        self._starts = np.array([0, *(round(stage.until * places) for stage in mixture[:-1])], np.uint64)
        lengths = np.diff(self._starts)[:, None]
        turns = [_turns(length, shares)[0] for length, shares in zip(lengths, self._shares, strict=False)]
        self._before = np.cumsum([np.zeros(len(ranges), np.uint64), *turns], 0)  # turns until each stage

    def at(self, places: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
        """The numbers of the windows of some places."""
        stages = np.searchsorted(self._starts[1:], places, side="right")
        sources, turns = np.zeros(len(places), int), np.zeros_like(places)
        for stage in np.unique(stages):
            here = stages == stage
            since = places[here] - self._starts[stage]
            before, after = (_turns(since + np.uint64(n), self._shares[stage]) for n in (0, 1))
            sources[here] = (after - before).argmax(1)
            counts = self._before[stage] + before
            turns[here] = np.take_along_axis(counts, sources[here, None], 1)[:, 0]
        numbers = np.zeros_like(places)
        for source in np.unique(sources):
            here, own = sources == source, self._ranges[source]
            epoch, index = np.divmod(turns[here], np.uint64(len(own)))
            key = _mixed(order_key(self._seed, epoch) + np.uint64(source))
            numbers[here] = permuted(index, len(own), key) + np.uint64(own.start)
        return numbers if self._kept is None else self._kept[numbers]


def _ranges(windows: Windows, kept: UInt64[np.ndarray, " N"] | None) -> dict[str, range]:
    """By source, which windows lie wholly inside it: their numbers, or their places among those kept."""
    sources, ranges, stop = windows.shards.manifest.splits[windows.split].sources, {}, 0
    for source in sources:
        start, stop = stop, stop + source.tokens
        ends = [-(-start // windows.seq_len), (stop - 1) // windows.seq_len]
        ranges[source.name] = range(*(ends if kept is None else np.searchsorted(kept, ends).tolist()))
    return ranges


def target_weights(ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T-1"]:
    """1 where the next id is to be predicted, 0 where it is `<pad>` or the `<bos>` of another document."""
    targets = ids[:, 1:]
    return ((targets != SPECIAL["<bos>"]) & (targets != SPECIAL["<pad>"])).float()


def _shares(weights: list[float]) -> list[int]:
    """Of what the sources before leave over, the share of each source, in units of 2^-28."""
    left = [*accumulate(reversed(weights))][::-1]
    return [
        round((weight / rest if rest else 1.0) * 2**_SHARE_BITS)
        for weight, rest in zip(weights, left, strict=True)
    ]


def _turns(places: UInt64[np.ndarray, " N"], shares: list[int]) -> UInt64[np.ndarray, "N S"]:
    """How many of the first so many places of a stage belong to each source.

    The first source gets its share, rounded to whole places; what it leaves is shared out among the others in
    the same way. From one place to the next a rounded share grows by 0 or 1, and so does what it leaves. So
    each place belongs to one source, and with S sources none is ever further than S / 2 places from its due:
    every batch is mixed, and not only the run.
    """
    columns: list[np.ndarray] = []
    half = np.uint64(1 << _SHARE_BITS - 1)
    for share in shares:
        columns.append((places * np.uint64(share) + half) >> np.uint64(_SHARE_BITS))
        places = places - columns[-1]
    return np.stack(columns, 1)


def in_turn(places: UInt64[np.ndarray, " N"], total: int, seed: int) -> UInt64[np.ndarray, " N"]:
    """Which of `total` things some places of a run take: all of them, in another order each epoch."""
    epoch, index = np.divmod(places, np.uint64(total))
    return permuted(index, total, order_key(seed, epoch))


def permuted(
    index: UInt64[np.ndarray, " N"], size: int, key: UInt64[np.ndarray, " N"]
) -> UInt64[np.ndarray, " N"]:
    """Where a keyed permutation of 0 to size - 1 takes each index, without holding the permutation.

    A Feistel network permutes the next power of four, and what falls outside goes through again until it is
    inside (cycle-walking, Black and Rogaway 2002). The arithmetic is ours, so that no library's release can
    change the order of a run.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    result, outside = index.copy(), np.ones(len(index), bool)
    while outside.any():
        left, right, keys = result[outside] >> shift, result[outside] & mask, key[outside]
        for round in range(10):  # with six, the orders of ten windows were measurably uneven
            left, right = right, left ^ (_mixed(_mixed(keys + np.uint64(round)) ^ right) & mask)
        result[outside] = left << shift | right
        outside = result >= size
    return result


def order_key(seed: int, epoch: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """The key of `permuted` for each epoch of a run with this seed."""
    return _mixed(_mixed(np.full_like(epoch, seed % 2**64)) + epoch)


def _mixed(x: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """SplitMix64: 64 bits to 64 bits, one to one, every bit of the result hanging on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
