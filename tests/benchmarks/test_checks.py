"""Right answers are found right however they are put, and wrong ones are not."""

import json
from pathlib import Path

import pytest

from gemwright.benchmarks.checks import (
    code_of,
    cut,
    exact,
    humaneval_program,
    mbpp_program,
    number,
    same_number,
)


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("Paris", "paris"),
        (" The  quick,\nbrown fox! ", "quick brown fox"),
        ("“An apple”", "apple"),
        ("the U.S.", "US"),
        ("ＡＢＣ", "abc"),
        ("STRASSE", "straße"),
        ("A", "a"),
        ("+", "+"),
    ],
)
def test_words_are_alike_but_for_case_articles_and_marks(said: str, gold: str):
    assert exact(said, gold)
    assert exact(gold, said)


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("Paris, France", "Paris"),
        ("", "A"),
        ("the", "A"),
        ("", "+"),
        ("then", "n"),
        ("ab", "a b"),
        ("B", "A"),
    ],
)
def test_other_words_are_not(said: str, gold: str):
    assert not exact(said, gold)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("There are 3, then 4 of them.", "4"),
        ("#### 18", "18"),
        ("3 + 4 = 7\n####7\n\nQuestion: 99", "7"),
        ("#### $1,234.50 of 2", "1234.50"),
        ("#### Step 1: add\nIt is 42", "42"),
        ("#### none\nbut 5", "5"),
        ("-$1,234.50.", "-1234.50"),
        ("$-5", "-5"),
        ("−4 °C", "-4"),
        ("x=-3", "-3"),
        ("(-7)", "-7"),
        ("**18**", "18"),
        ("7-3", "3"),
        ("(1)-3", "3"),
        ("10 - 4", "4"),
        ("- 5 apples", "5"),
        ("50%", "50"),
        ("$ 5.", "5"),
        ("12,345,678 eggs", "12345678"),
        ("1,2", "2"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("5.10.", "5.10"),
        ("3/4.", "3/4"),
        ("-1/2", "-1/2"),
        ("5/0", "0"),
        (r"\boxed{42}", "42"),
        ("none", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_number_of_an_answer_is_found(said: str, found: str | None):
    assert number(said) == found


@pytest.mark.parametrize(
    ("said", "gold"),
    [("5", "5.0"), ("it is 5.00.", "#### 5"), ("1,000", "1000"), ("10/2", "5"), ("1/2", "0.5"), ("-0", "0")],
)
def test_numbers_are_compared_as_numbers(said: str, gold: str):
    assert same_number(said, gold)
    assert same_number(gold, said)


@pytest.mark.parametrize(
    ("said", "gold"),
    [
        ("5", "-5"),
        ("5.01", "5"),
        ("50%", "0.5"),
        ("1,000", "1"),
        ("none", "5"),
        ("5", "none"),
        ("no", "none"),
    ],
)
def test_other_numbers_are_not_the_same(said: str, gold: str):
    assert not same_number(said, gold)


def test_a_number_without_end_is_an_answer_like_another():
    """A model in a loop writes more digits than Python turns into a number."""
    assert not same_number("9" * 9000, "9")
    assert same_number("9" * 9000, "9" * 9000)


def test_every_gold_number_of_gsm8k_is_read(data: Path):
    answers = [
        json.loads(line)["answer"]
        for line in (data / "benchmarks" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    golds = [answer.split("####")[1].strip().replace(",", "") for answer in answers]
    assert len(golds) == 1319
    assert [number(answer) for answer in answers] == golds
    assert all(same_number(f"So the answer is ${gold}.00.", gold) for gold in golds)
    assert not any(same_number(f"It is {int(gold) + 1}.", gold) for gold in golds)


def test_a_text_is_cut_at_the_earliest_stop():
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one two", ["three"]) == "one two"
    assert cut("one two", []) == "one two"
    assert cut("one two", [""]) == "one two"
    assert cut("one two", ["one"]) == ""


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("x = 1\n", "x = 1\n"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```bash\nls\n```\nthen\n```py\nx = 1\n```\n```python\ny = 2\n```", "x = 1\n"),
        ("```text\nx\n```\n```\ny\n```", "x\n"),
        ("```python\nx = 1\n", "x = 1\n"),
        ("~~~Python\nx = '```'\n~~~", "x = '```'\n"),
        ("1. So:\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("```python\n    return 1\n```", "    return 1\n"),
        ("```python\n```", ""),
        ("use `x` and ```y```", "use `x` and ```y```"),
    ],
)
def test_the_code_of_a_reply_stands_in_its_first_python_fence(said: str, code: str):
    assert code_of(said) == code


PROMPT = 'def f(x):\n    """Add one."""\n'
TEST = "def check(candidate):\n    assert candidate(1) == 2\n"


def passes(program: str) -> bool:
    """Whether a program of this file's own runs to its end."""
    try:
        exec(program, {"__name__": "program"})
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    "completion",
    [
        "    return x + 1",
        "\n    return x + 1\n\n\ndef f(x):\n    return 0\n",
        "    return x + 1\n\nclass A:\n    {",
        "    return x + 1\n\nif __name__ == '__main__':\n    1 / 0",
        "    return x + 1\n\nprint(f(1), 1 / 0)",
        "    return x + 1\n# 1\n1 / 0",
        "    return x + 1\n```\nThis adds one.",
        "    return x + 1\n```\n```python\ndef f(x):\n    return 0\n```",
        "```python\ndef f(x):\n    return x + 1\n```",
        "def f(x):\n    return g(x)\n\ndef g(x):\n    return x + 1\n",
        "Sure!\n\n```python\nimport math\n\ndef f(x: int):\n    return x + 1\n\nprint(f(2))\n```\nDone.",
        "```python\n    return x + 1\n```",
    ],
)
def test_a_right_completion_makes_a_program_that_passes(completion: str):
    assert passes(humaneval_program(PROMPT, completion, TEST, "f"))


@pytest.mark.parametrize(
    "completion", ["", "    return x", "    pass\n", "Sorry.", "```python\ndef f(x):\n    0\n```"]
)
def test_a_wrong_completion_makes_a_program_that_fails(completion: str):
    assert not passes(humaneval_program(PROMPT, completion, TEST, "f"))


@pytest.mark.parametrize("code", ["a = 1", "a = 1\n#", "```python\na = 1\n```", "So:\n```\na = 1\n```\nDone"])
def test_a_program_is_followed_by_all_its_tests(code: str):
    assert passes(mbpp_program(code, ["assert a == 1", "assert a < 2"]))
    assert not passes(mbpp_program(code, ["assert a == 2", "assert a < 2"]))
    assert not passes(mbpp_program(code, ["assert a < 2", "assert a == 2"]))


@pytest.mark.parametrize("code", ["if False: \\", "a = 1; b = (", "x = '''"])
def test_code_cannot_swallow_its_tests(code: str):
    assert not passes(mbpp_program(code, ["assert False"]))


def test_a_program_without_tests_is_refused():
    with pytest.raises(ValueError, match="always pass"):
        mbpp_program("a = 1", [])
