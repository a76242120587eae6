r"""Turns <-> ids: the report's format (tables 4 and 5), and which ids a model learns to emit.

    <bos><start_of_turn>user
    Knock knock.<end_of_turn>
    <start_of_turn>model
    Who's there?<end_of_turn><eos>

`<bos>` stands once, at the very start; `<eos>` once, at the very end. A second turn takes the place of
`<eos>`: `\n<start_of_turn>user...`. So a cache that holds an answer and its `<end_of_turn>` only grows,
by `next_turn`.

A message is `{"role": "user" | "model", "content": str}`; `assistant`, the word of other chat formats, is
read as `model`. The roles take turns, the user first, and Gemma 2 has no system role.

Content is data. It is encoded by itself, as it is: what spells a control token stays text, so nobody forges a
turn, and nothing is trimmed (Google's own fine-tuning code does not either), so that no turn that was sampled
changes when it is read back. Header and content never melt into one piece: an answer that begins with a
newline follows `model`, `\n` in training just as it does after a prompt.

The template that Google published on Hugging Face renders a conversation to one string and encodes that. A
prompt's ids are equal for content that is stripped and spells no control token; other content it trims, and
lets forge turns. After a last answer it writes `\n` and never `<eos>`, so a model tuned with it does not
learn to. Programs that want a template get ours: `gemwright.tokenizer.template`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemwright.tokenizer.tokenizer import CONTROL, Tokenizer, require_utf8

_START, _END = CONTROL["<start_of_turn>"], CONTROL["<end_of_turn>"]
_ROLES = ("user", "model")  # in their order


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[object]) -> list[int]:
    r"""The ids that the model's answer follows: `<bos>`, all turns, and `<start_of_turn>model\n`.

    Raises:
        ValueError: no message, one that is malformed or out of turn (the message says which), or the last is
            the model's.
    """
    turns = _checked(messages, last="user")
    return [tokenizer.bos_id, *_opened(tokenizer, turns)]


def next_turn(tokenizer: Tokenizer, message: object) -> list[int]:
    r"""What follows an `<end_of_turn>` of the model in its cache: `\n`, the user's turn, the model's header.

    An `<eos>` that the model gave after `<end_of_turn>` is not to be in the cache. Put behind
    `encode_prompt(messages)`, the ids of a reply and `<end_of_turn>`, this is `encode_prompt` of the longer
    conversation, as long as the reply's ids are those that its text encodes to. (A model may spell a word in
    other pieces than SentencePiece would.)

    Raises:
        ValueError: the message is malformed, or not the user's.
    """
    turns = _checked([message], last="user")
    return [*tokenizer.encode("\n"), *_opened(tokenizer, turns)]


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[object]) -> tuple[list[int], list[bool]]:
    r"""A conversation to learn from, and which of its ids carry loss: those that the model itself emits.

    These are the content and the `<end_of_turn>` of each model turn, and the final `<eos>`; not the headers,
    the user's turns and the `\n` between turns, which a program puts there. That earlier model turns carry
    loss too is our choice, where the report is silent: no turn sees what comes after it, so a conversation of
    n answers is n examples in one pass.

    Returns:
        ids, and a mask of the same length: True where the id itself (not the one after it) is a target.
    Raises:
        ValueError: as `encode_prompt`, but here the last message has to be the model's.
    """
    turns = _checked(messages, last="model")
    ids, mask = [tokenizer.bos_id], [False]
    for role, part in _parts(tokenizer, turns):
        ids += part
        mask += [role == "model"] * len(part)
    return [*ids, tokenizer.eos_id], [*mask, True]


def fold_system(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation without its system message, whose text begins the first turn of the user instead.

    What is no such conversation stays as it is, for who reads it next to say so.
    """
    match messages:
        case [{"role": "system", "content": str(system)}, {"role": "user", "content": str(turn)}, *others]:
            folded = {**messages[1], "content": f"{system}\n\n{turn}" if system.strip() else turn}
            return [folded, *(dict(other) for other in others)]
    return [dict(message) for message in messages]


def _opened(tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> list[int]:
    """The turns, and the header of a model's turn after them."""
    ids = [id for _, part in _parts(tokenizer, turns) for id in part]
    return ids + tokenizer.encode("\n") + _header(tokenizer, "model")


def _parts(tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> Iterator[tuple[str, list[int]]]:
    """The turns as runs of ids, and who emits each: a role its content and end, nobody the headers."""
    for number, (role, content) in enumerate(turns):
        newline = tokenizer.encode("\n") if number else []
        yield "", newline + _header(tokenizer, role)
        yield role, [*tokenizer.encode(content), _END]


def _header(tokenizer: Tokenizer, role: str) -> list[int]:
    return [_START, *tokenizer.encode(role + "\n")]


def _checked(messages: Sequence[object], last: str) -> list[tuple[str, str]]:
    """Role and content of each message; ValueError unless they take turns and the last is `last`'s."""
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        role, content = _read(number, message)
        due = _ROLES[len(turns) % 2]
        if role != due:
            raise ValueError(
                f"message {number} is of the role {role}, where {due} is due: the roles take turns, the user "
                "first. Join neighbours of one role, or drop what stands before the user's first message."
            )
        turns.append((role, content))
    if not turns:
        raise ValueError("the conversation is empty. Begin with a message of the user.")
    if turns[-1][0] != last:
        remedy = {
            "user": "so there is nothing to answer. Drop it, or add the user's next.",
            "model": "so there is nothing to learn after it. Drop it, or add the model's answer.",
        }
        raise ValueError(f"message {len(turns)}, the last, is of the role {turns[-1][0]}, {remedy[last]}")
    return turns


def _read(number: int, message: object) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f'message {number} is no object with "role" and "content": {str(message)[:80]!r}.')
    role, content = message["role"], message["content"]
    role = "model" if role == "assistant" else role
    if role == "system":
        raise ValueError(
            f"message {number} is of the role system, which Gemma 2 does not have. "
            "Put its text at the beginning of the first user message."
        )
    if role not in _ROLES:
        raise ValueError(
            f"message {number} is of the role {role!r}. Gemma 2 knows user and model (or assistant)."
        )
    if not isinstance(content, str):
        raise ValueError(
            f"message {number} has a {type(content).__name__} for content. Give one string: Gemma 2 reads "
            "text alone."
        )
    try:
        require_utf8(content)
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from None
    return role, content
