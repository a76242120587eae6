"""Benchmark contamination: does a document contain an item of a benchmark?

After appendix C of GPT-3 (arXiv 2005.14165): what shares 13 words in a row with a benchmark is contaminated;
words are lower case, punctuation is dropped, and what occurs too often is no evidence. The details are ours:

- Accents are dropped with the case. Digits stay what they are, or all tables of numbers would be one.
- An item of 13 words or more is found by any 13 of them in a row, a shorter one by all its words in a row.
- Such a run must hold five distinct words that are not numbers, or it marks nothing: "what do you do" is
  TruthfulQA and everyday speech, "0 0 0 0" is in every table. In 18 MB of novels, plays and library code no
  item of five to twelve words occurs; one of four does (PIQA's "to wash your hands", in a play), and two
  thirds of the items of one word.
- An item that is the whole document is always found, however short: as a prompt, "Are vampires real?" is
  TruthfulQA. So, if paragraphs are documents, are two of War and Peace: "Who are you?"
- A run that more than ten items of one benchmark share is its boilerplate (a preamble, instructions), and
  marks nothing. GPT-3 counts training documents instead, which no single process sees all of.
- GPT-3 cuts 200 characters around a hit out of a document; whoever calls `Index.find` drops the document.

Phrasing around a question and its answer options are taken off first, and a blank to fill in ("_") ends a
run: the text at large has a word there. Where a script puts no space between words, a clause is one word,
and little is found. Runs are compared by 64-bit hashes: 400,000 runs give one false hit in 5e13 words.
"""

import gzip
import json
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from jaxtyping import Bool, UInt16, UInt64

from gemwright.run import atomic

RUN = 13
"""Words in a row that mark a document, if they are a benchmark's."""

TELLING = 5
"""Distinct words, numbers not counted, below which a run is too common to mark a document."""

SHARED = 10
"""Items of a benchmark that may share a run before it is boilerplate: GPT-3's number (of documents)."""

_QUESTIONS = ("question", "instruction", "prompt", "goal", "text", "sentence", "turns")
_SOLUTIONS = ("canonical_solution", "code")
_FILE = re.compile(r"(?P<name>.+?)\.(?P<kind>jsonl?)(?P<packed>\.gz|\.zst)?")

# The instruction form of multiple choice, as LLM-Adapters (arXiv 2304.01933) has it
_PHRASED = re.compile(
    r"Please (?:choose|answer)\b[^:\n]*: (?P<item>.*?)"
    r"\s*(?:\b(?:Answer|Solution|Option|Ending)1: .*)?Answer format: .*",
    re.DOTALL,
)
_BLANK = re.compile(r"(?<!\w)_+(?!\w)")

_ACCENTS = re.compile("[\u0300-\u036f\u00ad\u200b-\u200d\u2060\ufeff]")  # and what is invisible inside words
_SEPARATORS = re.compile(r"[^\w\x00-\x7f]")
_ASCII = bytes(octet if octet > 127 or chr(octet).isalnum() else 32 for octet in range(256))

_FORMAT = 1  # of a saved index: another number whenever words, hashes or the rules above change
_BASE = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: odd, so that no word's bits are lost
_SHIFT = np.uint64(64 - 22)  # to a hash's first bits: 400,000 hashes have a tenth of the 2^22 there are
_hash = xxhash.xxh3_64_intdigest  # of short words it is as fast as a look-up in a cache of their hashes


@dataclass(frozen=True)
class Item:
    """A text to look for, and the benchmark that it belongs to."""

    benchmark: str
    text: str


