"""A draft changes how fast the model speaks, and never what it says."""

import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gemwright.generate import engine
from gemwright.generate.engine import Session
from gemwright.generate.sampling import Sampler, Sampling, Token
from gemwright.generate.speculative import SpeculativeSession
from gemwright.model.gemma import Gemma

Biting = Callable[..., Gemma]
often = pytest.mark.usefixtures("unchecked")
DRAFTS = ["the model itself", "one close to it", "a stranger", "a smaller stranger"]


def asked(max_tokens: int = 30, **options: Any) -> Sampling:
    return Sampling(**{"stop_ids": (), **options, "max_tokens": max_tokens})


def text(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [2, *torch.randint(108, 200, (length - 1,), generator=generator).tolist()]


def said(session: Session, max_tokens: int = 30, **options: Any) -> list[int]:
    return [token.id for token in session.decode(asked(max_tokens, **options))]


def plainly(model: Gemma, prompt: Sequence[int], max_tokens: int = 30, **options: Any) -> list[int]:
    session = Session(model)
    session.feed(prompt)
    return said(session, max_tokens, **options)


@pytest.fixture
def draft(biting: Biting) -> Callable[[str], Gemma]:
    """A draft for `biting()`, by name."""

    def build(kind: str) -> Gemma:
        if kind == "a smaller stranger":
            return biting(5, d_model=16, d_ff=16, head_dim=8, window=3, pattern=("sliding_attention",))
        made = biting(5 if kind == "a stranger" else 1)
        if kind == "one close to it":
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.add_(0.03 * parameter.std().nan_to_num() * torch.randn_like(parameter))
        return made

    return build


def speculative(model: Gemma, draft: Gemma, prompt: Sequence[int], lookahead: int) -> SpeculativeSession:
    session = SpeculativeSession(model, draft, lookahead=lookahead)
    session.feed(prompt)
    return session


# Greedily: the same tokens.


@often
@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("lookahead", range(1, 10))
def test_greedy_speech_is_that_of_the_model_alone(
    model: Gemma, draft: Callable[[str], Gemma], kind: str, lookahead: int
):
    """From before the window's edge to far beyond it; 9 is more than the window and the first prompt."""
    for length in (3, 19):
        session = speculative(model, draft(kind), text(length), lookahead)
        ids = said(session, 15)
        assert ids == plainly(model, text(length), 15)
        assert session.ids == text(length) + ids
        assert session.finish == "length"


def test_the_drafts_are_as_different_as_they_are_meant_to_be(model: Gemma, draft: Callable[[str], Gemma]):
    shares = []
    for kind in DRAFTS:
        session = speculative(model, draft(kind), text(9), 3)
        said(session)
        shares.append(session.acceptance)
    assert shares[0] == 1
    assert 0.3 < shares[1] < 1
    assert max(shares[2:]) < 0.3


@often
@pytest.mark.parametrize("kind", DRAFTS[:3])
@pytest.mark.parametrize(
    "changes", [{"window": 1}, {"pattern": ("sliding_attention",) * 2, "window": 4}], ids=str
)
def test_so_it_is_in_models_of_other_windows(
    biting: Biting, draft: Callable[[str], Gemma], kind: str, changes: dict[str, Any]
):
    model = biting(**changes)
    assert said(speculative(model, draft(kind), text(5), 4)) == plainly(model, text(5))


@often
@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("penalty", [1.3, 1e6])
def test_the_penalty_counts_what_the_draft_put_ahead(
    model: Gemma, draft: Callable[[str], Gemma], kind: str, penalty: float
):
    expected = plainly(model, text(6), repetition_penalty=penalty)
    assert said(speculative(model, draft(kind), text(6), 4), repetition_penalty=penalty) == expected
    assert expected != plainly(model, text(6))


@often
@pytest.mark.parametrize("kind", DRAFTS[:3])
@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_so_it_does_where_every_token_would_be_said_again(
    model: Gemma, draft: Callable[[str], Gemma], kind: str, lookahead: int
):
    """With large embeddings each token is its own likeliest successor, until it has been said."""
    judge = draft(kind)
    with torch.no_grad():
        for each in (model, judge):
            each.unembedding.mul_(10.0)
    expected = plainly(model, text(6), repetition_penalty=1e3)
    session = speculative(model, judge, text(6), lookahead)
    assert said(session, repetition_penalty=1e3) == expected
    assert (session.acceptance == 1) == (kind == "the model itself")
    assert len(set(plainly(model, text(6)))) < 3 < 8 < len(set(expected))


@often
@pytest.mark.parametrize("kind", DRAFTS[1:3])
@pytest.mark.parametrize("max_tokens", range(1, 8))
def test_it_says_no_more_than_it_may(model: Gemma, draft: Callable[[str], Gemma], kind: str, max_tokens: int):
    session = speculative(model, draft(kind), text(6), 3)
    assert said(session, max_tokens) == plainly(model, text(6), max_tokens)
    assert session.cache.length <= len(session.ids)


def test_for_one_token_the_draft_is_not_asked(model: Gemma, biting: Biting):
    other = biting(5)
    other.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the draft was run"))
    session = speculative(model, other, text(6), 4)
    assert said(session, 1) == plainly(model, text(6), 1)
    assert (session.proposed, session.accepted, session.acceptance) == (0, 0, 0)


def test_what_fills_the_model_is_said_to_the_last_token(model: Gemma):
    assert said(speculative(model, model, text(9), 5), 55) == plainly(model, text(9), 55)


def test_a_lookahead_longer_than_a_chunk_is_judged_as_a_whole(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    expected = plainly(model, text(12))
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 3)
    for lookahead in (1, 2, 3, 5):
        assert said(speculative(model, model, text(12), lookahead)) == expected


# How often a draft is right.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 20},
        {"temperature": 1.0, "repetition_penalty": 9.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("max_tokens", "proposed"), [(30, 24), (7, 5), (5, 4), (2, 1), (12, 9)])
def test_everything_that_the_model_itself_proposes_is_kept(
    model: Gemma, options: dict[str, Any], max_tokens: int, proposed: int
):
    """Of five tokens a round, the fifth is no proposal."""
    session = speculative(model, model, text(6), 4)
    assert len(said(session, max_tokens, **options)) == max_tokens
    assert (session.proposed, session.accepted, session.acceptance) == (proposed, proposed, 1)


@pytest.mark.parametrize("kind", DRAFTS)
def test_each_round_says_what_was_kept_and_one_token_more(
    model: Gemma, draft: Callable[[str], Gemma], monkeypatch: pytest.MonkeyPatch, kind: str
):
    judge, rounds, hidden = draft(kind), itertools.count(), model.hidden

    def watch(ids: Tensor, **options: Any) -> Tensor:
        next(rounds)
        return hidden(ids, **options)

    session = speculative(model, judge, text(6), 3)
    monkeypatch.setattr(model, "hidden", watch)
    ids = said(session, 29)
    count = next(rounds)
    assert len(ids) == session.accepted + count
    refused = session.proposed - session.accepted
    assert 0 <= refused <= count  # no more than one a round: what comes after it is not judged
    assert session.accepted <= session.proposed <= 3 * count


# By chance: the same distribution.


def unlikelihood(counts: dict[tuple[int, ...], int], expected: dict[tuple[int, ...], float]) -> float:
    """How seldom a chi-square is so large by chance; outcomes that are expected less than 5 times are one."""
    total = sum(counts.values())
    assert all(expected.get(outcome, 0) > 0 for outcome in counts), "something impossible was said"
    often = [outcome for outcome, p in expected.items() if p * total >= 5]
    seen = [counts.get(outcome, 0) for outcome in often]
    hoped = [expected[outcome] * total for outcome in often]
    seen, hoped = [*seen, total - sum(seen)], [*hoped, total - sum(hoped)]
    pairs = [(s, h) for s, h in zip(seen, hoped, strict=True) if h > 1e-6 * total]
    chi = sum((s - h) ** 2 / h for s, h in pairs)
    return float(torch.special.gammaincc(torch.tensor((len(pairs) - 1) / 2), torch.tensor(chi / 2)))


@torch.no_grad()
def distribution(
    model: Gemma, prompt: list[int], count: int, sampling: Sampling
) -> dict[tuple[int, ...], float]:
    """The probability of each continuation of `count` tokens, without a cache and without a draft."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(count):
        longer: dict[tuple[int, ...], float] = {}
        for ids, mass in found.items():
            so_far = [*prompt, *ids]
            sampler = Sampler(sampling, so_far, model.config.vocab_size)
            p = sampler.probabilities(model(torch.tensor([so_far]))[0, -1])
            longer |= {(*ids, id): mass * float(p[id]) for id in p.nonzero().flatten().tolist()}
        found = longer
    return found


def tallied(
    session: SpeculativeSession, prompt: list[int], count: int, seeds: int, **options: Any
) -> dict[tuple[int, ...], int]:
    """How often each continuation's first `count` tokens were said."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(seeds):
        session.cut(0)
        session.feed(prompt)
        ids = said(session, 3, seed=seed, **options)
        counts[tuple(ids[:count])] = counts.get(tuple(ids[:count]), 0) + 1
    return counts


@pytest.fixture
def small(biting: Biting) -> Callable[..., Gemma]:
    """One layer and few ids, each with a probability to speak of: what is said can be counted."""

    def build(seed: int, vocab_size: int) -> Gemma:
        made = biting(
            seed,
            d_model=16,
            d_ff=16,
            head_dim=8,
            window=2,
            pattern=("sliding_attention",),
            vocab_size=vocab_size,
        )
        with torch.no_grad():
            made.unembedding.mul_(5.0)
        return made

    return build


PROMPT = [2, 1, 0]
SETTINGS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "as the model speaks": (4, 2, {"temperature": 1.0}),
    "three tokens": (3, 3, {"temperature": 1.5}),
    "with every cut": (
        20, 2, {"temperature": 2.0, "top_k": 5, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.5},
    ),
}  # fmt: skip


