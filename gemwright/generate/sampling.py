"""From logits to the next token: what may be drawn, the draw, and the log-probabilities to report.

The steps are the field's, in Hugging Face's order: repetition penalty (arXiv 1909.05858), temperature,
top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082). A draw is one uniform number, looked up in the
cumulative distribution: a sequence has its own generator, on the CPU whatever the device, so the same seed
draws the same numbers alone, in a batch and on a GPU.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from gemwright.config import Config
from gemwright.tokenizer.tokenizer import CONTROL


class Sampling(Config):
    """How a continuation is chosen, and where it ends."""

    max_tokens: int = Field(default=128, gt=0)
    """Most new tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """Logits are divided by it; 0 takes the likeliest token, 1 draws from the model's own distribution."""
    top_k: int | None = Field(default=None, gt=0)
    """Only so many of the likeliest tokens may be drawn."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Only the likeliest tokens that together reach this probability."""
    min_p: float | None = Field(default=None, gt=0, le=1)
    """Only tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Logits of tokens that stand in the text already are divided by it if positive, else multiplied."""
    seed: int = Field(default=0, ge=-(1 << 63), lt=1 << 64)
    """Of the draws."""
    stop: tuple[str, ...] = ()
    """The text ends before any of these."""
    stop_ids: tuple[int, ...] = (CONTROL["<eos>"], CONTROL["<end_of_turn>"])
    """The text ends before any of these tokens: chat models end on 107, base models on 1."""
    logprobs: int | None = Field(default=None, ge=0)
    """Report every token's log-probability, and so many of the likeliest alternatives."""


class Token(NamedTuple):
    """One new token. Log-probabilities are the model's own, before penalty, temperature and cuts."""

    id: int
    logprob: float | None = None
    """Natural logarithm; None unless asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, best first."""


class Sampler:
    """Draws one sequence's tokens. `text` are the ids so far, which the repetition penalty counts."""

    def __init__(self, sampling: Sampling, text: Iterable[int], vocab_size: int) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._seen: Bool[Tensor, " V"] | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(list(text), dtype=torch.long)] = True

    def uniform(self) -> float:
        """The sequence's next random number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def saw(self, id: int) -> None:
        """Count a token that now stands in the text."""
        if self._seen is not None:
            self._seen[id] = True

    def choose(self, logits: Float[Tensor, " V"]) -> Token:
        """The next token, which is counted as seen."""
        if self.sampling.temperature == 0:
            id = int(self._penalised(logits, ()).argmax())
        else:
            id = draw(self.probabilities(logits), self.uniform())
        self.saw(id)
        return self.report(id, logits)

    def report(self, id: int, logits: Float[Tensor, " V"]) -> Token:
        """A chosen token with the log-probabilities that were asked for."""
        count = self.sampling.logprobs
        if count is None:
            return Token(id)
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(min(count, len(logprobs)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Token(id, float(logprobs[id]), top)

    def probabilities(self, logits: Float[Tensor, " V"], ahead: Sequence[int] = ()) -> Float[Tensor, " V"]:
        """What the next token is drawn from: zero where a token may not be drawn, all mass on one if greedy.

        Args:
            ahead: tokens that a draft put behind the text, counted as seen here only.
        """
        s = self.sampling
        logits = self._penalised(logits, ahead)
        if s.temperature == 0:
            return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
        # The largest logit becomes 0, so that the smallest temperature overflows downwards only.
        p = ((logits - logits.max()) / max(s.temperature, 1e-20)).softmax(-1)
        if s.top_k is not None and s.top_k < len(p):
            p = _only(p, p.topk(s.top_k).indices)
        if s.top_p is not None and s.top_p < 1:
            p = _only(p, _nucleus(p, s.top_p))
        if s.min_p is not None:
            p = torch.where(p >= s.min_p * p.max(), p, 0.0)
        total = p.sum()
        if not total > 0:  # not <=, which NaN passes
            raise ValueError("the model's logits are not finite: it is of a run that diverged, or damaged.")
        return p / total

    def _penalised(self, logits: Float[Tensor, " V"], ahead: Sequence[int]) -> Float[Tensor, " V"]:
        if self._seen is None:
            return logits
        penalty, seen = self.sampling.repetition_penalty, self._seen
        if ahead:
            seen = seen.clone()
            seen[torch.tensor(ahead)] = True
        changed = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(seen.to(logits.device), changed, logits)


def draw(probabilities: Float[Tensor, " V"], uniform: float) -> int:
    """The id at which the cumulative distribution passes `uniform`; an id of probability 0 is never drawn."""
    total = probabilities.double().cumsum(-1)
    whole = float(total[-1])
    goal = min(uniform * whole, math.nextafter(whole, 0))  # rounding must not lead beyond the last one
    return int(
        torch.searchsorted(total, torch.tensor([goal], dtype=torch.float64, device=total.device), right=True)
    )


def _only(p: Float[Tensor, " V"], ids: Tensor) -> Float[Tensor, " V"]:
    """These ids' probabilities, normed to 1."""
    kept = torch.zeros_like(p)
    kept[ids] = p[ids]
    return kept / kept.sum()


def _nucleus(p: Float[Tensor, " V"], mass: float) -> Tensor:
    """The fewest likeliest ids that together reach `mass`."""
    count = min(1024, len(p))  # sorting 256,000 takes ten times as long, and hardly ever is it needed
    while True:
        values, ids = p.topk(count)
        total = values.double().cumsum(-1)
        if float(total[-1]) >= mass or count == len(p):
            return ids[: int(torch.searchsorted(total, mass)) + 1]
        count = len(p)


def check(sampling: Sampling, ids: Sequence[int], vocab_size: int) -> None:
    """Raise ValueError for an id, in the text or to stop at, that the model has no row for."""
    for what, numbers in (("the prompt", ids), ("stop_ids", sampling.stop_ids)):
        for id in numbers:
            if not 0 <= id < vocab_size:
                raise ValueError(
                    f"{what} holds the id {id}, outside 0..{vocab_size - 1}. Use the model's own tokenizer."
                )
