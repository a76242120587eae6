"""`gemwright.load` and `gemwright.Chat`: a model with its tokenizer, for one's own code and the command line.

A `Chat` is a history and a live cache under it: a turn reads its own tokens and nothing twice, and what the
history holds is what the cache has read, however an answer ended.
"""

import itertools
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemwright.device import available_memory, pick_device
from gemwright.generate.engine import Finish, Session
from gemwright.generate.quantize import Kind
from gemwright.generate.quantize import quantize as quantized
from gemwright.generate.sampling import Sampling, Token
from gemwright.generate.scheduler import Request, Scheduler
from gemwright.generate.speculative import LOOKAHEAD, SpeculativeSession
from gemwright.hub import fetch
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.run import write_text
from gemwright.tokenizer.chat import encode_conversation, encode_prompt, next_turn
from gemwright.tokenizer.stream import TextStream
from gemwright.tokenizer.tokenizer import CONTROL, MODEL_FILE, Tokenizer

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""A text to continue; the messages of a conversation to answer, the user's last; or ids, <bos> first."""


@dataclass(frozen=True)
class Completion:
    """What came of a prompt."""

    text: str
    """The continuation, up to a stop string."""
    tokens: tuple[Token, ...]
    """What was drawn, stop tokens left out; where a stop string ended the text, it is among them."""
    finish: Finish | None
    """Why it ended; None while it goes on."""
    prompt_tokens: int
    """Tokens before it, `<bos>` and a conversation's history among them."""
    accepted: float | None
    """Share of the draft's tokens that the model kept, in a chat of all its turns; None without a draft."""


class Stream(Iterator[str]):
    """A continuation as it comes, each piece as soon as it is sure. Closing or dropping it ends it.

    `ended` is called once, however it ends.
    """

    finish: Finish | None = "cancelled"
    """Why it ended; None while it goes on."""

    def __init__(
        self, session: Session, tokenizer: Tokenizer, sampling: Sampling, ended: Callable[["Stream"], None]
    ) -> None:
        self.prompt_tokens = len(session.ids)
        self._session = session
        self._text = TextStream(tokenizer, sampling.stop)
        self._drawn = session.decode(sampling)
        self._ended = ended
        self._tokens: list[Token] = []
        self._cancelled = False
        self.finish = None  # it has begun

    @property
    def completion(self) -> Completion:
        """Everything about it so far."""
        accepted = self._session.acceptance if isinstance(self._session, SpeculativeSession) else None
        return Completion(self._text.text, tuple(self._tokens), self.finish, self.prompt_tokens, accepted)

    def __next__(self) -> str:
        """The next piece, never empty. An error or a KeyboardInterrupt ends the continuation too."""
        try:
            while self.finish is None:
                token = next(self._drawn, None)
                if self._cancelled:
                    raise StopIteration
                if token is None:
                    piece = self._text.finish()
                    self._end(self._session.finish or "stop")
                else:
                    self._tokens.append(token)
                    piece = self._text.push(token.id)
                    if self._text.stopped:
                        self._end("stop")
                if piece:
                    return piece
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def cancel(self) -> None:
        """End it after the token being drawn, which is dropped. For signal handlers and other threads."""
        self._cancelled = True

    def close(self) -> None:
        """End it now."""
        if self.finish is None:
            self._end("cancelled")

    __del__ = close

    def _end(self, finish: Finish) -> None:
        self.finish = finish
        self._drawn = iter(())  # before `ended`: a speculative session takes back what it read too far
        self._ended(self)


