"""Where text comes from: the running Python's standard library, or a folder of text files, split in three.

A corpus is scanned once (sizes, hashes, exact duplicates) and read lazily after that. The three splits must
not share near-copies, so whole groups go to one side: top-level modules of the standard library, top-level
entries of a folder. Names are ordered by a hash, and those that fit fill `held_out` and `validation` up to
their shares; a group above a quarter of a share trains, so that no single module is the benchmark. A folder
whose entries are too few or too large for this is split by file. Failing that, each large file is cut into
passages, at blank lines where there are any, and gives its end: the last twentieth is held out, and the one
before validates.
"""

import hashlib
import json
import platform
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from gemwright.reading.files import files, library_files

Split = Literal["train", "validation", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)

SHARE = 0.05
"""Of all characters, for validation and for held-out each."""

LEAST_CHARACTERS = 20_000
"""Below this the held-out twentieth has under 1,000 characters, and no number measured there means much."""

_PASSAGE = 8_000  # characters; a held-out end is cut finer where it would give fewer than four passages


@dataclass(frozen=True)
class Document:
    """One text: its path inside the corpus (`#n` after a passage's), the text, and the corpus's name."""

    id: str
    text: str
    source: str


@dataclass(frozen=True)
class _Entry:
    """A document as the scan found it: its place, in characters of its decoded file, and its hash."""

    file: str
    start: int
    stop: int
    sha256: str
    split: Split = "train"
    passage: int | None = None

    @property
    def id(self) -> str:
        return self.file if self.passage is None else f"{self.file}#{self.passage:04d}"


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, each in one split. Make one with `standard_library` or `folder`."""

    name: str
    root: Path
    facts: dict[str, str]
    """Name, SHA-256 over every id, split and text, counts a split: what a stage's card says of its text."""
    entries: tuple[_Entry, ...] = field(repr=False)
    part_characters: int = 32_000_000
    """What one worker reads at a time: some ten seconds of tokenising, which is what a kill may cost."""

    @classmethod
    def standard_library(cls) -> "Corpus":
        """Source and documentation of the Python that runs this, about 11 MB, split by top-level module.

        Raises:
            FileNotFoundError: this Python keeps no standard library in plain files.
        """
        root, kept = library_files()
        return cls._scan("python-standard-library", root, kept, {"python": platform.python_version()})

    @classmethod
    def folder(cls, path: Path) -> "Corpus":
        """Every UTF-8 text file below a folder; hidden files are passed over, others counted as skipped.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: too little text in it to train on one part and judge on another.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder. Give a folder that holds text files.")
        return cls._scan(path.resolve().name, path, files(path), {})

    @property
    def sources(self) -> tuple[str, ...]:
        """One: all of it."""
        return (self.name,)

    @property
    def parts(self) -> int:
        """Parts of some `part_characters` that can be read side by side."""
        return -(-sum(entry.stop - entry.start for entry in self.entries) // self.part_characters)

    def part(self, number: int) -> Iterator[tuple[Split, Document]]:
        """The documents of a part, each with its split; all parts are the corpus. Errors as `documents`."""
        start, chosen = 0, []
        for entry in self.entries:
            if start // self.part_characters == number:
                chosen.append(entry)
            start += entry.stop - entry.start
        return self._documents(chosen)

    def documents(self, split: Split) -> Iterator[Document]:
        """The documents of a split, read one file at a time.

        Raises:
            ValueError: a file is not what it was when the corpus was scanned.
        """
        return (document for _, document in self._documents(e for e in self.entries if e.split == split))

    def _documents(self, entries: Iterable[_Entry]) -> Iterator[tuple[Split, Document]]:
        file, content = "", ""
        for entry in entries:
            if entry.file != file:
                file, content = entry.file, _read(self.root / entry.file) or ""
            text = content[entry.start : entry.stop]
            if _sha256(text) != entry.sha256:
                raise ValueError(
                    f"{self.root / entry.file} changed after the corpus was scanned. Start the stage again."
                )
            yield entry.split, Document(entry.id, text, self.name)

    @classmethod
    def _scan(cls, name: str, root: Path, files: Iterable[Path], facts: dict[str, str]) -> "Corpus":
        entries: list[_Entry] = []
        seen: set[str] = set()
        skipped = 0
        for path in files:
            text = _read(path)
            if not text or text.isspace():
                skipped += 1
                continue
            digest = _sha256(text)
            if digest not in seen:
                seen.add(digest)
                entries.append(_Entry(path.relative_to(root).as_posix(), 0, len(text), digest))
        total = sum(entry.stop for entry in entries)
        if total < LEAST_CHARACTERS:
            raise ValueError(
                f"{root} holds {total:,} characters of distinct UTF-8 text, and a part can be held out of no "
                f"less than {LEAST_CHARACTERS:,}. Skipped as binary, empty or in another encoding: {skipped} "
                "files. Add text, or convert those to UTF-8."
            )
        entries = _split(root, entries)
        counts: dict[str, str] = {}
        for split in SPLITS:
            chosen = [entry for entry in entries if entry.split == split]
            if not chosen:
                raise ValueError(f"{root} has no text left for {split}: it repeats itself. Add other text.")
            counts[f"{split} documents"] = str(len(chosen))
            counts[f"{split} characters"] = str(sum(entry.stop - entry.start for entry in chosen))
        identity = json.dumps([(entry.id, entry.split, entry.sha256) for entry in entries])
        facts = {"name": name, **facts, "sha256": _sha256(identity), **counts, "skipped files": str(skipped)}
        return cls(name, root, facts, tuple(entries))


def _split(root: Path, entries: list[_Entry]) -> list[_Entry]:
    """Give every entry its split, by the coarsest groups that come near the shares."""
    target = SHARE * sum(entry.stop for entry in entries)
    groupings: list[tuple[Callable[[_Entry], str], float]] = [
        (lambda entry: entry.file.split("/")[0], target / 4),
        (lambda entry: entry.file, target),
    ]
    for group, largest in groupings:
        sizes: dict[str, int] = defaultdict(int)
        for entry in entries:
            sizes[group(entry)] += entry.stop
        kept = assign(sizes, target, largest)
        got = {split: sum(sizes[name] for name in kept if kept[name] == split) for split in SPLITS[1:]}
        if min(got.values()) >= 0.8 * target:
            return [replace(entry, split=kept.get(group(entry), "train")) for entry in entries]
    unique: dict[str, _Entry] = {}
    for entry in entries:
        for passage in [entry] if entry.stop <= target else _passages(root, entry):
            unique.setdefault(passage.sha256, passage)
    return list(unique.values())


def assign(sizes: dict[str, int], target: float, largest: float) -> dict[str, Split]:
    """The groups kept from training: in hash order, each in the first split that it brings nearer to full."""
    room: dict[Split, float] = {"held_out": target, "validation": target}
    kept: dict[str, Split] = {}
    for name in sorted(sizes, key=_sha256):
        for split in room:
            if sizes[name] <= min(largest, 2 * room[split]):
                kept[name] = split
                room[split] -= sizes[name]
                break
    return kept


def _passages(root: Path, entry: _Entry) -> Iterator[_Entry]:
    """A file cut into passages: its last twentieth held out, the one before for validation."""
    text = _read(root / entry.file) or ""
    fine = min(_PASSAGE, max(250, int(len(text) * SHARE / 4)))
    first, second = (_cut(text, int(len(text) * (1 - n * SHARE)), fine // 2) for n in (2, 1))
    parts: list[tuple[Split, int, int, int]] = [
        ("train", 0, first, _PASSAGE),
        ("validation", first, second, fine),
        ("held_out", second, len(text), fine),
    ]
    number = 0
    for split, start, stop, size in parts:
        while start < stop:
            end = stop if stop - start <= 1.5 * size else _cut(text, start + size, size // 2)
            passage = text[start:end]
            if passage.strip():
                yield _Entry(entry.file, start, end, _sha256(passage), split, number)
                number += 1
            start = end


def _cut(text: str, position: int, reach: int) -> int:
    """The end of the first blank line within `reach` of a position, else of a line, else the position."""
    window = text[position : position + reach]
    for pattern in (r"\n[ \t]*\n+", r"\n"):
        if found := re.search(pattern, window):
            return position + found.end()
    return position


def _read(path: Path) -> str | None:
    """A file's text with plain line ends and no byte-order mark; None where it is binary or not UTF-8."""
    data = path.read_bytes()
    if b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return None


def _sha256(text: str) -> str:
    # surrogatepass: names of files may hold bytes that are no UTF-8, which Python keeps as lone surrogates
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
