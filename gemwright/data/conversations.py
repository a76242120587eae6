"""Conversations to learn from: chat jsonl -> packed rows, with loss where the model itself speaks.

A line is `{"messages": [{"role", "content"}, ...]}`, `assistant` being another word for `model`, and may have
a `weight` that its tokens count with. Rows hold whole conversations, as many as fit. Each begins with
`<bos>`, by which attention keeps them apart (`model.gemma.packed`): none sees a neighbour.

Packing is best-fit decreasing (arXiv 2404.10830): the longest first, each into the row where the least room
is left over. Unlike cutting a stream into windows it never cuts an answer, and leaves a few per cent unused.
"""

import bisect
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt64
from torch import Tensor

from gemwright.config import Config
from gemwright.data.sources import Split
from gemwright.data.windows import in_turn
from gemwright.tokenizer.chat import encode_conversation, fold_system
from gemwright.tokenizer.tokenizer import SPECIAL, Tokenizer

ANSWERS = "answers.jsonl"
"""The file of conversations in a folder of `gemwright answer`."""
_HELD_BACK = 50  # one prompt in so many

Example = tuple[Sequence[int], Sequence[float]]
"""A conversation's ids, and what each of them counts as a target."""


class ConversationsConfig(Config):
    """What is made of conversations that Gemma 2 does not know, or that are none."""

    system: Literal["fold", "refuse"] = "fold"
    """A system message goes to the head of the first user turn, or is malformed: Gemma 2 has no such role."""
    malformed: Literal["refuse", "skip"] = "refuse"
    """Stop at malformed lines before anything is computed, or leave them out and count them."""