@often
@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize(("vocab_size", "count", "options"), SETTINGS.values(), ids=SETTINGS)
def test_by_chance_it_says_everything_as_often_as_the_model_alone(
    small: Callable[..., Gemma], vocab_size: int, count: int, options: dict[str, Any], lookahead: int
):
    model, other = small(1, vocab_size), small(2, vocab_size)
    session = SpeculativeSession(model, other, lookahead=lookahead)
    counts = tallied(session, PROMPT, count, 350, **options)
    expected = distribution(model, PROMPT, count, asked(3, **options))
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    assert unlikelihood(counts, expected) > 1e-3
    assert 0.1 < session.acceptance < 0.95


@often
def test_it_would_be_noticed_if_every_proposal_were_kept(
    small: Callable[..., Gemma], monkeypatch: pytest.MonkeyPatch
):
    """The test above bites: with a coin that always says yes, the draft speaks."""
    uniform = Sampler.uniform

    def kept(self: Sampler) -> float:
        number = uniform(self)
        return 0.0 if sys._getframe(1).f_code.co_name == "_round" else number

    monkeypatch.setattr(Sampler, "uniform", kept)
    model, other = small(1, 4), small(2, 4)
    session = SpeculativeSession(model, other, lookahead=2)
    counts = tallied(session, PROMPT, 2, 350, temperature=1.0)
    assert session.acceptance == 1
    assert unlikelihood(counts, distribution(model, PROMPT, 2, asked(3, temperature=1.0))) < 1e-6
    assert unlikelihood(counts, distribution(other, PROMPT, 2, asked(3, temperature=1.0))) > 1e-3


