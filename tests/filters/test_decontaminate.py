"""That what benchmarks ask is found in text, however it is written, and that other text is left alone."""

import gzip
import json
import pickle
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from gemwright.data.sources import SPLITS, Corpus
from gemwright.filters.decontaminate import RUN, SHARED, TELLING, Index, Item, read_benchmarks

LONG = (
    "Marta's seven geese each find 4 pebbles a day, and she sells every pebble for $3 at the harbour. "
    "How many dollars does she have after 2 weeks?"
)
SHORT = "Which bird carries pebbles to the harbour?"
PASSING = "Do geese swim?"


def prose(count: int, seed: int = 0) -> str:
    """Invented words, none of them in an item above."""
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("bdkmoruz", k=draw.randint(6, 9))) for _ in range(count))


def within(item: str) -> str:
    """The item in running text."""
    return f"{prose(30, 1)} {item} {prose(30, 2)}"


def index(*texts: str) -> Index:
    return Index.build(Item("geese", text) for text in texts)


def write(path: Path, *records: Any) -> Path:
    """Records in a file of the kind that its name says."""
    text = "\n".join(map(json.dumps, records)) if ".jsonl" in path.name else json.dumps(records)
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack.get(path.suffix, bytes)(text.encode()))
    return path


def texts(tmp_path: Path, *records: Any) -> list[str]:
    return [item.text for item in read_benchmarks(write(tmp_path / "some.jsonl", *records))]


@cache
def every_benchmark(folder: Path) -> Index:
    return Index.build(read_benchmarks(folder / "benchmarks"))


@cache
def novel(folder: Path) -> str:
    return (folder / "text" / "war_and_peace_2600-0.txt").read_text(encoding="utf-8-sig")


def passages(text: str) -> list[str]:
    return [text[start : start + 8_000] for start in range(0, len(text), 8_000)]


@pytest.mark.parametrize("start", [0, 5, 13])
def test_a_long_item_is_found_by_any_thirteen_of_its_words(start: int) -> None:
    words = LONG.split()[start : start + RUN]
    assert index(LONG).find(within(" ".join(words))) == "geese"


def test_twelve_words_of_a_long_item_mark_nothing() -> None:
    assert index(prose(40)).find(within(" ".join(prose(40).split()[10:22]))) is None


def test_a_short_item_is_found_in_running_text() -> None:
    assert index(SHORT).find(within(SHORT)) == "geese"


@pytest.mark.parametrize("part", [slice(1, None), slice(0, -1)])
def test_a_part_of_a_short_item_marks_nothing(part: slice) -> None:
    assert index(SHORT).find(within(" ".join(SHORT.split()[part]))) is None


def test_a_text_that_begins_as_a_short_item_and_goes_on_otherwise_is_left_alone() -> None:
    assert index(SHORT).find(within("Which bird carries pebbles to the field?")) is None


def test_words_in_another_order_mark_nothing() -> None:
    assert index(LONG, SHORT).find(" ".join(reversed(f"{LONG} {SHORT}".split()))) is None


@pytest.mark.parametrize("length", range(TELLING, RUN + 3))
def test_items_of_every_length_from_five_words_are_found_at_every_edge_of_a_text(length: int) -> None:
    item = prose(length, 7)
    for text in (item, f"{item} {prose(9)}", f"{prose(9)} {item}"):
        assert index(item).find(text) == "geese"


def test_an_item_of_few_words_is_found_where_it_is_the_whole_text() -> None:
    assert index(PASSING).find(f'\n"{PASSING.upper()}"\n') == "geese"


def test_an_item_of_few_words_marks_no_running_text() -> None:
    assert index(PASSING).find(within(PASSING)) is None


@pytest.mark.parametrize("item", ["1, 2, 3, 4, 5, 6, 7", "0 " * 20, "tick tock " * 8, "is 9 + 11 = 20 a sum"])
def test_numbers_and_repetitions_mark_no_running_text(item: str) -> None:
    assert index(item).find(within(item)) is None
    assert index(item).find(item) == "geese"


def test_digits_stay_what_they_are() -> None:
    item = "Add 17 to the number of grey geese there"
    assert index(item).find(within(item.replace("17", "18"))) is None


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        str.title,
        lambda text: text.replace(" ", "\r\n\t "),
        lambda text: text.replace(" ", "\N{NO-BREAK SPACE}"),
        lambda text: text.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}"),
        lambda text: re.sub(r"[^\w\s']", "", text),
        lambda text: re.sub(r"(\w+)", r"**\1**", text),
        lambda text: text.replace("ee", "e\N{SOFT HYPHEN}e"),
        lambda text: text.replace("o", "ó").replace("i", "i\N{COMBINING DIAERESIS}"),
        lambda text: text.replace("fi", "\N{LATIN SMALL LIGATURE FI}"),
    ],
)
@pytest.mark.parametrize("item", [LONG, SHORT])
def test_case_accents_punctuation_and_spacing_hide_nothing(item: str, change: Callable[[str], str]) -> None:
    assert index(item).find(within(change(item))) == "geese"


