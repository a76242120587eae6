"""Multiple choice, and three small benchmarks made from any held-out text, code or prose.

The report's ablations give the average of three benchmarks and do not name them (section 5, Table 6). These
three are ours, for models too small for published ones; choices are compared by likelihood after the context.

- `continuation`: which passage comes next? The others come from three other documents.
- `same_document`: the same, the others from elsewhere in the document, so that its topic gives nothing away.
- `word`: which word comes next? It stands in the context; the others are about as long and as frequent.

Guessing gets a quarter right: the answer stands in each place equally often, choices are of similar length,
and none begins with another, for the shorter of two such would always be the likelier.
"""

import json
import math
import random
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from pydantic import Field, StrictInt, StrictStr, model_validator

from gemwright.config import Config
from gemwright.run import write_text

CHOICES = 4
LEAST_ITEMS = 20
"""With fewer, the standard error is above ten points, and a task tells nothing."""

_ENOUGH = 4_000_000  # characters: more text than this makes no better items, so a sample of documents is used
_CONTEXT = 200  # characters before a choice, less what is cut so that it begins with a whole line or word
_SHORT, _LONG = 60, 100  # characters in a passage
_NEAR = 10  # characters by which passages may differ from the true one in length
_APART = 300  # characters between passages of an item that come from the same document

_LINE_END = re.compile(r"\n(?=[^\n])")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])(?=\s)|\n(?=[^\n])")
_WORD = re.compile(r"(?<!\w)[^\W\d]\w{3,23}(?!\w)")

_Draft = tuple[str, list[str]]  # a context; the true choice, then the others


class Item(Config):
    """A context, what might follow it, and the place of what does."""

    context: StrictStr
    choices: tuple[StrictStr, ...]
    answer: StrictInt

    @model_validator(mode="after")
    def _check(self) -> "Item":
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices) or not all(self.choices):
            raise ValueError(f"choices must be two or more, distinct and not empty, not {self.choices}")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer={self.answer} is no place among {len(self.choices)} choices")
        return self


