"""The blocks of curating, as datatrove steps: read, check, set aside, write.

A check is a pure function from a document to a reason, or to None if it may stay. Every step keeps its
rejects in a file a task, `rejects/<step>/<rank>.jsonl.zst`, and a ledger of them that the report adds up. A
task writes both when it ends and anew if it is run again, so that nothing is ever counted twice.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter

from gemwright.data import curated
from gemwright.data.curated import Level, buckets_of
from gemwright.filters import personal
from gemwright.filters.decontaminate import Index
from gemwright.filters.language import Identifier
from gemwright.filters.quality import Quality, QualityConfig
from gemwright.filters.unsafe import Unsafe, self_identification
from gemwright.reading.chats import NotAChat, prompts_of
from gemwright.reading.records import ReadConfig, read, read_rows
from gemwright.reading.units import Unit
from gemwright.run import write_json

REASON = "filter_reason"  # where datatrove's filters leave it in a document's metadata
TURN = "\n\x1e\n"
"""Between the turns of a chat while it is one text: ASCII's record separator, which no filter looks at."""
EXAMPLES = 3
"""Of each reason, from each task."""
_EXCERPT = 200  # characters


class Rejects:
    """What a step drops: written to a file of its own, counted by source and reason, with some examples.

    Args:
        reason: for steps of datatrove that name none.
    """

    def __init__(self, out: Path, ledgers: Path, step: str, reason: str = "") -> None:
        self._writer = writer(out / "rejects" / step)
        self._ledger = ledgers / step
        self._reason = reason

    def __enter__(self) -> "Rejects":
        self._rank: int | None = None
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._examples: dict[str, list[dict[str, str]]] = defaultdict(list)
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        if self._rank is not None:
            ledger = {"dropped": self._counts, "examples": self._examples}
            write_json(self._ledger / f"{self._rank:05d}.json", ledger)

    def write(self, document: Document, rank: int) -> None:
        """Set a document aside."""
        self._rank = rank
        reason = document.metadata.setdefault(REASON, self._reason)
        self._counts[document.metadata["source"]][reason] += 1
        if len(self._examples[reason]) < EXAMPLES:
            text, _ = personal.redact(" ".join(document.text[: 2 * _EXCERPT].split()))
            self._examples[reason].append({"id": document.id, "text": text[:_EXCERPT]})
        self._writer.write(document, rank)


class Read(PipelineStep):
    """The first step: what there is -> documents. What cannot be read is set aside.

    Args:
        tasks: the units that each task reads: of raw files, or whatever `documents` takes.
        documents: the documents of a unit, as `texts` gives them; of a problem one with its reason.
    """

    type, name = "READER", "read"

    def __init__(
        self,
        tasks: Sequence[Sequence[Any]],
        documents: Callable[[Any], Iterator[Document]],
        rejects: Rejects,
    ) -> None:
        super().__init__()
        self.tasks, self.documents, self.rejects = tasks, documents, rejects

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of this task's units."""
        with self.rejects as rejects:
            for unit in self.tasks[rank]:
                for document in self.documents(unit):
                    if REASON in document.metadata:
                        rejects.write(document, rank)
                    else:
                        yield document


def texts(unit: Unit, config: ReadConfig) -> Iterator[Document]:
    """A unit's records, each a document."""
    for record in read(unit, config):
        about: dict[str, Any] = {"source": unit.source, "file": record.file}
        if record.metadata:
            about["record"] = record.metadata
        if record.line is not None:
            about["line"] = record.line
        if record.problem is not None:
            about[REASON] = record.problem
        yield Document(record.text, record.id, metadata=about)


def prompts(unit: Unit, config: ReadConfig) -> Iterator[Document]:
    """The user's turns of a unit's conversations, each a document; of a problem nothing but its place."""
    for row in read_rows(unit, config):
        about: dict[str, Any] = {"source": unit.source, "file": row.file}
        try:
            if row.problem is not None:
                raise NotAChat(row.problem)
            for prompt in prompts_of(row.record):
                log = dict(flagged=prompt.flagged, redacted=prompt.redacted, language=prompt.language)
                text = joined(prompt.turns)
                id = prompt.id or f"{unit.source}/{row.file}:{row.line}"
                yield Document(text, id, metadata={**about, "log": log})
        except NotAChat as reason:
            about |= {"line": row.line, REASON: str(reason)}
            yield Document("", f"{unit.source}/{row.file}:{row.line}", metadata=about)


def joined(turns: Iterable[str]) -> str:
    """The turns of a chat as one text, which `text.split(TURN)` takes apart again."""
    return TURN.join(turn.replace("\x1e", " ") for turn in turns)


class Documents(PipelineStep):
    """The documents that the same task of an earlier pipeline wrote."""

    type, name = "READER", "documents"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield them in order; a task that wrote none has no file."""
        path = self.folder / f"{rank:05d}.jsonl.zst"
        if path.exists():
            for row in curated.read_rows(path):
                yield Document(row["text"], row["id"], metadata=row["metadata"])


class Check(BaseFilter):
    """A pure function as a filter: a document goes on, or leaves with the function's reason."""

    def __init__(self, name: str, check: Callable[[Document], str | None], rejects: Rejects) -> None:
        super().__init__(rejects)  # pyright: ignore[reportArgumentType]
        self.name, self.check = name, check

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """As datatrove asks for it."""
        reason = self.check(doc)
        return True if reason is None else (False, reason)


