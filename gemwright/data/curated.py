"""What `gemwright curate` leaves: documents in files by task, and a manifest that splits them in three.

A document's split hangs on its name alone, through a hash: each source has 1,000 buckets a level, and the
manifest lists the buckets kept from training. The levels are the groups that must not straddle splits,
coarsest first: what lies directly below a source (a module, a folder), one file, one document. The coarsest
whose buckets come near the shares of `data.sources` is taken. So reading takes one pass and no memory,
however large the corpus; and near-copies do not straddle where curating removed them.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
import xxhash
import zstandard
from pydantic import NonNegativeInt

from gemwright.config import Config
from gemwright.data.sources import LEAST_CHARACTERS, SHARE, SPLITS, Corpus, Document, Split, assign
from gemwright.run import CARD, fingerprint, read_card, read_manifest

STAGE = "curate"
DOCUMENTS = "documents"
MANIFEST = "curated.json"
FORMAT = 1
BUCKETS = 1000

Level = Literal["group", "file", "document"]
_NEAR_ENOUGH = 0.8  # of a split's share: below it, the next finer level is tried


class CuratedSource(Config):
    """One source: what was kept of it, and which buckets of which level are not for training."""

    documents: NonNegativeInt
    characters: dict[Split, NonNegativeInt]
    level: Level
    kept_from_training: dict[int, Split]
    """Split by bucket; a bucket that is not named trains."""

    def split_of(self, file: str, id: str) -> Split:
        """The split of a document, by its file inside the source and its id."""
        return self.kept_from_training.get(buckets_of(file, id)[self.level], "train")


class CuratedManifest(Config):
    """What `curated.json` holds."""

    format: NonNegativeInt
    sources: dict[str, CuratedSource]
    files: tuple[str, ...]
    """Below `documents/`, one a task that kept anything."""


class Curated:
    """A finished folder of `gemwright curate`, offered to tokenizer training and to packing; see `open`."""

    def __init__(self, folder: Path, manifest: CuratedManifest, sha256: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.name = folder.resolve().name
        totals = {
            split: sum(source.characters[split] for source in manifest.sources.values()) for split in SPLITS
        }
        self.facts = {"name": self.name, "sha256": sha256} | {
            f"{split} characters": str(total) for split, total in totals.items()
        }
        """Name, hash and size, as a stage's card says of its text."""

    @classmethod
    def open(cls, folder: Path) -> "Curated":
        """Check card and manifest. Raises FileNotFoundError or ValueError with the remedy."""
        remedy = "Curate the text again with --fresh."
        card = read_card(folder)
        if card.stage != STAGE:
            raise ValueError(f"{folder} is the work of the stage {card.stage!r}, not curated text.")
        sha256 = fingerprint(folder)
        data = read_manifest(folder / MANIFEST, card, FORMAT, remedy)
        manifest = CuratedManifest.parse(data)
        for name in manifest.files:
            if not (folder / DOCUMENTS / name).exists():
                raise FileNotFoundError(f"{folder / DOCUMENTS / name} is gone. {remedy}")
        return cls(folder, manifest, sha256)

    def require_splits(self) -> None:
        """Raise ValueError where too little is left to train on one part and to judge on another."""
        held_out = int(self.facts["held_out characters"])
        if held_out < LEAST_CHARACTERS * SHARE or not int(self.facts["validation characters"]):
            raise ValueError(
                f"{self.folder} has {held_out:,} characters of held-out text, and no number measured on less "
                f"than {LEAST_CHARACTERS * SHARE:,.0f} means much. Add text, or filter less of it "
                f"({self.folder / 'report.html'} says what was dropped)."
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.manifest.sources)

    @property
    def parts(self) -> int:
        """Files of documents: what can be read side by side."""
        return len(self.manifest.files)

    def part(self, number: int) -> Iterator[tuple[Split, Document]]:
        """The documents of one file, in order, each with its split."""
        for row in read_rows(self.folder / DOCUMENTS / self.manifest.files[number]):
            source = row["metadata"]["source"]
            split = self.manifest.sources[source].split_of(row["metadata"]["file"], row["id"])
            yield split, Document(row["id"], row["text"], source)

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of a split, file by file."""
        for number in range(self.parts):
            yield from (document for found, document in self.part(number) if found == split)


@dataclass(frozen=True)
class Together:
    """Several texts as one: web pages and code, say, that were curated by different rules."""

    texts: tuple[Corpus | Curated, ...]

    @property
    def name(self) -> str:
        """The names of all."""
        return " + ".join(text.name for text in self.texts)

    @property
    def facts(self) -> dict[str, str]:
        """The hash of their hashes, and characters by split."""
        hashes = " ".join(text.facts["sha256"] for text in self.texts)
        names = [f"{split} characters" for split in SPLITS]
        totals = {name: str(sum(int(text.facts[name]) for text in self.texts)) for name in names}
        return {"name": self.name, "sha256": hashlib.sha256(hashes.encode()).hexdigest(), **totals}

    @property
    def parts(self) -> int:
        """Of all."""
        return sum(text.parts for text in self.texts)

    def part(self, number: int) -> Iterator[tuple[Split, Document]]:
        """One of them, counted through the texts in their order."""
        for text in self.texts:
            if number < text.parts:
                return text.part(number)
            number -= text.parts
        raise AssertionError("there are no more parts")

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of a split, text by text."""
        return (document for text in self.texts for document in text.documents(split))


def open_text(*paths: Path) -> Corpus | Curated | Together:
    """Curated text, or any folder of text files as it is; several of them as one.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one is unfinished or too small, or two hold sources of one name.
    """
    texts = tuple(_open_one(path) for path in paths)
    names = [name for text in texts for name in text.sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two texts hold a source called {twice[0]!r}, which a mixture could not tell apart. Rename the "
            "folder or file that one of them was made from, and curate it again."
        )
    return texts[0] if len(texts) == 1 else Together(texts)


def _open_one(path: Path) -> Corpus | Curated:
    if (path / CARD).exists() and read_card(path).stage == STAGE:
        return Curated.open(path)
    return Corpus.folder(path)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a `.jsonl.zst` file that we wrote, one at a time."""
    with open(path, "rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        yield from map(orjson.loads, io.BufferedReader(stream, 2**20))  # pyright: ignore[reportArgumentType]


def buckets_of(file: str, id: str) -> dict[Level, int]:
    """A document's bucket at each level."""
    names: dict[Level, str] = {"group": file.split("/")[0], "file": file, "document": id}
    return {
        level: xxhash.xxh64_intdigest(name.encode(errors="surrogatepass")) % BUCKETS
        for level, name in names.items()
    }


def split_source(documents: int, sizes: Mapping[Level, Mapping[int, int]]) -> CuratedSource:
    """Choose what of a source is kept from training.

    Args:
        sizes: characters by bucket, for each level; empty if nothing of the source was kept.
    """
    total = sum(sizes.get("document", {}).values())
    target = SHARE * total
    largest: dict[Level, float] = {"group": target / 4, "file": target, "document": float(total)}
    for level in largest:
        by_name = {str(bucket): size for bucket, size in sizes.get(level, {}).items()}
        chosen = assign(by_name, target, largest[level])
        got: dict[Split, int] = {split: 0 for split in SPLITS}
        for name, size in by_name.items():
            got[chosen.get(name, "train")] += size
        if level == "document" or min(got["validation"], got["held_out"]) >= _NEAR_ENOUGH * target:
            break
    return CuratedSource(
        documents=documents,
        characters=got,
        level=level,
        kept_from_training={int(name): split for name, split in chosen.items()},
    )
