"""Token shards: a corpus as memory-mapped files of ids, and the windows that training and evaluation read.

A document becomes `<bos> text <eos>`, and documents follow each other without padding. The report does not
say how its documents are packed; this is our choice: `<bos>` because every prompt of Gemma 2 begins with it,
`<eos>` because a model that never saw an end cannot stop. The model does not look back across `<bos>`
(`model.gemma.packed`), and no loss asks for one (`target_weights`).

A folder holds `<split>-00000.bin`, ... (little-endian uint16, or uint32 above 65,536 ids), and the manifest,
written last. A place in a run is one integer, so resuming is exact: `Windows.batch(step, batch_size)` has no
state, and its order is a keyed permutation that is computed, not stored.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from gemwright.config import Config
from gemwright.data.sources import SPLITS, Corpus, Document, Split
from gemwright.run import (
    Card,
    RunFolder,
    atomic,
    fingerprint,
    read_card,
    read_manifest,
    run_stage,
    write_json,
)
from gemwright.tokenizer.tokenizer import SPECIAL, Tokenizer

MANIFEST = "manifest.json"
FORMAT = 1

_BATCH_CHARACTERS = 2_000_000  # tokenised at once: keeps the threads busy and costs a few megabytes of ids
_REMEDY = "Make the shards again with --fresh."


class ShardsConfig(Config):
    """How a corpus is packed."""

    max_tokens_per_file: PositiveInt = 2**28
    """Tokens in one file: 512 MiB of uint16."""


class ShardFile(Config):
    """One file of ids."""

    name: str
    tokens: PositiveInt
    sha256: str


class ShardSplit(Config):
    """One split: what went in, and the files in reading order."""

    documents: PositiveInt
    characters: PositiveInt
    bytes: PositiveInt  # of UTF-8, for bits per byte
    files: tuple[ShardFile, ...]

    @property
    def tokens(self) -> int:
        """Ids in all files, `<bos>` and `<eos>` included."""
        return sum(file.tokens for file in self.files)


class Manifest(Config):
    """What `manifest.json` holds."""

    format: NonNegativeInt
    dtype: Literal["uint16", "uint32"]
    vocab_size: PositiveInt
    tokenizer_sha256: str
    splits: dict[Split, ShardSplit]
    corpus: dict[str, str]


def run(
    config: ShardsConfig, out: Path, corpus: Corpus, tokenizer_folder: Path, *, fresh: bool = False
) -> Card:
    """Tokenise and pack every split of a corpus into `out`. Killed and started again, it packs anew.

    Raises:
        FileNotFoundError: no tokenizer there.
        ValueError: `out` holds other work.
    """

    def work(folder: RunFolder) -> dict[str, Any]:
        tokenizer = Tokenizer.load(tokenizer_folder)
        manifest = _pack(config, folder, corpus, tokenizer)
        write_json(folder.path / MANIFEST, manifest.to_dict())
        return {f"{name}_tokens": split.tokens for name, split in manifest.splits.items()}

    inputs = {"tokenizer": tokenizer_folder}
    return run_stage("shards", config, out, work, inputs=inputs, facts=corpus.facts, fresh=fresh)


class Shards:
    """A folder of packed ids. They stay on disk until they are asked for; `open` makes one."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._maps: dict[str, np.ndarray] = {}
        self._ends = {
            name: list(accumulate(file.tokens for file in split.files))
            for name, split in manifest.splits.items()
        }

    @classmethod
    def open(cls, folder: Path) -> "Shards":
        """Check the manifest and the size of every file, which takes no reading of ids.

        Raises:
            FileNotFoundError: no shards there, or one of their files is gone.
            ValueError: not finished, another format, edited or cut short.
        """
        card = read_card(folder)
        if card.stage != "shards" or not card.finished:
            state = "not finished" if card.stage == "shards" else f"the work of another stage, {card.stage!r}"
            raise ValueError(f"{folder} is {state}. Run the stage that packs shards first.")
        data = read_manifest(folder / MANIFEST, card, FORMAT, _REMEDY)
        shards = cls(folder, Manifest.parse(data))
        for file in shards._files():
            shards._check_size(file)
        return shards

    def verify(self) -> None:
        """Read every file and compare its SHA-256 with the manifest's. Raises ValueError on a difference."""
        for file in self._files():
            if fingerprint(self.folder / file.name) != file.sha256:
                raise ValueError(f"{self.folder / file.name} is damaged: its SHA-256 has changed. {_REMEDY}")

    def read(self, split: Split, start: int, stop: int) -> Int[Tensor, " N"]:
        """Ids start to stop of a split, as int64, across files where need be. Reads only their pages."""
        files, ends = self.manifest.splits[split].files, self._ends[split]
        assert 0 <= start <= stop <= ends[-1], (split, start, stop, ends[-1])
        ids, at = np.empty(stop - start, np.int64), start
        number = bisect_right(ends, start)
        while at < stop:
            part = self._map(files[number])[at - ends[number] :][: stop - at]
            ids[at - start : at - start + len(part)] = part
            at, number = at + len(part), number + 1
        return torch.from_numpy(ids)

    def _files(self) -> list[ShardFile]:
        return [file for split in self.manifest.splits.values() for file in split.files]

    def _check_size(self, file: ShardFile) -> None:
        path, expected = self.folder / file.name, file.tokens * np.dtype(self.manifest.dtype).itemsize
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone. {_REMEDY}")
        if path.stat().st_size != expected:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes, and the manifest says {expected:,}: it was cut "
                f"short or overwritten. {_REMEDY}"
            )

    def _map(self, file: ShardFile) -> np.ndarray:
        if file.name not in self._maps:
            dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
            self._maps[file.name] = np.memmap(self.folder / file.name, dtype=dtype, mode="r")
        return self._maps[file.name]


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
    ) -> None:
        """Choose the windows.

        Args:
            seed: orders the windows anew in each epoch.
            max_tokens: keep a random subset with at most so many targets. It hangs on `subset_seed` alone, so
                runs that differ in `seed` see the same tokens, and a smaller subset lies inside a larger one.
        Raises:
            ValueError: the split, or `max_tokens`, is shorter than one window.
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

    def __len__(self) -> int:
        """Windows in one epoch."""
        return self._kept

    @property
    def tokens(self) -> int:
        """Distinct targets: windows times `seq_len`."""
        return self._kept * self.seq_len

    def batch(self, step: int, batch_size: int) -> Int[Tensor, "B {self.seq_len+1}"]:
        """Batch number `step`, int64: a function of the seed and `step` alone."""
        return self.take(self.numbers(step, batch_size))

    def numbers(self, step: int, batch_size: int) -> UInt64[np.ndarray, " B"]:
        """Which windows of the split batch number `step` takes.

        Epochs follow each other without a gap: the batch that ends one begins the next, and none is dropped.
        """
        assert step >= 0, step
        place = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)
        epoch, index = np.divmod(place, np.uint64(self._kept))
        return self._chosen(_permuted(index, self._kept, _key(self._seed, epoch)))

    def in_order(self) -> UInt64[np.ndarray, " N"]:
        """The numbers of all windows that are kept, in the order of the text."""
        return np.sort(self._chosen(np.arange(self._kept, dtype=np.uint64)))

    def take(self, numbers: UInt64[np.ndarray, " N"]) -> Int[Tensor, "N {self.seq_len+1}"]:
        """Windows of the split by their numbers, int64."""
        starts = [int(number) * self.seq_len for number in numbers]
        return torch.stack(
            [self.shards.read(self.split, start, start + self.seq_len + 1) for start in starts]
        )

    def all(self, batch_size: int) -> Iterator[Int[Tensor, "B {self.seq_len+1}"]]:
        """Every window once, in the order of the text; the last batch may be short."""
        index = self.in_order()
        for start in range(0, self._kept, batch_size):
            yield self.take(index[start : start + batch_size])

    def _chosen(self, index: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
        """From a window's number among those kept to its number in the split."""
        if self._kept == self.total:
            return index
        return _permuted(index, self.total, _key(self.subset_seed, np.zeros_like(index)))