def read_benchmarks(path: Path) -> Iterator[Item]:
    """The items of a benchmark file, or of all such files below a folder, in the order of their paths.

    A file is `.json` (a list of records) or `.jsonl`, plain, `.gz` or `.zst`; its name without endings is the
    benchmark's. Questions are what the fields `question`, `instruction`, `prompt`, `goal`, `text`, `sentence`
    and `turns` of a record hold. Solutions (`canonical_solution`, `code`) are items from 13 words on: shorter
    ones are idiom, as `return a + b` is. Options and answers of multiple choice are none.

    Raises:
        FileNotFoundError: no such path, or a folder without such files.
        ValueError: a file of another kind, damaged, malformed or without a single item.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Name a benchmark file, or a folder of them.")
    if path.is_file():
        return _read(path)
    names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    files = [path / name for name in names if _FILE.fullmatch(name.name)]
    if not files:
        raise FileNotFoundError(
            f"{path} holds no benchmark file. Put .json or .jsonl files there, plain, .gz or .zst."
        )
    return (item for file in files for item in _read(file))


@dataclass(frozen=True, eq=False)
class Index:
    """What marks a document as contaminated. Make one with `build` or `load`. Workers get it as a pickle."""

    names: tuple[str, ...]
    """The benchmarks."""
    hashes: UInt64[np.ndarray, " N"]
    """Of whole items, and of their runs; ascending."""
    owners: UInt16[np.ndarray, " N"]
    """Which benchmark a hash belongs to: an index into `names`. The first of those that share it."""
    starts: UInt64[np.ndarray, " _"]
    """Of the first five words of items below 13 words; ascending. Few places in a text look like one."""

    @cached_property
    def _prefixes(self) -> Bool[np.ndarray, " _"]:
        """Which first bits any hash has: a look-up here spares nine binary searches in ten."""
        table = np.zeros(1 << (64 - int(_SHIFT)), np.bool_)
        table[self.hashes >> _SHIFT] = True
        table[self.starts >> _SHIFT] = True
        return table

    @classmethod
    def build(cls, items: Iterable[Item]) -> "Index":
        """Index benchmark items. Raises ValueError where there is nothing to look for."""
        # Each once (copies of an item make no boilerplate of it), and in their order
        texts: dict[str, dict[bytes, None]] = {}
        for item in items:
            if words := _words(item.text):
                texts.setdefault(item.benchmark, {})[b" ".join(words)] = None
        if not texts:
            raise ValueError(
                "there is no benchmark item with a word in it. Name benchmarks that hold some text."
            )
        hashes: list[UInt64[np.ndarray, " _"]] = []
        starts: list[UInt64[np.ndarray, " _"]] = []
        for found in texts.values():
            runs: list[UInt64[np.ndarray, " _"]] = [np.zeros(0, np.uint64)]
            for text in found:
                words = text.split()
                size = min(len(words), RUN)
                by_size = dict(_runs(words))
                telling = by_size[size][_telling(words, size)]
                runs.append(np.unique(telling))
                if size < RUN and len(telling):
                    starts.append(by_size[TELLING][:1])
            distinct, items_with_it = np.unique(np.concatenate(runs), return_counts=True)
            wholes = np.array([_hash(text) for text in found], np.uint64)
            hashes.append(np.concatenate([wholes, distinct[items_with_it <= SHARED]]))
        owners = np.repeat(np.arange(len(hashes), dtype=np.uint16), [len(of_one) for of_one in hashes])
        known, first = np.unique(np.concatenate(hashes), return_index=True)
        beginnings = np.unique(np.concatenate([np.zeros(0, np.uint64), *starts]))
        return cls(tuple(texts), known, owners[first], beginnings)

    def find(self, text: str) -> str | None:
        """The name of a benchmark of which the text contains an item, or None."""
        for candidates in self._candidates(_words(text)):
            candidates = candidates[self._prefixes[candidates >> _SHIFT]]
            place = np.searchsorted(self.hashes[:-1], candidates)  # without the last: no place lies beyond
            hits = place[self.hashes[place] == candidates]
            if len(hits):
                return self.names[self.owners[hits[0]]]
        return None

    def _candidates(self, words: list[bytes]) -> Iterator[UInt64[np.ndarray, " _"]]:
        """The text as a whole, the runs that begin as a short item does, and all runs of 13 words."""
        yield np.array([_hash(b" ".join(words))], np.uint64)
        begins = np.zeros(0, np.int64)
        for size, runs in _runs(words):
            if size == TELLING and len(self.starts):
                begins = np.flatnonzero(self._prefixes[runs >> _SHIFT])
                begins = begins[self.starts[np.searchsorted(self.starts[:-1], runs[begins])] == runs[begins]]
            if size == RUN:
                yield runs
            else:
                yield runs[begins[begins < len(runs)]]

    def save(self, path: Path) -> None:
        """Write the index to an `.npz` file, atomically; the same index gives the same bytes."""
        with atomic(path) as partial, open(partial, "wb") as file:
            np.savez(
                file, format=np.array(_FORMAT), names=np.array(self.names), hashes=self.hashes,
                owners=self.owners, starts=self.starts,
            )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read what `save` wrote. Raises FileNotFoundError or ValueError with the remedy."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                if saved["format"] == _FORMAT:
                    names = tuple(str(name) for name in saved["names"])
                    return cls(names, saved["hashes"], saved["owners"], saved["starts"])
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} does not exist. Build the index of the benchmarks first."
            ) from None
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is no index, or damaged ({error}). Build it again.") from None
        raise ValueError(f"{path} has another format than this version reads ({_FORMAT}). Build it again.")


def _words(text: str) -> list[bytes]:
    """Letters and digits between all else, in UTF-8, without case and accents."""
    if not text.isascii():
        text = _SEPARATORS.sub(" ", _ACCENTS.sub("", unicodedata.normalize("NFKD", text)))
    return text.casefold().encode().translate(_ASCII).split()


def _runs(words: list[bytes]) -> Iterator[tuple[int, UInt64[np.ndarray, " _"]]]:
    """For sizes from 1 to 13 the hashes of all runs of that many words, in the order in which they begin."""
    hashes = np.fromiter(map(_hash, words), np.uint64, len(words))
    runs = hashes
    for size in range(1, RUN + 1):
        if size > 1:
            runs = runs[:-1] * _BASE + hashes[size - 1 :]  # modulo 2^64
        yield size, runs


def _telling(words: list[bytes], size: int) -> Bool[np.ndarray, " _"]:
    """Which runs of that many words hold enough distinct words that are not numbers."""
    runs = (words[start : start + size] for start in range(len(words) - size + 1))
    return np.array([len({word for word in run if not word.isdigit()}) >= TELLING for run in runs])


def _read(path: Path) -> Iterator[Item]:
    """The items of one file."""
    name, found = benchmark_name(path), False
    for record in read_records(path):
        for text in _texts(record):
            found = True
            yield Item(name, text)
    if not found:
        raise ValueError(
            f"{path} holds no benchmark item: no record has text in {', '.join(_QUESTIONS + _SOLUTIONS)}. "
            "Rename the field that holds the questions to one of these, or take the file away."
        )


def benchmark_name(path: Path) -> str:
    """The file's name without its ending. Raises ValueError if it ends in none of those that are read."""
    return _named(path)["name"]


