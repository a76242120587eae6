"""Stored targets: the folder in which a teacher's distributions lie, written once and read in any order.

    targets/
    ├── card.json              from the stage `label`
    ├── manifest.json          written last: which teacher, tokenizer and shards, and every file's SHA-256
    └── <split>-00000.targets  so many windows each, the last file fewer

A file holds one block a window (`packing.py`), in ascending order of the windows' numbers in the split, and
at its end the index, 24 bytes a window: where the block ends (u64), its ids (u32), the teacher's mean entropy
in nats (f4), the mean mass of the stored ids (f4), and a CRC-32 of the block and of these four (u32). All is
little-endian. The index's own beginning is the end of the last block, so a file is read without the manifest.

Which windows these are is not stored either: all of the split, or the subset that `max_tokens` and
`subset_seed` choose. A *row* is a window's place among them, and all that this module asks for.
"""

import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from gemwright.config import Config
from gemwright.run import atomic, fingerprint, read_card, read_manifest
from gemwright.targets import packing
from gemwright.targets.draw import Sampled, Top

MANIFEST = "manifest.json"
STAGE = "label"
FORMAT = 1

Kind = Literal["stratified", "sampled", "top-k"]

_REMEDY = "Run gemwright label again with --fresh."
_RECORD = np.dtype([("end", "<u8"), ("ids", "<u4"), ("entropy", "<f4"), ("covered", "<f4"), ("crc", "<u4")])


class TargetFile(Config):
    """One file of windows."""

    name: str
    windows: PositiveInt
    bytes: PositiveInt
    ids: PositiveInt
    entropy: float
    """Of the teacher, the mean over its positions, nats."""
    covered: float
    """The teacher's mass on the stored ids, the mean over its positions."""
    sha256: str


class TargetSplit(Config):
    """One split: which of its windows are labelled, and the files that hold them in order."""

    total: PositiveInt
    """Windows in the split."""
    max_tokens: PositiveInt | None
    """What chose a subset of them, with `subset_seed`; None: all."""
    subset_seed: int
    files: tuple[TargetFile, ...]

    @property
    def windows(self) -> int:
        """Windows that are labelled."""
        return sum(file.windows for file in self.files)


class UsedShards(Config):
    """The shards that were labelled."""

    path: str
    """Relative to the folder that the targets' folder lies in."""
    sha256: str


class Manifest(Config):
    """What `manifest.json` holds."""

    format: NonNegativeInt
    kind: Kind
    samples: PositiveInt
    """Draws a position, or ids of the top k."""
    temperature: PositiveFloat
    seed: int
    vocab_size: PositiveInt
    seq_len: PositiveInt
    teacher_sha256: str
    tokenizer_sha256: str
    shards: UsedShards
    splits: dict[str, TargetSplit]


class Window(NamedTuple):
    """One window as it is written."""

    block: UInt8[np.ndarray, " _"]
    ids: int
    entropy: float
    covered: float


class TargetBatch(NamedTuple):
    """The targets of B windows. K is the most ids that one of their positions has."""

    ids: Int[Tensor, "B T K"]
    """int64; 0 where a position has fewer."""
    probs: Float[Tensor, "B T K"]
    """fp32; 0 where a position has fewer. With the tail they sum to 1."""
    tail: Float[Tensor, "B T"]
    """fp32, the mass of all ids that are not among them; 0 for sampled targets."""
    entropy: Float[Tensor, " B"]
    """Of the teacher, the mean over the window, nats."""
    covered: Float[Tensor, " B"]
    """The teacher's mass on these ids, the mean over the window."""


def packed(drawn: Sampled | Top, seq_len: int, vocab_size: int) -> Iterator[Window]:
    """The windows in what was drawn for whole windows, one after the other."""
    assert len(drawn.ids) % seq_len == 0, (len(drawn.ids), seq_len)
    for start in range(0, len(drawn.ids), seq_len):
        part = type(drawn)(*(field[start : start + seq_len] for field in drawn))
        if isinstance(part, Sampled):
            block, ids = packing.encode_sampled(part.ids.numpy(), vocab_size)
        else:
            arrays = part.ids.numpy(), part.log_probs.numpy(), part.log_tail.numpy()
            block, ids = packing.encode_top(*arrays, vocab_size), part.ids.numel()
        yield Window(block, ids, float(part.entropy.mean()), float(part.covered.mean()))


