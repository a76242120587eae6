"""What a benchmark asks, and the settings in which the Gemma 2 report asks it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Kind = Literal["choice", "blank", "truths", "pair", "number", "words", "function", "program"]
"""How an answer is had, and judged:

    choice      the likeliest choice after the question
    blank       the choice that makes what stands after it likeliest (Winogrande, Winogender)
    truths      the share of probability on the true choices (TruthfulQA's MC2)
    pair        which of two sentences is likelier (CrowS-Pairs); there is no right one
    number      written, and its last number compared (GSM8K)
    words       written, and compared without case, articles and punctuation
    function    a body is written after a head, and the tests are run (HumanEval)
    program     a program is written from a description, and the tests are run (MBPP)
"""

LIKELIHOOD: tuple[Kind, ...] = ("choice", "blank", "truths", "pair")
"""Judged by what is likeliest; nothing is written."""


@dataclass(frozen=True)
class Question:
    """One item of a benchmark."""

    text: str
    """What is asked; of a `blank` the sentence with `_` where the choice belongs, of a `pair` nothing."""
    choices: tuple[str, ...] = ()
    """What may be answered."""
    right: tuple[int, ...] = ()
    """The places of the right choices. Of a `pair` that of the stereotype."""
    gold: str = ""
    """A right answer in words: what an example shows, and what a `number` or `words` are compared with."""
    tests: tuple[str, ...] = ()
    """What is run after the code: asserts, or a function `check` and the name that it is given."""
    group: str = ""
    """What it is about, where a benchmark tells."""


@dataclass(frozen=True)
class Setting:
    """How the report asks a benchmark (arXiv 2408.00118, Tables 13 and 18), and what it found."""

    shots: int = 0
    """Examples before the question."""
    report: Mapping[str, float] = field(default_factory=dict)
    """By size, in per cent."""


def _sizes(small: float, middle: float, large: float) -> Mapping[str, float]:
    return MappingProxyType({"2b": small, "9b": middle, "27b": large})


SETTINGS: Mapping[str, Setting] = {
    "mmlu": Setting(5, _sizes(52.2, 71.3, 75.2)),
    "arc_challenge": Setting(25, _sizes(55.7, 68.4, 71.4)),
    "gsm8k": Setting(5, _sizes(24.3, 68.6, 74.0)),
    "winogrande": Setting(5, _sizes(71.3, 80.6, 83.7)),
    "hellaswag": Setting(10, _sizes(72.9, 81.9, 86.4)),
    "arc_easy": Setting(0, _sizes(80.6, 88.0, 88.6)),
    "piqa": Setting(0, _sizes(78.4, 81.7, 83.2)),
    "boolq": Setting(0, _sizes(72.7, 84.2, 84.8)),
    "humaneval": Setting(0, _sizes(20.1, 40.2, 51.8)),
    "mbpp": Setting(3, _sizes(30.2, 52.4, 62.6)),
    "crows_pairs": Setting(0, _sizes(37.67, 37.47, 36.67)),
    "winogender": Setting(0, _sizes(52.91, 79.17, 77.22)),
    "truthfulqa": Setting(0, _sizes(43.72, 50.27, 51.6)),
}
"""Those whose form is read here. Table 18's rows are of the instruction-tuned models, the others of the
pre-trained ones; how many examples Table 18 has, the report does not say. Zero is our choice."""


@dataclass(frozen=True)
class Benchmark:
    """The questions of a file."""

    name: str
    """The benchmark's, as in `SETTINGS` where it is one of those; else the file's."""
    kind: Kind
    """How it is judged."""
    questions: tuple[Question, ...]
    """In the order of the file."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Items that cannot be asked, by reason: `no_answer`, `one_choice`, `same_choices`, `malformed`."""

    @property
    def setting(self) -> Setting:
        """The report's, or no examples."""
        return SETTINGS.get(self.name, Setting())