def test_accents_in_an_item_are_none_either() -> None:
    item = "Où Zoë naïve a-t-elle caché l'œuf et le pâté ?"
    assert index(item).find(within("Ou Zoe naive a-t-elle cache l'œuf et le pate?")) == "geese"


def test_letters_beyond_latin_are_words() -> None:
    assert index("Сколько гусей живёт у старой мельницы?").find("СКОЛЬКО ГУСЕЙ ЖИВЕТ У СТАРОЙ МЕЛЬНИЦЫ")


@pytest.mark.parametrize("text", ["", " \n", "...", "\ud800 \udfff", "a"])
def test_a_text_with_hardly_a_word_in_it_is_left_alone(text: str) -> None:
    assert index(LONG, SHORT).find(text) is None


def test_what_more_than_ten_items_share_marks_nothing() -> None:
    preamble = prose(20)
    items = [f"{preamble} {prose(20, seed)}" for seed in range(3, 14)]
    assert index(*items[:10]).find(within(preamble)) == "geese"
    assert index(*items).find(within(preamble)) is None


def test_an_item_with_such_a_preamble_is_found_by_the_rest() -> None:
    items = [f"{prose(20)} {prose(20, seed)}" for seed in range(3, SHARED + 4)]
    assert all(index(*items).find(within(" ".join(item.split()[20:]))) for item in items)


def test_what_one_item_says_again_and_again_is_no_boilerplate() -> None:
    assert index(f"{prose(20)} " * 2 * SHARED).find(within(prose(20))) == "geese"


def test_copies_of_an_item_are_no_boilerplate() -> None:
    assert index(*[LONG, LONG.upper()] * SHARED).find(within(LONG)) == "geese"


def test_what_many_benchmarks_share_is_no_boilerplate() -> None:
    items = [Item(f"number {number}", LONG) for number in range(2 * SHARED)]
    assert Index.build(items).find(within(LONG)) == "number 0"


def test_the_benchmark_is_named() -> None:
    both = Index.build([Item("long", LONG), Item("short", SHORT)])
    assert [both.find(within(LONG)), both.find(within(SHORT))] == ["long", "short"]


@pytest.mark.parametrize("items", [[], [Item("empty", "?!")]], ids=["none", "no word"])
def test_nothing_to_look_for_is_an_error(items: list[Item]) -> None:
    with pytest.raises(ValueError, match=r"no benchmark item .* Name benchmarks"):
        Index.build(items)


def test_a_saved_index_finds_the_same(tmp_path: Path) -> None:
    made = Index.build([Item("long", LONG), Item("short", SHORT), Item("passing", PASSING)])
    made.save(tmp_path / "index.npz")
    read = Index.load(tmp_path / "index.npz")
    assert read.names == made.names
    assert [read.find(text) for text in (within(LONG), within(SHORT), PASSING, prose(50))] == [
        "long", "short", "passing", None,
    ]  # fmt: skip


def test_the_same_index_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.npz", "two.npz"):
        index(LONG, SHORT).save(tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_an_index_goes_to_workers_as_a_small_pickle() -> None:
    packed = pickle.dumps(index(LONG, SHORT))
    assert len(packed) < 2_000
    assert pickle.loads(packed).find(within(SHORT)) == "geese"


def test_hashes_are_those_of_earlier_versions() -> None:
    """A change here makes saved indices useless: it needs another format number."""
    made = index("one two three four five")
    assert [hex(number) for number in made.hashes] == ["0x292525c0c40b98dd", "0xea11017dd5073998"]
    assert [hex(number) for number in made.starts] == ["0x292525c0c40b98dd"]


def other_format(path: Path) -> None:
    index(LONG).save(path)
    with np.load(path) as saved:
        changed = {**saved, "format": np.array(99)}
    with open(path, "wb") as file:
        np.savez(file, **changed)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b""), "is no index, or damaged .* Build it again"),
        (lambda path: path.write_bytes(b"PK\3\4 and so on"), "is no index, or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "is no index, or damaged"),
        (lambda path: np.save(open(path, "wb"), np.zeros(3)), "is no index, or damaged"),  # noqa: SIM115
        (lambda path: np.savez(open(path, "wb"), a=np.zeros(3)), "is no index, or damaged"),  # noqa: SIM115
        (other_format, r"another format than this version reads \(1\). Build it again"),
    ],
    ids=["empty", "no zip", "cut off", "npy", "other npz", "other format"],
)
def test_a_spoilt_index_is_an_error_with_a_remedy(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    index(LONG).save(tmp_path / "index.npz")
    spoil(tmp_path / "index.npz")
    with pytest.raises(ValueError, match=message):
        Index.load(tmp_path / "index.npz")


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.npz does not exist. Build"):
        Index.load(tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    "name",
    ["geese.json", "geese.jsonl", "geese.json.gz", "geese.jsonl.gz", "geese.json.zst", "geese.jsonl.zst"],
)
def test_files_of_every_kind_are_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, {"question": LONG}, {"question": SHORT})
    assert list(read_benchmarks(path)) == [Item("geese", LONG), Item("geese", SHORT)]


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    frames = [zstandard.compress(json.dumps({"question": text}).encode() + b"\n") for text in (LONG, SHORT)]
    (tmp_path / "geese.jsonl.zst").write_bytes(b"".join(frames))
    assert [item.text for item in read_benchmarks(tmp_path / "geese.jsonl.zst")] == [LONG, SHORT]