def write_file(path: Path, windows: Iterable[Window]) -> TargetFile:
    """Write one file, which appears under its name when it is whole and on disk. There must be a window."""
    digest, records, end = hashlib.sha256(), [], 0
    with atomic(path) as partial, open(partial, "wb") as file:
        for window in windows:
            data, end = window.block.data, end + len(window.block)
            file.write(data)
            digest.update(data)
            record = np.array([(end, window.ids, window.entropy, window.covered, 0)], _RECORD)
            record["crc"] = _crc(data, record)
            records.append(record)
        assert records, f"{path} would hold no window"
        index = np.concatenate(records)
        file.write(index.tobytes())
        digest.update(index.tobytes())
    return _entry(path, index, digest.hexdigest())


def read_entry(path: Path) -> TargetFile:
    """What `write_file` gave for a file that is there, every block checked: a killed run goes on behind it.

    Raises ValueError for a damaged file.
    """
    remedy = "Delete it, and run the same command again."
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    size = _RECORD.itemsize
    end = int(np.frombuffer(data[-size:], _RECORD)["end"][0]) if len(data) >= size else -1
    if not 0 <= end < len(data) or (len(data) - end) % size:
        raise ValueError(f"{path} is damaged: it does not end with an index of its windows. {remedy}")
    index = np.frombuffer(data[end:], _RECORD)
    for number in range(len(index)):
        if _block(data, index, number) is None:
            raise ValueError(f"{path} is damaged: window {number:,} in it is not what was written. {remedy}")
    return _entry(path, index, fingerprint(path))


