"""Where text comes from, and that what is held out stays apart from what trains."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from gemwright.data.sources import LEAST_CHARACTERS, SHARE, SPLITS, Corpus


@pytest.fixture(scope="module")
def library() -> Corpus:
    return Corpus.standard_library()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def prose(characters: int, seed: int) -> str:
    """Distinct paragraphs of invented words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdeilnorst", k=draw.randint(2, 9))) for _ in range(400)]
    text = ""
    while len(text) < characters:
        text += " ".join(draw.choices(words, k=40)).capitalize() + ".\n\n"
    return text[:characters]


def share(corpus: Corpus, split: str) -> float:
    total = sum(int(corpus.facts[f"{name} characters"]) for name in SPLITS)
    return int(corpus.facts[f"{split} characters"]) / total


def test_no_top_level_module_lies_in_two_splits(library: Corpus) -> None:
    modules = [
        {entry.id.split("/")[0] for entry in library.entries if entry.split == split} for split in SPLITS
    ]
    assert not modules[0] & modules[1]
    assert not modules[0] & modules[2]
    assert not modules[1] & modules[2]


def test_the_standard_library_is_some_megabytes_with_a_twentieth_for_each_judge(library: Corpus) -> None:
    total = sum(int(library.facts[f"{split} characters"]) for split in SPLITS)
    assert 5e6 < total < 2e7
    assert 0.04 < share(library, "validation") < 0.06
    assert 0.04 < share(library, "held_out") < 0.06


def test_no_module_is_more_than_a_third_of_what_is_held_out(library: Corpus) -> None:
    sizes: dict[str, int] = {}
    for document in library.documents("held_out"):
        module = document.id.split("/")[0]
        sizes[module] = sizes.get(module, 0) + len(document.text)
    assert max(sizes.values()) < sum(sizes.values()) / 3


def test_test_suites_encodings_and_generated_files_are_left_out(library: Corpus) -> None:
    parts = {part for entry in library.entries for part in entry.id.split("/")}
    assert not parts & {"test", "tests", "idle_test", "encodings", "site-packages", "__pycache__"}
    assert not any(part.startswith(("_sysconfigdata", "config-")) for part in parts)


def test_the_library_includes_code_and_documentation(library: Corpus) -> None:
    ids = {entry.id for entry in library.entries}
    assert "asyncio/base_events.py" in ids
    assert "pydoc_data/topics.py" in ids


def test_a_second_scan_gives_the_same_corpus(tmp_path: Path) -> None:
    root = write(tmp_path, {f"{n}.txt": prose(3_000, n) for n in range(60)})
    first, second = Corpus.folder(root), Corpus.folder(root)
    assert first == second
    assert list(first.documents("train")) == list(second.documents("train"))


def test_the_hash_follows_every_text(tmp_path: Path) -> None:
    root = write(tmp_path, {f"{n}.txt": prose(3_000, n) for n in range(60)})
    before = Corpus.folder(root).facts["sha256"]
    write(root, {"7.txt": prose(2_999, 7) + "!"})
    assert Corpus.folder(root).facts["sha256"] != before


def test_counts_tell_what_documents_hold(tmp_path: Path) -> None:
    corpus = Corpus.folder(write(tmp_path, {f"{n}.txt": prose(3_000, n) for n in range(60)}))
    for split in SPLITS:
        documents = list(corpus.documents(split))
        assert corpus.facts[f"{split} documents"] == str(len(documents))
        assert corpus.facts[f"{split} characters"] == str(sum(len(document.text) for document in documents))


def test_exact_copies_are_kept_once(tmp_path: Path) -> None:
    files = {f"{n}.txt": prose(3_000, n) for n in range(60)}
    corpus = Corpus.folder(write(tmp_path, files | {"z/copy.txt": files["3.txt"]}))
    assert sum(int(corpus.facts[f"{split} documents"]) for split in SPLITS) == 60


def test_folders_are_kept_whole_where_there_are_enough(tmp_path: Path) -> None:
    files = {f"{n}/{part}.txt": prose(600, 10 * n + part) for n in range(200) for part in range(2)}
    corpus = Corpus.folder(write(tmp_path, files))
    splits: dict[str, set[str]] = {}
    for entry in corpus.entries:
        splits.setdefault(entry.id.split("/")[0], set()).add(entry.split)
    assert all(len(found) == 1 for found in splits.values())