def test_line_ends_of_other_systems_and_inside_texts_are_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "geese.jsonl").write_text(
        '\ufeff{"question": "one\u2028two"}\r\n\r\n{"question": "three"}\r\n', encoding="utf-8", newline=""
    )
    assert [item.text for item in read_benchmarks(tmp_path / "geese.jsonl")] == ["one\u2028two", "three"]


def test_a_folder_gives_all_files_below_it_in_order_but_hidden_and_other_ones(tmp_path: Path) -> None:
    for name in ("b.json", "a/z.jsonl", "a/b/c.json.gz", "c.jsonl.zst", ".hidden.json", ".cache/d.json"):
        write(tmp_path / name, {"question": name})
    (tmp_path / "README.md").write_text("about geese")
    (tmp_path / "folder.json").mkdir()
    names = ["a/b/c.json.gz", "a/z.jsonl", "b.json", "c.jsonl.zst"]
    assert [item.text for item in read_benchmarks(tmp_path)] == names


@pytest.mark.parametrize("field", ["question", "instruction", "prompt", "goal", "text", "sentence"])
def test_questions_are_items_and_options_and_answers_are_none(tmp_path: Path, field: str) -> None:
    other = {"answer": "A heron", "choices": ["A heron", "A goose"], "test": ["assert heron"], "id": 7}
    assert texts(tmp_path, {field: SHORT, **other}) == [SHORT]


def test_every_turn_of_a_conversation_is_an_item(tmp_path: Path) -> None:
    assert texts(tmp_path, {"turns": [SHORT, LONG]}) == [SHORT, LONG]


@pytest.mark.parametrize("field", ["canonical_solution", "code"])
def test_a_solution_is_an_item_and_an_idiom_is_none(tmp_path: Path, field: str) -> None:
    code = "def honks(geese):\n    for _ in geese:\n        total += sum(goose.honks for goose in geese) + 1"
    records = [{"prompt": SHORT, field: code}, {"prompt": SHORT, field: "    return [x for x in y if x]\n"}]
    assert texts(tmp_path, *records) == [SHORT, code, SHORT]


@pytest.mark.parametrize(
    "form",
    [
        "Please choose the correct answer to the question: {}\n\nAnswer1: A heron. Answer2: A goose.\n\n"
        "Answer format: answer1/answer2",
        "Please choose the correct solution to the question: {}\n\nSolution1: A heron\n\n"
        "Solution2: A goose\n\nAnswer format: solution1/solution2",
        "Please choose the correct answer to fill in the blank to complete the given sentence: {}\n\n"
        "Option1: A heron Option2: A goose Answer format: option1/option2",
        "Please answer the following question with true or false, question: {}\n\nAnswer format: true/false",
    ],
)
def test_phrasing_and_options_are_taken_off(tmp_path: Path, form: str) -> None:
    assert texts(tmp_path, {"instruction": form.format(SHORT)}) == [SHORT]


@pytest.mark.parametrize("text", ["Please choose a goose: the grey one", "Geese. Answer format: true/false"])
def test_what_is_only_like_such_phrasing_stays(tmp_path: Path, text: str) -> None:
    assert texts(tmp_path, {"instruction": text}) == [text]


def test_the_sides_of_a_blank_are_items_if_they_have_five_words(tmp_path: Path) -> None:
    asked = "Marta fed the grey goose before Olga because _ was early that windy day, or ___ was late."
    parts = texts(tmp_path, {"sentence": asked})
    assert [part.strip() for part in parts] == [
        "Marta fed the grey goose before Olga because",
        "was early that windy day, or",
    ]


def test_a_sentence_is_found_whatever_stands_in_its_blank(tmp_path: Path) -> None:
    asked = "The grey goose outran the white one because _ was far younger and had longer legs."
    made = index(*texts(tmp_path, {"sentence": asked}))
    assert made.find(within(asked.replace("_", "the first of the two"))) == "geese"


