"""The packing stage: text and a tokenizer in, token shards out, on as many workers as there are.

A text comes in parts, and a part is a task: one pass over it leaves a raw file of ids for each split and
source that it holds. When all are there they are joined, split by split, a split source by source, a source
part by part. So the result hangs on the text and the tokenizer alone, not on who worked when, and a killed
run goes on with the parts that are missing. Worker processes import this module, so it imports no torch.
"""

import hashlib
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from datatrove.pipeline.base import PipelineStep
from pydantic import PositiveInt

from gemwright.config import Config
from gemwright.data.executor import LOCAL, ExecutorConfig, execute
from gemwright.data.shards import FORMAT, MANIFEST, STAGE, Manifest, ShardFile, ShardSource, ShardSplit
from gemwright.data.sources import SPLITS, Document, Split
from gemwright.run import RESUME, Card, RunFolder, atomic, run_stage, write_json
from gemwright.tokenizer.tokenizer import Tokenizer

_BATCH_CHARACTERS = 2_000_000  # tokenised at once: keeps the threads busy and costs a few megabytes of ids
_BLOCK = 2**20  # ids that joining holds at a time
_COUNTS = ("documents", "characters", "bytes", "tokens")


class ShardsConfig(Config):
    """How a text is packed."""

    max_tokens_per_file: PositiveInt = 2**28
    """Tokens in one file: 512 MiB of uint16."""


@runtime_checkable
class Text(Protocol):
    """What can be packed: a `Corpus`, `Curated` text, or several `Together`."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def facts(self) -> dict[str, str]:
        """Its hash and whatever else a card says of it."""
        ...

    @property
    def parts(self) -> int:
        """How many parts it comes in, always the same for the same text."""
        ...

    def part(self, number: int) -> Iterator[tuple[Split, Document]]:
        """One pass over a part."""
        ...


def run(
    config: ShardsConfig,
    out: Path,
    text: Text,
    tokenizer_folder: Path,
    *,
    executor: ExecutorConfig = LOCAL,
    fresh: bool = False,
) -> Card:
    """Tokenise and pack every split of a text into `out`. Killed and started again, it goes on.

    Raises:
        FileNotFoundError: no tokenizer there.
        ValueError: `out` holds other work, or the text has nothing for one of the splits.
        OSError: the disk is full. While files are joined, every id is there twice.
    """

    def work(folder: RunFolder) -> dict[str, Any]:
        tokenizer = Tokenizer.load(tokenizer_folder)
        private = (folder.path / RESUME).resolve()  # a worker may stand elsewhere
        step = Tokenise(text, tokenizer, private / "parts")
        execute([step], text.parts, private / "tasks", executor, "tokenising")
        pieces = [piece for number in range(text.parts) for piece in step.pieces(number)]
        splits = _join(pieces, step, config, folder)
        manifest = Manifest(
            format=FORMAT,
            dtype="uint16" if step.dtype.itemsize == 2 else "uint32",
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            splits=splits,
            corpus=text.facts,
        )
        write_json(folder.path / MANIFEST, manifest.to_dict())
        return {f"{name}_tokens": split.tokens for name, split in splits.items()}

    inputs = {"tokenizer": tokenizer_folder}
    card = run_stage(STAGE, config, out, work, inputs=inputs, facts=text.facts, fresh=fresh)
    shutil.rmtree(out / RESUME, ignore_errors=True)  # after the card: until then a kill may want it
    return card


class Piece(Config):
    """What one part holds of one split and source: the raw file of its ids, below `parts`, and the counts."""

    split: Split
    file: str
    sha256: str
    counts: ShardSource


class Tokenise(PipelineStep):
    """The step that turns part `rank` of a text into raw files of ids, and lists them when it is done."""

    type, name = "PACK", "tokenise"

    def __init__(self, text: Text, tokenizer: Tokenizer, folder: Path) -> None:
        super().__init__()
        self.text, self.model, self.folder = text, tokenizer.model, folder
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the files of part `rank`, in a folder that gets its name when they are whole.

        So a worker that outlives a killed run is not in the way of the next one's.
        """
        if self._part(rank).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{rank:05d}-", dir=self.folder))
        found: dict[tuple[Split, str], _Raw] = {}
        tokenizer = _tokenizer(self.model)
        for batch in _batches(self.text.part(rank)):
            texts = [document.text for _, document in batch]
            rows = tokenizer.encode_arrays(texts, bos=True, eos=True)
            some: dict[tuple[Split, str], list[np.ndarray]] = defaultdict(list)
            for (split, document), row in zip(batch, rows, strict=True):
                key = split, document.source
                if key not in found:
                    found[key] = _Raw(folder / f"{len(found)}.bin")
                found[key].count(document.text)
                some[key].append(row)
            for key, ids in some.items():
                found[key].append(ids, self.dtype)
        pieces = [raw.piece(rank, *key).to_dict() for key, raw in found.items()]
        write_json(folder / "pieces.json", pieces)
        if not self._part(rank).exists():
            folder.rename(self._part(rank))

    def pieces(self, rank: int) -> list[Piece]:
        """What a finished part holds, in the order in which its splits and sources appear."""
        return [Piece.parse(piece) for piece in json.loads((self._part(rank) / "pieces.json").read_bytes())]

    def _part(self, rank: int) -> Path:
        return self.folder / f"{rank:05d}"


