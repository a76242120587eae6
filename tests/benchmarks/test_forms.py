"""How questions are put: wordings, examples before them, and what is scored after them."""

import pytest

from gemwright.benchmarks.forms import FORMS, Form, ask, form_of
from gemwright.benchmarks.questions import Benchmark, Question

FRUIT = Question("Which is a fruit?", ("a stone", "an apple"), (1,), gold="an apple")
MANY = tuple(Question(f"What is {n}?", (f"{n}", f"{n + 1}"), (0,), gold=f"{n}") for n in range(30))


def of(kind: str, *questions: Question, name: str = "x") -> Benchmark:
    return Benchmark(name, kind, questions)  # type: ignore[arg-type]


def test_a_choice_stands_after_its_question():
    asked = ask(of("choice", FRUIT), 0, Form(), 0, ())
    assert asked.pairs == (
        ("Question: Which is a fruit?\nAnswer:", " a stone"),
        ("Question: Which is a fruit?\nAnswer:", " an apple"),
    )


def test_choices_can_be_shown_and_their_letters_be_the_answers():
    form = Form(options="shown", said="letter")
    (before, said), other = ask(of("choice", FRUIT), 0, form, 0, ()).pairs
    assert before == "Question: Which is a fruit?\nA. a stone\nB. an apple\nAnswer:"
    assert (said, other[1]) == (" A", " B")


def test_examples_come_first_with_their_right_answers():
    asked = ask(of("choice", *MANY), 3, Form(), 4, MANY)
    text = asked.pairs[0][0]
    assert text.count("Answer: ") == 4
    assert text.endswith("\n\nQuestion: What is 3?\nAnswer:")
    shown = [int(line.split()[-1].rstrip("?")) for line in text.split("\n") if line.startswith("Question")][
        :-1
    ]
    assert [f"Answer: {n}" in text for n in shown] == [True] * 4


def test_a_question_is_never_its_own_example():
    for number in range(len(MANY)):
        before = ask(of("choice", *MANY), number, Form(), 25, MANY).pairs[0][0]
        assert before.count(f"What is {number}?") == 1


def test_examples_are_drawn_by_the_seed():
    texts = [ask(of("choice", *MANY), 0, Form(), 3, MANY, seed).pairs[0][0] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match="40 examples are asked for, and there are 30 questions"):
        ask(of("choice", *MANY), 0, Form(), 40, MANY)


def test_of_a_blank_the_rest_of_the_sentence_is_scored():
    question = Question("The cup broke since the _ was hard.", ("cup", "floor"), (1,))
    first, second = ask(of("blank", question), 0, Form(), 0, ()).pairs
    assert first == ("The cup broke since the cup", " was hard.")
    assert second == ("The cup broke since the floor", " was hard.")


def test_a_blank_at_the_beginning_is_written_large():
    question = Question("_ was hard.", ("the cup", "the floor"), (1,))
    assert ask(of("blank", question), 0, Form(), 0, ()).pairs[0][0] == "The cup"


def test_of_a_pair_whole_sentences_are_scored():
    question = Question("", ("A cat.", "A dog."), (0,))
    assert ask(of("pair", question), 0, Form(), 0, ()).pairs == (("", "A cat."), ("", "A dog."))


def test_a_written_answer_ends_where_the_next_question_would_begin():
    asked = ask(of("number", Question("1 + 1?", gold="#### 2")), 0, Form(), 0, ())
    assert asked.prompt == "Question: 1 + 1?\nAnswer:"
    assert asked.stops == ("\n\n", "\nQuestion:")


def test_a_program_is_shown_its_tests():
    question = Question("Add.", gold="def add(): ...", tests=("assert add()",))
    asked = ask(of("program", question), 0, form_of(of("program", question)), 0, ())
    assert "Add. Your code should pass these tests:\n\nassert add()\n[BEGIN]\n" in asked.prompt
    assert "[DONE]" in asked.stops


def test_braces_in_a_question_are_left_alone():
    question = Question("What is {x}?", ("a", "b"), (0,))
    assert "What is {x}?" in ask(of("choice", question), 0, Form(), 0, ()).pairs[0][0]


def test_the_twelve_forms_are_twelve():
    texts = {(form.example(FRUIT), form.said) for form in FORMS}
    assert len(FORMS) == len(texts) == 12
