"""Continuous batching: sequences join and leave a running batch at every step.

A step is one pass over the weights. It takes one token of every sequence whose prompt has been read, and of
new prompts, in the order they came, a chunk of tokens in all: short ones together, while a long one, read
chunk by chunk, holds nobody up. Each reserves the keys and values of its whole length at its start, so the
sum is bounded and a sequence that started is never thrown out.

What a sequence draws does not depend on who is beside it: own cache, own attention, own generator. Only
rounding differs between a product of one row and one of many, in the seventh digit of fp32; a text can differ
from the one drawn alone where two choices are that close, and nowhere else.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from gemwright.generate.engine import PREFILL_CHUNK, Finish, cache_bytes, explained, prepare
from gemwright.generate.sampling import Sampler, Sampling, Token
from gemwright.model.cache import KVCache
from gemwright.model.gemma import Gemma


class Request:
    """One sequence on its way through the scheduler."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, vocab_size: int) -> None:
        self.prompt = tuple(prompt)
        self.sampling = sampling
        self.tokens: list[Token] = []
        """What has been drawn so far, the stop token left out."""
        self.finish: Finish | None = None
        """None while it waits or runs."""
        self.stopped_by: int | None = None
        """The stop token that ended it, if one did."""
        self._ids = list(prompt)
        self._sampler = Sampler(sampling, prompt, vocab_size)
        self._cache: KVCache | None = None


class Scheduler:
    """Runs many requests on one model.

    Args:
        max_batch: most sequences in a step.
        max_kv_bytes: most memory for keys and values, all sequences together; None: no bound but `max_batch`.
    """

    def __init__(self, model: Gemma, *, max_batch: int = 8, max_kv_bytes: int | None = None) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch} must be at least 1.")
        self.model = model
        self.max_batch = max_batch
        self.max_kv_bytes = max_kv_bytes
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._waiting and not self._running

    @property
    def kv_bytes(self) -> int:
        """Memory that the running sequences have reserved for keys and values."""
        return sum(self._need(request) for request in self._running)

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Request:
        """Queue a prompt.

        Raises:
            ValueError: it could never run: empty, an id outside the vocabulary, longer than `max_seq_len`
                allows, or larger than `max_kv_bytes` alone.
        """
        prepare(self.model, prompt, sampling)
        request = Request(prompt, sampling, self.model.config.vocab_size)
        if self.max_kv_bytes is not None and self._need(request) > self.max_kv_bytes:
            raise ValueError(
                f"{len(prompt)} tokens of prompt and {sampling.max_tokens} new ones need "
                f"{self._need(request):,} bytes of keys and values; max_kv_bytes is {self.max_kv_bytes:,}. "
                "Shorten the prompt, lower max_tokens or raise the bound."
            )
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request now, waiting or running, and free its cache. A finished one is left as it is."""
        if request.finish is None:
            self._end(request, "cancelled")
            if request in self._waiting:
                self._waiting.remove(request)

    def step(self) -> list[tuple[Request, Token | None]]:
        """One step: requests with their new token, or with None where one ended at a stop token.

        Raises:
            OutOfMemory: a step did not fit; every running request is cancelled, those waiting are not.
        """
        self._admit()
        try:
            longest = max((len(request._ids) for request in self._running), default=0)
            with torch.no_grad(), explained(self.model, longest):
                return self._advance()
        except BaseException:
            for request in list(self._running):  # their caches may be torn between two layers
                self.cancel(request)
            raise

    def run(self) -> Iterator[tuple[Request, Token | None]]:
        """Step until nothing is left to do. Of a request that is cancelled meanwhile nothing more is told."""
        while not self.idle:
            for request, token in self.step():
                if request.finish != "cancelled":
                    yield request, token

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_batch:
            need = self._need(self._waiting[0])
            if self.max_kv_bytes is not None and self.kv_bytes + need > self.max_kv_bytes:
                return
            request = self._waiting.popleft()
            request._cache = KVCache(self.model.config, reserve=self._length(request))
            self._running.append(request)

    def _advance(self) -> list[tuple[Request, Token | None]]:
        """One pass; who has nothing left to read draws a token."""
        room, taken = PREFILL_CHUNK, list[tuple[Request, KVCache, list[int]]]()
        for request in self._running:
            assert request._cache is not None
            new = request._ids[request._cache.length :]
            if not request.tokens:
                new = new[:room]
                room -= len(new)
            if new:
                taken.append((request, request._cache, new))
        if not taken:
            return []
        lengths = [len(new) for _, _, new in taken]
        ids = torch.tensor([[id for _, _, new in taken for id in new]], device=self.model.device)
        hidden = self.model.hidden(ids, caches=[cache for _, cache, _ in taken], lengths=lengths)
        ready = [
            (request, end - 1)
            for (request, cache, _), end in zip(taken, accumulate(lengths), strict=True)
            if cache.length == len(request._ids)
        ]
        logits = self.model.logits(hidden[0, [last for _, last in ready]])
        return [self._take(request, row) for (request, _), row in zip(ready, logits, strict=True)]

    def _take(self, request: Request, logits: torch.Tensor) -> tuple[Request, Token | None]:
        token = request._sampler.choose(logits)
        if token.id in request.sampling.stop_ids:
            request.stopped_by = token.id
            self._end(request, "stop")
            return request, None
        request.tokens.append(token)
        request._ids.append(token.id)
        if len(request.tokens) == request.sampling.max_tokens:
            self._end(request, "length")
        return request, token

    def _end(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        request._cache = None
        if request in self._running:
            self._running.remove(request)

    def _need(self, request: Request) -> int:
        return cache_bytes(self.model, self._length(request))

    @staticmethod
    def _length(request: Request) -> int:
        return len(request.prompt) + request.sampling.max_tokens
