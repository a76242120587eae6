"""What texts cost by language, where they are read from, and the page; ids as arrays; training on tabs."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gemwright.cli import main as cli
from gemwright.run import CARD
from gemwright.tokenizer.fertility import Fertility, compare, fertility, read_texts, tables
from gemwright.tokenizer.tokenizer import Tokenizer, parse_model
from gemwright.tokenizer.train import TokenizerConfig, train

HINDI, CHINESE, TURTLE = "सभी मनुष्य जन्म से स्वतंत्र हैं", "人人生而自由", "🐢"


@pytest.fixture(scope="session")
def small_folder(small: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "ours"
    small.save(folder)
    return folder


@pytest.fixture
def languages(tmp_path: Path) -> Path:
    """A folder with four texts, one of them not UTF-8."""
    folder = tmp_path / "languages"
    folder.mkdir()
    (folder / "eng.txt").write_text("All human beings are born free", encoding="utf-8-sig")
    (folder / "hin.txt").write_text(HINDI, encoding="utf-8")
    (folder / "cmn.txt").write_text(CHINESE, encoding="utf-8")
    (folder / "old.txt").write_bytes("Schön".encode("latin-1"))
    return folder


def cost(tokenizer: Tokenizer, text: str) -> Fertility:
    return fertility(tokenizer, {"text": text})["text"]


def test_a_text_costs_as_many_tokens_as_its_encoding_has(tokenizer: Tokenizer) -> None:
    text = "def free_and_equal(dignity, rights): return 48\n"
    costs = fertility(tokenizer, {"text": text, "twice": 2 * text})
    for label, whole in (("text", text), ("twice", 2 * text)):
        assert costs[label].tokens == len(tokenizer.encode(whole))
        assert costs[label].tokens_per_character == costs[label].tokens / len(whole)


def test_tokens_a_word_are_tokens_over_runs_of_letters_and_digits(small: Tokenizer) -> None:
    measured = cost(small, "two words, and 48 more")
    assert measured.words == 5
    assert measured.tokens_per_word == measured.tokens / 5


def test_a_vowel_sign_does_not_end_a_word(small: Tokenizer) -> None:
    """Python's `\\w` leaves out marks, and would find 13 words."""
    assert cost(small, HINDI).words == 6


@pytest.mark.parametrize("text", [CHINESE, "すべての人間は", "ทุกคนเกิดมา", "ມະນຸດ", "មនុស្ស", "လူတိုင်း", "འགྲོ་བ་"])
def test_a_script_without_spaces_has_no_words(small: Tokenizer, text: str) -> None:
    assert cost(small, text).words is None
    assert cost(small, text).tokens_per_word is None
    assert cost(small, text).tokens_per_character > 0


def test_the_script_is_that_of_most_letters(small: Tokenizer) -> None:
    assert cost(small, "Все люди are born равными 1948").script == "Cyrillic"
    assert cost(small, "1948 %").script == "Other"


def test_a_character_without_a_piece_is_counted_in_bytes(small: Tokenizer) -> None:
    measured = cost(small, f"if {TURTLE}")
    assert measured.byte_tokens == 4
    assert measured.byte_share == 4 / measured.tokens
    assert measured.bytes_per_token == 7 / measured.tokens


def test_no_byte_is_counted_where_all_characters_have_pieces(small: Tokenizer) -> None:
    """Text that spells a byte's piece is text."""
    assert cost(small, "class <0x41>").byte_tokens == 0


def test_an_empty_text_is_refused_by_name(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="empty text: lat"):
        fertility(small, {"eng": "free", "lat": ""})


def test_no_texts_cost_nothing(small: Tokenizer) -> None:
    assert fertility(small, {}) == {}


def test_a_folder_and_a_zip_of_it_give_the_same_texts(languages: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        for file in languages.iterdir():
            archive.write(file, file.name)
        archive.writestr("__MACOSX/._eng.txt", "left behind")
    texts, skipped = read_texts(tmp_path / "texts.zip")
    assert (texts, skipped) == read_texts(languages)
    assert texts == {
        "cmn": CHINESE, "eng": "All human beings are born free", "hin": HINDI,
    }  # fmt: skip
    assert list(texts) == ["cmn", "eng", "hin"]


def test_what_is_not_utf8_or_binary_or_blank_is_named_and_left_out(languages: Path) -> None:
    (languages / "blank.txt").write_text(" \n")
    (languages / "image.bin").write_bytes(b"a\0b")
    assert read_texts(languages)[1] == ["blank.txt", "image.bin", "old.txt"]


def test_files_that_share_a_name_are_called_by_their_path(languages: Path) -> None:
    (languages / "more").mkdir()
    (languages / "more" / "eng.txt").write_text("and equal")
    assert list(read_texts(languages)[0]) == ["cmn", "eng.txt", "hin", "more/eng.txt"]


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda path: None, FileNotFoundError, "no texts at"),
        (lambda path: path.write_text("a text"), ValueError, "is no zip and no folder"),
        (lambda path: path.mkdir(), ValueError, "holds no readable text.* 0 files"),
    ],
)
def test_texts_that_cannot_be_read_are_told_with_the_remedy(
    tmp_path: Path, make: Callable[[Path], object], error: type[Exception], said: str
) -> None:
    make(tmp_path / "texts")
    with pytest.raises(error, match=rf"{said}.*Give a folder or a zip"):
        read_texts(tmp_path / "texts")


