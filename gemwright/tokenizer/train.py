"""Train a tokenizer with Gemma's properties on one's own text.

Ids 0 to 472 are Gemma's, one by one: control tokens, runs of newlines and of spaces, HTML tags, bytes. Then
come the learnt pieces and, last as in Gemma, runs of tabs. Digits are split, no space is lost, and what the
text shows too seldom is spelled in bytes (Gemma 2 report, section 3.1; runs and tags: the published model).

Two choices are ours. `[toxicity=0]` and `<unused99>`, which Gemma keeps beside the tabs, are left out. And
printable ASCII always has its pieces, so that a digit that the text never shows is still a piece.

Runs of newlines, spaces and tabs are pieces from the start, and SentencePiece learns nothing across such a
piece, so text may be cut at newlines without changing the result. A single tab is a byte, as in Gemma.
"""

import heapq
import io
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from sentencepiece import SentencePieceTrainer

from gemwright.config import Config
from gemwright.run import Card, RunFolder, run_stage
from gemwright.tokenizer.tokenizer import SPACE, SPECIAL, USER_DEFINED, Tokenizer, parse_model, require_utf8

_TAGS = (
    "table caption thead tbody tfoot tr th td",
    "h1 h2 h3 h4 h5 h6 blockquote",
    "strong em b i u s sub sup code",
)
_FIRST = [
    *list(SPECIAL)[4:],  # SentencePiece places the first four itself
    *("\n" * length for length in range(1, 32)),
    *(SPACE * length for length in range(2, 32)),
    *(f"<{slash}{tag}>" for group in _TAGS for slash in ("", "/") for tag in group.split()),
]
_LAST = ["\t" * length for length in range(2, 32)]
_ASCII = "".join(map(chr, range(33, 127)))
_FIXED = 4 + len(_FIRST) + 256 + len(_ASCII) + len(_LAST)

_CHUNK = 16_384  # characters: the unit of sampling
_MOST_BYTES = 4 * _CHUNK  # of a chunk in UTF-8; SentencePiece drops what is longer than its limit
_PROBE = 1_000_000  # characters on which the result is measured

# SentencePiece drops a whole sentence that holds U+2585. A tab is its own sign for "here was a fixed piece":
# where text holds many, it learns pieces across that sign, and runs of tabs a second time.
_RESERVED = re.compile("[▅\t]+")


class TokenizerConfig(Config):
    """How to train a tokenizer."""

    vocab_size: int = 256_000
    """All pieces, the 597 fixed ones included. Gemma 2: 256,000."""
    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    """Share of the text whose characters become pieces; the rarest are spelled in bytes."""
    max_characters: int = Field(default=200_000_000, ge=_CHUNK)
    """Train on a random sample of this size where there is more text."""
    seed: int = 0
    """Draws that sample; without effect on less text."""

    @field_validator("vocab_size")
    @classmethod
    def _leaves_room(cls, size: int) -> int:
        if size <= _FIXED:
            raise ValueError(
                f"vocab_size={size} leaves no room for text: {_FIXED} pieces are fixed (control tokens, runs "
                "of whitespace, HTML tags, bytes, ASCII). Use 1,000 or more."
            )
        return size


def train(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """A SentencePiece model, the same bytes for the same texts and config (and release of sentencepiece).

    Raises:
        ValueError: there is too little text for `vocab_size`, or too little room for the text's characters.
    """
    chunks = _sample(texts, config.max_characters, config.seed)
    for chunk in chunks:
        require_utf8(chunk)
    characters = sum(map(len, chunks))
    shortage = f"{characters:,} characters of text are too little for vocab_size={config.vocab_size:,}"
    if not characters:
        raise ValueError(f"{shortage}. Give it text.")
    wanted = config.vocab_size - len(_LAST)
    writer = io.BytesIO()
    named: dict[str, Any] = {}
    for name in ("pad", "eos", "bos", "unk"):
        named |= {f"{name}_piece": f"<{name}>", f"{name}_id": SPECIAL[f"<{name}>"]}
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=(part for chunk in chunks for part in _RESERVED.split(chunk)),
            model_writer=writer,
            model_type="bpe",
            vocab_size=wanted,
            hard_vocab_limit=False,  # a shortage is noticed below, with a better message
            character_coverage=config.character_coverage,
            user_defined_symbols=_FIRST,
            required_chars=_ASCII,
            **named,
            split_digits=True,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=_MOST_BYTES,
            num_threads=2,  # fixed, because the model file records it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocab_size={config.vocab_size:,} is too small for the characters of this text. Raise it, "
            f"or lower character_coverage. SentencePiece says: {error}"
        ) from None
    proto = parse_model(writer.getvalue())
    if len(proto.pieces) < wanted:
        possible = len(proto.pieces) + len(_LAST)
        raise ValueError(
            f"{shortage}: they give {possible:,} pieces. Add text, or use vocab_size={possible} or less."
        )
    for piece in _LAST:
        proto.pieces.add(piece=piece, score=0.0, type=USER_DEFINED)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString(deterministic=True)


def run(
    config: TokenizerConfig,
    out: Path,
    texts: Callable[[], Iterable[str]],
    corpus: Mapping[str, str],
    fresh: bool = False,
) -> Card:
    """The stage: train on `texts()` and write the files of `Tokenizer.save` to `out`.

    Args:
        texts: gives the documents anew each time it is called.
        corpus: what identifies these documents, such as their hash; it goes into the card.
        fresh: move an existing `out` aside and start anew.
    Raises:
        ValueError: as `train`, or `out` was made from another config or corpus.
    """

    def work(folder: RunFolder) -> dict[str, Any]:
        documents = characters = 0

        def counted() -> Iterator[str]:
            nonlocal documents, characters
            for text in texts():
                documents, characters = documents + 1, characters + len(text)
                yield text

        tokenizer = Tokenizer(train(counted(), config))
        tokenizer.save(folder.path)
        probe = _sample(texts(), _PROBE, config.seed)
        tokens = sum(map(len, tokenizer.encode_batch(probe)))
        return {
            "vocab_size": tokenizer.vocab_size,
            "documents": documents,
            "characters": characters,
            "characters_per_token": round(sum(map(len, probe)) / tokens, 3),
            "sha256": tokenizer.sha256,
            "sentencepiece": version("sentencepiece"),
        }

    return run_stage("tokenizer", config, out, work, facts=corpus, fresh=fresh)


def _sample(texts: Iterable[str], limit: int, seed: int) -> list[str]:
    """Chunks of the texts in their order: all of them, or a random choice of at most `limit` characters.

    One pass, bounded memory: each chunk draws a lot, and while there is too much text the highest lot leaves.
    """
    draw = random.Random(seed)
    heap: list[tuple[float, int, str]] = []
    total = 0
    for number, chunk in enumerate(chunk for text in texts for chunk in _chunks(text)):
        heapq.heappush(heap, (-draw.random(), number, chunk))
        total += len(chunk)
        while total > limit:
            total -= len(heapq.heappop(heap)[2])
    return [chunk for _, _, chunk in sorted(heap, key=lambda entry: entry[1])]


def _chunks(text: str) -> Iterator[str]:
    """The text in parts of at most `_CHUNK` characters, cut before a newline or, failing that, a space."""
    start = 0
    while len(text) - start > _CHUNK:
        stop = start + _CHUNK
        newline, space = (text.rfind(mark, start + 1, stop) for mark in "\n ")
        cut = next(place for place in (newline, space, stop) if place > 0)
        yield text[start:cut]
        start = cut
    yield text[start:]