def _named(path: Path) -> re.Match[str]:
    if named := _FILE.fullmatch(path.name):
        return named
    raise ValueError(f"{path} is no benchmark file. Give .json or .jsonl, plain, .gz or .zst.")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a benchmark file. Raises ValueError, with the line, for what is none."""
    named = _named(path)
    return _records(path, _unpacked(path, named["packed"]), lines=named["kind"] == "jsonl")


def _unpacked(path: Path, packed: str | None) -> str:
    data = path.read_bytes()
    try:
        if packed == ".gz":
            data = gzip.decompress(data)
        elif packed == ".zst":
            data = b"".join(_frames(data))
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, or not UTF-8 ({error}). Get the file again.") from None


def _frames(packed: bytes) -> Iterator[bytes]:
    while packed:
        frame = zstandard.ZstdDecompressor().decompressobj()
        yield frame.decompress(packed)
        if not frame.eof:  # zstandard itself takes half a file without a word
            raise EOFError("it ends too early")
        packed = frame.unused_data


def _records(path: Path, content: str, lines: bool) -> list[dict[str, Any]]:
    if lines:  # not splitlines: a JSON text may hold the other line ends that it knows
        numbered = enumerate(content.split("\n"), 1)
        data = [_parsed(path, line, number) for number, line in numbered if line.strip()]
    else:
        data = _parsed(path, content, None)
    if not isinstance(data, list) or not all(isinstance(record, dict) for record in data):
        raise ValueError(
            f'{path} holds something else than records. Write each as {{"question": "..."}}: a .json file is '
            "one list of them, a .jsonl file has one a line."
        )
    return data


def _parsed(path: Path, content: str, line: int | None) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        at = line or error.lineno
        raise ValueError(f"{path}, line {at}: this is no JSON ({error.msg}). Correct it.") from None


def _texts(record: dict[str, Any]) -> Iterator[str]:
    """The items in a record."""
    for field in _QUESTIONS:
        value = record.get(field)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and _words(text):
                phrased = _PHRASED.fullmatch(text)
                item = phrased["item"] if phrased else text
                parts = [part for part in _BLANK.split(item) if len(_words(part)) >= TELLING]
                yield from parts or [item]
    for field in _SOLUTIONS:
        value = record.get(field)
        if isinstance(value, str) and len(_words(value)) >= RUN:
            yield value
