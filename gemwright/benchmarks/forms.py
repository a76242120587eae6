"""How a question is put to a model: its wording, the examples before it, and what is scored or written.

The report names the number of examples (Table 13) and not the wording. Ours is that of
lm-evaluation-harness where it has the benchmark, so numbers can be set beside others'. Its Table 11 tells how
much scores hang on such things, over 12 combinations that it does not name; `FORMS` are twelve of ours.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gemwright.benchmarks.questions import Benchmark, Question
from gemwright.config import Config

Pair = tuple[str, str]
"""What is read, and what is scored after it."""


class Form(Config):
    """The wording of a question, and what counts as its answer."""

    question: str = "Question: {}"
    """Stands around the question's text."""
    answer: str = "\nAnswer:"
    """Stands between question and answer."""
    options: Literal["hidden", "shown"] = "hidden"
    """Whether the choices stand under the question, with letters."""
    said: Literal["text", "letter"] = "text"
    """Whether a choice's text or its letter is the answer. A letter needs `options` shown."""
    between: str = "\n\n"
    """Stands between examples."""

    def asked(self, question: Question) -> str:
        """The question up to where its answer begins."""
        text = self.question.format(question.text)
        if self.options == "shown":
            text += "".join(f"\n{_letter(i)}. {choice}" for i, choice in enumerate(question.choices))
        return text + self.answer

    def answers(self, question: Question) -> tuple[str, ...]:
        """The choices as they stand after the question, each with the space before it."""
        count = len(question.choices)
        texts = map(_letter, range(count)) if self.said == "letter" else question.choices
        return tuple(f" {text}" for text in texts)

    def example(self, question: Question) -> str:
        """The question with its answer."""
        if question.choices:
            return self.asked(question) + self.answers(question)[question.right[0]]
        return f"{self.asked(question)} {question.gold}"


_WORDINGS = (("Question: {}", "\nAnswer:"), ("Q: {}", "\nA:"), ("{}", "\nThe answer is"), ("{}", ""))
_ANSWERED = (("hidden", "text"), ("shown", "text"), ("shown", "letter"))
FORMS: tuple[Form, ...] = tuple(
    Form.parse({"question": question, "answer": answer, "options": options, "said": said})
    for question, answer in _WORDINGS
    for options, said in _ANSWERED
)
"""Four wordings; the choices hidden and their text scored, or shown and their text or letter scored."""

CODE_STOPS = ("\ndef ", "\nclass ", "\nif ", "\nprint(", "\n#", "\n@", "\nassert ", "\n```", "\nfrom ")
"""Where a base model goes on after a function's end."""
_PROGRAM = Form(
    question="You are an expert Python programmer, and here is your task: {}", answer="\n[BEGIN]\n",
    between="\n\n",
)  # fmt: skip
_FORMS: dict[str, Form] = {
    "openbookqa": Form(question="{}", answer=""),
    "boolq": Form(question="Question: {}"),
    "truthfulqa": Form(question="Q: {}", answer="\nA:"),
}


def form_of(benchmark: Benchmark) -> Form:
    """The usual wording of a benchmark."""
    return _FORMS.get(benchmark.name, _PROGRAM if benchmark.kind == "program" else Form())


@dataclass(frozen=True)
class Asked:
    """A question ready for a model."""

    pairs: tuple[Pair, ...] = ()
    """One a choice, where likelihood decides."""
    prompt: str = ""
    """What is continued, where an answer is written."""
    stops: tuple[str, ...] = ()
    """Where a written answer ends."""


def ask(
    benchmark: Benchmark, number: int, form: Form, shots: int, examples: Sequence[Question], seed: int = 0
) -> Asked:
    """Put question `number`.

    Args:
        examples: what the examples are drawn from. Where it is the benchmark itself, never the question.
        seed: draws the examples, another set for each question.
    Raises:
        ValueError: too few examples for so many shots.
    """
    question, kind = benchmark.questions[number], benchmark.kind
    if kind == "pair":
        return Asked(pairs=tuple(("", choice) for choice in question.choices))
    shown = _examples(question, number, shots, examples, seed)
    if kind == "blank":
        before = "".join(f"{_filled(one)}{form.between}" for one in shown)
        start, _, rest = question.text.partition("_")
        return Asked(pairs=tuple((f"{before}{_capital(start, choice)}", rest) for choice in question.choices))
    if kind == "function":
        return Asked(prompt=question.text, stops=CODE_STOPS)
    if kind == "program":
        before = "".join(f"{_program(form, one)}{one.gold}\n[DONE]{form.between}" for one in shown)
        return Asked(prompt=before + _program(form, question), stops=("[DONE]", *CODE_STOPS[-2:-1]))
    before = "".join(f"{form.example(one)}{form.between}" for one in shown)
    asked = before + form.asked(question)
    if kind in ("number", "words"):
        head = form.question.partition("{}")[0].strip()
        return Asked(prompt=asked, stops=(form.between, *([f"\n{head}"] if head else [])))
    return Asked(pairs=tuple((asked, answer) for answer in form.answers(question)))


def _examples(
    question: Question, number: int, shots: int, examples: Sequence[Question], seed: int
) -> list[Question]:
    if not shots:
        return []
    draw = random.Random(f"{seed} {number}")
    places = draw.sample(range(len(examples)), min(len(examples), shots + 1))
    shown = [examples[place] for place in places if examples[place] != question][:shots]
    if len(shown) < shots:
        raise ValueError(
            f"{shots} examples are asked for, and there are {len(examples):,} questions to draw them from. "
            "Ask for fewer shots, or name a larger file of examples."
        )
    return shown


def _letter(place: int) -> str:
    return chr(ord("A") + place)


def _capital(start: str, choice: str) -> str:
    return start + (choice if start.strip() else choice[0].upper() + choice[1:])


def _filled(question: Question) -> str:
    start, _, rest = question.text.partition("_")
    return _capital(start, question.choices[question.right[0]]) + rest


def _program(form: Form, question: Question) -> str:
    tests = "\n".join(question.tests)
    return f"{form.question.format(question.text)} Your code should pass these tests:\n\n{tests}{form.answer}"
