"""What becomes of a teacher's answers: filters, tags, and the conversations to learn from.

The report (section 5) removes from synthetic data what shows certain personal information, unsafe or toxic
answers, mistaken self-identification, and duplicates. The user's turns were filtered before, by
`gemwright prompts`; here what the teacher said is looked at. The machinery is that of `gemwright curate`.
"""

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
from datatrove.data import Document
from pydantic import NonNegativeFloat

from gemwright.config import Config
from gemwright.curate import pipeline, steps
from gemwright.curate.pipeline import Checks, FilterConfig
from gemwright.data.curated import read_rows
from gemwright.filters.tags import TAGS, tags_of
from gemwright.filters.unsafe import Unsafe, self_identification
from gemwright.run import atomic

_ROLES = ("user", "model")  # in their order


class TagWeights(Config):
    """What a conversation with a tag counts in training. One with several has the product, one without 1."""

    hedging: NonNegativeFloat = 1.0
    """It says that it is not sure."""
    refusal: NonNegativeFloat = 1.0
    """It does not answer, and says so."""
    attribution: NonNegativeFloat = 1.0
    """It names or quotes the user's text."""


@dataclass(frozen=True)
class Part:
    """Some lines of the file of answered conversations: what a task reads."""

    path: Path
    places: tuple[int, ...]
    """Where each begins, in bytes, in the order in which they are wanted."""


def conversations(part: Part, truncated: bool) -> Iterator[Document]:
    """The conversations of a part, each a document with its tags; what did not end well with its reason.

    The reasons are `empty`, `truncated` (unless `truncated` keeps those), and the other words of `Finish`.
    """
    with open(part.path, "rb") as file:
        for place in part.places:
            file.seek(place)
            row = json.loads(file.readline())
            contents = [message["content"] for message in row["messages"]]
            source, number = row["source"], row["sample"]
            about = {"source": source, "file": source, "prompt": row["id"], "sample": number}
            about["tags"] = _tags(contents)
            if (reason := _reason(row["finish"], contents, truncated)) is not None:
                about |= {steps.REASON: reason} | ({"detail": row["detail"]} if row["detail"] else {})
            yield Document(steps.joined(contents), f"{row['id']}/{number}", metadata=about)


def checks(config: FilterConfig, self_named: bool) -> Checks:
    """The filters: of what the model said, and for personal information of the whole conversation.

    Args:
        self_named: whether to drop a conversation in which the teacher says what it is.
    """
    if config.unsafe is not None:
        yield "unsafe", functools.partial(_check_model, judge=Unsafe(config.unsafe).check)
    if self_named:
        yield "self_identification", functools.partial(_check_model, judge=self_identification)
    if config.personal is not None:
        yield "personal", pipeline.personal(config)


def write_answers(kept: Path, path: Path, weights: TagWeights) -> None:
    """Write what the tasks left in the folder `kept` into one file, a conversation a line, in their order."""
    with atomic(path) as partial, open(partial, "wb") as file:
        for left in sorted(kept.glob("*.zst")):
            for row in read_rows(left):
                about = row["metadata"]
                messages = [
                    {"role": _ROLES[number % 2], "content": content}
                    for number, content in enumerate(row["text"].split(steps.TURN))
                ]
                weight = 1.0
                for tag in about["tags"]:
                    weight *= getattr(weights, tag)
                record = {"id": about["prompt"], "messages": messages, "sample": about["sample"]}
                record |= {"tags": about["tags"], "weight": weight, "source": about["source"]}
                file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


def _reason(finish: str, contents: list[str], truncated: bool) -> str | None:
    if finish not in ("stop", "length"):
        return finish
    if not all(content.strip() for content in contents[1::2]):
        return "empty"
    return "truncated" if finish == "length" and not truncated else None


def _tags(contents: list[str]) -> list[str]:
    """Of all answers, each seen with what the user had said before it; every tag once, in their order."""
    found: set[str] = set()
    for place in range(1, len(contents), 2):
        found |= set(tags_of(contents[place], "\n".join(contents[0:place:2])))
    return sorted(found, key=TAGS.index)


def _check_model(document: Document, judge: Callable[[str], str | None]) -> str | None:
    """What a judge of texts says of the model's turns."""
    return judge("\n\n".join(document.text.split(steps.TURN)[1::2]))
