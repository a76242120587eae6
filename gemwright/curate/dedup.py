"""Exact and near duplicates, by datatrove's signatures on disk, so that memory does not grow with the corpus.

Exact: the same text, by a 64-bit hash; one is kept. Near: MinHash (Broder 1997) on sets of five-word
shingles, banded: a document's 112 minima make 14 buckets of 8, and two documents that agree in a whole
bucket are taken for near-duplicates; of a chain of them one is kept. With Jaccard similarity s that happens
with probability 1 - (1 - s^8)^14 (`NearConfig.probability`):

    s            0.50   0.60   0.70   0.75   0.80   0.85   0.90   0.95
    probability  0.053  0.211  0.565  0.772  0.924  0.988  0.9996 1

Words are compared without case, accents and punctuation, since editions of one text differ in just these.
Digits stay (datatrove would make them all zeros): two tables of other numbers are two documents. The report
names no method; five words, 14 and 8 are FineWeb's (arXiv 2406.17557, section 3.4).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import regex
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from pydantic import PositiveInt

from gemwright.config import Config


class NearConfig(Config):
    """What near-duplicates are."""

    n_grams: PositiveInt = 5
    """Words a shingle; a document of fewer has no near-duplicates."""
    buckets: PositiveInt = 14
    """More of them find less similar pairs."""
    rows: PositiveInt = 8
    """Hashes a bucket; more of them ask for more similarity."""

    def probability(self, similarity: float) -> float:
        """That two documents of this Jaccard similarity meet in a bucket."""
        return 1 - (1 - similarity**self.rows) ** self.buckets

    @property
    def minhash(self) -> MinhashConfig:
        """The same for datatrove."""
        norm = TextNormConfig(norm_numbers=False)
        return MinhashConfig(self.n_grams, self.buckets, self.rows, norm_config=norm)


class ShingleWords(WordTokenizer):
    """Words for shingles: runs of letters and digits; single characters in scripts without spaces."""

    _WORD = regex.compile(
        r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]|\w+"
    )

    def word_tokenize(self, text: str) -> list[str]:
        """The words in order."""
        return self._WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """The text as one sentence: shingles may span sentences."""
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """The span of that sentence."""
        return [(0, len(text))]


def _text(document: Document) -> str:  # datatrove reads the annotation to choose its hash
    return document.text


class ExactSignature(PipelineStep):
    """datatrove's signatures of exact duplicates, made while documents pass through."""

    type, name = "DEDUP", "exact signatures"

    def __init__(self, folder: Path, finders: int) -> None:
        super().__init__()
        self.signature = ExactDedupSignature(str(folder), ExactDedupConfig(_text), finders)

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield what comes; write the signatures after the last."""
        signatures: list[Any] = []
        for number, document in enumerate(data):
            signatures += self.signature.get_hashes(document, number)
            yield document
        self.signature.save_hashes(rank, signatures)


def find_exact(signatures: Path, removals: Path) -> PipelineStep:
    """Which documents repeat an earlier one, from every task's signatures."""
    return ExactFindDedups(str(signatures), str(removals), ExactDedupConfig(_text))


def drop_exact(removals: Path, rejects: Any) -> PipelineStep:
    """Drop them: the input must be what `ExactSignature` saw, in the same tasks."""
    return ExactDedupFilter(str(removals), ExactDedupConfig(_text), rejects)


def near_signature(folder: Path, config: NearConfig) -> PipelineStep:
    """MinHash of every document: the last step of a pipeline, since it yields nothing."""
    words: Any = ShingleWords()  # datatrove takes one where its annotation says a language
    return MinhashDedupSignature(str(folder), config.minhash, words)


def find_near(signatures: Path, pairs: Path, config: NearConfig) -> PipelineStep:
    """Pairs that meet in a bucket; as many tasks as there are buckets."""
    return MinhashDedupBuckets(str(signatures), str(pairs), config=config.minhash)


def cluster_near(pairs: Path, removals: Path, config: NearConfig) -> PipelineStep:
    """From pairs to chains, and what of each to remove; one task, and memory for the pairs alone."""
    return MinhashDedupCluster(str(pairs), str(removals), config.minhash)


def drop_near(removals: Path, rejects: Any) -> PipelineStep:
    """Keep one of each chain: the input must be what `near_signature` saw, in the same tasks."""
    return MinhashDedupFilter(str(removals), rejects)


def shingles(text: str, config: NearConfig) -> set[int]:
    """The hashed shingles that MinHash compares, for measuring a pair's true similarity."""
    step: Any = near_signature(Path("."), config)
    return set(step.get_shingles(text).ravel().tolist())


def jaccard(a: Iterable[int], b: Iterable[int]) -> float:
    """Jaccard similarity of two sets; 0 for two empty ones."""
    a, b = set(a), set(b)
    return len(a & b) / max(1, len(a | b))