class LanguageModel:
    """A loaded checkpoint: called on ids (B, T) it gives the capped fp32 logits (B, T, V).

    `stream`, `generate`, `complete` and `batch` continue a prompt: a text, which follows `<bos>`, or the
    messages of a conversation. Their keywords are the fields of `Sampling`; an unknown one is a ValueError.

    Args:
        draft: a smaller model whose guesses this one judges, `lookahead` tokens at a time; the distribution
            stays exactly this model's. ValueError if its tokenizer or vocabulary is another.
    """

    def __init__(
        self, model: Gemma, tokenizer: Tokenizer | None, *, draft: "LanguageModel | None" = None,
        lookahead: int = LOOKAHEAD,
    ) -> None:  # fmt: skip
        self.model = model.eval()
        self.tokenizer = tokenizer
        """None where the folder has no `tokenizer.model`."""
        self.draft = draft
        self.lookahead = lookahead
        if draft is not None:
            if tokenizer is None or draft.tokenizer is None or draft.tokenizer.sha256 != tokenizer.sha256:
                raise ValueError(
                    "the draft has another tokenizer than the model: their ids mean different things. Use a "
                    f"draft whose folder holds the model's own {MODEL_FILE}."
                )
            self.session()  # refuses other vocabularies

    @property
    def config(self) -> GemmaConfig:
        """The model's config."""
        return self.model.config

    @torch.no_grad()
    def __call__(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of every position, final soft-cap applied, without gradients (train through `.model`)."""
        return self.model(ids.to(self.model.device))

    def session(self) -> Session:
        """A new sequence and its cache, for ids instead of text; with the draft if there is one."""
        if self.draft is None:
            return Session(self.model)
        return SpeculativeSession(self.model, self.draft.model, lookahead=self.lookahead)

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids that a continuation of `prompt` follows. Raises ValueError for malformed messages."""
        if isinstance(prompt, str):
            return self.require_tokenizer().encode(prompt, bos=True)
        if prompt and all(isinstance(part, int) for part in prompt):
            return list(prompt)  # type: ignore[arg-type]
        return encode_prompt(self.require_tokenizer(), prompt)

    def stream(self, prompt: Prompt, **sampling: Any) -> Stream:
        """The continuation piece by piece, until <eos>, <end_of_turn>, a stop string or `max_tokens`.

        Raises:
            ValueError: an unknown or wrong setting, no tokenizer, or prompt and `max_tokens` do not fit; at
                the call, before anything is computed.
            OutOfMemory: the memory does not hold the keys and values.
        """
        settings, session = Sampling.parse(sampling), self.session()
        session.feed(self.encode(prompt))
        return Stream(session, self.require_tokenizer(), settings, lambda _: session.close())

    def generate(self, prompt: Prompt, **sampling: Any) -> str:
        """The continuation as one string; errors as `stream`."""
        return "".join(self.stream(prompt, **sampling))

    def complete(self, prompt: Prompt, **sampling: Any) -> Completion:
        """The continuation with its tokens, their log-probabilities (`logprobs=5`) and why it ended."""
        stream = self.stream(prompt, **sampling)
        list(stream)
        return stream.completion

    def batch(
        self, prompts: Iterable[Prompt], *, max_batch: int = 8, **sampling: Any
    ) -> Iterator[tuple[int, Completion]]:
        """Continue many prompts, up to `max_batch` at a time: number and completion of each when it is done.

        `sorted(model.batch(prompts))` has them in order. Prompts are taken when there is room, so there may
        be any number of them. Number i draws with `seed` + i. The draft takes no part.

        Raises:
            ValueError: an unknown or wrong setting; a prompt that does not fit, when its turn comes.
        """
        return batched(self, enumerate(prompts), Sampling.parse(sampling), max_batch)

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError where there is none."""
        if self.tokenizer is None:
            raise ValueError(
                f"this checkpoint has no {MODEL_FILE}: put it there, or generate from ids by `session()`."
            )
        return self.tokenizer


def load(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    quantize: Kind | None = None,
    window: int | None = None,
    draft: str | Path | LanguageModel | None = None,
    lookahead: int = LOOKAHEAD,
    revision: str | None = None,
) -> LanguageModel:
    """Load a Gemma 2 from a folder in Hugging Face's format, or by its name there (`google/gemma-2-2b-it`).

    Args:
        dtype: the number format; the checkpoint's own if None.
        device: a GPU where there is one if None.
        quantize: "int8" holds the weights in one byte each, for inference only.
        window: of the local layers, instead of the checkpoint's (report, Table 10).
        draft: a smaller model with the same tokenizer, for speed; a name or folder is loaded likewise.
        lookahead: tokens that the draft proposes at a time.
        revision: a branch, tag or commit on Hugging Face.
    Raises:
        FileNotFoundError: there is no such folder or model, or a file of the checkpoint is missing.
        ValueError: it is not a Gemma 2, or damaged; or the draft does not fit. The message says where.
        PermissionError, ConnectionError: Hugging Face does not give it; see `gemwright.hub.fetch`.
    """
    folder = fetch(name_or_folder, revision=revision)
    device = device or pick_device()
    model = checkpoint.load(folder, dtype=dtype, device=device)
    if window is not None:
        model = model.with_window(window)
    if quantize is not None:
        model = quantized(model, quantize)
    tokenizer = Tokenizer.load(folder) if (folder / MODEL_FILE).exists() else None
    if draft is not None and not isinstance(draft, LanguageModel):
        draft = load(draft, dtype=dtype, device=device, quantize=quantize)
    return LanguageModel(model, tokenizer, draft=draft, lookahead=lookahead)


def batched(
    model: LanguageModel, prompts: Iterable[tuple[int, Prompt]], sampling: Sampling, max_batch: int
) -> Iterator[tuple[int, Completion]]:
    """`LanguageModel.batch` of prompts that bring their numbers along."""
    gemma, tokenizer, waiting = model.model, model.require_tokenizer(), iter(prompts)
    scheduler = Scheduler(gemma, max_batch=max_batch, max_kv_bytes=available_memory(gemma.device))
    running: dict[Request, tuple[int, TextStream, list[Token]]] = {}
    while True:
        for number, prompt in itertools.islice(waiting, 2 * max_batch - len(running)):
            try:
                request = scheduler.submit(model.encode(prompt), sampling.but(seed=sampling.seed + number))
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
            running[request] = number, TextStream(tokenizer, sampling.stop), []
        if not running:
            return
        for request, token in scheduler.step():
            number, text, tokens = running[request]
            if token is not None:
                tokens.append(token)
                text.push(token.id)
            if text.stopped or request.finish:
                scheduler.cancel(request)
                text.finish()
                del running[request]
                finish = "stop" if text.stopped else request.finish
                yield number, Completion(text.text, tuple(tokens), finish, len(request.prompt), None)


class Chat:
    """A conversation with a model, whose cache lives on from turn to turn.

    Args:
        messages: an earlier conversation to go on with, the model's answer last.
        sampling: fields of `Sampling`. An answer ends after `max_tokens`, or where the context is full; the
            default is 1,024, a quarter of the context if that is less. Turn number i draws with `seed` + i.
    Raises:
        ValueError: an unknown or wrong setting, malformed messages, or no tokenizer.
    """

    def __init__(
        self, model: LanguageModel, *, messages: Sequence[Mapping[str, Any]] = (), **sampling: Any
    ) -> None:
        self.model = model
        most = min(1024, max(1, model.config.max_seq_len // 4))
        self.sampling = Sampling.parse({"max_tokens": most} | sampling)
        self._tokenizer = model.require_tokenizer()
        self._session = model.session()
        self._messages: list[dict[str, str]] = []
        self._answer: Callable[[], Stream | None] = lambda: None
        if messages:  # <eos> gives way to the next turn
            self._session.feed(encode_conversation(self._tokenizer, messages)[0][:-1])
            self._messages = _turns(*(message["content"] for message in messages))

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns so far, an answer that is still coming left out; a copy."""
        return [dict(message) for message in self._messages]

    def say(self, text: str) -> Stream:
        """The model's answer to the user's next turn, piece by piece.

        An answer that is closed, dropped or interrupted stays in the history as far as it was shown; if
        nothing was, the user's turn is taken back. A new turn ends an answer that is still coming.

        Raises:
            ValueError: no room is left in the context; the conversation stays as it was.
            OutOfMemory: the memory does not hold the keys and values; likewise.
        """
        self._end_answer()
        (message,) = _turns(text)
        tokenizer, begin, turn = self._tokenizer, len(self._session.ids), len(self._messages) // 2
        new = next_turn(tokenizer, message) if turn else encode_prompt(tokenizer, [message])
        context = min(model.config.max_seq_len for model in (self.model, self.model.draft) if model)
        room = context - begin - len(new)
        if room < 1:
            raise ValueError(
                f"the conversation has {begin} tokens and this turn {len(new)}: no room for an answer in the "
                f"context of {context}. Begin anew with reset() (in `gemwright chat`: /reset)."
            )
        most, seed = min(self.sampling.max_tokens, room), self.sampling.seed + turn
        self._session.feed(new)
        try:
            own = self.sampling.but(max_tokens=most, seed=seed)
            answer = Stream(self._session, tokenizer, own, lambda end: self._settle(end, begin, text))
        except BaseException:
            self._session.cut(begin)
            raise
        self._answer = weakref.ref(answer)
        return answer

    def ask(self, text: str) -> str:
        """The answer as one string; errors as `say`."""
        return "".join(self.say(text))

    def reset(self) -> None:
        """Forget the conversation."""
        self._end_answer()
        self._session.close()
        self._session = self.model.session()
        self._messages = []

    def save(self, path: str | Path) -> None:
        """Write the conversation as one line of JSON: `{"messages": [{"role": ..., "content": ...}, ...]}`.

        Raises ValueError if the file exists and is no such conversation: it is not ours to replace.
        """
        if Path(path).exists():
            Chat.load(path, self.model)
        write_text(Path(path), json.dumps({"messages": self._messages}, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel, **sampling: Any) -> "Chat":
        """Go on with a saved conversation. Raises FileNotFoundError, or ValueError for another file."""
        try:
            messages = [dict(one) for one in json.loads(Path(path).read_text(encoding="utf-8"))["messages"]]
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path} is no saved conversation. Choose another file.") from None
        return cls(model, messages=messages, **sampling)

    def _end_answer(self) -> None:
        if (answer := self._answer()) is not None:
            answer.close()

    def _settle(self, answer: Stream, begin: int, said: str) -> None:
        """Let history and cache hold what was shown, and no more."""
        session, shown = self._session, answer.completion.text
        if answer.finish == "cancelled" and not shown:
            session.cut(begin)
            return
        drawn = session.ids[answer.prompt_tokens :]
        kept = len(drawn)
        # Drawn and not shown: a stop string, the beginning of one, or half a character.
        while not shown.startswith(text := self._tokenizer.decode(drawn[:kept])):
            kept -= 1
        session.cut(answer.prompt_tokens + kept)
        session.feed(self._tokenizer.encode(shown[len(text) :]))
        session.feed([CONTROL["<end_of_turn>"]])
        self._messages += _turns(said, shown)


def _turns(*contents: str) -> list[dict[str, str]]:
    """The messages of a user and a model who take turns."""
    return [{"role": ("user", "model")[number % 2], "content": one} for number, one in enumerate(contents)]
