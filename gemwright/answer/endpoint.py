"""A teacher behind an OpenAI-compatible endpoint: vLLM, llama.cpp's server, a provider's.

Some of many thousand requests always go wrong. What may pass by itself (status 408, 409, 425, 429 and 5xx, a
timeout, a broken connection, an answer that is none) is asked again after a pause that doubles and is drawn
at random within that, or as long as `Retry-After` says. What cannot pass (a wrong key, no such model) ends
the run at once. Any other refusal is of one prompt, which is put aside.
"""

import email.utils
import ipaddress
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveInt

from gemwright.answer.teacher import Answered, Conversations
from gemwright.config import Config
from gemwright.generate.sampling import Sampling

_AGAIN = {408, 409, 425, 429}
_HOPELESS = {
    401: "Give the key that belongs to it, in the environment variable that --api-key-env names.",
    402: "Its account has no credit left.",
    403: "Give a key that may use this model, in the environment variable that --api-key-env names.",
    404: "The URL ends before /chat/completions, as in http://localhost:8000/v1; --model names the model.",
    405: "The URL ends before /chat/completions, as in http://localhost:8000/v1.",
    407: "Give the proxy's name and password in HTTPS_PROXY.",
}
_LONGEST_PAUSE = 60.0  # seconds, unless Retry-After asks for more
_LONGEST_ASKED = 3600.0  # and more than this it does not get
_IN_A_ROW = 3  # prompts without an answer, and at least one a connection, before the endpoint counts as down
_EXCERPT = 300  # characters of what it said


class EndpointConfig(Config):
    """How patiently an endpoint is asked. Answers do not hang on it: a folder goes on with other values."""

    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds without a sign of life until a request is given up."""
    tries: PositiveInt = 8
    """How often one turn is asked."""
    pause_s: NonNegativeFloat = 1.0
    """Seconds before the second try; they double from try to try, up to a minute."""
    skip_unanswered: bool = False
    """Finish without the prompts whose tries are used up, instead of asking the same command again."""


class Endpoint:
    """A client. It is to be closed, by `with`, which also ends what still runs.

    Args:
        url: what stands before `/chat/completions`.
        api_key: sent as Bearer, and to be found nowhere else: neither in a file nor in a message.
        concurrency: requests at a time.
    Raises:
        ValueError: a URL with a password, a query or another scheme than http(s); a key that is no header.
    """

    def __init__(
        self, url: str, config: EndpointConfig, *, api_key: str | None = None, concurrency: int = 8
    ) -> None:
        import httpx2  # here, for it takes a tenth of a second that a teacher of ours should not cost

        self.url, host = _checked(url)
        self.config, self.concurrency = config, concurrency
        self._key = (api_key or "").strip()
        if not (self._key.isascii() and self._key.isprintable()) or " " in self._key:
            raise ValueError(
                "the API key holds characters that no key has. Look how it got into its variable."
            )
        self._errors, self._over, self._random = httpx2.RequestError, threading.Event(), random.Random()
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=config.timeout_s,
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            trust_env=not _is_loopback(host),  # a proxy does not lead back to this machine
        )

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._client.close()

    def only_model(self) -> str:
        """The name of the one model that it serves.

        Raises:
            ValueError: none or several; the message lists them.
            ConnectionError, PermissionError: it does not say.
        """
        try:
            listed = self._request("GET", "/models", None, _model_names)
        except (_Refused, _Unanswered) as error:
            raise ConnectionError(
                f"{self.url}/models gave no list of models: {error}. Start the server, correct the URL, or "
                "name a model by --model."
            ) from None
        if len(listed) != 1:
            raise ValueError(
                f"{self.url} serves {len(listed)} models: {', '.join(listed[:20]) or 'none'}. Choose one by "
                "--model."
            )
        return listed[0]

    def answer(
        self, conversations: Conversations, sampling: Sampling, model: str
    ) -> Iterator[tuple[int, Answered]]:
        """Answer conversations, `concurrency` at a time, each by one worker that asks turn after turn.

        Number i is asked with `seed` + i, for servers that heed it.

        Raises:
            PermissionError, ValueError: it refuses the key, the URL or the model.
            ConnectionError: as many conversations in a row as there are workers (three at least, and ten
                times as many where the unanswered are skipped) were not answered, or refused before any was
                answered.
        """
        todo: queue.SimpleQueue[tuple[int, Sequence[str]] | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Answered | BaseException]] = queue.SimpleQueue()

        def work() -> None:
            while (taken := todo.get()) is not None and not self._over.is_set():
                number, turns = taken
                try:
                    done.put((number, self._converse(turns, sampling, number, model)))
                except BaseException as error:
                    done.put((number, error))

        for _ in range(self.concurrency):  # daemons, for a Ctrl-C must not wait ten minutes for an answer
            threading.Thread(target=work, daemon=True).start()
        waiting, running = iter(conversations), 0
        health = _Health(max(self.concurrency, _IN_A_ROW) * (10 if self.config.skip_unanswered else 1))
        try:
            while True:
                while running < self.concurrency and (one := next(waiting, None)) is not None:
                    todo.put(one)
                    running += 1
                if not running:
                    return
                number, outcome = done.get()
                running -= 1
                if isinstance(outcome, BaseException):
                    raise outcome
                yield number, outcome
                if health.fails(outcome):
                    raise ConnectionError(
                        f"{self.url} answers nothing; the last time: {outcome.detail}. See what it lacks. "
                        "The same command goes on, and keeps what is there."
                    )
        finally:
            for _ in range(self.concurrency):
                todo.put(None)

    def _converse(self, turns: Sequence[str], sampling: Sampling, number: int, model: str) -> Answered:
        """One conversation, turn by turn."""
        body: dict[str, Any] = {"model": model, "max_tokens": sampling.max_tokens}
        body |= {"temperature": sampling.temperature, "seed": (sampling.seed + number) % 2**31}
        body |= {} if sampling.top_p is None else {"top_p": sampling.top_p}
        body |= {"stop": list(sampling.stop)} if sampling.stop else {}
        messages, tokens = list[dict[str, str]](), 0
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            body["messages"] = [
                {**message, "role": "user" if message["role"] == "user" else "assistant"}
                for message in messages
            ]
            try:
                text, finish, used = self._request("POST", "/chat/completions", body, _reply)
            except _Refused as error:
                return Answered(messages, "refused_by_endpoint", tokens, str(error))
            except _Unanswered as error:
                return Answered(messages, "unanswered", tokens, str(error))
            messages.append({"role": "model", "content": text})
            tokens += used
            if finish == "length":
                return Answered(messages, "length", tokens)
            if not text.strip():
                break  # it will be dropped, and an empty turn is refused in the next request
        return Answered(messages, "stop", tokens)

    def _request(self, method: str, path: str, body: Any, read: Any) -> Any:
        """What `read` makes of the answer's JSON. Asks until there is one, or the tries are used up."""
        told, pause = "", 0.0
        for number in range(self.config.tries):
            if number:
                longest = min(_LONGEST_PAUSE, self.config.pause_s * 2 ** (number - 1))
                if self._over.wait(max(pause, longest * self._random.uniform(0.5, 1.0))):
                    break
            pause = 0.0
            try:
                response = self._client.request(method, self.url + path, json=body)
            except self._errors as error:
                told = self._excerpt(f"{type(error).__name__} {error}")
                continue
            status = response.status_code
            told = self._excerpt(f"status {status}, {response.text[:_EXCERPT]}")
            if status in _AGAIN or status >= 500:
                pause = _seconds(response.headers.get("Retry-After", ""))
            elif status in _HOPELESS:
                kind = PermissionError if status in (401, 403) else ValueError
                raise kind(f"{self.url} refuses every request: {told}. {_HOPELESS[status]}")
            elif 300 <= status < 400:  # not followed: a key must not be led elsewhere
                there = self._excerpt(response.headers.get("Location", "nowhere"))
                raise ValueError(f"{self.url} sends requests to {there}. Give the URL that it means.")
            elif status >= 400:
                raise _Refused(told)
            else:
                try:
                    return read(response.json())
                except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
                    told = f"no answer in it, {told}"
        raise _Unanswered(f"{told} ({self.config.tries} tries)")

    def _excerpt(self, text: str) -> str:
        """The beginning of what it said, in one line, without the key if it repeated that."""
        text = text.replace(self._key, "[key]") if self._key else text
        return " ".join(text.encode(errors="replace").decode().split())[:_EXCERPT]


