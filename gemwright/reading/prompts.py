"""Prompts to be answered: what `gemwright prompts` kept, or a file of one's own.

A prompt is the turns of a user, to be answered one after the other. Records may be of any form that
`reading.chats` knows; answers in them are counted and never read: nobody is to learn from them by accident.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemwright.reading.chats import OTHER_ROLES, NotAChat, prompts_of

PROMPTS = "prompts.jsonl"
"""The file in a folder of `gemwright prompts`."""

System = Literal["fold", "refuse"]
"""What becomes of a system message: its text begins the first turn, or it is an error."""


@dataclass(frozen=True)
class Asked:
    """One prompt."""

    id: str
    """Unique in its file: the record's own, or the line's number."""
    turns: tuple[str, ...]
    """What the user says, turn by turn."""
    source: str | None = None
    """Where `gemwright prompts` found it."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of a file, in order."""

    asked: tuple[Asked, ...]
    answers_ignored: int
    """Answers that stood in the records."""


def read_prompts(path: Path, system: System = "fold") -> Prompts:
    """Read a folder of `gemwright prompts`, a .jsonl file of records, or a .txt file with a prompt a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, no prompt in it, or a line that is no prompt or, with
            `system="refuse"`, has a system message; the message names it.
    """
    file = path / PROMPTS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}. Name a file of prompts, or a folder of them.")
    if file.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{file} is neither .txt (a prompt a line) nor .jsonl (an object a line). Rename it."
        )
    asked: list[Asked] = []
    seen: Counter[str] = Counter()
    ignored = 0
    number = 0
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record = {"prompt": line.strip()} if file.suffix == ".txt" else json.loads(line)
                told, answers = _others(record)
                if told and system == "refuse":
                    raise ValueError("it has a system message, a role that Gemma 2 does not have.")
                ignored += answers
                for prompt in prompts_of(record):
                    id = prompt.id or f"line-{number}"
                    seen[id] += 1
                    first, *others = prompt.turns
                    turns = ("\n\n".join([*told, first]), *others)
                    unique = id if seen[id] == 1 else f"{id}#{seen[id]}"
                    asked.append(Asked(unique, turns, _source(record)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error}). Convert it.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {number}: it is no JSON ({error}). Correct or drop it.") from None
    except NotAChat as reason:
        raise ValueError(
            f"{file}, line {number}: it is no prompt ({reason}). Correct or drop it, or let `gemwright "
            "prompts` sort the file."
        ) from None
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: {error}") from None
    if not asked:
        raise ValueError(f"{file} holds no prompt. Write one a line.")
    return Prompts(tuple(asked), ignored)


def _others(record: Any) -> tuple[list[str], int]:
    """The texts of a record's system messages, and the number of its answers."""
    told, answers = list[str](), 0
    if not isinstance(record, Mapping):
        return told, answers
    for key in ("conversation", "conversations", "messages"):
        for message in record[key] if isinstance(record.get(key), list) else ():
            role = (
                str(message.get("role", message.get("from"))).lower() if isinstance(message, Mapping) else ""
            )
            text = message.get("content", message.get("value")) if role == "system" else None
            if isinstance(text, str) and text.strip():
                told.append(text)
            answers += role in OTHER_ROLES and role not in ("system", "tool", "function")
    for key in ("instances", "reference", "references", "answer", "output", "response"):
        value = record.get(key)
        answers += len(value) if isinstance(value, list) else isinstance(value, str)
    return told, answers


def _source(record: Any) -> str | None:
    source = record.get("source")
    return source if isinstance(source, str) else None
