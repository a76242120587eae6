"""What there is to read, as units of work: small, and the same for any number of workers.

A source is a file, a folder, `python` (the running Python's standard library) or a data set on the Hugging
Face Hub. Large text and JSON lines are cut into pieces of 32 MiB, archives into runs of members, a data set
into its shards; everything else is one unit.
"""

import functools
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from gemwright.reading import streams
from gemwright.reading.files import files, library_files

Kind = Literal["text", "jsonl", "json", "parquet", "zip", "hub"]
Packing = Literal["", "gz", "zst"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".zip": "zip",
}  # fmt: skip
_PACKINGS: dict[str, Packing] = {".gz": "gz", ".zst": "zst"}
LIBRARY = "python"
"""The source that is the running Python's standard library."""
_HUB = "hf:"
_TOKEN = "HF_TOKEN"


@dataclass(frozen=True)
class HubDataset:
    """A data set on the Hugging Face Hub, or a local folder in its form. A token is read from HF_TOKEN."""

    name: str
    """`owner/name`, or the path of a folder."""
    config: str | None = None
    """One of its configurations; None where it has one."""
    split: str = "train"
    text_key: str | None = None
    """The field with the text; None means the one that all sources share."""

    @classmethod
    def parse(cls, source: str) -> "HubDataset":
        """From `hf:owner/name` or `hf:owner/name:config:split`, either of the last two empty or left out."""
        name, config, split, *more = [*source.removeprefix(_HUB).split(":"), "", ""]
        if not name or len(more) > 2 or any(more):
            raise ValueError(
                f"{source!r} names no data set. Write hf:owner/name or hf:owner/name:config:split."
            )
        return cls(name, config or None, split or "train")

    def __str__(self) -> str:
        return f"{_HUB}{self.name}:{self.config or ''}:{self.split}"


@dataclass(frozen=True)
class Unit:
    """What one worker reads in one go."""

    source: str
    """The source's name."""
    path: Path | HubDataset
    file: str
    """The path inside the source, with `/`."""
    kind: Kind
    packing: Packing = ""
    start: int = 0
    """The first byte of a piece, the first member of an archive, or the shard of a data set."""
    stop: int | None = None
    """The byte or member after the last; None means to the end."""
    size: int = 0
    """Bytes to read, for shares of work and progress; a shard of a data set counts as one large piece."""


def plan(sources: Sequence[str | Path | HubDataset]) -> list[Unit]:
    """The units of some sources, in the order given and by path inside one.

    A source is a path, `hf:owner/name[:config[:split]]`, or `python` (as text; `./python` is a path).

    Raises:
        FileNotFoundError: a path that does not exist, or a data set.
        ValueError: a source with nothing in it, or none at all; the library for data sets is missing.
        ConnectionError: the Hub cannot be reached.
        PermissionError: a folder or data set that may not be read.
    """
    if not sources:
        raise ValueError("no sources were given. Name at least one file, folder or data set to read.")
    units: list[Unit] = []
    taken: set[str] = set()
    for source in sources:
        if isinstance(source, str) and source.startswith(_HUB):
            source = HubDataset.parse(source)
        if isinstance(source, HubDataset):
            name = _unused(PurePosixPath(source.name).name, taken)
            shards = hub_stream(source).num_shards
            units += [
                Unit(name, source, f"{source.split}-{shard:05d}", "hub", start=shard, size=streams.UNIT_BYTES)
                for shard in range(shards)
            ]
            continue
        if source == LIBRARY:
            root, found = library_files()
            name = _unused(LIBRARY, taken)
        else:
            root, found, name = _find(Path(source).absolute())  # workers may stand elsewhere
            name = _unused(name, taken)
        for path in found:
            # A name that is no UTF-8 would be text that no JSON can hold.
            inside = os.fsencode(path.relative_to(root).as_posix()).decode(errors="backslashreplace")
            units += _units_of(name, path, inside)
    return units


