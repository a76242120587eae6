"""A teacher that runs here; and what any teacher gives back, this one or an endpoint's.

Teachers share one form: they take conversations, each a number and the turns of a user, and yield each with
its number when it is over, in any order.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from gemwright.generate.language_model import LanguageModel
from gemwright.generate.rollout import Rollout, rollouts
from gemwright.generate.sampling import Sampling
from gemwright.tokenizer.chat import encode_prompt
from gemwright.tokenizer.tokenizer import SPECIAL

Conversations = Iterable[tuple[int, Sequence[str]]]
"""Numbers, and the turns of a user to be answered one after the other."""

Finish = Literal["stop", "length", "too_long", "ended_early", "refused_by_endpoint", "unanswered"]
"""Why a conversation ended: every turn has its answer; an answer was cut, at `max_tokens` or where the
context was full; a turn did not fit that; the teacher said <eos> while the user had more to say; an endpoint
refused it, or was silent."""


@dataclass(frozen=True)
class Answered:
    """A conversation that is over."""

    messages: list[dict[str, str]]
    """Roles `user` and `model`, in turns; the last is the user's where no answer came."""
    finish: Finish
    """Why it is over."""
    tokens: int
    """Tokens of the answers, as far as the teacher tells."""
    detail: str = ""
    """What an endpoint said of it."""


def answer(
    model: LanguageModel, conversations: Conversations, sampling: Sampling, max_batch: int
) -> Iterator[tuple[int, Answered]]:
    """Answer with a model of ours, up to `max_batch` at a time. Number i draws with `seed` + i.

    Raises:
        ValueError: the model has no tokenizer, or stop strings, which have no place in a conversation.
        OutOfMemory: the memory does not hold the keys and values.
    """
    tokenizer, config = model.require_tokenizer(), model.config
    too_long: list[tuple[int, Answered]] = []

    def fitting() -> Iterator[tuple[int, Sequence[str]]]:
        for number, turns in conversations:
            first = [{"role": "user", "content": turns[0]}]
            if len(encode_prompt(tokenizer, first)) >= config.max_seq_len:
                too_long.append((number, Answered(first, "too_long", 0)))
            else:
                yield number, turns

    for number, rollout in rollouts(model.model, tokenizer, fitting(), sampling, max_batch=max_batch):
        tokens = sum(len(reply.ids) for reply in rollout.replies)
        yield number, Answered(rollout.messages, _finish(rollout), tokens)
        while too_long:
            yield too_long.pop(0)
    yield from too_long


def _finish(rollout: Rollout) -> Finish:
    if rollout.complete or rollout.replies[-1].finish != "stop":
        return "stop" if rollout.complete else "length"
    return "ended_early" if rollout.ids[-1] == SPECIAL["<eos>"] else "too_long"
