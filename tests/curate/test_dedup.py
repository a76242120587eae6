"""Near-duplicates: what is found, what is left alone, and that the words compared are the words meant."""

import os
import random
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document

from gemwright.curate import dedup
from gemwright.curate.dedup import NearConfig, ShingleWords, jaccard, shingles

NEAR = NearConfig()
Pairs = list[tuple[int, int]]
needs_data = pytest.mark.skipif("GEMWRIGHT_DATA" not in os.environ, reason="needs real text (GEMWRIGHT_DATA)")


def documents(texts: Sequence[str]) -> Any:
    return (Document(text, str(number), metadata={"source": "s"}) for number, text in enumerate(texts))


def deduplicated(texts: Sequence[str], folder: Path, config: NearConfig = NEAR) -> tuple[set[int], Pairs]:
    """The numbers of the texts that are kept, and every pair that met in a bucket; in this process."""
    signatures, pairs, removals = folder / "signatures", folder / "pairs", folder / "removals"
    dedup.near_signature(signatures, config).run(documents(texts))
    for bucket in range(config.buckets):
        dedup.find_near(signatures, pairs, config).run(None, bucket, config.buckets)
    dedup.cluster_near(pairs, removals, config).run(None)
    kept = {int(document.id) for document in dedup.drop_near(removals, None).run(documents(texts)) or ()}
    met = b"".join(path.read_bytes() for path in sorted(pairs.glob("*.dups")))
    return kept, [(a, b) for _, a, _, b in struct.iter_unpack("<4I", met)]


def chains(count: int, pairs: Pairs) -> list[int]:
    """For every document the smallest number that it hangs together with."""
    parent = list(range(count))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for a, b in pairs:
        parent[max(root(a), root(b))] = min(root(a), root(b))
    return [root(number) for number in range(count)]


def prose(words: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("aeiounstrlmd", k=draw.randint(2, 9))) for _ in range(words))


def edited(text: str, share: float, draw: random.Random) -> str:
    """The text with a share of its words replaced."""
    return " ".join(prose(1, draw.randrange(10**9)) if draw.random() < share else w for w in text.split(" "))


def planted(originals: Sequence[str]) -> list[str]:
    """Each original, and after it a copy with up to a tenth of its words replaced."""
    draw = random.Random(1)
    return [text for one in originals for text in (one, edited(one, draw.random() / 10, draw))]


def recall_and_false_share(texts: Sequence[str], folder: Path) -> tuple[float, float, int]:
    """Of planted neighbours (2n, 2n + 1) the share found at Jaccard >= 0.85; of all dropped texts the share
    whose similarity to the one kept of their chain is below 0.5; and how many pairs the first is over."""
    kept, pairs = deduplicated(texts, folder)
    chain = chains(len(texts), pairs)
    sets = [shingles(text, NEAR) for text in texts]
    similar = [n for n in range(0, len(texts), 2) if jaccard(sets[n], sets[n + 1]) >= 0.85]
    found = sum(chain[n] == chain[n + 1] for n in similar)
    of_chain = {chain[number]: number for number in kept}
    dropped = [number for number in range(len(texts)) if number not in kept]
    false = sum(jaccard(sets[number], sets[of_chain[chain[number]]]) < 0.5 for number in dropped)
    return found / len(similar), false / len(dropped), len(similar)


@pytest.mark.parametrize(
    ("similarity", "probability"), [(0.0, 0.0), (0.5, 0.0533), (0.8, 0.9235), (0.85, 0.9884), (1.0, 1.0)]
)
def test_the_probability_curve_is_the_one_that_is_written_down(similarity: float, probability: float):
    assert NEAR.probability(similarity) == pytest.approx(probability, abs=1e-4)


def test_copies_with_a_few_changed_words_are_found_and_others_left_alone(tmp_path: Path):
    recall, false, pairs = recall_and_false_share(planted([prose(80, n) for n in range(300)]), tmp_path)
    assert pairs >= 50
    assert recall >= 0.95
    assert false <= 0.05


def test_texts_that_share_nothing_are_all_kept(tmp_path: Path):
    kept, pairs = deduplicated([prose(60, n) for n in range(50)], tmp_path)
    assert (len(kept), pairs) == (50, [])


def test_of_a_chain_of_near_copies_one_is_kept(tmp_path: Path):
    text = prose(200, 0)
    copies = [text, text + " one", text + " two", "zero " + text]
    kept, _ = deduplicated([*copies, prose(200, 1)], tmp_path)
    assert len(kept) == 2
    assert 4 in kept


@pytest.mark.parametrize(
    "other",
    [
        "PRINCE VASILI, said Anna Pavlovna; it is war -- and the princess laughed",
        "Prince Vasíli said Anna Pávlovna it is war and the princess laughed",
        "_Prince_   Vasili, said Anna Pavlovna:\nit is war and the princess laughed.",
    ],
    ids=["case and punctuation", "accents", "emphasis and spaces"],
)
def test_editions_that_differ_in_their_marks_have_the_same_shingles(other: str):
    text = "Prince Vasili, said Anna Pavlovna, it is war, and the princess laughed."
    assert shingles(text, NEAR) == shingles(other, NEAR)


def test_tables_of_other_numbers_are_other_documents(tmp_path: Path):
    tables = [" ".join(str(n * 1000 + row) for row in range(40)) for n in range(1, 6)]
    assert len(deduplicated(tables, tmp_path)[0]) == 5


def test_in_scripts_without_spaces_every_character_is_a_word():
    assert ShingleWords().word_tokenize("人人生而自由 and free") == [*"人人生而自由", "and", "free"]


def test_a_text_of_fewer_words_than_a_shingle_is_never_a_near_duplicate(tmp_path: Path):
    assert len(deduplicated(["two words", "two words"], tmp_path)[0]) == 2


def paragraphs(name: str) -> list[str]:
    text = Path(os.environ["GEMWRIGHT_DATA"], "text", name).read_text(encoding="utf-8-sig")
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text.replace("\r\n", "\n")))
    return [part for part in found if part]


@needs_data
def test_real_paragraphs_with_planted_edits_are_found(tmp_path: Path):
    long = [p for p in paragraphs("war_and_peace_2600-0.txt") if len(p.split()) >= 40][:1_000]
    recall, false, pairs = recall_and_false_share(planted(long), tmp_path)
    assert pairs >= 200
    assert recall >= 0.95
    assert false <= 0.05


@needs_data
@pytest.mark.slow
def test_two_editions_of_a_book_keep_little_more_than_one(tmp_path: Path):
    editions = [paragraphs(f"war_and_peace_{name}.txt") for name in ("2600-0", "wrnpc12")]
    kept = []
    for number, texts in enumerate([editions[0], editions[0] + editions[1]]):
        distinct = list(dict.fromkeys(texts))
        kept.append(len(deduplicated(distinct, tmp_path / str(number))[0]))
    assert kept[1] <= 1.1 * kept[0]