def _find(path: Path) -> tuple[Path, list[Path], str]:
    """What lies below a path, the folder that its parts are named from, and the source's name."""
    if path.is_dir():
        found = files(path, "__pycache__")
        if not found:
            raise ValueError(f"{path} holds no files but hidden ones. Name a folder with text in it.")
        return path, found, path.resolve().name or "root"
    if path.is_file():
        stem = path.stem if path.suffix in _PACKINGS else path.name
        return path.parent, [path], PurePosixPath(stem).stem
    raise FileNotFoundError(f"{path} does not exist, or is no file or folder. Correct the path.")


def _unused(name: str, taken: set[str]) -> str:
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    taken.add(free)
    return free


def kind_of(name: str) -> tuple[Kind, Packing]:
    """What a file holds and how it is packed, by the endings of its name. What has no known one is text."""
    path = PurePosixPath(name.lower())
    packing = _PACKINGS.get(path.suffix, "")
    kind = _KINDS.get(PurePosixPath(path.stem).suffix if packing else path.suffix, "text")
    return ("text" if packing and kind == "zip" else kind), packing


def _units_of(source: str, path: Path, file: str) -> Iterator[Unit]:
    kind, packing = kind_of(path.name)
    size = path.stat().st_size
    if kind == "zip":
        yield from _archive_units(source, path, file)
    elif kind in ("text", "jsonl") and not packing:
        for start in range(0, max(size, 1), streams.UNIT_BYTES):
            stop = start + streams.UNIT_BYTES
            end = None if stop >= size else stop
            yield Unit(source, path, file, kind, packing, start, end, min(stop, size) - start)
    else:
        yield Unit(source, path, file, kind, packing, size=size)


def _archive_units(source: str, path: Path, file: str) -> Iterator[Unit]:
    """Runs of members of 32 MiB unpacked. One that cannot be opened is a unit too: its reader says so."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [member.file_size for member in members(archive)]
    except (OSError, *streams.DAMAGE):
        yield Unit(source, path, file, "zip", size=path.stat().st_size)
        return
    start, size = 0, 0
    for stop, more in enumerate(sizes, start=1):
        size += more
        if size >= streams.UNIT_BYTES or stop == len(sizes):
            yield Unit(source, path, file, "zip", start=start, stop=stop, size=size)
            start, size = stop, 0


def members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """An archive's files by name, without hidden ones and what systems add."""
    return sorted(
        (
            member
            for member in archive.infolist()
            if not member.is_dir()
            and not any(
                part.startswith(".") or part in ("__pycache__", "__MACOSX")
                for part in member.filename.split("/")
            )
        ),
        key=lambda member: member.filename,
    )


@functools.lru_cache
def hub_stream(dataset: HubDataset) -> Any:
    """A data set as the library's stream, which reads while it is iterated.

    Raises:
        ValueError: the library is missing, or the data set has no such configuration or split.
        FileNotFoundError, PermissionError, ConnectionError: not there, not allowed, not reached.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]
        from datasets.exceptions import DatasetNotFoundError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{dataset} needs the datasets library, which is not installed. Use `pip install gemwright[hub]`."
        ) from None
    try:
        return datasets.load_dataset(
            dataset.name, dataset.config, split=dataset.split, streaming=True, token=os.environ.get(_TOKEN)
        )
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            told = (
                f"{_TOKEN} is set, and its owner has no access"
                if _TOKEN in os.environ
                else f"{_TOKEN} is not set"
            )
            raise PermissionError(
                f"{dataset} is gated, and {told}. Ask for access on its page at https://huggingface.co/datasets/"
                f"{dataset.name}, and set {_TOKEN} to a token of your account."
            ) from None
        raise FileNotFoundError(
            f"{dataset} is not on the Hub, or is private. Correct its name, or set {_TOKEN} to a token that "
            "may read it."
        ) from None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{dataset} holds no data that can be read: {error}") from None
    except ConnectionError as error:
        raise ConnectionError(
            f"{dataset} cannot be reached: {error}. Unset HF_HUB_OFFLINE if it is set, connect to the "
            "network, or copy the data set to a folder and name that."
        ) from None
    except ValueError as error:
        raise ValueError(f"{dataset} cannot be read as asked: {error}") from None
