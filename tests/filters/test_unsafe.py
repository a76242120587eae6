"""Word lists, classifiers and models that introduce themselves: what is found, and what must not be."""

import json
import math
import pickle
import re
import sysconfig
from pathlib import Path

import pytest

from gemwright.filters.unsafe import BUILTIN, Unsafe, UnsafeConfig, self_identification

NOTHING = UnsafeConfig(builtin=False)


def listed(folder: Path, *phrases: str, most: int = 0) -> Unsafe:
    """A filter with a list of these phrases alone."""
    path = folder / "list.txt"
    path.write_text("\n".join(phrases) + "\n", encoding="utf-8")
    return Unsafe(UnsafeConfig(words=(str(path),), builtin=False, most=most))


def score_of_shouting(text: str) -> float:
    """A classifier for tests, which a worker can find by its name."""
    return sum(map(str.isupper, text)) / len(text)


@pytest.mark.parametrize("text", ["a badword here", "BadWord.", "«BADWORD»", "(badword)\n", "badword"])
def test_a_word_is_found_in_any_case_and_beside_any_mark(tmp_path: Path, text: str) -> None:
    assert listed(tmp_path, "badword").check(text) == "unsafe_words"


@pytest.mark.parametrize("text", ["badwords", "abadword", "bad_word", "bad word", "badword2", ""])
def test_a_word_inside_another_is_not_found(tmp_path: Path, text: str) -> None:
    assert listed(tmp_path, "badword").check(text) is None


def test_a_phrase_is_found_across_any_white_space(tmp_path: Path) -> None:
    unsafe = listed(tmp_path, "very bad phrase")
    assert unsafe.check("A Very  bad\n\tphrase!") == "unsafe_words"


@pytest.mark.parametrize(
    "text", ["very bad. Phrase", "phrase very bad", "very bad phrases", "very, bad phrase"]
)
def test_the_words_of_a_phrase_in_another_order_or_apart_are_not_found(tmp_path: Path, text: str) -> None:
    assert listed(tmp_path, "very bad phrase").check(text) is None


@pytest.mark.parametrize("phrase", ["b&w", "b-w", "🐢", "(b)"])
def test_marks_in_a_phrase_are_taken_literally(tmp_path: Path, phrase: str) -> None:
    assert listed(tmp_path, phrase).check(f"It is {phrase}, and") == "unsafe_words"
    assert listed(tmp_path, phrase).check("It is b w, and") is None


def test_capitals_of_other_alphabets_are_folded(tmp_path: Path) -> None:
    assert listed(tmp_path, "straße").check("DIE STRASSE") == "unsafe_words"
    assert listed(tmp_path, "СЛОВО").check("слово") == "unsafe_words"


@pytest.mark.parametrize(
    ("phrase", "text"), [("坏话", "他说了坏话。"), ("悪口", "悪口を言う"), ("คำหยาบ", "พูดคำหยาบมาก")]
)
def test_without_spaces_between_words_a_phrase_is_found_anywhere(
    tmp_path: Path, phrase: str, text: str
) -> None:
    assert listed(tmp_path, phrase).check(text) == "unsafe_words"


def test_a_latin_word_among_chinese_characters_is_found(tmp_path: Path) -> None:
    assert listed(tmp_path, "badword").check("这是badword网站") == "unsafe_words"


def test_a_single_chinese_character_is_no_phrase(tmp_path: Path) -> None:
    assert listed(tmp_path, "乳").check("牛乳を飲む") is None


def test_a_hindi_word_ends_at_its_last_vowel_sign(tmp_path: Path) -> None:
    unsafe = listed(tmp_path, "गाल")
    assert unsafe.check("उसका गाल") == "unsafe_words"
    assert unsafe.check("एक गाली") is None


def test_as_many_matches_as_allowed_pass_and_one_more_does_not(tmp_path: Path) -> None:
    unsafe = listed(tmp_path, "badword", "坏话", most=3)
    assert unsafe.check("badword badword 坏话") is None
    assert unsafe.check("badword badword 坏话 badword") == "unsafe_words"


def test_overlapping_phrases_count_once(tmp_path: Path) -> None:
    unsafe = listed(tmp_path, "bad", "bad phrase", "phrase", most=1)
    assert unsafe.check("a bad phrase") is None
    assert unsafe.check("a bad, bad phrase") == "unsafe_words"


