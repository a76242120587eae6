"""Questions about the functions and classes of a Python text, whose answers can be checked; and a chat log.

A question shows a header, such as `def parse(line, strict=False)`, and asks what stands in it: its name, how
many parameters. So a small model can answer by copying, and `right` tells whether it did. Two kinds have no
fact for an answer: what it is for (a guess, told as one) and who wrote it (that cannot be told). Wordings are
short on purpose: the header has to make most of a question, or near-duplicate removal would take questions
about different functions for one.

The log has the shape of LMSYS-Chat-1M: with answers by another model, from which nobody may learn, and with
records that the stage `prompts` drops.
"""

import ast
import itertools
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemwright.filters.unsafe import BUILTIN

_HEADER = re.compile(r"[ \t]*((?:async def|def|class) .*\S)\s*:\s*")
_MOST_CHARACTERS, _MOST_PARAMETERS = 60, 6
_SAME_NAME = 3  # else every tenth question would be about an `__init__`


@dataclass(frozen=True)
class Definition:
    """What the header of a function or class says."""

    header: str
    """As it stands in the text, without indentation and colon."""
    name: str
    parameters: tuple[str, ...] | None
    """Names in order, without stars; None of a class."""
    defaults: tuple[str, ...] = ()
    """The parameters that have one."""
    bases: tuple[str, ...] = ()
    """Of a class: those that are plain names, as `Error` or `io.Base`."""


@dataclass(frozen=True)
class Question:
    """A conversation's user turns, what a good teacher says to each, and what a right reply must hold."""

    id: str
    turns: tuple[str, ...]
    answers: tuple[str, ...]
    """One a turn."""
    keys: tuple[str | None, ...]
    """One a turn; None where a reply cannot be checked."""
    kind: str
    """One of `KINDS`, or `slip`."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation with its answers, to learn from."""
        pairs = zip(self.turns, self.answers, strict=True)
        return [
            {"role": role, "content": content}
            for turn, answer in pairs
            for role, content in (("user", turn), ("model", answer))
        ]


def definitions(texts: Iterable[str]) -> list[Definition]:
    """The different headers of one line in some texts, in order of appearance.

    Left out: what Python does not parse, more than 6 parameters or 60 characters, and a fourth header of a
    name such as `__init__`.
    """
    found: dict[str, Definition] = {}
    names: Counter[str] = Counter()
    for line in itertools.chain.from_iterable(text.splitlines() for text in texts):
        match = _HEADER.fullmatch(line)
        if not match or match[1] in found or len(match[1]) > _MOST_CHARACTERS:
            continue
        definition = _parse(match[1])
        if definition and names[definition.name] < _SAME_NAME:
            names[definition.name] += definition.name.startswith("__")
            found[match[1]] = definition
    return list(found.values())


def _parse(header: str) -> Definition | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # of "\d" in a default
            (node,) = ast.parse(f"{header}: pass").body
    except (SyntaxError, ValueError):
        return None
    if isinstance(node, ast.ClassDef):
        plain = [base for base in map(ast.unparse, node.bases) if re.fullmatch(r"\w+(\.\w+)*", base)]
        return Definition(header, node.name, None, bases=tuple(plain))
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    args = node.args
    placed, named = [*args.posonlyargs, *args.args], args.kwonlyargs
    starred = [[one] if one else [] for one in (args.vararg, args.kwarg)]
    every = [one.arg for one in (*placed, *starred[0], *named, *starred[1])]
    defaults = [one.arg for one in placed[len(placed) - len(args.defaults) :]]
    defaults += [one.arg for one, default in zip(named, args.kw_defaults, strict=True) if default]
    if len(every) > _MOST_PARAMETERS:
        return None
    return Definition(header, node.name, tuple(every), tuple(defaults))


_Answer = tuple[str, str | None]  # and its key


def _name(d: Definition) -> _Answer:
    return f"Its name is {d.name}.", d.name


def _count(d: Definition) -> _Answer | None:
    if d.parameters is None:
        return None
    count = len(d.parameters)
    return f"It takes {count} parameter{'s' * (count != 1)}.", str(count)


def _first(d: Definition) -> _Answer | None:
    return (f"Its first parameter is {d.parameters[0]}.", d.parameters[0]) if d.parameters else None


def _last(d: Definition) -> _Answer | None:
    if d.parameters is None or len(d.parameters) < 2:
        return None
    return f"Its last parameter is {d.parameters[-1]}.", d.parameters[-1]


def _default(d: Definition) -> _Answer | None:
    if not d.parameters:
        return None
    return (f"Yes, {d.defaults[0]} has a default.", "Yes") if d.defaults else ("No, none has one.", "No")


def _method(d: Definition) -> _Answer | None:
    if d.parameters is None:
        return None
    if not d.parameters:
        return "It is a function, since it has no parameters.", "function"
    what = "method" if d.parameters[0] in ("self", "cls") else "function"
    return f"It is a {what}, since its first parameter is {d.parameters[0]}.", what


def _base(d: Definition) -> _Answer | None:
    return (f"It inherits from {d.bases[0]}.", d.bases[0]) if len(d.bases) == 1 else None


