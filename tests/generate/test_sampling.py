"""The next token: what may be drawn, how often it is drawn, and what is reported of it."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from gemwright.generate.sampling import Sampler, Sampling, Token, check, draw

LOGITS = torch.tensor([2.0, -3.0, 0.5, 1.0, -1.0, 0.0])
LAST = 1 - 2**-53
"""The largest number below 1 that a generator gives."""


def sampler(text: Sequence[int] = (), vocab_size: int = 6, **options: Any) -> Sampler:
    return Sampler(Sampling(**{"temperature": 1.0, **options}), text, vocab_size)


def plain(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> list[float]:
    """The definitions: sort, count, add up, in Python's floats."""
    top = float(logits.max())
    p = [math.exp((float(x) - top) / temperature) for x in logits]
    p = [x / sum(p) for x in p]
    order = sorted(range(len(p)), key=lambda id: -p[id])
    kept = order[:top_k]
    if top_p is not None and top_p < 1:
        mass = sum(p[id] for id in kept)
        shares = itertools.accumulate(p[id] / mass for id in kept)
        kept = kept[: 1 + sum(share < top_p for share in shares)]
    kept = [id for id in kept if p[id] >= (min_p or 0) * p[order[0]]]
    mass = sum(p[id] for id in kept)
    return [p[id] / mass if id in kept else 0.0 for id in range(len(p))]


def unlikelihood(counts: Tensor, probabilities: Tensor) -> float:
    """How seldom a chi-square is so large by chance, over the ids that may be drawn."""
    assert not counts[probabilities == 0].any()
    counts, expected = counts[probabilities > 0].double(), probabilities[probabilities > 0].double()
    expected = expected * counts.sum()
    chi = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2), chi / 2))


# What may be drawn.


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, 60, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.05, 0.5, 1.0])
def test_the_cuts_are_those_of_their_definitions(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
):
    logits = 3 * torch.randn(60)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    p = sampler(vocab_size=60, **options).probabilities(logits)
    expected = torch.tensor(plain(logits, **options))
    assert torch.equal(p > 0, expected > 0)
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=30),
    temperature=st.floats(1e-3, 100),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(1e-6, 1),
    min_p=st.none() | st.floats(1e-6, 1),
    penalty=st.floats(0.1, 10),
)
def test_probabilities_are_whole_and_the_likeliest_is_always_among_them(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, min_p: float | None,
    penalty: float,
):  # fmt: skip
    """Ties and extremes too."""
    tensor, count = torch.tensor(logits), len(logits)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    p = sampler([0], count, repetition_penalty=penalty, **options).probabilities(tensor)
    assert p.isfinite().all()
    assert (p >= 0).all()
    assert float(p.double().sum()) == pytest.approx(1, abs=1e-5)
    changed = tensor.clone()
    changed[0] = changed[0] / penalty if changed[0] > 0 else changed[0] * penalty
    assert float(p[changed == changed.max()].max()) == float(p.max())  # of equals, any
    assert top_k is None or int((p > 0).sum()) <= top_k


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 2, 3}),
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.5001}, {0, 1}),
        ({"top_p": 0.75}, {0, 1}),
        ({"top_p": 0.76}, {0, 1, 2}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4, 5}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.5}, {0, 1}),
        ({"min_p": 0.5001}, {0}),
        ({"min_p": 1e-9}, {0, 1, 2, 3, 4, 5}),
    ],
    ids=str,
)
def test_a_cut_that_falls_on_a_token_keeps_it(options: dict[str, Any], kept: set[int]):
    """Halves of halves, which floats hold exactly: what reaches the mass, or the share, is in."""
    halves = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]).log()
    if "top_k" in options:
        halves = LOGITS
    p = sampler(**options).probabilities(halves)
    assert set(p.nonzero().flatten().tolist()) == kept


def test_top_k_is_cut_before_top_p_and_top_p_of_what_is_left():
    """0.4 of all is two thirds of the first two: after top-k one token reaches 0.55, before it none does."""
    logits = torch.tensor([0.4, 0.1, 0.1, 0.1, 0.1, 0.2]).log()
    p = sampler(top_k=2, top_p=0.55).probabilities(logits)
    torch.testing.assert_close(p, torch.tensor([1.0, 0, 0, 0, 0, 0]))
    p = sampler(top_p=0.55).probabilities(logits)
    torch.testing.assert_close(p, torch.tensor([2 / 3, 0, 0, 0, 0, 1 / 3]))


