"""The rules of quality and repetition: a text made to break each rule, and prose that breaks none."""

import pickle
import random
import re
import zipfile
from pathlib import Path

import pytest

from gemwright.filters.quality import EMPTY, Quality, QualityConfig, SpacedWords, Words

NOUNS = "harbour ship lantern captain river window garden letter winter bridge market stone village song"
VERBS = "carried watched painted followed answered crossed measured forgot remembered opened"
WEB = QualityConfig(gopher=False, repetition=False)
C4, FINEWEB = WEB.but(c4=True), WEB.but(fineweb=True)


def prose(sentences: int, seed: int = 0) -> str:
    """Sentences that make no sense and break no rule."""
    draw, nouns, verbs = random.Random(seed), NOUNS.split(), VERBS.split()
    return " ".join(
        f"The {draw.choice(nouns)} of the {draw.choice(nouns)} {draw.choice(verbs)} a {draw.choice(nouns)}, "
        f"and {draw.choice(verbs)} {draw.randint(2, 999)} {draw.choice(nouns)}s with {draw.choice(nouns)}."
        for _ in range(sentences)
    )


def reason(text: str, config: QualityConfig = QualityConfig(), language: str = "en") -> str | None:  # noqa: B008
    return Quality(config).check(text, language)[1]


def test_prose_passes_every_rule_and_is_not_changed() -> None:
    text = "\n".join(prose(3, seed) for seed in range(6))
    assert Quality(QualityConfig(c4=True, fineweb=True)).check(text) == (text, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The end of the story.", "quality_short_doc"),
        ("of a to be I we it do so up on " * 10, "quality_below_avg_threshold"),
        ("the internationalisation of " + "interdisciplinary " * 60, "quality_above_avg_threshold"),
        (prose(6) + " #" * 20, "quality_too_many_hashes"),
        (prose(6) + " word..." * 20, "quality_too_many_ellipsis"),
        ("\n".join(f"- {prose(1, seed)}" for seed in range(8)), "quality_too_many_bullets"),
        ("\n".join(f"{prose(3, seed)[:-1]}..." for seed in range(8)), "quality_too_many_end_ellipsis"),
        (prose(4) + " 12345" * 30, "quality_below_alpha_threshold"),
        (re.sub(r"\b(the|of|and|with)\b", "some", prose(8), flags=re.I), "quality_few_stop_words"),
    ],
    ids=lambda value: value if value.startswith("quality") else "",
)
def test_each_rule_of_gopher_on_quality_bites(text: str, expected: str) -> None:
    assert reason(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\n".join([prose(1)] * 3 + [prose(3, 1)]), "repetition_dup_para_frac"),
        ("\n\n".join([prose(9)] * 2 + [prose(1, n) for n in range(5, 10)]), "repetition_dup_para_char_frac"),
        ("\n".join([*(prose(1, n) for n in range(6)), *["Menu"] * 5]), "repetition_dup_line_frac"),
        ("\n".join([prose(9)] * 2 + [prose(1, n) for n in range(5, 10)]), "repetition_dup_line_char_frac"),
        (prose(6) + " copper kettle" * 20, "repetition_top_2_gram"),
        (" ".join([prose(4)] * 2), "repetition_duplicated_5_n_grams"),
    ],
    ids=lambda value: value if re.fullmatch(r"\w+", value) else "",
)
def test_each_kind_of_repetition_bites(text: str, expected: str) -> None:
    assert reason(text) == expected


@pytest.mark.parametrize("text", ["", "\n \n", "...", "🐢", "— — —"])
@pytest.mark.parametrize("language", ["en", "de"])
def test_a_text_without_words_is_called_empty(text: str, language: str) -> None:
    loose = QualityConfig(min_words=None, c4=True, c4_min_sentences=0, fineweb=True)
    assert Quality(loose).check(text, language) == (text, EMPTY)


def test_a_text_of_which_c4_leaves_nothing_is_called_empty() -> None:
    citations = "\n".join(["[1] [2] [3]"] * 6)
    assert Quality(C4.but(c4_end_marks=False)).check(citations) == (citations, EMPTY)


def test_rules_made_for_english_leave_other_languages_alone() -> None:
    text = "Das Schiff verließ den Hafen."
    assert reason(text, QualityConfig(c4=True, fineweb=True), "de") is None
    assert reason(text, QualityConfig(c4=True, fineweb=True), "en") == "quality_short_doc"


def test_repetition_is_judged_in_every_language() -> None:
    assert reason("Das Schiff verließ den Hafen.\n" * 20, language="de") == "repetition_dup_line_frac"


def test_a_short_text_does_not_repeat_what_it_says_once() -> None:
    """Two of five words are a third of the characters: the rule on the commonest pair would drop it."""
    assert reason("Das Schiff verließ den Hafen.", language="de") is None
    assert reason("Das Schiff, das Schiff! " * 3, language="de") == "repetition_duplicated_5_n_grams"


def test_each_set_of_rules_can_be_left_out() -> None:
    repeated = "The end of the story.\n" * 20
    assert reason(repeated, QualityConfig(repetition=False)) is None
    assert reason("The end of the story.", QualityConfig(gopher=False)) is None


def test_the_lengths_that_are_allowed_can_be_set() -> None:
    assert reason("The end of the story.", QualityConfig(min_words=5)) is None
    assert reason("The end of the story.", QualityConfig(min_words=None)) is None
    assert reason(prose(9), QualityConfig(max_words=60)) == "quality_long_doc"