def test_one_seed_gives_one_continuation(model: Gemma, draft: Callable[[str], Gemma]):
    close = draft("one close to it")

    def ids(seed: int) -> list[int]:
        return said(speculative(model, close, text(6), 3), temperature=1.0, seed=seed)

    first = ids(1)
    torch.rand(5)
    assert ids(1) == first
    assert ids(2) != first


# What is reported.


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=str)
def test_log_probabilities_are_those_of_the_model_and_not_of_the_draft(
    model: Gemma, draft: Callable[[str], Gemma], kind: str, options: dict[str, Any]
):
    sampling = asked(20, logprobs=3, **options)
    ours = list(speculative(model, draft(kind), text(6), 4).decode(sampling))
    session = Session(model)
    session.feed(text(6))
    for mine, expected in zip(ours, session.decode(sampling), strict=True):
        assert mine.id == expected.id
        assert mine.logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert [id for id, _ in mine.top] == [id for id, _ in expected.top]
        assert [value for _, value in mine.top] == pytest.approx([v for _, v in expected.top], abs=1e-4)


def test_drawn_tokens_have_the_models_log_probabilities_too(model: Gemma, draft: Callable[[str], Gemma]):
    session = speculative(model, draft("a stranger"), text(6), 3)
    tokens = list(session.decode(asked(25, temperature=2.0, logprobs=0)))
    with torch.no_grad():
        full = model(torch.tensor([session.ids]))[0].log_softmax(-1)
    for place, token in enumerate(tokens, start=5):
        assert token.logprob == pytest.approx(float(full[place, token.id]), abs=1e-4)
    assert 0 < session.acceptance < 1


