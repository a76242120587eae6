"""Token shards: a corpus as memory-mapped files of ids, and the reader of them.

A document becomes `<bos> text <eos>`, and documents follow each other without padding. The report does not
say how its documents are packed; this is our choice: `<bos>` because every prompt of Gemma 2 begins with it,
`<eos>` because a model that never saw an end cannot stop. The model does not look back across `<bos>`
(`model.gemma.packed`), and no loss asks for one (`windows.target_weights`).

A folder holds `<split>-00000.bin`, ... (little-endian uint16, or uint32 above 65,536 ids), and the manifest,
written last. In a split the sources follow each other, and the manifest says how much each of them is, so
that training can mix them by weight. `packing` writes what is read here.
"""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64
from pydantic import NonNegativeInt, PositiveInt

from gemwright.config import Config
from gemwright.data.sources import Split
from gemwright.run import fingerprint, read_card, read_manifest

STAGE = "shards"
MANIFEST = "manifest.json"
FORMAT = 2

_REMEDY = "Make the shards again with --fresh."


class ShardFile(Config):
    """One file of ids."""

    name: str
    tokens: PositiveInt
    sha256: str


class ShardSource(Config):
    """What one source gave to a split; in a small split that may be nothing."""

    name: str
    documents: NonNegativeInt
    characters: NonNegativeInt
    bytes: NonNegativeInt  # of UTF-8, for bits per byte
    tokens: NonNegativeInt


class ShardSplit(Config):
    """One split: what went in, source after source, and the files in reading order."""

    sources: tuple[ShardSource, ...]
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
        if card.stage != STAGE or not card.finished:
            state = "not finished" if card.stage == STAGE else f"the work of another stage, {card.stage!r}"
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

    def read(self, split: Split, start: int, stop: int) -> Int64[np.ndarray, " N"]:
        """Ids start to stop of a split, across files where need be. Reads only their pages."""
        files, ends = self.manifest.splits[split].files, self._ends[split]
        assert 0 <= start <= stop <= ends[-1], (split, start, stop, ends[-1])
        ids, at = np.empty(stop - start, np.int64), start
        number = bisect_right(ends, start)
        while at < stop:
            part = self._map(files[number])[at - ends[number] :][: stop - at]
            ids[at - start : at - start + len(part)] = part
            at, number = at + len(part), number + 1
        return ids

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