@lru_cache(1)
def _tokenizer(model: bytes) -> Tokenizer:
    """One a process, for all its tasks: building Gemma's takes half a second."""
    return Tokenizer(model)


@dataclass
class _Raw:
    """A raw file that grows, opened for each addition: there may be more sources than files may be open."""

    path: Path
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))
    digest: Any = field(default_factory=hashlib.sha256)

    def count(self, text: str) -> None:
        self.counts["documents"] += 1
        self.counts["characters"] += len(text)
        self.counts["bytes"] += len(text.encode())

    def append(self, rows: list[np.ndarray], dtype: np.dtype) -> None:
        ids = np.concatenate(rows).astype(dtype)
        data = ids.data
        with open(self.path, "ab") as file:
            file.write(data)
        self.digest.update(data)
        self.counts["tokens"] += len(ids)

    def piece(self, rank: int, split: Split, source: str) -> Piece:
        file, counts = f"{rank:05d}/{self.path.name}", ShardSource(name=source, **self.counts)
        return Piece(split=split, file=file, sha256=self.digest.hexdigest(), counts=counts)


def _batches(documents: Iterator[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    batch: list[tuple[Split, Document]] = []
    waiting = 0
    for split, document in documents:
        batch.append((split, document))
        waiting += len(document.text)
        if waiting >= _BATCH_CHARACTERS:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


def _join(
    pieces: list[Piece], step: Tokenise, config: ShardsConfig, folder: RunFolder
) -> dict[Split, ShardSplit]:
    """Join all raw files; sources stand in the order in which they first appear in the text."""
    sources = list(dict.fromkeys(piece.counts.name for piece in pieces))
    found: dict[tuple[Split, str], list[Piece]] = defaultdict(list)
    for piece in pieces:
        found[piece.split, piece.counts.name].append(piece)
    if empty := set(SPLITS) - {piece.split for piece in pieces}:
        raise ValueError(f"{step.text.name} has no text for {' and '.join(sorted(empty))}. Add text.")
    splits: dict[Split, ShardSplit] = {}
    total = sum(piece.counts.tokens for piece in pieces)
    with folder.progress("joining", total, unit="tokens") as advance:
        for split in SPLITS:
            ordered = [piece for source in sources for piece in found[split, source]]
            files = _write(folder.path, split, _blocks(ordered, step, advance), config.max_tokens_per_file)
            sums = tuple(_sum(source, found[split, source]) for source in sources)
            splits[split] = ShardSplit(sources=sums, files=files)
    return splits


def _sum(source: str, pieces: list[Piece]) -> ShardSource:
    return ShardSource(
        name=source, **{name: sum(getattr(piece.counts, name) for piece in pieces) for name in _COUNTS}
    )


def _blocks(pieces: Iterable[Piece], step: Tokenise, advance: Callable[..., None]) -> Iterator[np.ndarray]:
    """The ids of raw files, in order, some at a time. Raises ValueError where one is not what was written."""
    for piece in pieces:
        digest = hashlib.sha256()
        with open(step.folder / piece.file, "rb") as file:
            while len(block := np.fromfile(file, step.dtype, _BLOCK)):
                digest.update(block.data)
                yield block
                advance(len(block))
        if digest.hexdigest() != piece.sha256:
            raise ValueError(
                f"{step.folder / piece.file} is damaged: its SHA-256 has changed. "
                "Make the shards again with --fresh."
            )


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