class _Health:
    """Whether an endpoint is up, by what came of conversations: `most` failures in a row say it is not."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.failed = 0
        self.answered = False

    def fails(self, outcome: Answered) -> bool:
        """Count one conversation. Refusals speak against the endpoint only until something was answered."""
        if outcome.finish == "unanswered" or (outcome.finish == "refused_by_endpoint" and not self.answered):
            self.failed += 1
        elif outcome.finish != "refused_by_endpoint":
            self.failed, self.answered = 0, True
        return self.failed >= self.most


class _Refused(Exception):
    """Of one prompt: to ask it again would not help."""


class _Unanswered(Exception):
    """All tries are used up."""


def is_url(teacher: object) -> bool:
    """Whether a teacher's name is that of an endpoint."""
    return str(teacher).lower().startswith(("http://", "https://"))


def _checked(url: str) -> tuple[str, str]:
    """The URL without a slash at its end, and its host."""
    import httpx2

    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(
            f"the endpoint is no URL ({error}). It should be like http://localhost:8000/v1."
        ) from None
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ValueError(
            "the endpoint's URL holds a password, a query or a fragment, and would be written down. Leave it "
            "out; a key goes into the environment variable that --api-key-env names."
        )
    if not is_url(url) or not parsed.host:
        raise ValueError(f"{url} is no http(s) URL. It should be like http://localhost:8000/v1.")
    return url.rstrip("/"), parsed.host


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _model_names(answer: Any) -> list[str]:
    return [str(one["id"]) for one in answer["data"]]


def _reply(answer: Any) -> tuple[str, str, int]:
    """Text, why it ended, and tokens. Raises _Refused, or anything of what it lacks."""
    choice = answer["choices"][0]
    text, finish = choice["message"].get("content"), choice.get("finish_reason")
    if finish == "content_filter":
        raise _Refused("finish_reason content_filter")
    if not isinstance(text, str):
        raise ValueError("content is no text")
    text.encode()  # half a surrogate pair is no text either
    usage = answer.get("usage")
    used = usage.get("completion_tokens") if isinstance(usage, dict) else 0
    return text, str(finish), used if isinstance(used, int) else 0


def _seconds(retry_after: str) -> float:
    """How long to wait, by a number or a date; 0 for anything else."""
    try:
        if not retry_after.isdecimal():
            wait = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        else:
            wait = float(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, min(wait, _LONGEST_ASKED))
