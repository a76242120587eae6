"""The engine: prefill in chunks, decode one token after another, stop; a session keeps its cache alive.

A session's ids may be ahead of its cache: the token that was just drawn, or a turn that was just appended, is
read when the next token is asked for. So a conversation goes on where it stands, and nothing is read twice.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gemwright.device import available_memory
from gemwright.generate.sampling import Sampler, Sampling, Token, check
from gemwright.model.cache import KVCache
from gemwright.model.cost import kv_cache_bytes
from gemwright.model.gemma import Gemma

PREFILL_CHUNK = 512
"""Tokens of a prompt read at a time: enough rows for the GEMMs, few enough for the activations."""

Finish = Literal["stop", "length", "cancelled"]
"""Why a continuation ended: at a stop token or string, at `max_tokens`, or because nobody wants it."""


class OutOfMemory(RuntimeError):
    """The machine's memory does not hold what was asked for."""


class Session:
    """One sequence and its live cache: feed it ids, decode, feed it more.

    Args:
        rewind: how many of the newest tokens `cut` may take back; see `KVCache`.
    """

    def __init__(self, model: Gemma, *, rewind: int = 0) -> None:
        self.model = model
        self.ids: list[int] = []
        """Everything read and drawn so far."""
        self.finish: Finish | None = None
        """Why the last `decode` ended; None while it has not."""
        self._rewind = rewind
        self._reserve = 0
        self._cache: KVCache | None = None

    @property
    def cache(self) -> KVCache:
        """Keys and values of the ids that have been read."""
        if self._cache is None:
            self._cache = KVCache(self.model.config, rewind=self._rewind, reserve=self._reserve)
        return self._cache

    def feed(self, ids: Sequence[int]) -> None:
        """Append ids; they are read when the next token is asked for."""
        self.cut(len(self.ids))
        self.ids += ids

    def cut(self, length: int) -> None:
        """Forget everything from position `length` on. What the cache cannot take back is read anew."""
        del self.ids[length:]
        self._unread(length)

    def _unread(self, length: int) -> None:
        """See to it that the cache holds no position from `length` on."""
        if self._cache is not None and self._cache.length > length:
            try:
                self._cache.cut(length)
            except ValueError:
                self._cache = None

    def close(self) -> None:
        """Free the cache. The ids stay, and are read again if the session goes on."""
        self._cache = None

    def decode(self, sampling: Sampling) -> Iterator[Token]:
        """Yield new tokens until a stop id (neither yielded nor kept) or `max_tokens` of them.

        Raises:
            ValueError: nothing was fed, an id is outside the vocabulary, or text and new tokens exceed
                `max_seq_len`; at once, before anything is computed.
            OutOfMemory: the cache does not fit.
        """
        prepare(self.model, self.ids, sampling, held=self._cache.bytes if self._cache else 0)
        self.cut(len(self.ids))
        self.finish = None
        if self._cache is None:
            self._reserve = len(self.ids) + sampling.max_tokens
        return self._decode(sampling)

    def _decode(self, sampling: Sampling) -> Iterator[Token]:
        sampler = Sampler(sampling, self.ids, self.model.config.vocab_size)
        for _ in range(sampling.max_tokens):
            token = sampler.choose(self.advance()[-1])
            if token.id in sampling.stop_ids:
                self.finish = "stop"
                return
            self.ids.append(token.id)
            yield token
        self.finish = "length"

    @torch.no_grad()
    def advance(self, positions: int = 1) -> Float[Tensor, "P V"]:
        """Read what has not been read; returns the logits after each of the last `positions` ids."""
        assert 0 < positions <= len(self.ids)
        self._unread(len(self.ids) - positions)
        try:
            with explained(self.model, len(self.ids)):
                return self._advance(positions)
        except BaseException:  # interrupted between two layers, the cache is torn
            self._cache = None
            raise

    def _advance(self, positions: int) -> Float[Tensor, "P V"]:
        while True:
            start, left = self.cache.length, len(self.ids) - self.cache.length
            # The last chunk holds all the positions whose logits are wanted.
            size = left if left <= max(PREFILL_CHUNK, positions) else min(PREFILL_CHUNK, left - positions)
            chunk = torch.tensor([self.ids[start : start + size]], device=self.model.device)
            hidden = self.model.hidden(chunk, caches=[self.cache])
            if size == left:
                return self.model.logits(hidden[0, -positions:])


def prepare(model: Gemma, ids: Sequence[int], sampling: Sampling, held: int = 0) -> None:
    """Refuse what cannot be generated, before anything is computed. Raises as `Session.decode`.

    Args:
        held: bytes of keys and values that the sequence has already.
    """
    config, length = model.config, len(ids) + sampling.max_tokens
    if not ids:
        raise ValueError("the prompt is empty: begin with <bos> at least (encode(text, bos=True)).")
    check(sampling, ids, config.vocab_size)
    if length > config.max_seq_len:
        raise ValueError(
            f"{len(ids)} tokens of prompt and {sampling.max_tokens} new ones exceed the model's max_seq_len="
            f"{config.max_seq_len}. Shorten the prompt or lower max_tokens."
        )
    free = available_memory(model.device)
    need = cache_bytes(model, length)
    if free is not None and need - held > free:
        raise OutOfMemory(_too_large(need, length, f"{free / 2**20:,.0f} MiB are free"))


def cache_bytes(model: Gemma, length: int) -> int:
    """What a sequence of so many tokens holds in keys and values."""
    return kv_cache_bytes(model.config, length, model.model.norm.weight.element_size())


@contextmanager
def explained(model: Gemma, length: int) -> Iterator[None]:
    """Turn torch's words for exhausted memory into `OutOfMemory`, which says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        told = any(words in str(error) for words in ("not enough memory", "can't allocate memory"))
        if not told and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise OutOfMemory(_too_large(cache_bytes(model, length), length, "the machine has less")) from error


def _too_large(need: int, length: int, limit: str) -> str:
    return (
        f"the keys and values of {length:,} tokens take {need / 2**20:,.0f} MiB, and {limit}. Shorten the "
        "text, lower max_tokens, or load the model in bf16 or int8."
    )