def test_one_folder_of_many_files_is_split_by_file(tmp_path: Path) -> None:
    corpus = Corpus.folder(write(tmp_path, {f"all/{n}.txt": prose(1_000, n) for n in range(100)}))
    assert all("#" not in entry.id for entry in corpus.entries)
    assert share(corpus, "held_out") == pytest.approx(SHARE, abs=0.01)


def test_one_big_file_is_cut_and_its_end_held_out(tmp_path: Path) -> None:
    text = prose(400_000, 0)
    corpus = Corpus.folder(write(tmp_path, {"book.txt": text}))
    joined = "".join(document.text for split in SPLITS for document in corpus.documents(split))
    assert joined == text
    assert len(list(corpus.documents("held_out"))) >= 4
    assert share(corpus, "held_out") == pytest.approx(SHARE, abs=0.01)
    assert share(corpus, "validation") == pytest.approx(SHARE, abs=0.01)


def test_passages_end_at_blank_lines(tmp_path: Path) -> None:
    corpus = Corpus.folder(write(tmp_path, {"book.txt": prose(400_000, 0)}))
    *passages, _ = [document.text for split in SPLITS for document in corpus.documents(split)]
    assert all(passage.endswith("\n\n") for passage in passages)


def test_each_of_a_few_files_gives_its_end(tmp_path: Path) -> None:
    corpus = Corpus.folder(write(tmp_path, {f"{n}.txt": prose(90_000, n) for n in range(3)}))
    held = {document.id.split("#")[0] for document in corpus.documents("held_out")}
    assert held == {"0.txt", "1.txt", "2.txt"}


@pytest.mark.parametrize("text", ["x" * 50_000, "word " * 10_000], ids=["no space", "one line"])
def test_text_without_lines_is_cut_all_the_same(tmp_path: Path, text: str) -> None:
    unlike = "".join(f"{n}{character}" for n, character in enumerate(text))
    assert list(Corpus.folder(write(tmp_path, {"one.txt": unlike})).documents("held_out"))


def test_the_least_text_still_has_something_held_out(tmp_path: Path) -> None:
    files = {f"{n}.txt": prose(LEAST_CHARACTERS // 8, n) for n in range(8)}
    assert list(Corpus.folder(write(tmp_path, files)).documents("held_out"))


def test_binary_hidden_and_other_encodings_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, {f"{n}.txt": prose(3_000, n) for n in range(60)})
    write(tmp_path, {".hidden": prose(3_000, 61), ".git/config": prose(3_000, 62), "empty.txt": " \n"})
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    corpus = Corpus.folder(tmp_path)
    assert sum(int(corpus.facts[f"{split} documents"]) for split in SPLITS) == 60
    assert corpus.facts["skipped files"] == "3"


def test_line_ends_and_byte_order_marks_do_not_reach_the_text(tmp_path: Path) -> None:
    write(tmp_path, {f"{n}.txt": prose(3_000, n) for n in range(60)})
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    texts = {d.id: d.text for split in SPLITS for d in Corpus.folder(tmp_path).documents(split)}
    assert texts["windows.txt"] == "one\ntwo\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "holds 0 characters .* Add text"),
        (lambda root: write(root, {"a.txt": "short"}), "holds 5 characters"),
        (lambda root: write(root, {"a.txt": "ab\n\n" * 20_010}), "no text left for held_out"),
    ],
    ids=["empty", "short", "repetitive"],
)
def test_too_little_text_is_an_error_with_a_remedy(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        Corpus.folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        Corpus.folder(tmp_path / "nowhere")


def test_a_file_that_changed_after_the_scan_is_noticed(tmp_path: Path) -> None:
    corpus = Corpus.folder(write(tmp_path, {f"{n}.txt": prose(3_000, n) for n in range(60)}))
    write(tmp_path, {f"{n}.txt": "other" for n in range(60)})
    with pytest.raises(ValueError, match=r"changed after the corpus was scanned. Start the stage again."):
        list(corpus.documents("train"))
