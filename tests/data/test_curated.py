"""Curated text is split by names alone, near the shares, by the coarsest groups that allow it."""

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from gemwright.data.curated import CuratedSource, Level, buckets_of, open_text, split_source
from gemwright.data.sources import SHARE, SPLITS


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


def texts(root: Path, *names: str) -> list[Path]:
    """Folders of numbers, each with its own."""
    for start, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(60):
            words = " ".join(str(start * 10**6 + number * 1_000 + n) for n in range(200))
            (root / name / f"{number}.txt").write_text(words)
    return [root / name for name in names]


def test_several_texts_are_packed_as_one_with_all_their_sources(tmp_path: Path):
    web, code = texts(tmp_path, "web", "code")
    both = open_text(web, code)
    parts = [document for number in range(both.parts) for _, document in both.part(number)]
    assert Counter(document.source for document in parts) == {"web": 60, "code": 60}
    one = {split: sum(1 for _ in open_text(web).documents(split)) for split in SPLITS}
    assert {split: sum(1 for _ in both.documents(split)) for split in SPLITS} == {
        split: one[split] + sum(1 for _ in open_text(code).documents(split)) for split in SPLITS
    }
    assert both.facts["sha256"] != open_text(code, web).facts["sha256"]


def test_two_texts_with_a_source_of_one_name_are_refused(tmp_path: Path):
    folders = texts(tmp_path, "a/web", "b/web")
    with pytest.raises(ValueError, match="two texts hold a source called 'web'"):
        open_text(*folders)