class Keep(PipelineStep):
    """The last step: writes what is left, and a ledger of it."""

    type, name = "WRITER", "keep"

    def __init__(self, out: Path, ledgers: Path) -> None:
        super().__init__()
        self.writer = writer(out)
        self.ledgers = ledgers

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write each document; yields none."""
        kept: dict[str, Kept] = defaultdict(Kept)
        with self.writer as writer:
            for document in data:
                kept[document.metadata["source"]].add(document)
                writer.write(document, rank)
        write_json(self.ledgers / f"{rank:05d}.json", {name: vars(one) for name, one in kept.items()})
        yield from ()


@dataclass
class Kept:
    """Counts of what one task kept of one source."""

    documents: int = 0
    characters: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents by the power of two of their length in characters: 10 holds 1,024 to 2,047."""
    languages: Counter[str] = field(default_factory=Counter)
    """Of the documents that were looked at for it."""
    redacted: Counter[str] = field(default_factory=Counter)
    """Pieces of personal information replaced, by kind."""
    tags: Counter[str] = field(default_factory=Counter)
    """Documents by what they were marked with."""
    sizes: dict[Level, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    """Characters by level and bucket, for the splits (`data.curated`)."""

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add the counts of another task, as its ledger has them in JSON, where keys are text."""
        self.documents += other["documents"]
        self.characters += other["characters"]
        self.lengths.update({int(power): count for power, count in other["lengths"].items()})
        self.languages.update(other["languages"])
        self.redacted.update(other["redacted"])
        self.tags.update(other["tags"])
        for level, buckets in other["sizes"].items():
            self.sizes[level].update({int(bucket): size for bucket, size in buckets.items()})

    def add(self, document: Document) -> None:
        """Count a document."""
        length, about = len(document.text), document.metadata
        self.documents += 1
        self.characters += length
        self.lengths[int(math.log2(max(1, length)))] += 1
        if "language" in about:
            self.languages[about["language"]] += 1
        self.redacted.update(about.get("redacted", {}))
        self.tags.update(about.get("tags", ()))
        for level, bucket in buckets_of(about["file"], document.id).items():
            self.sizes[level][bucket] += length


# One of each a worker process: building them takes longer than many a task.
_identifier = functools.cache(Identifier)
_quality = functools.cache(Quality)
_index = functools.cache(Index.load)


def check_language(document: Document, kept: tuple[str, ...] | None) -> str | None:
    """Note the language, the log's own word first; `other_language` if only others are kept."""
    about = document.metadata
    about["language"] = about.get("log", {}).get("language") or _identifier().identify(document.text)[0]
    return None if kept is None or about["language"] in kept else "other_language"


def check_log(document: Document) -> str | None:
    """`flagged` by the log's moderation, or with names `redacted`: the report trains on neither."""
    log = document.metadata["log"]
    return "flagged" if log["flagged"] else "redacted" if log["redacted"] else None


def check_length(document: Document, least: int, most: int) -> str | None:
    """`too_short` or `too_long`, in characters of all turns."""
    length = len(document.text)
    return "too_short" if length < least else "too_long" if length > most else None


def check_unsafe(document: Document, unsafe: Unsafe) -> str | None:
    """What `Unsafe.check` says."""
    return unsafe.check(document.text)


def check_self_identification(document: Document) -> str | None:
    """`self_identification`: a model speaks of itself."""
    return self_identification(document.text)


def check_contamination(document: Document, index: Path) -> str | None:
    """`contaminated`: an item of a benchmark in the index lies in it; which benchmark's is noted."""
    benchmark = _index(index).find(document.text)
    if benchmark is not None:
        document.metadata["benchmark"] = benchmark
    return None if benchmark is None else "contaminated"


def check_quality(document: Document, config: QualityConfig) -> str | None:
    """What `Quality.check` says; C4's rules may also cut lines out of the document."""
    quality = _quality(config)  # pyright: ignore[reportArgumentType]
    text, reason = quality.check(document.text, document.metadata["language"])
    document.text = text
    return reason


def check_personal(
    document: Document, action: Literal["redact", "drop"], regions: tuple[str, ...]
) -> str | None:
    """Replace personal information by its kind, or drop the document for it: `personal_information`."""
    text, found = personal.redact(document.text, regions=regions)
    if found:
        document.metadata["redacted"] = found
        if action == "drop":
            return "personal_information"
        document.text = text
    return None


def writer(folder: Path) -> JsonlWriter:
    """A step that writes what passes through, a file a task, for `Documents` to read.

    zstd, because gzip costs more than some of the filters.
    """
    return JsonlWriter(str(folder), "${rank}.jsonl", compression="zstd")