class Targets:
    """A folder of targets. They stay on disk until they are asked for; `open` makes one."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._maps: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._ends = {
            name: list(accumulate(file.windows for file in split.files))
            for name, split in manifest.splits.items()
        }

    @classmethod
    def open(cls, folder: Path) -> "Targets":
        """Check the manifest and the size of every file, which takes no reading of blocks.

        Raises:
            FileNotFoundError: no targets there, or one of their files is gone.
            ValueError: not finished, another format, edited or cut short.
        """
        card = read_card(folder)
        if card.stage != STAGE:
            raise ValueError(
                f"{folder} is the work of another stage, {card.stage!r}. "
                "Name a folder that gemwright label made."
            )
        if not card.finished:
            raise ValueError(f"{folder} is not finished. Run the same gemwright label again: it goes on.")
        data = read_manifest(folder / MANIFEST, card, FORMAT, _REMEDY)
        targets = cls(folder, Manifest.parse(data))
        for file in targets._files():
            targets._check_size(file)
        return targets

    def verify(self, advance: Callable[[int], object] | None = None) -> None:
        """Read every file and compare its SHA-256 with the manifest's; `advance(bytes)` after each.

        Raises ValueError that names the first file that differs.
        """
        for file in self._files():
            if fingerprint(self.folder / file.name) != file.sha256:
                raise ValueError(f"{self.folder / file.name} is damaged: its SHA-256 has changed. {_REMEDY}")
            if advance is not None:
                advance(file.bytes)

    def read(self, split: str, rows: Sequence[int]) -> TargetBatch:
        """The targets of some windows, by their places among those labelled. Reads only their pages.

        Raises ValueError for a window that is not what was written.
        """
        manifest, ends = self.manifest, self._ends[split]
        assert len(rows)
        assert 0 <= min(rows) <= max(rows) < ends[-1], (split, rows, ends[-1])
        parts, entropy, covered = [], [], []
        for row in map(int, rows):
            number = bisect_right(ends, row)
            file = manifest.splits[split].files[number]
            data, index = self._map(file)
            place = row - ends[number] + file.windows
            parts.append(self._decoded(file, data, index, place))
            entropy.append(index["entropy"][place])
            covered.append(index["covered"][place])
        lengths = np.concatenate([np.diff(part.begins) for part in parts])
        most, positions = int(lengths.max()), len(lengths)
        pads = most * np.arange(positions) - np.cumsum(lengths) + lengths
        to = np.arange(lengths.sum()) + np.repeat(pads, lengths)
        ids, probs = np.zeros(positions * most, np.int64), np.zeros(positions * most, np.float32)
        ids[to] = np.concatenate([part.ids for part in parts])
        probs[to] = np.concatenate([part.probs for part in parts])
        shape = (len(parts), manifest.seq_len, most)
        tail = np.stack([part.tail for part in parts])
        arrays = ids.reshape(shape), probs.reshape(shape), tail, np.array(entropy), np.array(covered)
        return TargetBatch(*map(torch.from_numpy, arrays))

    def _decoded(self, file: TargetFile, data: np.ndarray, index: np.ndarray, place: int) -> "_Decoded":
        """One window, checked."""
        manifest = self.manifest
        positions, samples = manifest.seq_len, manifest.samples
        try:
            block = _block(data, index, place)
            if block is None:
                raise ValueError("its checksum has changed.")
            if manifest.kind == "top-k":
                ids, probs, tail = packing.decode_top(
                    block, positions=positions, k=samples, vocab_size=manifest.vocab_size
                )
                begins = samples * np.arange(positions + 1)
                return _Decoded(ids.reshape(-1), probs.reshape(-1), begins, tail)
            ids, counts, begins = packing.decode_sampled(
                block,
                int(index["ids"][place]),
                positions=positions,
                samples=samples,
                vocab_size=manifest.vocab_size,
            )
            return _Decoded(ids, counts / np.float32(samples), begins, np.zeros(positions, np.float32))
        except ValueError as error:
            raise ValueError(
                f"{self.folder / file.name} is damaged, window {place:,} in it: {error} {_REMEDY}"
            ) from None

    def _files(self) -> list[TargetFile]:
        return [file for split in self.manifest.splits.values() for file in split.files]

    def _check_size(self, file: TargetFile) -> None:
        path = self.folder / file.name
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone. {_REMEDY}")
        if path.stat().st_size != file.bytes:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes, and the manifest says {file.bytes:,}: it was cut "
                f"short or overwritten. {_REMEDY}"
            )

    def _map(self, file: TargetFile) -> tuple[np.ndarray, np.ndarray]:
        """A file's bytes and its index, both left on disk."""
        if file.name not in self._maps:
            self._check_size(file)  # again: it may have been replaced since it was opened
            data = np.asarray(np.memmap(self.folder / file.name, np.uint8, "r"))  # a plain view slices faster
            index = data[len(data) - file.windows * _RECORD.itemsize :].view(_RECORD)
            self._maps[file.name] = data, index
        return self._maps[file.name]


class _Decoded(NamedTuple):
    """One window's ids one after the other, and where each position begins among them."""

    ids: np.ndarray
    probs: np.ndarray
    begins: np.ndarray
    tail: np.ndarray


def _entry(path: Path, index: np.ndarray, sha256: str) -> TargetFile:
    size = int(index["end"][-1]) + index.nbytes
    ids = int(index["ids"].sum(dtype=np.int64))
    entropy, covered = (float(index[name].mean(dtype=np.float64)) for name in ("entropy", "covered"))
    return TargetFile(
        name=path.name,
        windows=len(index),
        bytes=size,
        ids=ids,
        entropy=entropy,
        covered=covered,
        sha256=sha256,
    )


def _block(data: np.ndarray, index: np.ndarray, place: int) -> np.ndarray | None:
    """A window's block; None if it or its record is not what was written."""
    start, end = int(index["end"][place - 1]) if place else 0, int(index["end"][place])
    block = data[start:end]  # places outside the file make an empty or a shorter block: the checksum tells
    return block if _crc(block.data, index[place]) == index["crc"][place] else None


def _crc(block: memoryview, record: np.ndarray | np.void) -> int:
    return zlib.crc32(record.tobytes()[: -_RECORD["crc"].itemsize], zlib.crc32(block))
