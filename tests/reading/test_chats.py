"""Chat logs give their users' turns, and never an answer."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gemwright.reading.chats import NotAChat, Prompt, prompts_of

SAID = "SECRET ANSWER"
LMSYS: dict[str, Any] = {
    "conversation_id": "c1",
    "model": "vicuna-13b",
    "conversation": [
        {"role": "user", "content": " How do I boil an egg? "},
        {"role": "assistant", "content": SAID},
        {"role": "user", "content": "And two?"},
        {"role": "assistant", "content": SAID},
    ],
    "turn": 2,
    "language": "English",
    "openai_moderation": [{"flagged": False}, {"flagged": False}],
    "redacted": False,
}


def one(record: Any) -> Prompt:
    (prompt,) = prompts_of(record)
    return prompt


def test_a_record_of_lmsys_chat_gives_its_user_turns_in_order():
    assert one(LMSYS) == Prompt("c1", ("How do I boil an egg?", "And two?"), "en", False, False)


@pytest.mark.parametrize(
    "record",
    [
        LMSYS,
        {"id": "s", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": SAID}]},
        {"messages": [{"role": "system", "content": SAID}, {"role": "user", "content": "Hi"}]},
        {"id": "t", "instruction": "Add", "instances": [{"input": "1 2", "output": SAID}]},
        {"question_id": 81, "turns": ["Write.", "Rewrite."], "reference": [SAID]},
        {"uid": "a", "prompt": "Write.", "answer": SAID},
    ],
    ids=["lmsys", "sharegpt", "messages", "self-instruct", "mt-bench", "arena"],
)
def test_no_answer_is_in_what_a_record_gives(record: Any):
    prompts = list(prompts_of(record))
    assert prompts
    assert SAID not in repr(prompts)


def test_a_flag_on_an_answer_marks_the_conversation():
    assert one(LMSYS | {"openai_moderation": [{"flagged": False}, {"flagged": True}]}).flagged


def test_wildchat_marks_its_toxic_conversations():
    assert one(LMSYS | {"toxic": True}).flagged


@pytest.mark.parametrize("where", ["record", "message"])
def test_a_redaction_is_seen_on_the_record_and_on_a_message(where: str):
    messages = [{"role": "user", "content": "I am NAME_1", "redacted": where == "message"}]
    assert one({"conversation": messages, "redacted": where == "record"}).redacted


def test_a_language_that_is_not_in_the_table_keeps_its_name():
    assert one(LMSYS | {"language": "Klingon"}).language == "klingon"


def test_a_log_that_names_no_language_says_none():
    assert one({"prompt": "Write."}).language is None


def test_every_instance_of_self_instruct_is_a_prompt_with_its_input_below_the_instruction():
    instances = [{"input": "a b", "output": SAID}, {"input": "", "output": SAID}]
    prompts = list(prompts_of({"id": "seed", "instruction": "Sort.", "instances": instances}))
    assert [(prompt.id, prompt.turns) for prompt in prompts] == [
        ("seed", ("Sort.\n\na b",)),
        ("seed#1", ("Sort.",)),
    ]


def test_turns_may_be_objects_as_in_arena_hard():
    assert one({"turns": [{"content": "One."}, {"content": "Two."}]}).turns == ("One.", "Two.")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["no object"], "wrong_type"),
        ({"text": "no chat"}, "missing_key"),
        ({"conversation": "no list"}, "wrong_type"),
        ({"conversation": [{"role": "user", "content": None}]}, "wrong_type"),
        ({"conversation": [{"role": "oracle", "content": SAID}]}, "wrong_type"),
        ({"conversation": [{"role": "assistant", "content": SAID}]}, "no_user_turn"),
        ({"conversation": []}, "no_user_turn"),
        ({"prompt": "  "}, "no_user_turn"),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_refused_with_its_reason(record: Any, reason: str):
    with pytest.raises(NotAChat, match=reason):
        list(prompts_of(record))


@pytest.mark.skipif("GEMWRIGHT_DATA" not in os.environ, reason="needs the real prompts (GEMWRIGHT_DATA)")
@pytest.mark.parametrize(
    ("name", "conversations", "turns"),
    [
        ("mt_bench.jsonl", 80, 160),
        ("arena_hard_v0.1.jsonl", 500, 500),
        ("self_instruct_user_oriented.jsonl", 252, 252),
        ("fastchat_dummy_conversation.json", 500, 1000),
        ("lmsys_chat_1m/synthetic_example.jsonl", 1, 1),
    ],
)
def test_published_files_are_read_whole(name: str, conversations: int, turns: int):
    text = Path(os.environ["GEMWRIGHT_DATA"], "prompts", name).read_text(encoding="utf-8")
    records = json.loads(text) if name.endswith(".json") else map(json.loads, text.splitlines())
    prompts = [prompt for record in records for prompt in prompts_of(record)]
    assert (len(prompts), sum(len(prompt.turns) for prompt in prompts)) == (conversations, turns)
