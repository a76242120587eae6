"""Questions have right answers, wrong replies are told from right ones, and the log holds what it says."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gemwright.curate.pipeline import PromptsConfig, prompts
from gemwright.data.executor import ExecutorConfig
from gemwright.filters.personal import find
from gemwright.filters.unsafe import self_identification
from gemwright.reading.chats import prompts_of
from gemwright.recipes.laptop_full.questions import (
    KINDS,
    OTHER_ANSWER,
    Definition,
    Question,
    chat_log,
    definitions,
    questions,
    right,
    slips,
)

WORDS = re.findall(
    r"\w+", "stream header parser token buffer socket thread module packet record cursor window branch column"
)


def library() -> str:
    """Functions, methods and classes with names of two words, none twice."""
    lines: list[str] = []
    for one in WORDS:
        for other in WORDS:
            name, title = f"{one}_{other}", f"{one.title()}{other.title()}"
            lines += [f"def {name}({other}, {one}=None):", "    return 1", f"def {title.lower()}({one}):"]
            lines += [f"    def get_{name}(self, {other}):", f"    def has_{name}(self, {one}=0):"]
            lines += [f"class {title}(abc.{one.title()}):", f"class Base{title}({other.title()}):"]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def known() -> list[Definition]:
    return definitions([library()])


@pytest.fixture(scope="module")
def asked(known: list[Definition]) -> list[Question]:
    return questions(known, 600, seed=1)


@pytest.mark.parametrize(
    ("header", "name", "parameters", "defaults", "bases"),
    [
        ("def f()", "f", (), (), ()),
        ("def get(self, key, default=None)", "get", ("self", "key", "default"), ("default",), ()),
        ("def f(a, /, b=1, *c, d, e=2, **g)", "f", ("a", "b", "c", "d", "e", "g"), ("b", "e"), ()),
        ("async def go(x: int = 3) -> str", "go", ("x",), ("x",), ()),
        (r"def f(sep='\d')", "f", ("sep",), ("sep",), ()),
        ("class Plain", "Plain", None, (), ()),
        ("class E(io.Base, Mixin, metaclass=M)", "E", None, (), ("io.Base", "Mixin")),
        ("class P(namedtuple('P', 'x'))", "P", None, (), ()),
    ],
)
def test_a_header_is_understood(header: str, name: str, parameters: Any, defaults: Any, bases: Any):
    expected = Definition(header, name, parameters, defaults, bases)
    assert definitions([f"x = 1\n    {header}:\n    pass\n"]) == [expected]


@pytest.mark.parametrize(
    "line",
    [
        "def f(a,",
        "def f(a, b c):",
        "def f(): return 1",
        "class x y:",
        "if def f(x):",
        "define f(x):",
        "def f(a, b, c, d, e, f, g):",
        f"def f({'long' * 14}):",
        "def f(\0):",
        "# def f(x):",
        "def f(x): pass; y = [a:",
    ],
)
def test_what_is_no_header_of_the_kind_is_left_out(line: str):
    assert definitions([line]) == []


def test_headers_are_kept_once_and_of_dunder_names_three():
    inits = [f"    def __init__(self, {name}):" for name in "abcde"]
    runs = [f"    def run(self, {name}):" for name in "abcde"]
    text = "\n".join([*inits, *runs, *runs, *inits])
    found = Counter(one.name for one in definitions([text, text]))
    assert found == {"__init__": 3, "run": 5}


def test_every_answer_is_right_by_its_own_key(asked: list[Question]):
    checked = [(a, k) for one in asked for a, k in zip(one.answers, one.keys, strict=True) if k is not None]
    assert len(checked) > 500
    assert not [pair for pair in checked if not right(*pair)]


def test_facts_are_those_of_the_header():
    (one,) = definitions(["def load_file(self, path, mode='r'):"])
    found = {q.kind: (q.answers[0], q.keys[0]) for q in questions([one], 9, seed=0) if q.kind != "two"}
    assert found == {
        "name": ("Its name is load_file.", "load_file"),
        "count": ("It takes 3 parameters.", "3"),
        "first": ("Its first parameter is self.", "self"),
        "last": ("Its last parameter is mode.", "mode"),
        "default": ("Yes, mode has a default.", "Yes"),
        "method": ("It is a method, since its first parameter is self.", "method"),
        "purpose": ("By its name, it probably has to do with load and file.", None),
        "author": ("I cannot tell that from the signature.", "cannot"),
    }


def test_facts_of_a_bare_function_and_of_a_class_are_theirs():
    bare, derived = definitions(["def now():\nclass HTTPError(io.Base):"])
    facts = {(q.kind, q.answers[0]) for q in questions([bare, derived], 10, seed=0) if q.kind != "two"}
    assert facts == {
        ("name", "Its name is now."),
        ("count", "It takes 0 parameters."),
        ("method", "It is a function, since it has no parameters."),
        ("purpose", "By its name, it probably has to do with now."),
        ("author", "I cannot tell that from the signature."),
        ("name", "Its name is HTTPError."),
        ("base", "It inherits from io.Base."),
        ("purpose", "By its name, it probably has to do with http and error."),
    }


@pytest.mark.parametrize(
    ("reply", "key", "expected"),
    [
        ("Its name is parse.", "parse", True),
        ("parse", "parse", True),
        ("It is `parse`, I think", "parse", True),
        ("Its name is parse_all.", "parse", False),
        ("Its name is reparse.", "parse", False),
        ("Its name is Parse.", "parse", False),
        ("It inherits from json.parse.", "parse", False),
        ("It inherits from parse.json.", "parse", False),
        ("It inherits from io.Base.", "io.Base", True),
        ("It inherits from ioxBase.", "io.Base", False),
        ("It inherits from my.io.Base.", "io.Base", False),
        ("It takes 3 parameters.", "3", True),
        ("It takes 13 parameters.", "3", False),
        ("It takes 3.5 parameters.", "3", False),
        ("None has one.", "No", False),
        ("No, none has one.", "No", True),
        ("Its name is __init__.", "__init__", True),
        ("", "x", False),
    ],
)
def test_a_key_counts_as_a_whole_word(reply: str, key: str, expected: bool):
    assert right(reply, key) is expected


def test_an_answer_to_another_question_is_mostly_wrong(asked: list[Question]):
    single = [one for one in asked if one.kind in ("name", "last", "base")]
    crossed = zip(single, [*single[1:], single[0]], strict=True)
    assert not [1 for one, other in crossed if one.keys[0] and right(other.answers[0], one.keys[0])]


def test_what_is_to_be_copied_stands_in_the_question(asked: list[Question]):
    copied = [one for one in asked if one.kind in ("name", "first", "last", "base")]
    assert copied
    assert not [one for one in copied if not right(one.turns[0], one.keys[0] or "")]


def test_kinds_and_their_two_answers_are_balanced(asked: list[Question]):
    counts = Counter((one.kind, one.keys[0] if one.kind in ("default", "method") else None) for one in asked)
    assert {kind for kind, _ in counts} == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_questions_are_a_function_of_the_seed(known: list[Definition], asked: list[Question]):
    assert questions(known, 600, seed=1) == asked
    assert {one.turns for one in questions(known, 600, seed=2)} != {one.turns for one in asked}


def test_no_question_is_asked_twice_and_every_definition_before_any_again(known: list[Definition]):
    made = questions(known, 2 * len(known), seed=3)
    assert len({one.id for one in made}) == len({one.turns for one in made}) == len(made)
    half = [header_of(one, known) for one in made[: len(known)]]
    assert len(set(half)) == len(known)


def header_of(question: Question, known: list[Definition]) -> str:
    return max((one.header for one in known if one.header in question.turns[0]), key=len)


def test_two_turns_are_two_different_questions_about_one_definition(asked: list[Question]):
    two = [one for one in asked if one.kind == "two"]
    assert {len(one.turns) for one in two} == {len(one.answers) for one in two} == {2}
    assert all(one.answers[0] != one.answers[1] for one in two)
    assert all(one.turns[1].startswith("And ") for one in two)


def test_a_question_and_its_answer_are_short(asked: list[Question]):
    """At most about 100 tokens of the laptop's tokenizer, which spells English in few characters a piece."""
    assert max(len(" ".join((*one.turns, *one.answers))) for one in asked) < 230


