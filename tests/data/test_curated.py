"""Curated text is split by names alone, near the shares, by the coarsest groups that allow it."""

from collections import Counter, defaultdict

import pytest

from gemwright.data.curated import CuratedSource, Level, buckets_of, split_source
from gemwright.data.sources import SHARE


def source(files: dict[str, int], size: int = 1_000) -> tuple[CuratedSource, dict[str, str]]:
    """A source of files with so many documents of `size` characters each, and every document's split."""
    sizes: dict[Level, Counter[int]] = defaultdict(Counter)
    names = [(file, f"{file}#{number}") for file, count in files.items() for number in range(count)]
    for file, id in names:
        for level, bucket in buckets_of(file, id).items():
            sizes[level][bucket] += size
    chosen = split_source(len(names), sizes)
    return chosen, {id: chosen.split_of(file, id) for file, id in names}


def shares(splits: dict[str, str]) -> dict[str, float]:
    counts = Counter(splits.values())
    return {split: counts[split] / len(splits) for split in ("train", "validation", "held_out")}


@pytest.mark.parametrize(
    ("files", "level"),
    [
        ({f"module{n}/{part}.py": 1 for n in range(400) for part in range(3)}, "group"),
        ({f"all/{n}.txt": 1 for n in range(2_000)}, "file"),
        ({"book.txt": 2_000}, "document"),
        ({"one.txt": 500, "two.txt": 500}, "document"),
    ],
    ids=["many modules", "one folder", "one book", "two books"],
)
def test_the_coarsest_level_that_comes_near_the_shares_is_taken(files: dict[str, int], level: str):
    chosen, splits = source(files)
    assert chosen.level == level
    for split in ("validation", "held_out"):
        assert shares(splits)[split] == pytest.approx(SHARE, rel=0.25)


def test_no_group_lies_in_two_splits():
    chosen, splits = source({f"module{n}/{part}.py": 1 for n in range(400) for part in range(3)})
    assert chosen.level == "group"
    by_group = defaultdict(set)
    for id, split in splits.items():
        by_group[id.split("/")[0]].add(split)
    assert {len(found) for found in by_group.values()} == {1}


def test_the_manifest_counts_the_characters_of_each_split():
    chosen, splits = source({"book.txt": 2_000}, size=700)
    assert chosen.characters == {split: 700 * count for split, count in Counter(splits.values()).items()}


def test_a_source_of_which_nothing_is_left_has_an_empty_entry():
    chosen = split_source(0, {})
    assert (chosen.documents, sum(chosen.characters.values())) == (0, 0)
