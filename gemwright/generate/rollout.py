"""Whole conversations with a model, many at a time: the user's turns are given, it writes the replies.

A rollout keeps the ids as they were drawn, and which of them are the model's own. So a teacher, or a reward,
judges what was sampled, and not what its text would be encoded to. The model may be one that is being
trained: nothing is copied, and each call of `rollouts` sees the weights as they are.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gemwright.device import available_memory
from gemwright.generate.engine import Finish
from gemwright.generate.sampling import Sampling
from gemwright.generate.scheduler import Request, Scheduler
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.chat import encode_prompt, next_turn
from gemwright.tokenizer.tokenizer import CONTROL, SPECIAL, Tokenizer

_END, _EOS = CONTROL["<end_of_turn>"], SPECIAL["<eos>"]


@dataclass(frozen=True)
class Reply:
    """What the model said in one turn."""

    text: str
    """The reply."""
    ids: tuple[int, ...]
    """What was drawn, a stop token left out."""
    finish: Finish
    """`stop`, at a stop token; or `length`."""


@dataclass(frozen=True)
class Rollout:
    """A conversation: the user's turns, the model's replies, and the ids that it read and wrote."""

    turns: tuple[str, ...]
    """The user's turns that were answered."""
    replies: tuple[Reply, ...]
    """One a turn. One that was cut is the last."""
    ids: tuple[int, ...]
    """From `<bos>` to the end, the model's tokens as they were drawn."""
    mask: tuple[bool, ...]
    """Which ids are the model's own: what `encode_conversation` marks, for what was drawn."""
    complete: bool
    """Whether every turn of the user has its reply, and each of these ended by itself."""

    @property
    def chosen(self) -> tuple[bool, ...]:
        """Which ids the model chose: its own, but not the `<eos>` that is put after the last turn's end."""
        put = self.ids[-2:] == (_END, _EOS)
        return (*self.mask[:-1], False) if put else self.mask

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as `encode_conversation` takes it."""
        pairs = zip(self.turns, self.replies, strict=True)
        return [
            {"role": role, "content": content}
            for turn, reply in pairs
            for role, content in (("user", turn), ("model", reply.text))
        ]


def in_order(
    model: Gemma, tokenizer: Tokenizer, conversations: Sequence[tuple[int, Sequence[str]]],
    sampling: Sampling, max_batch: int,
) -> list[Rollout]:  # fmt: skip
    """All `rollouts`, in the order of the conversations. Layers compiled for training run eagerly."""
    with torch.compiler.set_stance("force_eager"):
        found = dict(rollouts(model, tokenizer, conversations, sampling, max_batch=max_batch))
    return [found[number] for number, _ in conversations]


def padded(
    drawn: Sequence[Rollout], batch_size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[list[int], Int[Tensor, "B T"], Bool[Tensor, "B T"]]]:
    """Rollouts of like length in rows, padded on the right, where nothing that is scored can see it.

    Yields their numbers, their ids, and which of the ids the model chose.
    """
    order = sorted(range(len(drawn)), key=lambda number: len(drawn[number].ids))
    for first in range(0, len(order), batch_size):
        taken = order[first : first + batch_size]
        width = len(drawn[taken[-1]].ids)
        ids = torch.full((len(taken), width), SPECIAL["<pad>"])
        chosen = torch.zeros(len(taken), width, dtype=torch.bool)
        for row, number in enumerate(taken):
            length = len(drawn[number].ids)
            ids[row, :length] = torch.tensor(drawn[number].ids)
            chosen[row, :length] = torch.tensor(drawn[number].chosen)
        yield taken, ids.to(device), chosen.to(device)


@dataclass
class _Running:
    """A conversation on its way."""

    number: int
    turns: Sequence[str]
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    def read(self, ids: Sequence[int], own: bool = False) -> None:
        """Append what the model reads, or writes itself."""
        self.ids += ids
        self.mask += [own] * len(ids)

    def done(self, complete: bool) -> tuple[int, Rollout]:
        """It ends here."""
        turns, replies = tuple(self.turns[: len(self.replies)]), tuple(self.replies)
        return self.number, Rollout(turns, replies, tuple(self.ids), tuple(self.mask), complete)


def rollouts(
    model: Gemma,
    tokenizer: Tokenizer,
    conversations: Iterable[tuple[int, Sequence[str]]],
    sampling: Sampling,
    *,
    max_batch: int = 8,
) -> Iterator[tuple[int, Rollout]]:
    """Answer every turn of every conversation, one turn after the other, up to `max_batch` at a time.

    Conversations are taken when there is room, and yielded when they are done, with their numbers, in any
    order. Turn t of number i draws with `seed` + i + 2^32 t. A reply ends after `max_tokens`, or where the
    context is full.

    The model's own are also the `<end_of_turn>` that ended a reply, and the `<eos>` after the last one, which
    is due there (report, table 5) and not drawn. An `<eos>` that was drawn in place of `<end_of_turn>` stands
    alone, and ends the conversation.

    Raises:
        ValueError: stop strings, which may end inside a token; or a conversation without turns, or whose
            first turn leaves no room for a reply, when it is taken. A later turn that does not ends its
            rollout.
    """
    if sampling.stop:
        raise ValueError(f"stop={sampling.stop} has no place in a conversation: its turns end by a token.")
    scheduler = Scheduler(model, max_batch=max_batch, max_kv_bytes=available_memory(model.device))
    waiting, running = iter(conversations), dict[Request, _Running]()

    def submit(one: _Running, ids: list[int]) -> None:
        room = max(1, model.config.max_seq_len - len(one.ids) - len(ids))
        changes = {"max_tokens": min(sampling.max_tokens, room)}
        changes["seed"] = (sampling.seed + one.number + (len(one.replies) << 32)) % 2**63
        running[scheduler.submit([*one.ids, *ids], sampling.but(**changes))] = one
        one.read(ids)

    exhausted = False
    while True:
        while not exhausted and len(running) < 2 * max_batch:
            if (taken := next(waiting, None)) is None:
                exhausted = True
                break
            number, turns = taken
            try:
                submit(_Running(number, turns), encode_prompt(tokenizer, [_user(turn) for turn in turns[:1]]))
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
        if not running:
            return
        for request, _ in scheduler.step():
            if request.finish is None or (one := running.pop(request, None)) is None:
                continue
            ended = _settle(one, request, tokenizer)
            if ended is not None:
                yield one.done(ended)
                continue
            try:
                submit(one, next_turn(tokenizer, _user(one.turns[len(one.replies)])))
            except ValueError:
                yield one.done(False)


def _settle(one: _Running, request: Request, tokenizer: Tokenizer) -> bool | None:
    """Take a reply down. Returns None if the conversation goes on, else whether it is complete."""
    ids = tuple(token.id for token in request.tokens)
    assert request.finish is not None
    one.replies.append(Reply(tokenizer.decode(ids), ids, request.finish))
    one.read(ids, own=True)
    if request.finish != "stop":
        return False
    last = len(one.replies) == len(one.turns)
    if request.stopped_by == _EOS:  # it ended the conversation instead of its turn
        one.read([_EOS], own=True)
        return last
    one.read([_END], own=True)
    if last:
        one.read([_EOS], own=True)
    return True if last else None


def _user(turn: str) -> dict[str, str]:
    return {"role": "user", "content": turn}
