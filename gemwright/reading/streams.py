"""Files as bytes in bounded memory: blocks, packed or not, and the lines and JSON values in them.

Also where a file may be cut so that many workers can read it. Each worker finds the edges of its piece by
itself, from the bytes at its start and at its stop; its neighbour finds the same ones.
"""

import contextlib
import functools
import gzip
import io
import lzma
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import zstandard

BLOCK = 1 << 20  # bytes
UNIT_BYTES = 32 << 20
"""What one worker reads of a large file, in bytes. Fixed, so that no document hangs on who reads."""

_EDGE = 1 << 16  # bytes in which a blank line is looked for
_PACKED_BLOCK = 1 << 10  # bytes: zstd makes 32 MiB of them at the very most, and 4 kB as a rule
_LARGEST_WINDOW = 1 << 31  # bytes: `zstd --long=31`, in which archives of forums are packed

DAMAGE = (
    EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, zstandard.ZstdError,
    pa.ArrowInvalid,
)  # fmt: skip
"""What a packed file raises that ends early or is damaged."""

_BLANK_LINES = re.compile(rb"(?:\n|\r(?!\n))(?:[ \t\f\v]*(?:\r?\n|\r))+")
_LINE_END = re.compile(rb"\n|\r(?!\n)")
# A string, one that goes on in the next block, or a bracket.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{}]', re.S)
_BETWEEN = b" \t\r\n,"  # JSON values