def test_nothing_is_reported_unless_it_is_asked_for(model: Gemma):
    assert list(speculative(model, model, text(6), 3).decode(asked(3))) == [
        Token(id) for id in plainly(model, text(6), 3)
    ]


# In the middle of a round.


def first_new(whole: list[int], after: int) -> int:
    """The first place from there on whose token has not come before."""
    return next(place for place in range(after, len(whole)) if whole[place] not in whole[:place])


@often
@pytest.mark.parametrize("kind", DRAFTS[:3])
@pytest.mark.parametrize("after", range(5))
def test_a_stop_id_inside_a_round_ends_it_there(
    model: Gemma, draft: Callable[[str], Gemma], kind: str, after: int
):
    """What was read and kept beyond it is forgotten, whether the next turn or the same one goes on."""
    whole = plainly(model, text(6), 20)
    place, judge = first_new(whole, after), draft(kind)
    session = speculative(model, judge, text(6), 5)
    assert said(session, 20, stop_ids=(whole[place],)) == whole[:place]
    assert session.finish == "stop"
    assert session.ids == text(6) + whole[:place]
    session.feed([107, *text(3)])
    assert said(session, 8) == plainly(model, [*text(6), *whole[:place], 107, *text(3)], 8)


@pytest.mark.parametrize("kind", DRAFTS)
def test_after_a_stop_the_same_turn_can_be_gone_on_with(
    model: Gemma, draft: Callable[[str], Gemma], kind: str
):
    whole = plainly(model, text(6), 20)
    place = first_new(whole, 2)
    session = speculative(model, draft(kind), text(6), 5)
    assert said(session, 20, stop_ids=(whole[place],)) == whole[:place]
    assert said(session, 20 - place) == whole[place:]