class Conversations:
    """Packed conversations, read as `Windows` are: rows of `seq_len + 1` ids, by number."""

    def __init__(
        self, examples: Iterator[Example], seq_len: int, *, split: Split, seed: int, path: Path,
        counts: Counter[str],
    ) -> None:  # fmt: skip
        self.split: Split = split
        self.seq_len = seq_len
        self.path = path
        self.counts = counts
        """Conversations that are read, and by reason what was done to others."""
        self._seed = seed
        ids, weights, lengths = array("i"), array("f"), []
        for tokens, token_weights in examples:
            ids.extend(tokens)
            weights.extend(token_weights)
            lengths.append(len(tokens))
        self._ids, self._weights = np.array(ids, np.int32), np.array(weights, np.float32)
        self._starts = np.cumsum([0, *lengths], dtype=np.int64)
        self._members, self._ends = _best_fit(lengths, seq_len + 1)
        counts["conversations"] = len(lengths)

    @classmethod
    def read(
        cls,
        path: Path,
        tokenizer: Tokenizer,
        seq_len: int,
        config: ConversationsConfig,
        *,
        split: Split = "train",
        seed: int = 0,
    ) -> "Conversations":
        """Read, encode and pack a `.jsonl` file, or the answers in a folder.

        A conversation that is longer than a row loses its last exchanges; one whose first is too long is left
        out. Of the prompts one in fifty is the validation split, whatever else the file holds.

        Args:
            seed: orders the rows anew in each epoch.
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: malformed lines; the message counts them and names the first. Or nothing to train on.
        """
        file = path / ANSWERS if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no {file}. Name a .jsonl file of conversations, or a folder of `gemwright answer`."
            )
        counts: Counter[str] = Counter()
        examples = _examples(file, tokenizer, seq_len, config, split, counts)
        found = cls(examples, seq_len, split=split, seed=seed, path=path, counts=counts)
        if split == "train" and not len(found):
            raise ValueError(
                f"{file} holds no conversation to train on: {dict(counts)}. A row has room for {seq_len + 1} "
                "tokens; raise seq_len if they are too long."
            )
        return found

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._ends) - 1

    @property
    def total(self) -> int:
        """Rows that there are."""
        return len(self)

    @property
    def tokens(self) -> int:
        """Targets that count, whatever their weight."""
        return int(np.count_nonzero(self._weights))

    @property
    def fill(self) -> float:
        """The share of the rows' places that hold a token."""
        return len(self._ids) / max(1, len(self) * (self.seq_len + 1))

    @property
    def sha256(self) -> str:
        """A digest of rows and weights: what stored targets have to be about."""
        digest = hashlib.sha256(f"{self.seq_len}".encode())
        for part in (self._ids, self._weights, self._starts, self._members, self._ends):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def numbers(self, step: int, batch_size: int) -> UInt64[np.ndarray, " B"]:
        """Which rows batch number `step` takes: a function of the seed and `step` alone."""
        place = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.uint64)
        return in_turn(place, len(self), self._seed)

    def in_order(self) -> UInt64[np.ndarray, " N"]:
        """The numbers of all rows."""
        return np.arange(len(self), dtype=np.uint64)

    def take(self, numbers: UInt64[np.ndarray, " N"]) -> Int[Tensor, "N {self.seq_len+1}"]:
        """Rows by their numbers, int64, padded with `<pad>`."""
        return torch.from_numpy(self._rows(self._ids, numbers, SPECIAL["<pad>"])).long()

    def weights(self, numbers: UInt64[np.ndarray, " N"]) -> Float[Tensor, "N {self.seq_len}"]:
        """What the targets of these rows count: 0 for what the model does not say itself, and for padding."""
        return torch.from_numpy(self._rows(self._weights, numbers, 0)[:, 1:])

    def begun(self, numbers: UInt64[np.ndarray, " N"]) -> Bool[Tensor, "N {self.seq_len+1}"]:
        """Where a conversation begins in these rows."""
        flags = np.zeros(len(self._ids), bool)
        flags[self._starts[:-1]] = True
        return torch.from_numpy(self._rows(flags, numbers, 0))

    def all(self, batch_size: int) -> Iterator[tuple[Int[Tensor, "N T1"], Float[Tensor, "N T"]]]:
        """Every row once, with its weights; the last batch may be short."""
        index = self.in_order()
        for start in range(0, len(index), batch_size):
            few = index[start : start + batch_size]
            yield self.take(few), self.weights(few)

    def ends(self) -> Int[np.ndarray, "N 2"]:
        """Row and column of every conversation's last id, in the order in which they were given."""
        found = np.empty((len(self._members), 2), np.int64)
        for row in range(len(self)):
            members = self._members[self._ends[row] : self._ends[row + 1]]
            lengths = self._starts[members + 1] - self._starts[members]
            found[members, 0], found[members, 1] = row, np.cumsum(lengths) - 1
        return found

    def _rows(self, flat: np.ndarray, numbers: np.ndarray, padding: int) -> np.ndarray:
        rows = np.full((len(numbers), self.seq_len + 1), padding, flat.dtype)
        for row, number in zip(rows, numbers.astype(np.int64), strict=True):
            begin = 0
            for member in self._members[self._ends[number] : self._ends[number + 1]]:
                part = flat[self._starts[member] : self._starts[member + 1]]
                row[begin : begin + len(part)] = part
                begin += len(part)
        return rows


def pack(
    examples: Sequence[Example], seq_len: int
) -> tuple[Int[Tensor, "R {seq_len+1}"], Float[Tensor, "R {seq_len}"], Bool[Tensor, "R {seq_len+1}"]]:
    """A few conversations in as few rows as they need, the weights of the targets, and where each begins.

    Raises:
        ValueError: one is longer than a row.
    """
    packed = _packed(examples, seq_len)
    rows = packed.in_order()
    return packed.take(rows), packed.weights(rows), packed.begun(rows)