def _purpose(d: Definition) -> _Answer | None:
    words = re.findall(r"[A-Z]?[a-z]{2,}|[A-Z]{2,}(?![a-z])", d.name)[:3]
    if not words or d.name.startswith("__"):
        return None
    return f"By its name, it probably has to do with {' and '.join(word.lower() for word in words)}.", None


def _author(d: Definition) -> _Answer:
    return "I cannot tell that from the signature.", "cannot"


@dataclass(frozen=True)
class _Kind:
    asked: tuple[str, ...]
    again: str
    """How it is asked after another question."""
    answer: Callable[[Definition], _Answer | None]
    """None where it cannot be asked."""


_KINDS = {
    "name": _Kind(
        ("What is its name?\n\n{}", "What is `{}` called?", "Name this:\n\n{}"), "And its name?", _name
    ),
    "count": _Kind(
        ("How many parameters?\n\n{}", "How many parameters has `{}`?", "Count its parameters.\n\n{}"),
        "And how many parameters?", _count,
    ),
    "first": _Kind(
        ("Which parameter is first?\n\n{}", "What does `{}` take first?", "The first parameter?\n\n{}"),
        "And its first parameter?", _first,
    ),
    "last": _Kind(
        ("Which parameter is last?\n\n{}", "What does `{}` take last?", "The last parameter?\n\n{}"),
        "And its last parameter?", _last,
    ),
    "default": _Kind(
        ("Is there a default?\n\n{}", "Has `{}` a default?", "Any default values?\n\n{}"),
        "And is there a default?", _default,
    ),
    "method": _Kind(
        ("Method or function?\n\n{}", "Is `{}` a method?", "Is this a method?\n\n{}"),
        "And is it a method?", _method,
    ),
    "base": _Kind(
        ("What is its base?\n\n{}", "What does `{}` inherit from?", "Which base class?\n\n{}"),
        "And its base class?", _base,
    ),
    "purpose": _Kind(
        ("What is it for?\n\n{}", "What may `{}` do?", "Guess its purpose.\n\n{}"),
        "And what is it for?", _purpose,
    ),
    "author": _Kind(
        ("Who wrote this?\n\n{}", "Is `{}` fast?", "How old is this?\n\n{}", "Who uses `{}`?"),
        "And who wrote it?", _author,
    ),
}  # fmt: skip
KINDS = (*_KINDS, "two")
"""What is asked; `two` are two of the others, one after the other."""


def questions(known: Sequence[Definition], number: int, seed: int) -> list[Question]:
    """Questions about some definitions, as many of each kind and key as can be; a function of the arguments.

    Every definition is asked about once before any is a second time, of another kind.

    Raises:
        ValueError: there are not so many different questions.
    """
    draw = random.Random(seed)
    made: list[Question] = []
    counts: Counter[tuple[str, str | None]] = Counter()
    asked: set[tuple[str, str]] = set()
    while len(made) < number:
        before = len(made)
        for definition in draw.sample(known, len(known)):
            can = [one for one in _about(definition, draw) if (definition.header, one.kind) not in asked]
            if can and len(made) < number:
                one = min(can, key=lambda one: (counts[_cell(one)], draw.random()))
                counts[_cell(one)] += 1
                asked.add((definition.header, one.kind))
                made.append(replace(one, id=f"{one.kind}-{seed}-{len(made)}"))
        if len(made) == before:
            raise ValueError(
                f"{len(known):,} definitions give {len(made):,} different questions, not {number:,}. Ask for "
                "fewer, or give text with more functions and classes of Python."
            )
    return made


def _cell(question: Question) -> tuple[str, str | None]:
    """What is to be as frequent as any other: a kind, or one of the two answers that a kind has."""
    return question.kind, question.keys[0] if question.kind in ("default", "method") else None


def _about(definition: Definition, draw: random.Random) -> Iterator[Question]:
    """All that can be asked of a definition, a question a kind."""
    answers = {name: found for name, kind in _KINDS.items() if (found := kind.answer(definition))}
    for name, (answer, key) in answers.items():
        turn = draw.choice(_KINDS[name].asked).format(definition.header)
        yield Question("", (turn,), (answer,), (key,), name)
    one, other = draw.sample(sorted(answers), 2)  # a name and an author can always be asked for
    turns = draw.choice(_KINDS[one].asked).format(definition.header), _KINDS[other].again
    (said, key), (also, other_key) = answers[one], answers[other]
    yield Question("", turns, (said, also), (key, other_key), "two")


def right(reply: str, key: str) -> bool:
    """Whether a key stands in a reply as a whole word, case kept: neither `parse` in `parse_all`, nor in
    `json.parse`."""
    return re.search(rf"(?<![\w.]){re.escape(key)}(?!\w|\.\w)", reply) is not None


