"""Benchmark files of every form: what is read, what is left out and counted, and what is refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gemwright.benchmarks.files import read_benchmark
from gemwright.benchmarks.questions import SETTINGS, Question


def written(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


PHRASED = (
    "Please choose the correct answer to the question: Which is a fruit?\n\n"
    "Answer1: a stone Answer2: an apple Answer3: a chair\n\nAnswer format: answer1/answer2/answer3"
)


def test_multiple_choice_in_words_is_taken_apart(tmp_path: Path):
    path = written(tmp_path / "arc_easy_test.jsonl", [{"instruction": PHRASED, "answer": "answer2"}])
    found = read_benchmark(path)
    assert (found.name, found.kind) == ("arc_easy", "choice")
    (question,) = found.questions
    assert question == Question(
        "Which is a fruit?", ("a stone", "an apple", "a chair"), (1,), gold="an apple"
    )


def test_a_blank_is_a_kind_of_its_own(tmp_path: Path):
    text = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: The cup broke "
        "since the _ was hard.\n\nOption1: cup Option2: floor Answer format: option1/option2"
    )
    found = read_benchmark(written(tmp_path / "x.jsonl", [{"instruction": text, "answer": "option2"}]))
    assert found.kind == "blank"
    assert found.questions[0].choices == ("cup", "floor")
    assert found.questions[0].right == (1,)


def test_true_or_false_is_answered_yes_or_no(tmp_path: Path):
    text = (
        "Please answer the following question with true or false, question: is water wet\n\n"
        "Answer format: true/false"
    )
    found = read_benchmark(written(tmp_path / "boolq.jsonl", [{"instruction": text, "answer": "false"}]))
    assert found.questions[0] == Question("is water wet?", ("yes", "no"), (1,), gold="no")


@pytest.mark.parametrize("answer", [2, "C", "two"])
def test_an_answer_is_a_number_a_letter_or_the_text(tmp_path: Path, answer: Any):
    record = {"question": "1 + 1?", "choices": ["none", "one", "two"], "answer": answer}
    assert read_benchmark(written(tmp_path / "x.jsonl", [record])).questions[0].right == (2,)


def test_letters_of_arcs_own_form_may_be_digits(tmp_path: Path):
    record = {
        "question": "q", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3",
    }  # fmt: skip
    assert read_benchmark(written(tmp_path / "x.jsonl", [record])).questions[0].right == (2,)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": None}, "no_answer"),
        ({"answer": 7}, "no_answer"),
        ({"choices": ["a"], "answer": 0}, "one_choice"),
        ({"choices": ["a", "a"]}, "same_choices"),
        ({"choices": 3}, "malformed"),
        ({"question": " "}, "malformed"),
    ],
)
def test_what_cannot_be_asked_is_left_out_and_counted(tmp_path: Path, changes: dict[str, Any], reason: str):
    good = {"question": "q", "choices": ["a", "b"], "answer": 1}
    found = read_benchmark(written(tmp_path / "x.jsonl", [good, good | changes, good]))
    assert len(found.questions) == 2
    assert found.left_out == Counter({reason: 1})


def test_a_file_without_any_question_is_refused(tmp_path: Path):
    path = written(tmp_path / "x.jsonl", [{"question": "q", "choices": ["a"], "answer": 0}] * 3)
    with pytest.raises(ValueError, match=r"none of 3 items can be asked \(one_choice: 3\)"):
        read_benchmark(path)


def test_an_unknown_form_says_what_would_be_known(tmp_path: Path):
    path = written(tmp_path / "x.jsonl", [{"colour": "red"}])
    with pytest.raises(ValueError, match=r"no benchmark that is known \(it has colour\)\. Give"):
        read_benchmark(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no benchmark file .*nothing\.json"):
        read_benchmark(tmp_path / "nothing.json")


def test_among_the_truths_a_choice_counts_once_and_one_that_is_both_not_at_all(tmp_path: Path):
    targets = {"choices": ["a", "b", "a", "c", "d", "d", ""], "labels": [1, 1, 1, 0, 0, 1, 1]}
    found = read_benchmark(written(tmp_path / "x.jsonl", [{"question": "q", "mc2_targets": targets}]))
    assert found.kind == "truths"
    assert (found.questions[0].choices, found.questions[0].right) == (("a", "b", "c"), (0, 1))


def test_numbers_and_words_are_told_apart(tmp_path: Path):
    for answer, kind in (("2 + 2\n#### 4", "number"), ("four", "words")):
        path = written(tmp_path / f"{kind}.jsonl", [{"question": "q", "answer": answer}])
        assert read_benchmark(path).kind == kind


def test_of_a_pair_the_stereotype_is_known(tmp_path: Path):
    path = tmp_path / "crows_pairs_anonymized.csv"
    path.write_text(
        ",sent_more,sent_less,stereo_antistereo,bias_type\n0,A cat.,A dog.,stereo,animal\n"
        "1,A hen.,A cow.,antistereo,animal\n"
    )
    found = read_benchmark(path)
    assert (found.name, found.kind) == ("crows_pairs", "pair")
    assert [one.right for one in found.questions] == [(0,), (1,)]


@pytest.mark.parametrize(
    ("sentence", "blank", "owner"),
    [
        ("The cook met the guest and she ate.", "The cook met the guest and _ ate.", ""),
        ("The cook met the guest and her son.", "The cook met the guest and _ son.", "'s"),
        ("The cook met the guest to talk to her.", "The cook met the guest to talk to _.", ""),
    ],
)
def test_a_pronoun_becomes_the_blank(tmp_path: Path, sentence: str, blank: str, owner: str):
    path = tmp_path / "winogender_all_sentences.tsv"
    path.write_text(f"sentid\tsentence\ncook.guest.1.female.txt\t{sentence}\n")
    found = read_benchmark(path)
    assert (found.name, found.kind) == ("winogender", "blank")
    question = found.questions[0]
    assert (question.text, question.right) == (blank, (1,))
    assert question.choices == (f"the cook{owner}", f"the guest{owner}")


@pytest.mark.parametrize(
    ("file", "kind", "count"),
    [
        ("HumanEval.jsonl.gz", "function", 164), ("arc_challenge_test.json", "choice", 1172),
        ("arc_easy_test.json", "choice", 2376), ("boolq_test.json", "choice", 3270),
        ("gsm8k_test.jsonl", "number", 1319), ("mbpp_test.jsonl", "program", 500),
        ("openbookqa_test.json", "choice", 500), ("piqa_test.json", "choice", 1838),
        ("truthfulqa_en.json", "truths", 817), ("winogrande_test.json", "blank", 1267),
    ],
)  # fmt: skip
def test_public_benchmarks_are_read_whole(data: Path, file: str, kind: str, count: int):
    found = read_benchmark(data / "benchmarks" / file)
    assert (found.kind, len(found.questions), dict(found.left_out)) == (kind, count, {})
    assert found.name in SETTINGS or found.name == "openbookqa"


@pytest.mark.parametrize(
    ("file", "count"), [("crows_pairs_anonymized.csv", 1508), ("winogender_all_sentences.tsv", 720)]
)
def test_tables_of_bias_are_read_whole(data: Path, file: str, count: int):
    found = read_benchmark(data / "safety" / file)
    assert (len(found.questions), dict(found.left_out)) == (count, {})
    assert found.name in SETTINGS