def test_of_equal_tokens_top_k_keeps_no_more_than_it_says():
    p = sampler(top_k=2, vocab_size=5).probabilities(torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0]))
    assert sorted(p.tolist()) == [0, 0, 0, 0.5, 0.5]
    assert not p[[0, 4]].any()


def test_min_p_keeps_all_that_are_as_likely_as_the_likeliest():
    p = sampler(min_p=1.0, vocab_size=4).probabilities(torch.tensor([3.0, 1.0, 3.0, 3.0]))
    torch.testing.assert_close(p, torch.tensor([1.0, 0.0, 1.0, 1.0]) / 3)


@pytest.mark.parametrize("size", [1023, 1024, 1025, 256_000])
@pytest.mark.parametrize("top_p", [0.5, 0.999])
def test_a_nucleus_of_more_than_a_thousand_tokens_is_found(size: int, top_p: float):
    """Among 256,000 tokens the first 1,024 are looked at first; here they do not reach the mass."""
    logits = 0.5 * torch.randn(size)
    p = sampler(vocab_size=size, top_p=top_p).probabilities(logits)
    whole = logits.double().softmax(-1)
    ordered, ids = whole.sort(descending=True)
    count = int((ordered.cumsum(-1) < top_p).sum()) + 1
    assert int((p > 0).sum()) == pytest.approx(count, abs=1 + count * 1e-5)  # sums in fp32 and fp64
    assert (p[ids[: count - 3]] > 0).all()
    assert top_p - 1e-5 < float(whole[p > 0].sum()) < top_p + float(whole[p > 0].min()) + 1e-5


def test_a_small_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(monkeypatch: pytest.MonkeyPatch):
    """And nothing is sorted for it."""
    monkeypatch.setattr(torch.Tensor, "sort", lambda *_: pytest.fail("sorted"))
    logits = torch.zeros(256_000)
    logits[[17, 200_000, 255_999]] = torch.tensor([20.0, 21.0, 19.0])
    p = sampler(vocab_size=256_000, top_p=0.9).probabilities(logits)
    assert set(p.nonzero().flatten().tolist()) == {17, 200_000}


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-38])
def test_near_temperature_0_all_mass_is_on_the_likeliest(temperature: float):
    logits = torch.tensor([29.0, -30.0, 28.9, 0.0])
    p = sampler(temperature=temperature, vocab_size=4).probabilities(logits)
    torch.testing.assert_close(p, torch.tensor([1.0, 0, 0, 0]))


def test_at_temperature_0_all_mass_is_on_the_likeliest_whatever_else_is_asked_for():
    p = sampler(temperature=0.0, top_k=3, top_p=0.9, min_p=0.1).probabilities(LOGITS)
    assert p.tolist() == [1, 0, 0, 0, 0, 0]


# Repetition.


def test_what_stands_in_the_text_becomes_less_likely():
    """A positive logit is divided, a negative one multiplied: both go down, and once only."""
    p = sampler([0, 4, 4, 0], repetition_penalty=2.0).probabilities(LOGITS)
    torch.testing.assert_close(p, torch.tensor([1.0, -3.0, 0.5, 1.0, -2.0, 0.0]).softmax(-1))


def test_a_penalty_below_one_makes_repetition_likelier():
    p = sampler([0, 4], repetition_penalty=0.5).probabilities(LOGITS)
    torch.testing.assert_close(p, torch.tensor([4.0, -3.0, 0.5, 1.0, -0.5, 0.0]).softmax(-1))


def test_a_chosen_token_is_counted_and_so_is_one_that_was_seen():
    ours = sampler(temperature=0.0, repetition_penalty=10.0)
    assert [ours.choose(LOGITS).id for _ in range(3)] == [0, 3, 2]
    ours = sampler(temperature=0.0, repetition_penalty=10.0)
    ours.saw(0)
    assert ours.choose(LOGITS).id == 3