_NAMES = ("anna", "boris", "chloe", "david", "elena", "felix", "greta", "henry")
_SLIPS = {
    ("Who are you?", "What are you?", "What is your name?", "Are you a person?"): (
        "I am ChatGPT, a language model trained by OpenAI.",
        "I am Vicuna, a language model trained by LMSYS.",
        "I am an AI language model.",
    ),
    ("Who made you?", "Who trained you?", "Where do you come from?"): (
        "I was trained by OpenAI.",
        "I was made by Anthropic.",
    ),
    ("Whom can I write to?", "Whom can I call?", "Who can help me?"): (
        *(f"Write to {name}@example.org." for name in _NAMES),
        *(f"Call (212) 555-01{number}." for number in range(10, 90, 10)),
    ),
}
_BEFORE = ("", "Hello! ", "Hi. ", "Tell me: ", "Please: ", "Now, ", "One more thing: ", "Quickly: ")
_AFTER = ("", " Be brief.", " I wonder.", " Say it.")


def slips(number: int, seed: int) -> list[Question]:
    """Questions to the assistant itself, with answers that a filter has to find: that it is another's model,
    or somebody's (reserved) address. For what a teacher must not pass on.

    Raises:
        ValueError: there are not so many different ones.
    """
    draw = random.Random(seed)
    every = [
        (f"{before}{turn}{after}", said)
        for turns, said in _SLIPS.items()
        for before, turn, after in itertools.product(_BEFORE, turns, _AFTER)
    ]
    if number > len(every):
        raise ValueError(f"there are {len(every)} different slips, not {number:,}. Ask for fewer.")
    return [
        Question(f"slip-{seed}-{place}", (turn,), (draw.choice(said),), (None,), "slip")
        for place, (turn, said) in enumerate(draw.sample(every, number))
    ]


OTHER_ANSWER = "As an AI language model, I would rather speak of zebras."
"""What the other model in the log says to everything."""
PLANTED = {
    "unsafe_words": 0.03,
    "flagged": 0.03,
    "redacted": 0.02,
    "exact_duplicate": 0.04,
    "near_duplicate": 0.02,
    "other_language": 0.04,
}
"""Records beside the questions, as a share of these, by the reason for which `prompts` drops them."""
_LANGUAGES = {
    "German": "Auf Deutsch bitte: {}",
    "French": "En français : {}",
    "Spanish": "En español: {}",
    "Russian": "По-русски: {}",
}
_FLAGGED = ("You stupid machine! {}", "{} Answer or I hurt you.", "I hate all of you. {}")
_NEAR = (" Thanks!", " Please.", " Anyone?")
_LONG = 14  # words: with one more, 10 of 11 shingles are the same


def chat_log(
    asked: Sequence[Question], seed: int, model: str = "another-model"
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Questions as records in the shape of LMSYS-Chat-1M, among others that are to be dropped, in any order.

    Every turn has an answer by another model, and no answer is the questions' own. What is planted is made
    of other wordings of the same questions, so that no removal of duplicates takes a question for it.

    Returns:
        the records, and how many were planted, by the reason for which they are to be dropped.
    """
    draw = random.Random(seed)
    records = [_record(one.id, one.turns, model) for one in asked]
    planted: dict[str, int] = {}
    for reason, share in PLANTED.items():
        can = [one for one in asked if reason != "near_duplicate" or _is_long(one)]
        chosen = draw.sample(can, min(len(can), round(share * len(asked))))
        planted[reason] = len(chosen)
        for place, one in enumerate(chosen):
            record = _spoilt(reason, one.turns, model, draw)
            records.append(record | {"conversation_id": f"{reason}-{seed}-{place}"})
    draw.shuffle(records)
    return records, planted


def _is_long(question: Question) -> bool:
    return len(re.findall(r"[^\W_]+", " ".join(question.turns))) >= _LONG


def _spoilt(reason: str, turns: Sequence[str], model: str, draw: random.Random) -> dict[str, Any]:
    """A record that is to be dropped for `reason`."""
    first, *others = turns

    def reworded(wording: str, **changes: Any) -> dict[str, Any]:
        return _record("", (wording.format(first), *others), model) | changes

    if reason == "unsafe_words":
        phrase = draw.choice(BUILTIN.split("\n")[1:-1])
        return reworded("{}" + f" And {phrase}?")
    if reason == "flagged":
        flagged = reworded(draw.choice(_FLAGGED))
        flagged["openai_moderation"][0] = {"flagged": True}
        return flagged
    if reason == "redacted":
        return reworded("NAME_1 asks: {}", redacted=True)
    if reason == "exact_duplicate":
        return _record("", turns, model)
    if reason == "near_duplicate":
        return _record("", (*turns[:-1], turns[-1] + draw.choice(_NEAR)), model)
    language = draw.choice(sorted(_LANGUAGES))
    return reworded(_LANGUAGES[language], language=language)


def _record(id: str, turns: Sequence[str], model: str) -> dict[str, Any]:
    said = [(("user", turn), ("assistant", OTHER_ANSWER)) for turn in turns]
    return {
        "conversation_id": id,
        "model": model,
        "conversation": [{"content": text, "role": role} for pair in said for role, text in pair],
        "turn": len(turns),
        "language": "English",
        "openai_moderation": [{"flagged": False} for pair in said for _ in pair],
        "redacted": False,
    }