def pack_whole(
    texts: Sequence[Sequence[int]], seq_len: int
) -> tuple[Int[Tensor, "R {seq_len}"], Int[Tensor, "N 2"]]:
    """A few conversations that are read to their last id, in as few rows as they need.

    Returns:
        the rows, and row and column of every conversation's last id, in the order given.
    Raises:
        ValueError: one is longer than a row.
    """
    packed = _packed([(ids, ()) for ids in texts], seq_len - 1)
    return packed.take(packed.in_order()), torch.from_numpy(packed.ends())


def _packed(examples: Sequence[Example], seq_len: int) -> Conversations:
    longest = max((len(ids) for ids, _ in examples), default=0)
    if longest > seq_len + 1:
        raise ValueError(f"a conversation has {longest} tokens, and a row {seq_len + 1}. Raise seq_len.")
    return Conversations(iter(examples), seq_len, split="train", seed=0, path=Path(), counts=Counter())


def is_held_back(turn: str, one_in: int = _HELD_BACK) -> bool:
    """Whether a prompt with this first turn is kept for validation: one in so many, by its hash."""
    return int.from_bytes(hashlib.sha256(turn.encode()).digest()[:8]) % one_in == 0


def _examples(
    file: Path, tokenizer: Tokenizer, seq_len: int, config: ConversationsConfig, split: Split,
    counts: Counter[str],
) -> Iterator[Example]:  # fmt: skip
    """The conversations of a split, encoded, none longer than a row."""
    first, lines = "", 0
    with open(file, encoding="utf-8-sig") as lines_of:
        for number, line in enumerate(lines_of, 1):
            if not line.strip():
                continue
            lines += 1
            try:
                messages, weight = _parse(line, config)
                if _split(messages) != split:
                    counts["held_back"] += split == "train"
                    continue
                ids, mask = encode_conversation(tokenizer, messages)
            except ValueError as error:
                counts["malformed"] += 1
                first = first or f"{file}, line {number}: {error}"
                continue
            kept = messages
            while len(ids) > seq_len + 1 and len(kept) > 2:
                kept = kept[:-2]
                ids, mask = encode_conversation(tokenizer, kept)
            if len(ids) > seq_len + 1:
                counts["too_long"] += 1
                continue
            counts["shortened"] += len(kept) < len(messages)
            yield ids, [weight * own for own in mask]
    if counts["malformed"] and config.malformed == "refuse":
        raise ValueError(
            f"{counts['malformed']:,} of {lines:,} conversations are malformed. The first: {first} Correct "
            "them, or leave them out with --set conversations.malformed=skip."
        )


def _split(messages: list[dict[str, Any]]) -> Split:
    turn = messages[0].get("content") if messages else None
    return "validation" if isinstance(turn, str) and is_held_back(turn) else "train"


def _parse(line: str, config: ConversationsConfig) -> tuple[list[dict[str, Any]], float]:
    """The messages of a line, and their weight."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error}).") from None
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ValueError("it has no `messages`, a list of objects.")
    weight = record.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ValueError(f"its weight is {weight!r}, and not a number from 0.")
    if config.system == "fold":
        messages = fold_system(messages)
    for number, message in enumerate(messages, 1):
        if message.get("role") in ("model", "assistant") and not str(message.get("content") or "").strip():
            raise ValueError(f"message {number}, the model's, is empty.")
    return messages, float(weight)


def _best_fit(lengths: Sequence[int], room: int) -> tuple[np.ndarray, np.ndarray]:
    """Which examples share a row: their numbers row by row, and where each row ends among them (from 0)."""
    rows: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(room + 1)]
    spaces: list[int] = []  # those that some row has, ascending
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        place = bisect.bisect_left(spaces, lengths[number])
        if place == len(spaces):
            row, space = len(rows), room
            rows.append([])
        else:
            space = spaces[place]
            row = by_space[space].pop()
            if not by_space[space]:
                del spaces[place]
        rows[row].append(number)
        left = space - lengths[number]
        if not by_space[left]:
            bisect.insort(spaces, left)
        by_space[left].append(row)
    ends = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64)
    return np.array([number for row in rows for number in row], np.int64), ends