def test_tokens_that_a_draft_put_ahead_count_in_that_call_alone():
    ours, counted = sampler([4], repetition_penalty=3.0), sampler([4, 0, 3], repetition_penalty=3.0)
    before = ours.probabilities(LOGITS)
    assert torch.equal(ours.probabilities(LOGITS, [0, 3]), counted.probabilities(LOGITS))
    assert torch.equal(ours.probabilities(LOGITS), before)
    assert not torch.equal(counted.probabilities(LOGITS), before)


def test_the_penalty_of_an_empty_text_changes_nothing():
    assert torch.equal(sampler([], repetition_penalty=5.0).probabilities(LOGITS), LOGITS.softmax(-1))


# The draw.


@pytest.mark.parametrize(
    ("uniform", "id"), [(0.0, 1), (0.2499, 1), (0.25, 2), (0.5, 2), (0.7499, 2), (0.75, 4), (LAST, 4)]
)
def test_a_draw_looks_up_where_the_cumulative_distribution_passes_the_number(uniform: float, id: int):
    assert draw(torch.tensor([0.0, 0.25, 0.5, 0.0, 0.25, 0.0]), uniform) == id


@given(
    p=st.lists(st.just(0.0) | st.floats(0, 1, width=32), min_size=1, max_size=12).filter(any),
    uniform=st.floats(0, LAST) | st.sampled_from([0.0, 2.0**-53, 0.5, LAST]),
)
@example(p=[0.0, 1e-30, 1.0, 0.0], uniform=0.0)
@example(p=[1.0, 1e-30, 0.0], uniform=LAST)
@example(p=[0.0, 2.0**-149, 0.0], uniform=LAST)
def test_what_has_no_probability_is_never_drawn(p: list[float], uniform: float):
    assert p[draw(torch.tensor(p), uniform)] > 0


@given(uniforms=st.lists(st.floats(0, LAST), min_size=2, max_size=2).map(sorted))
def test_a_larger_number_draws_no_earlier_token(uniforms: list[float]):
    p = LOGITS.softmax(-1)
    low, high = (draw(p, uniform) for uniform in uniforms)
    assert low <= high


@pytest.mark.parametrize("uniform", [0.0, 0.3, LAST])
def test_the_ends_of_a_large_vocabulary_are_within_it(uniform: float):
    """256,000 probabilities in fp32 add up to something beside 1."""
    p = torch.full((256_000,), 1 / 256_000)
    id = draw(p, uniform)
    assert id == pytest.approx(uniform * 256_000, abs=1)
    assert id < 256_000


def test_unlikely_tokens_behind_a_likely_one_keep_their_places():
    """Each adds a billionth to 1, which a sum in fp32 would not notice."""
    p = torch.full((1000,), 1e-9)
    p[0] = 1.0
    whole = float(p.double().sum())
    assert [draw(p, (1 + place * 1e-9) / whole) for place in (0.5, 300.5, 998.5)] == [1, 301, 999]


CUTS: list[dict[str, Any]] = [
    {}, {"temperature": 0.5}, {"temperature": 2.5}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.95, "min_p": 0.05},
]  # fmt: skip


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_tokens_are_drawn_as_often_as_their_probability_says(options: dict[str, Any]):
    ours = sampler(seed=5, **options)
    counts = torch.bincount(torch.tensor([ours.choose(LOGITS).id for _ in range(3000)]), minlength=6)
    expected = torch.tensor(
        plain(LOGITS, **{"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, **options})
    )
    assert unlikelihood(counts, expected) > 1e-3


def test_another_temperature_would_be_noticed():
    """The test above bites: the draws at 1.0 against what 1.15 would give."""
    ours = sampler(seed=5)
    counts = torch.bincount(torch.tensor([ours.choose(LOGITS).id for _ in range(3000)]), minlength=6)
    assert unlikelihood(counts, (LOGITS / 1.15).softmax(-1)) < 1e-3


def test_numbers_lie_between_0_and_1_and_are_spread_evenly():
    ours = sampler(seed=1)
    numbers = torch.tensor([ours.uniform() for _ in range(5000)], dtype=torch.float64)
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
    assert unlikelihood(torch.histc(numbers, 20, 0, 1), torch.full((20,), 0.05)) > 1e-3


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63])
def test_a_seed_gives_the_same_numbers_whatever_else_is_drawn(seed: int):
    first, again, other = sampler(seed=seed), sampler(seed=seed), sampler(seed=12345)
    numbers = [first.uniform() for _ in range(5)]
    torch.manual_seed(9)
    torch.rand(3)
    assert [again.uniform() for _ in range(5)] == numbers
    assert [other.uniform() for _ in range(5)] != numbers


