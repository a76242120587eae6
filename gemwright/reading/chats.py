"""Chat logs -> the user's turns, and nothing else.

The report trains on the prompts of LMSYS-Chat-1M and not on its answers (arXiv 2408.00118, section 5), so
what a model said is not read further than its role: it reaches no document, no reject and no report.

Known records: LMSYS-Chat-1M and WildChat (`conversation`), ShareGPT (`conversations`), the `messages` of chat
APIs, MT-bench and Arena-hard (`turns`), a bare `prompt`, and self-instruct (`instruction` with `instances`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

USER_ROLES = {"user", "human", "prompter"}
OTHER_ROLES = {"assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "system", "tool", "function"}

LANGUAGE_NAMES = {
    "arabic": "ar", "chinese": "zh", "czech": "cs", "dutch": "nl", "english": "en", "french": "fr",
    "german": "de", "greek": "el", "hindi": "hi", "hungarian": "hu", "indonesian": "id", "italian": "it",
    "japanese": "ja", "korean": "ko", "persian": "fa", "polish": "pl", "portuguese": "pt", "romanian": "ro",
    "russian": "ru", "spanish": "es", "swedish": "sv", "thai": "th", "turkish": "tr", "ukrainian": "uk",
    "vietnamese": "vi",
}  # fmt: skip
"""Chat logs name languages in English; a name that is not here stays as it is, and is no kept code."""


@dataclass(frozen=True)
class Prompt:
    """One conversation's user turns, and what its log says of it."""

    id: str | None
    turns: tuple[str, ...]
    language: str | None
    """A code where the log names a known language; None where it names none."""
    flagged: bool
    """A moderation flag on any turn, the answers' included: their log marks the whole conversation."""
    redacted: bool
    """Names were blanked out by the log's keeper."""


class NotAChat(ValueError):
    """A record that is none of the known forms; the message is the reason that it is set aside for."""


def prompts_of(record: Any) -> Iterator[Prompt]:
    """The conversations in a record: one, or for self-instruct one an instance.

    Raises:
        NotAChat: `missing_key` (none of the known keys), `wrong_type` (a turn is no text, a record no
            object), `no_user_turn`.
    """
    if not isinstance(record, Mapping):
        raise NotAChat("wrong_type")
    id = next((str(record[key]) for key in _IDS if isinstance(record.get(key), str | int)), None)
    if isinstance(record.get("instances"), list):
        for number, instance in enumerate(record["instances"]):
            given = instance.get("input", "") if isinstance(instance, Mapping) else None
            text = "\n\n".join(part for part in (_text(record.get("instruction")), _text(given)) if part)
            yield _prompt(record, f"{id}#{number}" if id and number else id, [text])
        return
    yield _prompt(record, id, list(_user_turns(record)))


_IDS = ("conversation_id", "conversation_hash", "id", "question_id", "uid")
_MESSAGES = ("conversation", "conversations", "messages")


def _user_turns(record: Mapping[str, Any]) -> Iterator[str]:
    for key in _MESSAGES:
        if key in record:
            if not isinstance(record[key], list):
                raise NotAChat("wrong_type")
            for message in record[key]:
                if not isinstance(message, Mapping):
                    raise NotAChat("wrong_type")
                role = str(message.get("role", message.get("from"))).lower()
                if role in USER_ROLES:
                    yield _text(message.get("content", message.get("value")))
                elif role not in OTHER_ROLES:
                    raise NotAChat("wrong_type")  # an unknown role may be an answer: better lost than learnt
            return
    if isinstance(record.get("turns"), list):
        for turn in record["turns"]:
            yield _text(turn.get("content") if isinstance(turn, Mapping) else turn)
    elif "prompt" in record or "instruction" in record:
        yield _text(record.get("prompt", record.get("instruction")))
    else:
        raise NotAChat("missing_key")


def _prompt(record: Mapping[str, Any], id: str | None, turns: list[str]) -> Prompt:
    turns = [turn.strip() for turn in turns]
    if not any(turns):
        raise NotAChat("no_user_turn")
    named = record.get("language")
    messages = next((record[key] for key in _MESSAGES if isinstance(record.get(key), list)), [])
    return Prompt(
        id=id,
        turns=tuple(turn for turn in turns if turn),
        language=LANGUAGE_NAMES.get(named.lower(), named.lower()) if isinstance(named, str) else None,
        flagged=bool(record.get("toxic")) or any(map(_is_flagged, _list(record.get("openai_moderation")))),
        redacted=bool(record.get("redacted"))
        or any(isinstance(message, Mapping) and bool(message.get("redacted")) for message in messages),
    )


def _is_flagged(moderation: Any) -> bool:
    return isinstance(moderation, Mapping) and bool(moderation.get("flagged"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise NotAChat("wrong_type")
    return value
