"""One unit -> documents, with all that cannot be read set aside by reason and line.

A text file is cut into passages; a record of JSON lines, a JSON list, parquet or a data set is a document.
Reading never stops at bad data: it yields a record with a `problem` in its place and goes on.
"""

import codecs
import errno
import functools
import io
import itertools
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import PositiveInt

from gemwright.config import Config
from gemwright.reading import streams
from gemwright.reading.passages import passages
from gemwright.reading.units import HubDataset, Unit, hub_stream, kind_of, members

Problem = Literal[
    "binary", "broken_utf8", "empty", "empty_file", "line_too_long", "malformed_json", "missing_key",
    "nul_bytes", "truncated", "unreadable", "wrong_type",
]  # fmt: skip
"""Why something was set aside. `truncated` ends early or is damaged; the system refused `unreadable`."""

EXCERPT = 200
"""Characters of what was set aside that are kept to show it."""

_BOM = b"\xef\xbb\xbf"
_BINARY_HEAD = 8 << 10  # bytes in which a NUL makes a file binary
_BATCH_BYTES = 4 << 20  # of parquet, unpacked
_PLAIN = frozenset({str, int, float, bool})
_BLANK_LINES = re.compile(r"(?:[ \t\f\v]*(?:\r?\n|\r))+")


class ReadConfig(Config):
    """How files become documents."""

    passage_characters: PositiveInt | None = 8_000
    """Longest passage of a text file, in characters; 1: each paragraph is a document; None: a file is one."""
    max_characters: PositiveInt = 1_000_000
    """Longest document of a text file where passages do not bound it; what is longer is cut."""
    text_key: str = "text"
    """Key of a record's text."""
    id_key: str = "id"
    """Key of a record's own id, if it has one."""
    max_line_bytes: PositiveInt = 16 << 20
    """A longer line, or value of a JSON list, is set aside."""


@dataclass(frozen=True, slots=True)
class Record:
    """A document, or what was set aside in place of one."""

    text: str
    """The document; of a problem, an excerpt."""
    id: str
    """`source/file#byte` of a passage's first byte; a record's own id, else `source/file:line`."""
    file: str
    """The path inside the source."""
    line: int | None
    """From 1, in the whole file (in parquet and data sets, the row): of a problem, where there is one, and of
    a record that has no id of its own. None elsewhere, as it would cost a look at all that comes before."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """A record's other plain fields. Of a problem: `detail`, in words that hold nothing of the text."""
    problem: Problem | None = None


class Row(NamedTuple):
    """A record as it was stored, or what was set aside in place of one."""

    record: Any
    file: str
    number: int | None
    """The line or row, counted from 1 where the unit begins."""
    problem: Problem | None = None
    excerpt: str = ""
    """What the problem looks like. Nobody has to keep it."""
    detail: str = ""
    before: Callable[[], int] = int
    """Counts the lines before the unit; a large file is gone through for that."""

    @property
    def line(self) -> int | None:
        """The line or row in the whole file, from 1."""
        return None if self.number is None else self.number + self.before()


def read(unit: Unit, config: ReadConfig) -> Iterator[Record]:
    """The documents of a unit, and its problems, in the order of the file.

    Raises:
        OSError: no space left, or a data set broke off; anything else is a problem record.
    """
    if isinstance(unit.path, HubDataset) and unit.path.text_key is not None:
        config = config.but(text_key=unit.path.text_key)
    for item in _items(unit, config, texts=True):
        yield item if isinstance(item, Record) else _record(item, unit.source, config)


def read_rows(unit: Unit, config: ReadConfig) -> Iterator[Row]:
    """The records of a unit as they were stored, for those with a form of their own. Errors as `read`.

    A text file is one problem, `wrong_type`.
    """
    for item in _items(unit, config, texts=False):
        assert isinstance(item, Row), item
        yield item


def _record(row: Row, source: str, config: ReadConfig) -> Record:
    place = f"{source}/{row.file}"
    if row.problem is not None:
        line = row.line
        detail = {"detail": row.detail} if row.detail else {}
        id = place if line is None else f"{place}:{line}"
        return Record(row.excerpt, id, row.file, line, detail, row.problem)
    value = row.record
    if not isinstance(value, dict):
        return _record(_refused(row, "wrong_type", f"a record is a {type(value).__name__}"), source, config)
    text = value.get(config.text_key)
    if not isinstance(text, str):
        if config.text_key in value:
            return _record(_refused(row, "wrong_type", f"text is a {type(text).__name__}"), source, config)
        return _record(_refused(row, "missing_key", f"no {config.text_key!r}"), source, config)
    if not text or text.isspace():
        return _record(_refused(row, "empty"), source, config)
    if "\0" in text:
        return _record(_refused(row, "nul_bytes"), source, config)
    own, line = value.get(config.id_key), None
    if not (type(own) is int or (type(own) is str and own)):
        line = row.line
        own = f"{place}:{line}"
    metadata = {
        key: entry
        for key, entry in value.items()
        if type(entry) in _PLAIN and key != config.text_key and key != config.id_key
    }
    return Record(_unix(text), str(own), row.file, line, metadata)


