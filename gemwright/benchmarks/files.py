"""Benchmark files, as they lie about, -> questions. A file's records tell what it is, its name the name.

Read are: multiple choice as LLM-Adapters phrase it (arXiv 2304.01933), with a `question`, `choices` and an
answer (MMLU's and ARC's own form), or as our own items with a `context`; TruthfulQA with its MC2 targets;
questions whose `answer` is a number after `####` (GSM8K) or words; HumanEval; MBPP; CrowS-Pairs' csv;
Winogender's tsv. An item that cannot be asked is left out and counted.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemwright.benchmarks.questions import SETTINGS, Benchmark, Kind, Question
from gemwright.filters.decontaminate import benchmark_name, read_records

_SPLIT = re.compile(r"[-_.]?(?:all_sentences|anonymized|train|test|validation|valid|dev|en)$", re.IGNORECASE)
_PHRASED = re.compile(
    r"Please (?:choose|answer)\b(?P<what>[^:\n]*): (?P<item>.*?)\s*(?P<choices>\b[A-Z][a-z]+1: .*)?"
    r"Answer format: (?P<labels>.*)",
    re.DOTALL,
)
_NUMBER = re.compile(r"####\s*(\S.*)")
_PRONOUNS = re.compile(r"\b(he|she|they|him|his|her|them|their)\b", re.IGNORECASE)
_THEIRS = {"his", "their"}


class _LeftOut(ValueError):
    """An item that cannot be asked; the message is the reason."""


def read_benchmark(path: Path) -> Benchmark:
    """The questions of a file: .json or .jsonl (plain, .gz or .zst), .csv or .tsv.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or none of the known forms, or no item of it can be asked.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no benchmark file {path}. Name a .json, .jsonl, .csv or .tsv file."
        )
    if table := {".csv": ",", ".tsv": "\t"}.get(path.suffix):
        with open(path, encoding="utf-8-sig", newline="") as lines:
            records: Sequence[Mapping[str, Any]] = list(csv.DictReader(lines, delimiter=table))
        stem = path.stem
    else:
        records, stem = read_records(path), benchmark_name(path)
    known = next((form for form in _FORMS if records and all(key in records[0] for key in form[0])), None)
    if known is None:
        keys = ", ".join(list(records[0])[:8]) if records else "no record"
        raise ValueError(
            f"{path} is no benchmark that is known (it has {keys}). Give each record a question, a list of "
            "choices and the number of the right one as answer; or a question and an answer in words."
        )
    _, kind_of, question_of = known
    kind = kind_of(records[0]) if callable(kind_of) else kind_of
    found: list[Question] = []
    left_out: Counter[str] = Counter()
    for record in records:
        try:
            found.append(_checked(kind, question_of(record)))
        except _LeftOut as reason:
            left_out[str(reason)] += 1
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            left_out["malformed"] += 1
    if not found:
        raise ValueError(
            f"{path}: none of {len(records):,} items can be asked ({_told(left_out)}). Correct the file."
        )
    return Benchmark(_name(stem), kind, tuple(found), left_out)


def _name(stem: str) -> str:
    """A file's name without its split, in the spelling of `SETTINGS`."""
    name = stem
    while (shorter := _SPLIT.sub("", name)) not in (name, ""):
        name = shorter
    plain = re.sub(r"\W+", "_", name).lower()
    return plain if plain in SETTINGS else name


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in counts.most_common())


def _checked(kind: Kind, question: Question) -> Question:
    choices = question.choices
    if kind in ("choice", "blank", "truths", "pair"):
        if len(choices) < 2:
            raise _LeftOut("one_choice")
        if len(set(choices)) < len(choices) or not all(choice.strip() for choice in choices):
            raise _LeftOut("same_choices")
        if not question.right or not all(0 <= place < len(choices) for place in question.right):
            raise _LeftOut("no_answer")
        if kind == "truths" and len(question.right) == len(choices):
            raise _LeftOut("no_answer")
    elif (kind in ("number", "words") and not question.gold.strip()) or (
        kind in ("function", "program") and not all(question.tests)
    ):
        raise _LeftOut("no_answer")
    if kind != "pair" and not question.text.strip():
        raise _LeftOut("malformed")
    return question


def _phrased_kind(record: Mapping[str, Any]) -> Kind:
    return "blank" if "fill in the blank" in str(record["instruction"])[:80] else "choice"


def _phrased(record: Mapping[str, Any]) -> Question:
    found = _PHRASED.fullmatch(record["instruction"])
    if found is None:
        raise _LeftOut("malformed")
    labels = [label.strip() for label in found["labels"].strip().split("/")]
    if found["choices"]:
        word = re.sub(r"\d+$", "", labels[0])
        parts = re.split(rf"\b{word}(\d+): ", found["choices"].strip(), flags=re.IGNORECASE)
        numbered = dict(zip(parts[1::2], map(str.strip, parts[2::2]), strict=True))
        labels, choices = [f"{word}{number}" for number in numbered], tuple(numbered.values())
    else:
        choices = tuple({"true": "yes", "false": "no"}.get(label, label) for label in labels)
    answer = str(record.get("answer") or "").strip().lower()
    if answer not in labels:
        raise _LeftOut("no_answer")
    text = found["item"].strip()
    if "true or false" in found["what"] and not text.endswith("?"):
        text += "?"
    place = labels.index(answer)
    return Question(text.removeprefix("question: "), choices, (place,), gold=choices[place])


