"""Made-up English, for texts in which all that is dropped was planted."""

import random
from collections.abc import Callable

import pytest

_WORDS = [
    "the",
    "house",
    "that",
    "we",
    "have",
    "built",
    "stands",
    "with",
    "its",
    "garden",
    "near",
    "a",
    "river",
    "and",
    "people",
    "come",
    "to",
    "see",
    "it",
    "in",
    "summer",
    "because",
    "there",
    "is",
    "little",
    "else",
    "for",
    "them",
    "to",
    "do",
    "when",
    "work",
    "has",
    "ended",
    "early",
    "some",
    "bring",
    "bread",
    "others",
    "wine",
    "they",
    "sit",
    "under",
    "old",
    "trees",
    "talking",
    "about",
    "weather",
    "music",
    "children",
    "and",
    "long",
    "journeys",
    "which",
    "their",
    "fathers",
    "made",
    "across",
    "mountains",
    "before",
    "any",
    "road",
    "was",
    "there",
]


def english(words: int, seed: int) -> str:
    """Sentences of common words; texts of other seeds share hardly a shingle."""
    draw = random.Random(seed)
    text: list[str] = []
    while sum(len(sentence.split()) for sentence in text) < words:
        sentence = " ".join(draw.choices(_WORDS, k=draw.randint(8, 16)))
        text.append(sentence[0].upper() + sentence[1:] + ".")
    return " ".join(text)


@pytest.fixture(scope="session")
def prose() -> Callable[[int, int], str]:
    """`prose(words, seed)`: English text that the filters have nothing against."""
    return english