def target_weights(ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T-1"]:
    """1 where the next id is to be predicted, 0 where it is `<pad>` or the `<bos>` of another document."""
    targets = ids[:, 1:]
    return ((targets != SPECIAL["<bos>"]) & (targets != SPECIAL["<pad>"])).float()


def _pack(config: ShardsConfig, folder: RunFolder, corpus: Corpus, tokenizer: Tokenizer) -> Manifest:
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    splits: dict[Split, ShardSplit] = {}
    total = sum(int(corpus.facts[f"{split} characters"]) for split in SPLITS)
    with folder.progress("packing", total, unit="characters") as advance:
        for split in SPLITS:
            counts = {"documents": 0, "characters": 0, "bytes": 0}
            pieces = _tokenised(corpus.documents(split), tokenizer, dtype, counts, advance)
            files = _write(folder.path, split, pieces, config.max_tokens_per_file)
            splits[split] = ShardSplit(**counts, files=files)
    return Manifest(
        format=FORMAT,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        splits=splits,
        corpus=corpus.facts,
    )


def _tokenised(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    dtype: str,
    counts: dict[str, int],
    advance: Callable[..., None],
) -> Iterator[np.ndarray]:
    """Ids of some documents at a time, `<bos>` and `<eos>` in place; `counts` learns what went in."""
    texts: list[str] = []
    waiting = 0

    def flush() -> np.ndarray:
        rows = tokenizer.encode_batch(texts, bos=True)
        counts["documents"] += len(texts)
        counts["characters"] += waiting
        counts["bytes"] += sum(len(text.encode()) for text in texts)
        advance(waiting)
        return np.array(
            [id for row in rows for id in (*row, tokenizer.eos_id)], np.dtype(dtype).newbyteorder("<")
        )

    for document in documents:
        texts.append(document.text)
        waiting += len(document.text)
        if waiting >= _BATCH_CHARACTERS:
            yield flush()
            texts, waiting = [], 0
    if texts:
        yield flush()


def _write(folder: Path, split: Split, pieces: Iterator[np.ndarray], limit: int) -> tuple[ShardFile, ...]:
    """Write pieces of ids into files of `limit` ids, the last one shorter; a document may span files."""
    files: list[ShardFile] = []
    piece = next(pieces, None)
    while piece is not None:
        path, tokens, digest = folder / f"{split}-{len(files):05d}.bin", 0, hashlib.sha256()
        with atomic(path) as partial, open(partial, "wb") as file:
            while piece is not None and tokens < limit:
                data = piece[: limit - tokens].tobytes()
                file.write(data)
                digest.update(data)
                tokens, piece = tokens + len(piece[: limit - tokens]), piece[limit - tokens :]
                if not len(piece):
                    piece = next(pieces, None)
        files.append(ShardFile(name=path.name, tokens=tokens, sha256=digest.hexdigest()))
    return tuple(files)


def _permuted(
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


def _key(seed: int, epoch: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    return _mixed(_mixed(np.full_like(epoch, seed % 2**64)) + epoch)


def _mixed(x: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    """SplitMix64: 64 bits to 64 bits, one to one, every bit of the result hanging on every bit of x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