class Task(Config):
    """Items under a name; on disk `<name>.jsonl`, an item a line."""

    name: StrictStr = Field(pattern=r"^\w[\w.-]*$")
    items: tuple[Item, ...] = Field(min_length=1)

    def save(self, folder: Path) -> Path:
        """Write `<name>.jsonl` into a folder and return its path."""
        path = folder / f"{self.name}.jsonl"
        write_text(
            path, "".join(json.dumps(item.to_dict(), ensure_ascii=False) + "\n" for item in self.items)
        )
        return path

    @classmethod
    def load(cls, path: Path) -> "Task":
        """Read what `save` wrote, or what someone wrote like it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a line is no item, or the last one is cut short.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no task at {path}. Write one with `Task.save`, or name another file.")
        *lines, rest = path.read_text(encoding="utf-8").split("\n")  # not splitlines: text may hold U+2028
        if rest:
            raise ValueError(f"{path} does not end with a line's end: it was cut short. Copy it again.")
        items: list[Item] = []
        for number, line in enumerate(lines, start=1):
            try:
                items.append(Item.parse(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error}. Correct the line or drop it.") from None
        return cls.parse({"name": path.stem, "items": items})


def build_tasks(texts: Sequence[str], items: int = 300, seed: int = 0) -> tuple[Task, ...]:
    """Make the three tasks from the texts of held-out documents, the same for the same seed.

    Args:
        items: in each task; fewer where the text has no more.
    Raises:
        ValueError: a task would have fewer than `LEAST_ITEMS` (or than `items`, where that is less).
    """
    if items < 1:
        raise ValueError(f"items={items}: a task has one or more. Ask for some hundreds.")
    sample, size = list[str](), 0
    for text in random.Random(seed).sample(texts, len(texts)):
        sample.append(text)
        if (size := size + len(text)) >= _ENOUGH and len(sample) >= CHOICES:
            break
    drafts: dict[str, Callable[[Sequence[str], random.Random], Iterator[_Draft]]] = {
        "continuation": partial(_passage_drafts, same_document=False),
        "same_document": partial(_passage_drafts, same_document=True),
        "word": _word_drafts,
    }
    draws = {name: random.Random(f"{seed} {name}") for name in drafts}
    return tuple(
        _task(name, sample, drafts[name](sample, draws[name]), items, draws[name]) for name in drafts
    )


def _task(name: str, texts: Sequence[str], drafts: Iterator[_Draft], items: int, draw: random.Random) -> Task:
    drafted: dict[str, list[str]] = {}
    for context, choices in drafts:
        drafted.setdefault(context, choices)  # documents share boilerplate, and an item is asked once
        if len(drafted) == items:
            break
    if len(drafted) < (least := min(items, LEAST_ITEMS)) or not drafted:
        raise ValueError(
            f"{name}: {len(texts)} documents of {sum(map(len, texts)):,} characters give {len(drafted)} "
            f"items, and {least} are the least. Hold out more text, in {CHOICES} documents or more."
        )
    answers = [number % CHOICES for number in range(len(drafted))]
    draw.shuffle(answers)
    made: list[Item] = []
    for (context, (truth, *others)), answer in zip(drafted.items(), answers, strict=True):
        draw.shuffle(others)
        choices = (*others[:answer], truth, *others[answer:])
        made.append(Item(context=context, choices=choices, answer=answer))
    return Task(name=name, items=tuple(made))


@dataclass(frozen=True)
class _Passage:
    document: int
    start: int
    text: str

    @property
    def indent(self) -> int:
        return len(self.text) - len(self.text.lstrip())


def _passage_drafts(texts: Sequence[str], draw: random.Random, same_document: bool) -> Iterator[_Draft]:
    documents = [_passages(number, text) for number, text in enumerate(texts)]
    truths = list(chain.from_iterable(documents))
    draw.shuffle(truths)
    filled = [number for number, passages in enumerate(documents) if passages]

    def pool(truth: _Passage) -> list[_Passage]:
        """Candidates, those of the same indentation first: else it would give the answer away in code."""
        numbers = [truth.document] if same_document else draw.sample(filled, min(30, len(filled)))
        most = 600 // len(numbers)
        some = [p for n in numbers for p in draw.sample(documents[n], min(most, len(documents[n])))]
        draw.shuffle(some)
        return sorted(some, key=lambda passage: passage.indent != truth.indent)

    def apart(a: _Passage, b: _Passage) -> bool:
        return abs(a.start - b.start) >= _APART if same_document else a.document != b.document

    for truth in truths:
        chosen = [truth]
        for other in pool(truth):
            if abs(len(other.text) - len(truth.text)) <= _NEAR and all(
                apart(other, one) and _differ(other.text, one.text) for one in chosen
            ):
                chosen.append(other)
            if len(chosen) == CHOICES:
                yield _context(texts[truth.document], truth.start), [passage.text for passage in chosen]
                break


def _passages(document: int, text: str) -> list[_Passage]:
    """Runs of whole lines that have a context before them.

    Where lines are as long as paragraphs: of whole sentences, and a long one is cut after a word.
    """
    lines = len(text) <= _LONG * (text.count("\n") + 1)
    breaks = [found.end() for found in (_LINE_END if lines else _SENTENCE_END).finditer(text)]
    breaks.append(len(text) + _SHORT)  # so that every start has a break after it
    passages: list[_Passage] = []
    for start in breaks[bisect_left(breaks, _CONTEXT) : -1]:
        stop = breaks[bisect_left(breaks, start + _SHORT)]
        passage = text[start:stop].rstrip()
        if len(passage) > _LONG and not lines:
            passage = re.sub(r"\s+\S*$", "", passage[:_LONG])
        visible = [character for character in passage if not character.isspace()]
        if _SHORT <= len(passage) <= _LONG and sum(map(str.isalpha, visible)) > len(visible) / 2:
            passages.append(_Passage(document, start, passage))
    return passages


def _word_drafts(texts: Sequence[str], draw: random.Random) -> Iterator[_Draft]:
    found = [
        [match for match in _WORD.finditer(text) if sum(map(str.isalpha, match[0])) > 3] for text in texts
    ]
    count = Counter(match[0] for matches in found for match in matches)
    vocabularies = [sorted({match[0] for match in matches}) for matches in found]
    places: list[tuple[int, str, list[int]]] = []
    for document, matches in enumerate(found):
        where: dict[str, list[int]] = defaultdict(list)
        last: dict[str, int] = {}
        for match in matches:
            word, start = match[0], match.start()
            # Within half a context, for the other half may be cut.
            if start > _CONTEXT and start - last.get(word, -_CONTEXT) <= _CONTEXT // 2:
                where[word].append(start)
            last[word] = start
        places += [(document, word, starts) for word, starts in where.items()]
    draw.shuffle(places)  # by distinct word and document, or `self` and `that` would be most of the answers
    everywhere = sorted(count)

    def pool(document: int, word: str) -> Iterator[str]:
        for vocabulary in (vocabularies[document], everywhere):
            alike = [other for other in vocabulary if abs(len(other) - len(word)) <= 2]
            draw.shuffle(alike)
            yield from sorted(alike, key=lambda other: abs(math.log(count[other] / count[word])))

    for document, word, starts in places:
        chosen = [word]
        for other in pool(document, word):
            if all(_differ(other, one) for one in chosen):
                chosen.append(other)
            if len(chosen) == CHOICES:
                text, start = texts[document], draw.choice(starts)
                # A tokenizer joins a lone space with the word after it, so the space belongs to the choice.
                space = " " if re.search(r"\S $", text[start - 2 : start]) else ""
                yield _context(text, start - len(space)), [space + one for one in chosen]
                break


def _context(text: str, stop: int) -> str:
    """What comes before `stop`, from the beginning of a line or a word; at least half of `_CONTEXT`."""
    start = max(0, stop - _CONTEXT)
    if start:
        for mark in (r"\n", r"\s"):
            if cut := re.compile(mark).search(text, start, stop - _CONTEXT // 2):
                return text[cut.end() : stop]
    return text[start:stop]


def _differ(a: str, b: str) -> bool:
    a, b = a.strip(), b.strip()
    return not a.startswith(b) and not b.startswith(a)