def _refused(row: Row, problem: Problem, detail: str = "") -> Row:
    shown = orjson.dumps(row.record, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    return row._replace(problem=problem, excerpt=_excerpt(shown), detail=detail)


def _items(unit: Unit, config: ReadConfig, texts: bool) -> Iterator[Row | Record]:
    """What is in a unit: rows, and passages as records. Without `texts`, text is refused."""
    if isinstance(unit.path, HubDataset):
        return _shard(unit.path, unit)
    if unit.kind == "zip":
        return _guarded(unit.file, _archive(unit, unit.path, config, texts))
    path = unit.path
    return _guarded(unit.file, _file(unit, lambda: open(path, "rb"), config, texts))


def _guarded(file: str, items: Iterable[Row | Record]) -> Iterator[Row | Record]:
    """End with a problem where reading raises: a damaged file hides neither its start nor the next file."""
    number = None
    try:
        for item in items:
            number = item.number if isinstance(item, Row) else None
            yield item
    except streams.DAMAGE as error:
        yield Row(None, file, number and number + 1, "truncated", detail=f"{type(error).__name__}: {error}")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Arrow's complaints about what it reads are OSErrors without a number.
        problem = "truncated" if error.errno is None else "unreadable"
        yield Row(None, file, number and number + 1, problem, detail=error.strerror or str(error))


def _archive(unit: Unit, path: Path, config: ReadConfig, texts: bool) -> Iterator[Row | Record]:
    with zipfile.ZipFile(path) as archive:
        for member in members(archive)[unit.start : unit.stop]:
            kind, packing = kind_of(member.filename)
            inside = Unit(unit.source, path, f"{unit.file}/{member.filename}", kind, packing)
            if member.flag_bits & 1:
                yield Row(None, inside.file, None, "unreadable", detail="it is encrypted")
                continue

            def opened(member: zipfile.ZipInfo = member) -> io.BufferedIOBase:
                return cast(zipfile.ZipExtFile, archive.open(member))

            yield from _guarded(inside.file, _file(inside, opened, config, texts))


def _file(
    unit: Unit, opened: Callable[[], io.BufferedIOBase], config: ReadConfig, texts: bool
) -> Iterator[Row | Record]:
    nothing = True
    with opened() as raw:
        parse = _parquet if unit.kind == "parquet" else _stream
        for item in parse(unit, raw, config, texts):
            nothing = False
            yield item
    if nothing and unit.start == 0 and unit.stop is None:
        yield Row(None, unit.file, None, "empty_file")


def _stream(unit: Unit, raw: io.BufferedIOBase, config: ReadConfig, texts: bool) -> Iterator[Row | Record]:
    """A unit of text, JSON lines or JSON: its edges, what it begins with, and on to its parser."""
    begin, end, text = 0, None, unit.kind not in ("jsonl", "json")
    if unit.start and b"\0" in raw.read(_BINARY_HEAD):
        return  # the first piece says so
    if text:
        begin = streams.text_edge(raw, unit.start)
        end = None if unit.stop is None else streams.text_edge(raw, unit.stop)
    elif unit.start:
        begin = streams.line_edge(raw, unit.start, unit.stop)
    if begin is None or begin == end:
        return  # a long line or paragraph goes through this piece, and belongs to the one where it begins
    before: Callable[[], int] = int
    if begin and not isinstance(unit.path, HubDataset):
        before = functools.partial(streams.newlines_before, unit.path, begin)

    stream = streams.blocks(raw, unit.packing, begin, end)
    first = next(stream, b"")
    if not begin:
        if b"\0" in first[:_BINARY_HEAD]:
            yield Row(None, unit.file, None, "binary")
            return
        begin = len(_BOM) if first.startswith(_BOM) else 0
        first = first[begin:]
    stream = itertools.chain([first], stream)
    if text and texts:
        yield from _passages(unit, stream, begin, before, config)
    elif text:
        if not unit.start:
            yield Row(None, unit.file, None, "wrong_type", detail="it is text, and records were expected")
    else:
        line, newline, _ = first.partition(b"\n")
        if unit.kind == "jsonl" or (newline and line.lstrip()[:1] == b"{" and _why_not(line) is None):
            found = enumerate(streams.lines(stream, config.max_line_bytes, begin, unit.stop), start=1)
        else:
            found = streams.values(stream, config.max_line_bytes)
        yield from _parsed(unit.file, found, before, config.max_line_bytes)


def _passages(
    unit: Unit, stream: Iterable[bytes], offset: int, before: Callable[[], int], config: ReadConfig
) -> Iterator[Record]:
    longest = config.passage_characters or config.max_characters
    target = longest
    if config.passage_characters == 1:
        longest = config.max_characters
    number, lengths = 1, [0]
    pieces = streams.without_long_lines(iter(stream), config.max_line_bytes)

    def up_to_long_line() -> Iterator[bytes]:
        for piece in pieces:
            if isinstance(piece, int):
                lengths.append(piece)
                return
            yield piece

    while lengths:
        lengths.clear()
        for raw in passages(_decoded(up_to_long_line()), target, longest):
            ahead = _BLANK_LINES.match(raw)
            skipped = ahead.end() if ahead else 0
            problem = "nul_bytes" if "\0" in raw else None
            try:
                size = len(raw) if raw.isascii() else len(raw.encode())
            except UnicodeEncodeError:
                size, problem = len(raw.encode(errors="surrogateescape")), "broken_utf8"
            if text := raw[skipped:].rstrip():
                id = f"{unit.source}/{unit.file}#{offset + skipped}"
                if problem is None:
                    yield Record(_unix(text), id, unit.file, None)
                else:
                    line = before() + number + raw.count("\n", 0, skipped)
                    yield Record(_excerpt(text), id, unit.file, line, problem=problem)
            offset += size
            number += raw.count("\n")
        for length in lengths:
            line, detail = before() + number, {"detail": f"{length:,} bytes"}
            id = f"{unit.source}/{unit.file}#{offset}"
            yield Record("", id, unit.file, line, detail, "line_too_long")
            offset += length


def _decoded(stream: Iterable[bytes]) -> Iterator[str]:
    """Text in which a byte that is no UTF-8 is a lone surrogate, from which it comes back as it was."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for block in stream:
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _parsed(
    file: str, found: Iterable[tuple[int, bytes | int]], before: Callable[[], int], longest: int
) -> Iterator[Row]:
    for number, raw in found:
        if isinstance(raw, int) or len(raw) > longest:
            length = raw if isinstance(raw, int) else len(raw)
            yield Row(None, file, number, "line_too_long", detail=f"{length:,} bytes", before=before)
            continue
        try:
            yield Row(orjson.loads(raw), file, number, before=before)
        except orjson.JSONDecodeError as error:
            if not raw or raw.isspace():
                continue
            shown = _excerpt(raw[: 4 * EXCERPT].decode(errors="replace"))
            detail = f"{error.msg} at column {error.colno}"
            yield Row(None, file, number, _why_not(raw) or "malformed_json", shown, detail, before)


def _why_not(raw: bytes) -> Problem | None:
    """What is wrong with a JSON value; None if nothing is."""
    try:
        orjson.loads(raw)
        return None
    except orjson.JSONDecodeError:
        pass
    try:
        # Python's parser, unlike the fast one, takes half a surrogate pair; no UTF-8 can hold it.
        json.dumps(json.loads(raw.decode()), ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError):
        return "broken_utf8"
    except (ValueError, RecursionError):
        pass
    return "malformed_json"


def _parquet(unit: Unit, raw: io.BufferedIOBase, config: ReadConfig, texts: bool) -> Iterator[Row]:
    # Unless it is told not to, the library takes up a column's whole row group before its first batch.
    options = {"buffer_size": streams.BLOCK, "pre_buffer": False, "page_checksum_verification": True}
    with streams.seekable(raw, unit.packing) as whole, pq.ParquetFile(whole, **options) as file:
        schema, about = file.schema_arrow, file.metadata
        columns = None
        if texts:
            if config.text_key not in schema.names:
                detail = f"no column {config.text_key!r} among {', '.join(schema.names)}"
                yield Row(None, unit.file, None, "missing_key", detail=detail)
                return
            used = (config.text_key, config.id_key)
            columns = [column.name for column in schema if column.name in used or _is_plain(column.type)]
        size = sum(about.row_group(number).total_byte_size for number in range(about.num_row_groups))
        rows = max(1, min(4_096, _BATCH_BYTES * about.num_rows // max(1, size)))
        number = 0
        for batch in file.iter_batches(rows, columns=columns, use_threads=False):
            for record in _records(batch):
                number += 1
                broken = "broken_utf8" if record is None else None
                yield Row(record, unit.file, number, broken)


def _is_plain(type: pa.DataType) -> bool:
    if pa.types.is_dictionary(type):
        return _is_plain(type.value_type)
    kinds = ("string", "large_string", "string_view", "integer", "floating", "boolean")
    return any(getattr(pa.types, f"is_{kind}")(type) for kind in kinds)


def _records(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for one whose strings are no UTF-8, which no writer is kept from."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [record for row in range(len(batch)) for record in _records(batch.slice(row, 1))]


def _shard(dataset: HubDataset, unit: Unit) -> Iterator[Row]:
    stream = hub_stream(dataset)
    number = 0
    try:
        for record in stream.shard(num_shards=stream.num_shards, index=unit.start):
            number += 1
            yield Row(record, unit.file, number)
    except Exception as error:  # of the network, the file system or the format: the library has many
        raise ConnectionError(
            f"{dataset} broke off after {number:,} records of shard {unit.start}: {error}. Run the same "
            "command again. If it stops there each time, the data set is damaged: name a copy of the rest."
        ) from error


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _excerpt(text: str) -> str:
    """The first characters, printable: what was no UTF-8 becomes U+FFFD, and so does NUL."""
    shown = text[:EXCERPT].encode(errors="surrogateescape").decode(errors="replace")
    return _unix(shown).replace("\0", "\ufffd")[:EXCERPT]