def test_messages_take_turns(asked: list[Question]):
    two = next(one for one in asked if one.kind == "two")
    assert [message["role"] for message in two.messages] == ["user", "model"] * 2
    assert [message["content"] for message in two.messages[1::2]] == list(two.answers)


def test_more_questions_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="1 definitions give 9 different questions, not 100"):
        questions(definitions(["def load_file(self, path, mode='r'):"]), 100, seed=0)
    with pytest.raises(ValueError, match="0 definitions"):
        questions([], 1, seed=0)


def test_every_slip_is_one_that_a_filter_finds():
    made = slips(200, seed=0)
    found = Counter(
        self_identification(one.answers[0]) or ("personal" if find(one.answers[0]) else one.answers[0])
        for one in made
    )
    assert set(found) == {"self_identification", "personal"}
    assert len({one.turns for one in made}) == 200
    assert made == slips(200, seed=0)


def test_more_slips_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="there are 320 different slips, not 1,000"):
        slips(1_000, seed=0)


def test_a_log_is_read_as_the_questions_without_any_answer(asked: list[Question]):
    records, planted = chat_log(asked, seed=0)
    read = [prompt for record in records for prompt in prompts_of(json.loads(json.dumps(record)))]
    assert len(read) == len(asked) + sum(planted.values())
    assert {one.id: one.turns for one in asked}.items() <= {one.id: one.turns for one in read}.items()
    assert OTHER_ANSWER not in repr(read)
    assert all(
        message["content"] == OTHER_ANSWER for record in records for message in record["conversation"][1::2]
    )


def test_a_log_has_the_keys_of_lmsys_chat(asked: list[Question], data: Path):
    path = data / "prompts/lmsys_chat_1m/synthetic_example.jsonl"
    example: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    records, _ = chat_log(asked[:50], seed=0)
    assert all(record.keys() == example.keys() for record in records)
    for record in records:
        assert len(record["openai_moderation"]) == len(record["conversation"]) == 2 * record["turn"]


def test_a_log_is_a_function_of_the_seed(asked: list[Question]):
    assert chat_log(asked, seed=4) == chat_log(asked, seed=4)
    assert chat_log(asked, seed=5)[0] != chat_log(asked, seed=4)[0]


def test_the_stage_drops_what_was_planted_and_next_to_nothing_else(asked: list[Question], tmp_path: Path):
    """Near-duplicate removal may take a few questions about headers that are alike."""
    records, planted = chat_log(asked + slips(40, seed=0), seed=0)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    source = str(tmp_path / "log.jsonl")
    card = prompts(PromptsConfig(), tmp_path / "out", [source], executor=ExecutorConfig(workers=1))
    dropped = card.results["dropped"]
    near = dropped.pop("near_duplicate"), planted.pop("near_duplicate")
    assert dropped == planted
    assert 0 < near[1] <= near[0]
    assert card.results["kept"] == len(asked) + 40 - (near[0] - near[1])
    assert near[0] - near[1] <= 0.1 * len(asked)
    kept = (tmp_path / "out/prompts.jsonl").read_text(encoding="utf-8")
    assert not re.search("zebra|bomb|NAME_1|Deutsch|stupid", kept)
