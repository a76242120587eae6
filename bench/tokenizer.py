"""How long does a tokenizer of Gemma's size take to train, and how fast are texts encoded?

Training: 256,000 pieces from 25 MB: two editions of a novel, plays, a declaration in 387 languages, Python's
standard library, and school mathematics. Encoding: Gemma's vocabulary, documents of 2,000 characters, a third
each of prose, code and many languages, next to SentencePiece's own batch call, two threads each. `pack` is
what packing needs, one array of ids with `<bos>` and `<eos>`; `pack_lists` makes it from lists of ids.

Each has a process of its own, and those that encode take turns.

    GEMWRIGHT_DATA=folder python -m bench.tokenizer --json
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from bench.turns import Ask, in_turns
from gemwright.data.sources import SPLITS, Corpus
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.tokenizer.train import TokenizerConfig, train

TRAINING_BYTES = 25_000_000
PART, DOCUMENT = 1_700_000, 2_000  # characters of each kind of text, and of a document
THREADS = 2
ENCODERS = ("gemwright", "sentencepiece", "pack", "pack_lists")


def novels(data: Path) -> list[str]:
    """War and Peace twice, and Shakespeare's plays."""
    return [path.read_text(encoding="utf-8-sig") for path in sorted((data / "text").glob("*.txt"))]


def languages(data: Path) -> list[str]:
    """The Universal Declaration of Human Rights."""
    with zipfile.ZipFile(data / "text" / "udhr2.zip") as archive:
        return [archive.read(name).decode("utf-8-sig") for name in sorted(archive.namelist())]


def library() -> list[str]:
    """All of Python's standard library that is text."""
    texts = Corpus.standard_library()
    return [document.text for split in SPLITS for document in texts.documents(split)]


def problems(data: Path) -> list[str]:
    """School mathematics, with solutions."""
    lines = (data / "benchmarks" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    return ["\n".join(json.loads(line).values()) for line in lines]


def corpus(data: Path) -> Iterator[str]:
    """Texts up to `TRAINING_BYTES` of UTF-8."""
    left = TRAINING_BYTES
    for text in [*novels(data), *languages(data), *library(), *problems(data)]:
        if (left := left - len(text.encode())) < 0:
            return
        yield text


def make_training(name: str, data: Path, vocab_size: int) -> Ask:
    """The training, in `name`'s process: its seconds, and the peak memory of the whole process."""
    texts = list(corpus(data))

    def ask(question: str) -> dict[str, Any]:
        start = time.perf_counter()
        model = train(texts, TokenizerConfig(vocab_size=vocab_size))
        return {
            "train_seconds": round(time.perf_counter() - start, 2),
            "train_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "vocab_size": Tokenizer(model).vocab_size,
            "characters": sum(map(len, texts)),
            "bytes": sum(len(text.encode()) for text in texts),
        }

    return ask


def make_encoder(name: str, data: Path) -> Ask:
    """One way to encode: "count" gives tokens and bytes, "time" seconds."""
    kinds = ("".join(texts)[:PART] for texts in (novels(data), library(), languages(data)))
    texts = [kind[start : start + DOCUMENT] for kind in kinds for start in range(0, len(kind), DOCUMENT)]
    model = data / "tokenizer" / "gemma2.model"
    tokenizer, processor = Tokenizer.load(model), SentencePieceProcessor(model_file=str(model))

    def pack_lists() -> np.ndarray:
        rows = tokenizer.encode_batch(texts, bos=True, threads=THREADS)
        return np.array([number for row in rows for number in (*row, tokenizer.eos_id)], np.int32)

    ways: dict[str, Callable[[], Any]] = {
        "gemwright": lambda: tokenizer.encode_batch(texts, threads=THREADS),
        "sentencepiece": lambda: processor.encode(texts, num_threads=THREADS),
        "pack": lambda: np.concatenate(tokenizer.encode_arrays(texts, True, True, THREADS)),
        "pack_lists": pack_lists,
    }

    def ask(question: str) -> float:
        if question == "count":
            return sum(map(len, tokenizer.encode_batch(texts)))
        start = time.perf_counter()
        ways[name]()
        return time.perf_counter() - start

    return ask


def _faster(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(b / a for a, b in zip(ours, theirs, strict=True)), 3)


def main() -> None:
    """Measure, and print a table or one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    parser.add_argument("--vocab", type=int, default=256_000, help="pieces (default 256000)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of encoding (default 7)")
    options = parser.parse_args()
    if not (folder := os.environ.get("GEMWRIGHT_DATA")):
        sys.exit("GEMWRIGHT_DATA is not set: it names the folder with the texts and Gemma's vocabulary.")
    data = Path(folder).resolve()
    (result,) = in_turns(["training"], make_training, (data, options.vocab), ["train"])["training"]
    answers = in_turns(ENCODERS, make_encoder, (data,), ["count", "time", *["time"] * options.rounds])
    tokens = answers["gemwright"][0]
    timed = {name: answer[2:] for name, answer in answers.items()}
    for name, seconds in timed.items():
        key = "encode_tokens_per_s" if name == "gemwright" else f"encode_tokens_per_s_{name}"
        result[key] = round(tokens / statistics.median(seconds))
        result[f"{key}_spread"] = [round(tokens / bound(seconds)) for bound in (max, min)]
    # Of turns next to each other, since the machine is not equally free in all of them.
    result["encode_ratio"] = _faster(timed["gemwright"], timed["sentencepiece"])
    result["pack_ratio"] = _faster(timed["pack"], timed["pack_lists"])
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:38} {value}")


if __name__ == "__main__":
    main()
