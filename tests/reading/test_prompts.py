"""Prompts are read from what `gemwright prompts` kept and from files of one's own, and answers never."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemwright.reading.prompts import Asked, Prompts, read_prompts

SAID = "SECRET ANSWER"


def written(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_folder_of_prompts_gives_what_was_kept(tmp_path: Path):
    record = {"id": "c1", "turns": ["Hi", "And then?"], "language": "en", "source": "log"}
    written(tmp_path / "prompts.jsonl", record)
    assert read_prompts(tmp_path) == Prompts((Asked("c1", ("Hi", "And then?"), "log"),), 0)


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone\n\n two \n", encoding="utf-8")
    assert read_prompts(path).asked == (Asked("line-1", ("one",)), Asked("line-3", ("two",)))


@pytest.mark.parametrize(
    ("record", "answers"),
    [
        (
            {"conversation": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": SAID}] * 2},
            2,
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": SAID}]}, 1),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "model", "content": SAID}]}, 1),
        ({"prompt": "Hi", "answer": SAID}, 1),
        ({"turns": ["Hi"], "reference": [SAID, SAID]}, 2),
        ({"instruction": "Add", "instances": [{"input": "1 2", "output": SAID}]}, 1),
    ],
)
def test_answers_in_the_records_are_counted_and_not_read(tmp_path: Path, record: Any, answers: int):
    found = read_prompts(written(tmp_path / "a.jsonl", record))
    assert found.answers_ignored == answers
    assert SAID not in repr(found)


def test_turns_of_a_user_that_follow_each_other_are_answered_one_by_one(tmp_path: Path):
    said = [{"role": "user", "content": text} for text in ("one", "two", "three")]
    assert read_prompts(written(tmp_path / "a.jsonl", {"messages": said})).asked[0].turns == (
        "one", "two", "three",
    )  # fmt: skip


SYSTEM = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]}


def test_a_system_message_begins_the_first_turn(tmp_path: Path):
    assert read_prompts(written(tmp_path / "a.jsonl", SYSTEM)).asked[0].turns == ("Be kind.\n\nHi",)


def test_a_system_message_is_refused_by_choice(tmp_path: Path):
    path = written(tmp_path / "a.jsonl", {"prompt": "Hi"}, SYSTEM)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: it has a system message, a role that Gemma 2"):
        read_prompts(path, system="refuse")


def test_two_prompts_of_one_name_get_two(tmp_path: Path):
    path = written(tmp_path / "a.jsonl", *[{"id": "same", "prompt": str(n)} for n in range(3)])
    assert [one.id for one in read_prompts(path).asked] == ["same", "same#2", "same#3"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"line 2: it is no JSON"),
        ('{"prompt": "a"}\n{"text": "b"}\n', r"line 2: it is no prompt \(missing_key\)"),
        ('{"turns": [1]}\n', r"line 1: it is no prompt \(wrong_type\)"),
        ("[1]\n", r"line 1: it is no prompt \(wrong_type\)"),
        ("\n\n", "holds no prompt"),
    ],
)
def test_what_is_no_prompt_is_an_error_that_names_the_line(tmp_path: Path, text: str, told: str):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        read_prompts(path)


def test_files_that_are_none_of_these_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*prompts\.jsonl"):
        read_prompts(tmp_path)
    with pytest.raises(ValueError, match=r"neither \.txt .* nor \.jsonl"):
        read_prompts(written(tmp_path / "a.csv", {"prompt": "Hi"}))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        read_prompts(tmp_path / "b.txt")