def blocks(file: io.BufferedIOBase, packing: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes of a file from `start` to `stop`, unpacked if it is packed as gz or zst.

    Raises:
        one of DAMAGE, after what could be unpacked; OSError.
    """
    if packing == "gz":
        file = gzip.GzipFile(fileobj=file)
    elif packing == "zst":
        yield from _unpacked_zst(file)
        return
    if start or stop is not None:
        file.seek(start)  # the edges were looked for
    left = BLOCK if stop is None else stop - start
    # read1 gives what there is before it raises, where read would lose it.
    while left > 0 and (block := file.read1(min(BLOCK, left))):
        yield block
        left -= 0 if stop is None else len(block)


@contextlib.contextmanager
def seekable(file: io.BufferedIOBase, packing: str) -> Iterator[Any]:
    """The same file, or on disk what is packed in it: parquet is read from its end."""
    if not packing:
        yield file
        return
    with tempfile.TemporaryFile() as whole:
        whole.writelines(blocks(file, packing))
        whole.seek(0)
        yield whole


def _unpacked_zst(file: io.BufferedIOBase) -> Iterator[bytes]:
    """The library's own stream reader takes a file that ends early for a whole one."""
    unpack, inside = None, False
    while packed := file.read(_PACKED_BLOCK):
        while packed:  # frames may follow one another
            if unpack is None:
                unpack = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
            if block := unpack.decompress(packed):
                yield block
            packed = unpack.unused_data if unpack.eof else b""
            inside = not unpack.eof
            unpack = unpack if inside else None
    if inside:
        raise EOFError("the last frame ends early")


def text_edge(file: io.BufferedIOBase, position: int) -> int:
    """Where text may be cut soon after a byte position: behind a blank line.

    Without one in 64 KiB it is behind a line. Near the end of the file, and in its last line, it is the end.
    """
    if position == 0:
        return 0
    file.seek(position)
    window = file.read(_EDGE)
    found = _BLANK_LINES.search(window)
    if not found and len(window) == _EDGE:
        found = _LINE_END.search(window)
    while not found and window:
        position += len(window)
        window = file.read(BLOCK) if len(window) >= _EDGE else b""
        found = _LINE_END.search(window)
    return position + (found.end() if found else 0)


def line_edge(file: io.BufferedIOBase, start: int, stop: int | None) -> int | None:
    """Where the first line begins whose predecessor ends in this piece; None if there is none."""
    at = start
    for block in blocks(file, "", start, stop):
        if (found := block.find(b"\n")) >= 0:
            return at + found + 1
        at += len(block)
    return None


def lines(
    stream: Iterator[bytes], longest: int, at: int = 0, stop: int | None = None
) -> Iterator[bytes | int]:
    """The lines that begin at or before `stop`, if the stream begins at byte `at`, without their ends.

    Of a line longer than `longest` bytes there is only the length, if it is not held in a block already.
    """
    rest, lost = b"", 0
    for block in stream:
        if lost:
            end = block.find(b"\n")
            lost += len(block) if end < 0 else end
            if end < 0:
                continue
            yield lost
            at, lost, block = at + lost + 1, 0, block[end + 1 :]
        data = rest + block if rest else block
        *whole, rest = data.split(b"\n")
        if stop is None or at + len(data) <= stop:
            yield from whole
            at += len(data) - len(rest)
        else:
            for line in whole:
                if at > stop:
                    return
                yield line
                at += len(line) + 1
        if stop is not None and at > stop:
            return
        if len(rest) > longest:
            rest, lost = b"", len(rest)
    if lost or rest:
        yield lost or rest


def without_long_lines(stream: Iterator[bytes], longest: int) -> Iterator[bytes | int]:
    """A text's bytes, cut behind lines; in place of a line longer than `longest` bytes its length.

    Its line end is not counted: it is the first byte of what comes next.
    """
    rest, lost = b"", 0
    for block in stream:
        if lost:
            end = block.find(b"\n")
            lost += len(block) if end < 0 else end
            if end < 0:
                continue
            yield lost
            lost, block = 0, block[end:]
        data = rest + block
        whole, rest = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
        if len(whole) <= longest:
            yield whole
        else:
            for line in whole.splitlines(keepends=True):
                yield from [line] if len(line) <= longest + 1 else [len(line) - 1, b"\n"]
        if len(rest) > longest:
            rest, lost = b"", len(rest)
    if lost or rest:
        yield lost or rest


def values(stream: Iterator[bytes], longest: int) -> Iterator[tuple[int, bytes | int]]:
    """The JSON values of a stream, or those of its list if it is one, each with the line where it begins.

    They are told apart by brackets alone; what is no value comes out with its neighbour, for the parser to
    refuse. Of a value longer than `longest` bytes there is only the length, if no block holds it already.
    """
    data, scanned, depth, base, started = b"", 0, 0, 0, False
    line, lost, lost_lines = 1, 0, 0
    for block in stream:
        data += block
        begin = 0
        for token in _TOKEN.finditer(data, scanned):
            mark, scanned = token[0], token.end()
            if mark == b'"':  # a string that goes on in the next block
                scanned = token.start()
                break
            if mark in (b"[", b"{"):
                if not started and mark == b"[" and not data[: token.start()].strip():
                    line += data.count(b"\n", 0, scanned)
                    base, begin = 1, scanned
                started = True
                depth += 1
            elif mark in (b"]", b"}"):
                depth = max(0, depth - 1)
                if depth <= base:
                    # The end of a value, or of the list: then what is left in it is no object.
                    end = scanned if depth == base else token.start()
                    if (value := data[begin:end].strip(_BETWEEN)) or lost:
                        before = len(data[begin:end]) - len(data[begin:end].lstrip(_BETWEEN))
                        yield (
                            line + data.count(b"\n", begin, begin + before),
                            lost + len(value) if lost else value,
                        )
                    line += lost_lines + data.count(b"\n", begin, scanned)
                    begin, base, lost, lost_lines = scanned, min(base, depth), 0, 0
        else:
            scanned = len(data)
        data, scanned = data[begin:], scanned - begin
        if len(data) > longest:
            if not lost:
                line += data.count(b"\n") - data.lstrip(_BETWEEN).count(b"\n")
                scanned -= len(data) - len(data.lstrip(_BETWEEN))
                data = data.lstrip(_BETWEEN)
            # Of an open string its quote is kept, and half of an escape that was torn.
            open_string = data[scanned:]
            torn = (len(open_string) - len(open_string.rstrip(b"\\"))) % 2
            kept = open_string[:1] + b"\\" * torn
            lost, lost_lines = lost + len(data) - len(kept), lost_lines + data.count(b"\n")
            data, scanned = kept, 0
    if (rest := data.strip(_BETWEEN)) or lost:
        yield line, lost + len(rest) if lost else rest


@functools.lru_cache(maxsize=1 << 16)
def _newlines(path: Path, start: int, stop: int) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in blocks(file, "", start, stop))


def newlines_before(path: Path, position: int) -> int:
    """How many line ends (`\\n`) a file has before a byte. No process counts a piece of a file twice."""
    stops = [*range(UNIT_BYTES, position, UNIT_BYTES), position]
    return sum(_newlines(path, start, stop) for start, stop in zip([0, *stops], stops, strict=False))
