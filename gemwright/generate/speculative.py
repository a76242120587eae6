"""Speculative decoding (arXiv 2211.17192): a small draft proposes, the large model judges many at once.

The draft draws a few tokens; the target reads them all in one pass, which costs little more than reading
one, and keeps the first few by a coin whose odds make the output's distribution exactly the target's: token
d, drawn from q where the target has p, is kept with probability min(1, p(d) / q(d)); the first one refused
is drawn again from what p has above q. Greedy decoding is the case where both put all mass on one token.

The natural draft of a teacher is the student that was distilled from it.
"""

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

from gemwright.generate.engine import Session, prepare
from gemwright.generate.sampling import Sampler, Sampling, Token, draw
from gemwright.model.gemma import Gemma

LOOKAHEAD = 2
"""Tokens proposed at a time. Ours: on a CPU three rows cost what one does, and five half as much again."""


class SpeculativeSession(Session):
    """A `Session` of the target model that a draft hurries along.

    Args:
        lookahead: tokens proposed at a time.
    Raises:
        ValueError: the two models do not share a vocabulary.
    """

    def __init__(self, model: Gemma, draft: Gemma, *, lookahead: int = LOOKAHEAD) -> None:
        if draft.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"the draft has {draft.config.vocab_size:,} tokens, the model {model.config.vocab_size:,}: "
                "their ids mean different things. Use a draft with the model's own tokenizer."
            )
        if lookahead < 1:
            raise ValueError(f"lookahead={lookahead} must be at least 1.")
        # What a round proposes, and one more: to go on after a stop token, the one before it is read again.
        super().__init__(model, rewind=lookahead + 1)
        self.draft = Session(draft, rewind=lookahead + 1)
        self.lookahead = lookahead
        self.proposed = 0
        """Tokens that the draft has proposed and the target has judged."""
        self.accepted = 0
        """How many of them were kept."""

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that were kept; 0 before the first."""
        return self.accepted / max(1, self.proposed)

    def decode(self, sampling: Sampling) -> Iterator[Token]:
        """As `Session.decode`; the text has to fit the draft's `max_seq_len` too."""
        prepare(self.draft.model, self.ids, sampling)
        return super().decode(sampling)

    def close(self) -> None:
        """Free both caches."""
        super().close()
        self.draft.close()

    def cut(self, length: int) -> None:
        """Forget everything from position `length` on, the draft too."""
        super().cut(length)
        self.draft.cut(length)

    def _decode(self, sampling: Sampling) -> Iterator[Token]:
        sampler = Sampler(sampling, self.ids, self.model.config.vocab_size)
        left = sampling.max_tokens
        try:
            while left:
                for token in self._round(sampler, min(self.lookahead, left - 1)):
                    if token.id in sampling.stop_ids:
                        self.finish = "stop"
                        return
                    sampler.saw(token.id)
                    self.ids.append(token.id)
                    left -= 1
                    yield token
            self.finish = "length"
        finally:
            self.cut(len(self.ids))  # of the last round more may have been read than was wanted

    def _round(self, sampler: Sampler, lookahead: int) -> list[Token]:
        """The tokens that one pass of the target gives: from one to `lookahead` + 1."""
        begin = len(self.ids)
        drafted, odds = self._propose(sampler, lookahead)
        self.ids += drafted
        try:
            logits = self.advance(lookahead + 1)
        finally:
            del self.ids[begin:]
        kept: list[Token] = []
        for place, (id, q) in enumerate(zip(drafted, odds, strict=True)):
            p = sampler.probabilities(logits[place], drafted[:place])
            if sampler.uniform() * float(q[id]) >= float(p[id]):
                above = (p - q.to(p.device)).clamp(min=0)
                # Nothing above q but for rounding: the two are equal, and p itself will do.
                above = above if above.any() else p
                kept.append(sampler.report(draw(above, sampler.uniform()), logits[place]))
                break
            kept.append(sampler.report(id, logits[place]))
        else:
            last = draw(sampler.probabilities(logits[-1], drafted), sampler.uniform())
            kept.append(sampler.report(last, logits[-1]))
        accepted = len(kept) - 1
        self.proposed += min(accepted + 1, lookahead)
        self.accepted += accepted
        # Both have read more than was kept; the last token neither has read.
        self.cache.cut(begin + accepted)
        self.draft.cut(begin + min(accepted, lookahead))
        return kept

    def _propose(self, sampler: Sampler, count: int) -> tuple[list[int], list[Float[Tensor, " V"]]]:
        """Tokens drawn from the draft after the session's ids, and the distributions they came from."""
        self.draft.feed(self.ids[len(self.draft.ids) :])
        drafted: list[int] = []
        odds: list[Float[Tensor, " V"]] = []
        for _ in range(count):
            odds.append(sampler.probabilities(self.draft.advance()[-1], drafted))
            drafted.append(draw(odds[-1], sampler.uniform()))
            self.draft.feed(drafted[-1:])
        return drafted, odds
