"""Preference pairs: two conversations with one beginning, of which one is better.

A line is `{"chosen": ..., "rejected": ...}`. Each is a list of messages; or, as in HH-RLHF (arXiv
2204.05862), a text of turns that begin with `Human:` and `Assistant:`. With a `prompt`, as TRL writes it,
they may also hold only what comes after it. There may be several turns, and both end with the model's.
"""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import PositiveInt

from gemwright.config import Config
from gemwright.data.conversations import is_held_back
from gemwright.data.windows import in_turn
from gemwright.tokenizer.chat import encode_conversation, fold_system
from gemwright.tokenizer.tokenizer import Tokenizer

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "model"}
_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
"""What others name the scores of the two, where they keep them."""

Messages = list[dict[str, Any]]


class PairsConfig(Config):
    """What is made of lines that are no pair, and how many pairs are kept for measuring."""

    malformed: Literal["refuse", "skip"] = "refuse"
    """Stop at malformed lines before anything is computed, or leave them out and count them."""
    held_back: PositiveInt = 10
    """One prompt in so many, by its hash, is for measuring alone."""


class Pair(NamedTuple):
    """Two conversations as ids, each to its last."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


@dataclass(frozen=True)
class Pairs:
    """The pairs of a file: those to learn from, and those held back."""

    train: tuple[Pair, ...]
    held_back: tuple[Pair, ...]
    counts: dict[str, int]
    """Pairs that are read, and by reason what was done to others."""

    def batch(self, step: int, size: int, seed: int) -> list[Pair]:
        """The pairs of an update: a function of the arguments alone."""
        places = np.arange(step * size, (step + 1) * size, dtype=np.uint64)
        return [self.train[int(number)] for number in in_turn(places, len(self.train), seed)]


def read_pairs(path: Path, tokenizer: Tokenizer, seq_len: int, config: PairsConfig) -> Pairs:
    """Read and encode a .jsonl file of pairs, or a .jsonl.gz.

    Where one of a pair is longer than `seq_len` ids, both lose their first exchanges, while these and the
    turn that comes next are equal; a pair that is too long even so is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: malformed lines, the message counts them and names the first: no JSON, two that are equal
            or answer different prompts, a score that is higher for the rejected one, a pair that another line
            turns round. Or nothing to train on.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}. Name one with `chosen` and `rejected` a line.")
    counts: Counter[str] = Counter()
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    wrong: list[str] = []
    seen: dict[tuple[str, str], int] = {}
    number = 0
    for number, line in _lines(path):
        try:
            one, other = sides(line)
            ids = [encode_conversation(tokenizer, side) for side in (one, other)]
            _require_new((one, other), number, seen)
        except ValueError as error:
            wrong.append(f"line {number}: {error}")
            continue
        held_back = is_held_back(one[0]["content"], config.held_back)
        kept = (one, other)
        while max(len(side) for side, _ in ids) > seq_len and kept[0][:3] == kept[1][:3]:
            kept = (kept[0][2:], kept[1][2:])
            ids = [encode_conversation(tokenizer, side) for side in kept]
        if max(len(side) for side, _ in ids) > seq_len:
            counts["too_long"] += 1
            continue
        counts["shortened"] += len(kept[0]) < len(one)
        counts["held_back" if held_back else "pairs"] += 1
        parts[held_back].append(Pair(*(tuple(side) for side, _ in ids)))
    counts["malformed"] = len(wrong)
    if wrong and config.malformed == "refuse":
        raise ValueError(
            f"{path}: {len(wrong):,} of {number:,} lines are malformed. The first, {wrong[0]} Correct them, "
            "or leave them out with --set pairs.malformed=skip."
        )
    if not parts[0]:
        raise ValueError(
            f"{path} holds no pair to train on: {dict(counts)}. A row has room for {seq_len} tokens; raise "
            "seq_len if they are too long."
        )
    return Pairs(tuple(parts[0]), tuple(parts[1]), dict(counts))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def sides(line: str) -> tuple[Messages, Messages]:
    """The better and the worse conversation of a line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error}).") from None
    if not isinstance(record, dict) or not {"chosen", "rejected"} <= record.keys():
        raise ValueError("it has no `chosen` and `rejected`.")
    prompt = _messages(record["prompt"], "user") if record.get("prompt") else []
    sides = [_messages(record[name], "model") for name in ("chosen", "rejected")]
    chosen, rejected = (
        fold_system(side if side[: len(prompt)] == prompt else [*prompt, *side]) for side in sides
    )
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal: nothing is preferred.")
    if not chosen or not rejected or chosen[0].get("content") != rejected[0].get("content"):
        raise ValueError("chosen and rejected answer different prompts.")
    for better, worse in _SCORES:
        one, other = record.get(better), record.get(worse)
        if isinstance(one, int | float) and isinstance(other, int | float) and one < other:
            raise ValueError(f"{better}={one} is below {worse}={other}: they are swapped.")
    for side in (chosen, rejected):
        if not str(side[-1].get("content") or "").strip() and side[-1].get("role") != "user":
            raise ValueError("one of them ends with an empty answer.")
    return chosen, rejected


def _messages(side: Any, role: str) -> Messages:
    """The messages of one side: a list of them, turns in a text, or the text of one message."""
    if isinstance(side, list) and all(isinstance(one, dict) for one in side):
        return [
            {"role": "model" if one.get("role") == "assistant" else one.get("role"), **_content(one)}
            for one in side
        ]
    if not isinstance(side, str):
        raise ValueError(f"it has a {type(side).__name__} where a conversation is due.")
    before, *turns = _TURN.split(side)
    if not turns:
        return [{"role": role, "content": side}]
    if before.strip():
        raise ValueError(f"its text begins before the first turn: {before[:40]!r}.")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": _ROLES[name], "content": text.strip()} for name, text in pairs]


def _content(message: dict[str, Any]) -> dict[str, Any]:
    return {"content": message["content"]} if "content" in message else {}


def _require_new(sides: tuple[Messages, Messages], number: int, seen: dict[tuple[str, str], int]) -> None:
    """Raise ValueError for a pair that an earlier line holds the other way round."""
    chosen, rejected = (json.dumps(side, ensure_ascii=False) for side in sides)
    if (rejected, chosen) in seen:
        raise ValueError(f"line {seen[rejected, chosen]} prefers the other of the two.")
    seen.setdefault((chosen, rejected), number)