def test_dialogue_with_much_punctuation_is_prose() -> None:
    """Where each mark is a word of its own, a third of these words have no letter."""
    said = [
        '"No," said the captain, "not now; not here, not with the lantern!"',
        '"Why?" "Well - the ship..."',
    ]
    text = "\n".join(f"{said[n % 2]} {prose(1, n)}" for n in range(10))
    assert reason(text, QualityConfig(repetition=False)) is None


def test_blank_lines_with_spaces_or_carriage_returns_are_no_repetition() -> None:
    text = "\n   \n".join(prose(2, seed) for seed in range(8))
    assert reason(text) is None
    assert Quality(QualityConfig()).check(text.replace("\n", "\r\n")) == (text.replace("\n", "\r\n"), None)


def test_c4_drops_lines_and_keeps_the_rest() -> None:
    lines = [prose(2, seed) for seed in range(4)]
    page = "\n".join(["Home | About", *lines, "This site uses cookies.", "Enable javascript to read on."])
    assert Quality(C4).check(page) == ("\n".join(lines), None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Lorem ipsum dolor sit amet.\n" + prose(6), "quality_lorem_ipsum"),
        (prose(6) + "\nThe body { margin } is set.", "quality_curly_bracket"),
        (prose(4), "quality_too_few_sentences"),
    ],
)
def test_c4_refuses_placeholders_code_and_scraps(text: str, expected: str) -> None:
    assert Quality(C4).check(text) == (text, expected)


def test_c4_can_keep_lines_without_an_end_mark_as_fineweb_does() -> None:
    page = "A headline without a mark\n" + prose(6)
    assert Quality(C4).check(page)[0] == prose(6)
    assert Quality(C4.but(c4_end_marks=False)).check(page)[0] == page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n".join(prose(1, seed)[:-1] for seed in range(9)), "quality_line_punct_ratio"),
        ("\n".join(["A short line."] * 1 + [f"Item {n}." for n in range(9)]), "quality_short_line_ratio"),
        ("\n".join([prose(1)] * 2 + [prose(1, n) for n in range(1, 7)]), "quality_char_dup_ratio"),
    ],
)
def test_each_rule_of_fineweb_bites(text: str, expected: str) -> None:
    assert reason(text, FINEWEB) == expected


def test_a_line_that_comes_twice_in_a_long_text_passes_fineweb() -> None:
    """The paper allows a tenth of the characters; datatrove left to itself, a hundredth."""
    text = "\n".join([prose(1)] * 2 + [prose(2, n) for n in range(1, 12)])
    assert reason(text, FINEWEB) is None


def test_words_are_cut_in_every_script() -> None:
    words = Words().word_tokenize
    assert words("It's 3 pm.") == ["It", "'", "s", "3", "pm", "."]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]  # not at vowel signs
    assert words("船离开了港口。") == ["船离", "开了", "港口", "。"]
    assert words("日本語OK") == ["日本", "語", "OK"]
    assert "".join(words("ภาษาไทย")) == "ภาษาไทย"
    assert len(words("ภาษาไทย")) == 3


def test_sentences_end_at_their_marks() -> None:
    assert Words().sent_tokenize("One. Two!  Three?\nFour") == ["One.", "Two!", "Three?", "Four"]
    assert Words().sent_tokenize("第一句。第二句！") == ["第一句。", "第二句！"]
    assert Words().sent_tokenize("") == []


def test_spans_give_back_the_sentences() -> None:
    text = "One. Two!  Three?\nFour"
    assert [text[a:b] for a, b in Words().span_tokenize(text)] == Words().sent_tokenize(text)


def test_tokenizers_are_equal_by_kind_and_so_share_a_cache() -> None:
    assert {Words(), Words(), SpacedWords()} == {Words(), SpacedWords()}
    assert Words() != SpacedWords()
    assert pickle.loads(pickle.dumps(Words())) == Words()


def test_quality_can_be_sent_to_a_worker() -> None:
    sent = pickle.loads(pickle.dumps(Quality(QualityConfig(c4=True, fineweb=True))))
    assert sent.check("The end of the story.")[1] == "quality_short_doc"


def test_the_declaration_of_human_rights_does_not_repeat_itself_in_any_large_language(data: Path) -> None:
    """As formulaic as prose gets. Words cut at vowel signs made six of these fail, single characters five."""
    large = (
        "eng cmn_hans cmn_hant jpn kor tha khm mya lao hin ben tam "  # codespell:ignore tha
        "arb pes_1 heb rus deu fra spa tur vie ind"  # codespell:ignore vie
    )
    quality = Quality(QualityConfig(gopher=False))
    with zipfile.ZipFile(data / "text/udhr2.zip") as archive:
        texts = {name: archive.read(f"udhr2/{name}.txt").decode("utf-8") for name in large.split()}
    assert not {name: why for name, text in texts.items() if (why := quality.check(text, name)[1])}


def test_almost_no_paragraph_of_war_and_peace_is_dropped(data: Path) -> None:
    book = (data / "text/war_and_peace_2600-0.txt").read_text(encoding="utf-8")
    long = [text for text in re.split(r"\n\s*\n", book) if len(text.split()) >= 60][:800]
    quality = Quality(QualityConfig())
    assert sum(quality.check(text)[1] is not None for text in long) <= 0.01 * len(long)