@often
@pytest.mark.parametrize("kind", DRAFTS[:3])
@pytest.mark.parametrize("taken", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("fed", [[], [107, 5, 150]], ids=["the same turn", "another turn"])
def test_a_continuation_that_nobody_wants_any_longer_can_be_gone_on_from(
    model: Gemma, draft: Callable[[str], Gemma], kind: str, taken: int, fed: list[int]
):
    """As when a stop string came: the iterator is closed, perhaps inside a round."""
    session = speculative(model, draft(kind), text(6), 4)
    first = [token.id for token in itertools.islice(session.decode(asked()), taken)]
    assert session.ids == text(6) + first
    session.feed(fed)
    assert said(session, 8) == plainly(model, [*text(6), *first, *fed], 8)


@pytest.mark.parametrize("taken", [1, 3])
def test_a_continuation_that_still_stands_inside_a_round_can_be_gone_on_from(model: Gemma, taken: int):
    """Not closed, as a plain session allows it: what it had read ahead must not be taken for what was fed."""
    session = speculative(model, model, text(6), 4)
    unfinished = session.decode(asked())
    first = [next(unfinished).id for _ in range(taken)]
    session.feed([107, 5, 150])
    assert said(session, 12) == plainly(model, [*text(6), *first, 107, 5, 150], 12)


@often
@pytest.mark.parametrize("kind", DRAFTS[:3])
@pytest.mark.parametrize("lookahead", [1, 4, 9])
def test_turn_after_turn_it_says_what_the_model_alone_says(
    model: Gemma, draft: Callable[[str], Gemma], kind: str, lookahead: int
):
    session, whole = speculative(model, draft(kind), [], lookahead), []
    for turn in (text(5), text(1), text(11)):
        session.feed(turn)
        whole += turn
        ids = said(session, 9)
        assert ids == plainly(model, whole, 9)
        whole += ids


@often
@pytest.mark.parametrize("kind", DRAFTS[:3])
@pytest.mark.parametrize("length", [4, 12, 14, 15, 16])
def test_after_a_cut_it_goes_on(model: Gemma, draft: Callable[[str], Gemma], kind: str, length: int):
    session = speculative(model, draft(kind), text(6), 3)
    ids = text(6) + said(session, 10)
    session.cut(length)
    session.feed([150])
    assert said(session, 10) == plainly(model, [*ids[:length], 150], 10)


def test_a_closed_session_frees_both_caches_and_goes_on(model: Gemma, draft: Callable[[str], Gemma]):
    session = speculative(model, draft("one close to it"), text(6), 3)
    tokens = session.decode(asked(20))
    first = [next(tokens).id for _ in range(4)]
    caches = [weakref.ref(session.cache), weakref.ref(session.draft.cache)]
    session.close()
    assert [cache() for cache in caches] == [None, None]
    assert first + [token.id for token in tokens] == plainly(model, text(6), 20)
    assert said(session, 5) == plainly(model, session.ids[:-5], 5)


@pytest.mark.parametrize("who", ["model", "draft"])
@pytest.mark.parametrize("calls", [0, 1, 4])
def test_interrupted_between_two_layers_it_goes_on_as_if_nothing_had_happened(
    model: Gemma, draft: Callable[[str], Gemma], who: str, calls: int
):
    close, whole, count = draft("one close to it"), plainly(model, text(10), 20), itertools.count()

    def fail(*_: Any) -> None:
        if next(count) == calls:
            raise KeyboardInterrupt

    session = speculative(model, close, text(10), 3)
    handle = {"model": model, "draft": close}[who].model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        said(session, 20)
    handle.remove()
    so_far = session.ids[10:]
    assert so_far == whole[: len(so_far)]
    assert len(so_far) < 20
    assert so_far + said(session, 20 - len(so_far)) == whole


def test_gradients_are_not_left_switched_off(model: Gemma, biting: Biting):
    tokens = speculative(model, biting(5), text(6), 3).decode(asked(9))
    next(tokens)
    assert torch.is_grad_enabled()


# What cannot be done.


def test_a_draft_with_another_vocabulary_is_refused(model: Gemma, biting: Biting):
    with pytest.raises(
        ValueError, match="the draft has 150 tokens, the model 200: their ids mean different things"
    ):
        SpeculativeSession(model, biting(5, vocab_size=150))


@pytest.mark.parametrize("lookahead", [0, -1])
def test_a_draft_that_proposes_nothing_is_refused(model: Gemma, lookahead: int):
    with pytest.raises(ValueError, match=f"lookahead={lookahead} must be at least 1"):
        SpeculativeSession(model, model, lookahead=lookahead)


def test_a_text_longer_than_the_draft_can_read_is_refused_at_the_call(model: Gemma, biting: Biting):
    short = biting(5, max_seq_len=20)
    session = speculative(model, short, text(10), 3)
    with pytest.raises(ValueError, match=r"10 tokens of prompt and 11 new ones exceed .* max_seq_len=20"):
        session.decode(asked(11))
    assert said(session, 10) == plainly(model, text(10), 10)


def test_a_text_longer_than_the_model_can_read_is_refused_at_the_call(model: Gemma, biting: Biting):
    session = speculative(model, biting(5, max_seq_len=500), text(10), 3)
    with pytest.raises(ValueError, match=r"10 tokens of prompt and 55 new ones exceed .* max_seq_len=64"):
        session.decode(asked(55))