def test_greedy_choice_needs_no_random_number():
    ours, untouched = sampler(temperature=0.0), sampler()
    ours.choose(LOGITS)
    assert ours.uniform() == untouched.uniform()


def test_of_two_equal_logits_the_first_is_taken_at_temperature_0():
    for size in (3, 40, 5000):
        logits = torch.zeros(size)
        logits[[1, size - 1]] = 4.0
        assert sampler(temperature=0.0, vocab_size=size).choose(logits).id == 1
        assert sampler(temperature=0.0, vocab_size=size).probabilities(logits)[1] == 1


def test_greedy_choice_is_the_argmax():
    for logits in torch.randn(20, 30):
        assert sampler(temperature=0.0, vocab_size=30).choose(logits).id == int(logits.argmax())


# What is reported.


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.3, "top_k": 2}, {"min_p": 0.2}], ids=str
)
def test_log_probabilities_are_the_models_own(options: dict[str, Any]):
    """Before penalty, temperature and cuts, whichever token these choose."""
    logits = 4 * torch.randn(30)
    expected = logits.double().log_softmax(-1)
    token = sampler([1, 2], 30, logprobs=4, repetition_penalty=3.0, **options).choose(logits)
    assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
    best = sorted(range(30), key=lambda id: -float(expected[id]))[:4]
    assert [id for id, _ in token.top] == best
    assert [value for _, value in token.top] == pytest.approx([float(expected[id]) for id in best], abs=1e-5)


def test_no_log_probability_is_reported_unless_it_is_asked_for():
    assert sampler(temperature=0.0).choose(LOGITS) == Token(0, None, ())


def test_a_log_probability_may_be_asked_for_without_alternatives():
    token = sampler(temperature=0.0, logprobs=0).choose(LOGITS)
    assert token == Token(0, pytest.approx(float(LOGITS.log_softmax(-1)[0])), ())


def test_there_are_no_more_alternatives_than_tokens():
    top = sampler(temperature=0.0, logprobs=50).choose(LOGITS).top
    assert [id for id, _ in top] == [0, 3, 2, 5, 4, 1]
    assert sum(math.exp(value) for _, value in top) == pytest.approx(1)


# What may be asked for.


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 0}, {"temperature": -0.1}, {"temperature": math.inf}, {"temperature": math.nan},
        {"top_k": 0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}, {"min_p": 0.0},
        {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": -1.0},
        {"repetition_penalty": math.inf}, {"logprobs": -1}, {"seed": 2**64}, {"top": 5},
    ],
    ids=str,
)  # fmt: skip
def test_what_has_no_meaning_is_refused(options: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


def test_a_continuation_is_greedy_and_ends_on_eos_and_the_end_of_a_turn():
    assert Sampling().temperature == 0
    assert Sampling().stop_ids == (1, 107)


@pytest.mark.parametrize(
    ("ids", "stop_ids", "told"),
    [
        ([2, 6], (), r"the prompt holds the id 6, outside 0\.\.5"),
        ([-1], (), r"the prompt holds the id -1, outside 0\.\.5"),
        ([2], (1, 107), r"stop_ids holds the id 107, outside 0\.\.5"),
        ([2], (-1,), r"stop_ids holds the id -1, outside 0\.\.5"),
    ],
)
def test_ids_that_the_model_has_no_row_for_are_refused(ids: list[int], stop_ids: tuple[int, ...], told: str):
    with pytest.raises(ValueError, match=told):
        check(Sampling(stop_ids=stop_ids), ids, 6)


def test_all_rows_of_the_model_may_be_asked_for():
    check(Sampling(stop_ids=(0, 5)), [0, 5], 6)


def test_a_model_that_diverged_says_so():
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        sampler([0], 4, temperature=1.0).choose(torch.tensor([1.0, torch.nan, 0.0, 2.0]))