def test_a_short_item_around_a_blank_is_kept(tmp_path: Path) -> None:
    assert texts(tmp_path, {"sentence": "The _ of geese"}) == ["The _ of geese"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"question":\n "x"},\n oops]', r"a.json, line 3: this is no JSON \(.*\). Correct it"),
        ("a.jsonl", b'{"question": "x"}\n\n{"question": \n', "a.jsonl, line 3: this is no JSON"),
        ("a.json", b"", "a.json, line 1: this is no JSON"),
        ("a.json", b'{"question": "x"}', 'something else than records. Write each as {"question": "..."}'),
        ("a.jsonl", b'["question"]', "something else than records"),
        ("a.jsonl", b'{"query": "x"}', "holds no benchmark item: .* question, .* Rename the field"),
        ("a.jsonl", b'{"question": "?!", "turns": [3]}', "holds no benchmark item"),
        ("a.jsonl", b"", "holds no benchmark item"),
        ("a.jsonl", "é".encode("latin-1"), "damaged, or not UTF-8 .* Get the file again"),
        ("a.jsonl.gz", gzip.compress(b'{"question": "x"}', mtime=0)[:-9], "damaged"),
        ("a.jsonl.gz", b'{"question": "x"}', "damaged"),
        ("a.jsonl.zst", zstandard.compress(b'{"question": "x"}')[:-5], r"damaged, .*\(it ends too early\)"),
        ("a.jsonl.zst", b'{"question": "x"}', "damaged"),
        ("a.csv", b"question\nx", "is no benchmark file. Give .json or .jsonl"),
    ],
)
def test_a_file_that_gives_no_items_is_an_error_with_a_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_benchmarks(tmp_path / name))


def test_a_missing_path_and_an_empty_folder_are_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist. Name a benchmark file"):
        read_benchmarks(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no benchmark file. Put"):
        read_benchmarks(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gsm8k_test.jsonl", str),
        ("gsm8k_test.jsonl", lambda text: re.sub(r"\s+", "\n", text.upper())),
        ("HumanEval.jsonl.gz", str),
        ("HumanEval.jsonl.gz", lambda text: re.sub(r"\s+", "  ", text.swapcase())),
        ("arc_challenge_test.json", str),
        ("arc_challenge_test.json", lambda text: re.sub(r"\s+", "\r\n", text.upper())),
        ("arc_easy_test.json", str),
        ("arc_easy_test.json", lambda text: re.sub(r"\s+", "\n  ", text.title())),
    ],
)
def test_every_item_is_found_inside_a_paragraph_of_a_novel(
    data: Path, name: str, change: Callable[[str], str]
) -> None:
    """But those that have not five words to tell them by: eighteen of ARC, three solutions of HumanEval."""
    items = list(read_benchmarks(data / "benchmarks" / name))
    made = Index.build(items)
    paragraphs = [part for part in re.split(r"\n\s*\n", novel(data)) if len(part) > 300]
    before, after = random.Random(0).sample(paragraphs, 2)
    assert made.find(f"{before} {after}") is None
    missed = [i.text for i in items if not made.find(f"{before} {change(i.text)} {after}")]
    assert all(len(set(re.findall(r"[a-z]\w*", text.lower()))) < TELLING for text in missed)
    assert len(missed) < 0.02 * len(items)


def test_no_paragraph_and_no_passage_of_the_plays_is_marked(data: Path) -> None:
    plays = (data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    paragraphs = re.split(r"\n\s*\n", plays)
    made = every_benchmark(data)
    assert len(paragraphs) > 7_000
    assert not [text for text in paragraphs + passages(plays) if made.find(text)]


def test_no_passage_of_the_novel_is_marked(data: Path) -> None:
    assert not [text for text in passages(novel(data)) if every_benchmark(data).find(text)]


def test_no_file_of_the_standard_library_is_marked(data: Path) -> None:
    """Solutions of programming problems are items too, and yet they mark no other code."""
    library = Corpus.standard_library()
    made = every_benchmark(data)
    assert not [doc.id for split in SPLITS for doc in library.documents(split) if made.find(doc.text)]


def test_a_question_that_one_benchmark_took_from_another_is_found(data: Path) -> None:
    """MT-bench asks GSM8K's "Some people got on a bus at the terminal", and changed its end."""
    lines = (data / "prompts" / "mt_bench.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [turn for line in lines for turn in json.loads(line)["turns"]]
    marked = {turn: name for turn in turns if (name := every_benchmark(data).find(turn))}
    assert set(marked.values()) == {"gsm8k_test"}
    assert [turn for turn in marked if turn.startswith("Some people got on a bus at the terminal")]