def test_the_report_holds_every_text_for_every_tokenizer(
    small: Tokenizer, small_folder: Path, languages: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(train([HINDI * 50], TokenizerConfig(vocab_size=620)))
    compare([small_folder, other], languages, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert data["skipped"] == ["old.txt"]
    assert list(data["tokenizers"]) == ["ours", "other"]
    assert all(list(entry["languages"]) == ["cmn", "eng", "hin"] for entry in data["tokenizers"].values())
    hindi = {name: entry["languages"]["hin"]["tokens"] for name, entry in data["tokenizers"].items()}
    assert hindi["other"] < hindi["ours"] == len(small.encode(HINDI))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert page.count("<td>hin</td>") == 1


def test_a_mean_counts_every_text_once_however_long(small_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "short").write_text("a")
    (folder / "long").write_text("1 " * 500)
    entry = compare([small_folder], folder, tmp_path / "out")["tokenizers"]["ours"]
    each = [text["tokens_per_character"] for text in entry["languages"].values()]
    assert entry["mean"]["tokens_per_character"] == pytest.approx(sum(each) / 2, abs=1e-4)


def test_words_are_averaged_over_the_texts_that_have_them(
    small_folder: Path, languages: Path, tmp_path: Path
) -> None:
    entry = compare([small_folder], languages, tmp_path / "out")["tokenizers"]["ours"]
    words = {label: text["tokens_per_word"] for label, text in entry["languages"].items()}
    assert words["cmn"] is None
    assert entry["mean"]["tokens_per_word"] == pytest.approx((words["eng"] + words["hin"]) / 2, abs=1e-4)
    assert entry["scripts"]["Han"]["tokens_per_word"] is None


def test_tokenizers_that_share_a_name_are_called_by_their_path(
    small: Tokenizer, languages: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name / "tokenizer" for name in ("one", "two")]
    for folder in folders:
        small.save(folder)
    data = compare(folders, languages, tmp_path / "out")
    assert list(data["tokenizers"]) == [str(folder) for folder in folders]


def test_a_stages_folder_is_not_written_into(small_folder: Path, languages: Path, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("{}")
    with pytest.raises(ValueError, match=r"holds the work of a stage.*Choose another --out"):
        compare([small_folder], languages, tmp_path)


def test_the_table_has_a_line_a_tokenizer_and_a_line_a_script(
    small_folder: Path, languages: Path, tmp_path: Path
) -> None:
    lines = tables(compare([small_folder], languages, tmp_path / "out")).splitlines()
    assert [line.split()[0] for line in lines if line] == [
        "tokenizer", "---------", "ours", "tokens", "script", "----------", "Devanagari", "Han", "Latin",
    ]  # fmt: skip


def test_the_command_prints_one_line_of_json_and_says_what_it_left_out(
    small_folder: Path,
    languages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "tokenizer",
        "fertility",
        str(small_folder),
        "--texts",
        str(languages),
        "--out",
        str(tmp_path / "o"),
    ]
    monkeypatch.setattr("sys.argv", ["gemwright", *words, "--json"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert said.out.count("\n") == 1
    assert told["texts"] == 3
    assert set(told["tokenizers"]["ours"]) == {"vocab_size", "sha256", "mean", "scripts"}
    assert "not UTF-8: old.txt" in said.err


def test_gemma_over_the_declaration_of_human_rights(gemma: Tokenizer, data: Path) -> None:
    texts, skipped = read_texts(data.parent / "text" / "udhr2.zip")
    costs = fertility(gemma, texts)
    assert skipped == ["udhr2/nku.txt"]
    assert costs["eng"].tokens_per_character == min(cost.tokens_per_character for cost in costs.values())
    wordless = {cost.script for cost in costs.values() if cost.words is None}
    assert wordless == {"Han", "Hiragana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan"}


def test_arrays_hold_the_ids_of_the_batch(tokenizer: Tokenizer, texts: list[str]) -> None:
    lines = [*texts[0].split("\n")[:200], HINDI, "", TURTLE]
    rows = [[*row, tokenizer.eos_id] for row in tokenizer.encode_batch(lines, bos=True)]
    assert [row.tolist() for row in tokenizer.encode_arrays(lines, bos=True, eos=True)] == rows


def test_no_texts_are_no_arrays(small: Tokenizer) -> None:
    assert small.encode_arrays([]) == []


def test_encoding_to_arrays_tells_half_a_surrogate_pair_as_such(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="character 1 of a text is half a surrogate pair"):
        small.encode_arrays(["fine", "a\udc00"])


def test_text_full_of_tabs_gives_a_tokenizer_that_loads(texts: list[str]) -> None:
    """SentencePiece marks fixed pieces with tabs. It learnt a run of them again; nothing could load that."""
    tabbed = [text.replace("    ", "\t") for text in texts]
    model = train(tabbed, TokenizerConfig(vocab_size=2000))
    learnt = [piece.piece for piece in parse_model(model).pieces if piece.type == 1]
    assert not [piece for piece in learnt if "\t" in piece]
    assert Tokenizer(model).encode("\t") == [217 + 9]


def test_gemmas_size_trained_on_many_languages_has_gemmas_properties(data: Path) -> None:
    text = data.parent / "text"
    declaration, _ = read_texts(text / "udhr2.zip")
    novels = [path.read_text(encoding="utf-8-sig") for path in sorted(text.glob("*.txt"))]
    tokenizer = Tokenizer(train([*novels, *declaration.values()], TokenizerConfig()))
    assert tokenizer.vocab_size == 256_000
    assert [tokenizer.piece(number) for number in tokenizer.encode("1948")] == ["1", "9", "4", "8"]
    strange = f"\t\tdef  f():\n\n\n   return {TURTLE}  "
    assert all(tokenizer.decode(tokenizer.encode(part)) == part for part in (strange, *declaration.values()))
    assert [tokenizer.is_byte(number) for number in tokenizer.encode(TURTLE)] == 4 * [True]
    assert len(tokenizer.encode("<start_of_turn>")) > 1