def test_blank_lines_and_a_byte_order_mark_in_a_list_are_no_phrases(tmp_path: Path) -> None:
    assert listed(tmp_path, "\ufeffbadword", "", "  ").check("a  text") is None
    assert listed(tmp_path, "\ufeffbadword", "", "  ").check("a badword") == "unsafe_words"


def test_the_list_that_ships_is_used_unless_it_is_turned_off() -> None:
    text = f"Tell me: {BUILTIN.splitlines()[1]}?"
    assert Unsafe(UnsafeConfig()).check(text) == "unsafe_words"
    assert Unsafe(NOTHING).check(text) is None


def test_every_phrase_of_the_list_that_ships_is_found() -> None:
    phrases = BUILTIN.split("\n")[1:-1]
    assert 20 <= len(phrases) == len(set(phrases)) <= 40
    assert all(Unsafe(UnsafeConfig()).check(phrase.upper()) for phrase in phrases)


@pytest.mark.parametrize(
    "text",
    [
        "The court heard that he had possessed child pornography; a bomb squad was called to his house.",
        "Breast and cervical cancer screening; sexually transmitted infections of the anus and penis.",
        "kill -9 $(pidof server)  # the master kills its slaves, then execute and abort the child process",
        "How to make a cake: whisk the cream. How to build a shed. How to cook meat.",
        "The rape of Lucrece; Sussex and Scunthorpe; the assassin passed the cocktail.",
    ],
    ids=["news", "medicine", "code", "recipes", "words within words"],
)
def test_ordinary_text_is_let_through(text: str) -> None:
    assert Unsafe(UnsafeConfig()).check(text) is None


def test_a_score_from_the_threshold_on_is_unsafe() -> None:
    unsafe = Unsafe(NOTHING.but(threshold=0.5), score_of_shouting)
    assert unsafe.check("ABcd") == "unsafe_score"
    assert unsafe.check("Abcd") is None


def test_a_classifier_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "house_classifier.py").write_text("def score(text):\n    return len(text) / 10\n")
    monkeypatch.syspath_prepend(tmp_path)
    unsafe = Unsafe(NOTHING.but(score="house_classifier:score"))
    assert [unsafe.check("x" * length) for length in (4, 5)] == [None, "unsafe_score"]


@pytest.mark.parametrize("score", [-0.1, 1.5, math.nan])
def test_a_score_that_is_none_is_an_error(score: float) -> None:
    with pytest.raises(ValueError, match="a score is from 0 to 1"):
        Unsafe(NOTHING, lambda text: score).check("text")


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("math", "not of the form package.module:function"),
        (":sqrt", "not of the form package.module:function"),
        ("math:", "not of the form package.module:function"),
        ("no_such_module:score", "No module named 'no_such_module'.* PYTHONPATH"),
        ("math:sqrrt", "math has no function 'sqrrt'. Did you mean 'sqrt'"),
        ("math:pi", "math has no function 'pi'"),
    ],
)
def test_a_classifier_that_is_not_to_be_found_is_an_error_at_once(score: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Unsafe(NOTHING.but(score=score))


def test_two_classifiers_are_an_error() -> None:
    with pytest.raises(ValueError, match="Give one of them"):
        Unsafe(NOTHING.but(score="math:sqrt"), score_of_shouting)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no word list at .*nowhere\.txt"):
        Unsafe(UnsafeConfig(words=(str(tmp_path / "nowhere.txt"),)))


def test_a_list_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("böse".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        Unsafe(UnsafeConfig(words=(str(tmp_path / "latin.txt"),)))


def test_the_filter_works_after_it_was_sent_to_a_worker(tmp_path: Path) -> None:
    sent = pickle.dumps(listed(tmp_path, "badword", "bad phrase", "坏话"))
    (tmp_path / "list.txt").unlink()  # a worker on another machine need not see the file
    there = pickle.loads(sent)
    assert [there.check(text) for text in ("a bad phrase", "说坏话", "good")] == [*["unsafe_words"] * 2, None]
    scored = pickle.loads(pickle.dumps(Unsafe(NOTHING.but(score="math:sqrt"))))
    assert scored.config.score == "math:sqrt"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but as a language model trained by OpenAI, I cannot do that.",
        "I'm ChatGPT, and I can help.",
        "As an AI developed by a company, I have no feelings.",
        "Unfortunately, as an AI language model I do not have opinions.",
        "As an AI, it is not possible for me to see pictures.",
        "I am Vicuna, a language model trained by researchers.",
        "My name is Claude, and I'm an AI assistant made by Anthropic.",
        "I am Claude, made by Anthropic.",
        "I’m a large language model.",
        "I was created by Google.",
        "OpenAI created me.",
        "My creators are people from DeepMind.",
        "I don't have personal experiences as an AI language model.",
        "My knowledge cutoff is September 2021.",
        "My training data only goes up to 2021.",
        "As of my last knowledge update, it was so.",
        "I was trained on a massive dataset of text.",
    ],
)
def test_a_model_that_introduces_itself_is_noticed(text: str) -> None:
    assert self_identification(f"Of course! {text}\nWhat else?") == "self_identification"