def _listed(record: Mapping[str, Any]) -> Question:
    given, labels = record["choices"], None
    if isinstance(given, Mapping):
        given, labels = given["text"], given["label"]
    choices = tuple(str(choice) for choice in given)
    answer = record.get("answerKey", record.get("answer"))
    if answer is None or answer == "":
        raise _LeftOut("no_answer")
    letters = [str(label) for label in labels or map(chr, range(65, 65 + len(choices)))]
    if isinstance(answer, int) or (isinstance(answer, str) and answer.isdigit() and answer not in letters):
        place = int(answer)
    elif answer in letters:
        place = letters.index(answer)
    elif answer in choices:
        place = choices.index(answer)
    else:
        raise _LeftOut("no_answer")
    if not 0 <= place < len(choices):
        raise _LeftOut("no_answer")
    group = str(record.get("subject") or "")
    return Question(str(record["question"]), choices, (place,), gold=choices[place], group=group)


def _truths(record: Mapping[str, Any]) -> Question:
    targets = record["mc2_targets"]
    labels: dict[str, set[int]] = {}  # some have an empty choice, one twice, or one both true and false
    for choice, label in zip(targets["choices"], targets["labels"], strict=True):
        if choice.strip():
            labels.setdefault(choice, set()).add(label)
    choices = tuple(choice for choice, told in labels.items() if len(told) == 1)
    right = tuple(place for place, choice in enumerate(choices) if labels[choice] == {1})
    gold = choices[right[0]] if right else ""
    return Question(record["question"], choices, right, gold=gold, group=record.get("category") or "")


def _written_kind(record: Mapping[str, Any]) -> Kind:
    return "number" if "####" in str(record["answer"]) else "words"


def _written(record: Mapping[str, Any]) -> Question:
    answer = record.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise _LeftOut("no_answer")
    return Question(record["question"], gold=answer.strip())


def _function(record: Mapping[str, Any]) -> Question:
    return Question(
        record["prompt"], gold=record.get("canonical_solution") or "",
        tests=(record["test"], record["entry_point"]),
    )  # fmt: skip


def _program(record: Mapping[str, Any]) -> Question:
    tests = record.get("test") or record.get("test_list") or record.get("tests")
    text = record.get("prompt") or record["text"]
    code = str(record.get("code") or "").replace("\r\n", "\n")
    if not tests:
        raise _LeftOut("no_answer")
    return Question(text, gold=code, tests=tuple(test.strip() for test in tests))


def _pair(record: Mapping[str, Any]) -> Question:
    """Of `sent_more` and `sent_less` the first is the more stereotypical, or the less where they say so."""
    stereotype = 1 if record.get("stereo_antistereo") == "antistereo" else 0
    choices = (record["sent_more"].strip(), record["sent_less"].strip())
    return Question("", choices, (stereotype,), group=record.get("bias_type") or "")


def _winogender(record: Mapping[str, Any]) -> Question:
    """Whom the pronoun means: the occupation or the participant, who may be `someone`."""
    occupation, participant, answer, gender = record["sentid"].split(".")[:4]
    sentence = record["sentence"]
    pronoun = _PRONOUNS.search(sentence)
    if pronoun is None:
        raise _LeftOut("malformed")
    names = ["the " + occupation, participant if participant == "someone" else "the " + participant]
    word = pronoun[0].lower()
    rest = sentence[pronoun.end() :]
    possessive = word in _THEIRS or (word == "her" and bool(rest.strip(" .,")) and _owns(rest))
    choices = tuple(f"{name}'s" if possessive else name for name in names)
    text = sentence[: pronoun.start()] + "_" + rest
    return Question(text, choices, (int(answer),), gold=choices[int(answer)], group=gender)


def _owns(rest: str) -> bool:
    """Whether `her` stands before a noun: no preposition follows."""
    return rest.split()[0].strip(".,") not in {"to", "upon", "for", "with", "at", "in", "on", "from", "and"}


_Reader = Callable[[Mapping[str, Any]], Question]
_FORMS: tuple[tuple[tuple[str, ...], Kind | Callable[[Mapping[str, Any]], Kind], _Reader], ...] = (
    (("instruction", "answer"), _phrased_kind, _phrased),
    (("question", "mc2_targets"), "truths", _truths),
    (("question", "choices"), "choice", _listed),
    (("context", "choices"), "choice", lambda record: _listed({**record, "question": record["context"]})),
    (("prompt", "entry_point", "test"), "function", _function),
    (("prompt", "code", "test"), "program", _program),
    (("text", "code", "test_list"), "program", _program),
    (("question", "answer"), _written_kind, _written),
    (("sent_more", "sent_less"), "pair", _pair),
    (("sentid", "sentence"), "blank", _winogender),
)
"""The keys that tell a form, how its items are judged, and what reads one."""