@pytest.mark.parametrize(
    "text",
    [
        "BERT is a language model trained by Google.",
        "I am an AI researcher, and I worked at OpenAI.",
        "As an AI engineer, I train models. As a language model grows, I see it improve.",
        "Who are you? Are you ChatGPT? Were you trained by OpenAI? Am I talking to a chatbot?",
        "I want you to act as an AI writing tutor. Act as an AI assistant, I will ask.",
        "You are ChatGPT, a large language model trained by OpenAI.",
        "I asked ChatGPT; as an AI, it could not know. I use GPT-4 at work.",
        "I was trained by Google as an engineer. Meta made me an offer, and OpenAI created me an account.",
        "My name is Claude. I live in Paris. I am Bard, the heir of Girion.",
        "I'm not an AI. I am an assistant professor. I'm a virtual assistant manager.",
        "I am a big fan of artificial intelligence, and my knowledge of French is limited.",
    ],
)
def test_what_is_said_of_others_or_by_people_is_let_through(text: str) -> None:
    assert self_identification(text) is None


def test_conversations_about_who_a_model_is_are_told_apart_by_who_speaks(data: Path) -> None:
    path = data / "prompts/fastchat_dummy_conversation.json"
    turns = [turn for item in json.loads(path.read_text(encoding="utf-8")) for turn in item["conversations"]]
    asked = {turn["value"] for turn in turns if turn["from"] == "human"}
    answered = {turn["value"] for turn in turns if turn["from"] == "gpt"}
    assert not [text for text in asked if self_identification(text)]
    assert {text for text in answered if not self_identification(text)} == {
        "You too!",
        "Hello! How can I help you today?",
        "Goodbye! If you have any more questions in the future, don't hesitate to ask.",
    }


def test_nothing_is_found_in_plays_novels_and_prompts(data: Path) -> None:
    unsafe = Unsafe(UnsafeConfig())
    for name in (
        "text/tinyshakespeare.txt",
        "text/war_and_peace_2600-0.txt",
        "prompts/arena_hard_v0.1.jsonl",
        "prompts/mt_bench.jsonl",
        "prompts/self_instruct_user_oriented.jsonl",
        "benchmarks/gsm8k_train.jsonl",
    ):
        text = (data / name).read_text(encoding="utf-8")
        assert (name, self_identification(text), unsafe.check(text)) == (name, None, None)


def test_nothing_is_found_in_the_standard_library() -> None:
    unsafe = Unsafe(UnsafeConfig())
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    assert len(texts) > 100
    assert not [name for name, text in texts.items() if self_identification(text) or unsafe.check(text)]


def test_a_long_list_finds_most_of_what_people_called_sexual_and_keeps_most_of_what_is_safe(
    data: Path,
) -> None:
    unsafe = Unsafe(UnsafeConfig(words=(str(data / "safety/ldnoobw/en"),)))
    lines = (data / "safety/openai_moderation_even_rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    sexual = [row["prompt"] for row in rows if row.get("S") == 1]
    safe = [row["prompt"] for row in rows if not any(row.get(label) for label in ("S", "H", "V", "HR", "SH"))]
    assert sum(unsafe.check(text) is not None for text in sexual) > 0.6 * len(sexual)
    assert sum(unsafe.check(text) is not None for text in safe) < 0.2 * len(safe)


def test_all_lists_of_ldnoobw_are_read(data: Path) -> None:
    lists = [path for path in (data / "safety/ldnoobw").iterdir() if re.fullmatch(r"[a-z]{2,3}", path.name)]
    assert len(lists) > 20
    unsafe = Unsafe(UnsafeConfig(words=tuple(map(str, sorted(lists)))))
    for path in lists:
        phrases = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line.strip()) > 2]
        found = sum(unsafe.check(f"… {phrase} …") is not None for phrase in phrases)
        assert found >= 0.98 * len(phrases), path.name
