"""Verdicts: the p-value is Student's, and a direction counts where it is clear of chance."""

import math
import random

import pytest

from gemwright.ablate.verdict import Claim, overall, paired_p


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.706), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (30, 2.0423)],
)
def test_the_five_per_cent_points_are_those_of_the_tables(freedom: int, t: float):
    """Differences with mean m and standard deviation s have t = m / (s / sqrt(n))."""
    count = freedom + 1
    spread = [math.cos(2 * math.pi * k / count) for k in range(count)] if count > 2 else [1.0, -1.0]
    deviation = math.sqrt(sum(one**2 for one in spread) / freedom)
    mean = t * deviation / math.sqrt(count)
    assert paired_p([mean + one for one in spread]) == pytest.approx(0.05, abs=1e-4)


def test_chance_is_resolved_one_time_in_twenty():
    draw = random.Random(0)
    found = [paired_p([draw.gauss(0, 1) for _ in range(3)]) for _ in range(4000)]
    assert sum(p is not None and p < 0.05 for p in found) / 4000 == pytest.approx(0.05, abs=0.012)


def test_one_seed_is_no_test():
    assert paired_p([1.0]) is None


def test_equal_differences_have_no_spread_to_doubt():
    assert (paired_p([0.0, 0.0, 0.0]), paired_p([1.0, 1.0, 1.0])) == (1.0, 0.0)


def judged(better: list[float], worse: list[float], **how: bool) -> str:
    values = {"a": {"nats": better}, "b": {"nats": worse}}
    return Claim("a", "b", "nats", **how).judged(values)["verdict"]


CLEAR, NEARLY = [1.0, 1.1, 1.05], [2.0, 2.1, 2.06]


def test_less_is_better_where_it_is_said():
    assert judged(CLEAR, NEARLY) == "same direction"
    assert judged(NEARLY, CLEAR) == "opposite"
    assert judged(NEARLY, CLEAR, lower=False) == "same direction"


def test_what_might_be_chance_is_not_resolved():
    assert judged([1.0, 2.0, 3.0], [1.1, 1.9, 3.2]) == "not resolved"


def test_where_no_difference_is_expected_a_clear_one_is_opposite():
    assert judged(CLEAR, NEARLY, equal=True) == "opposite"
    assert judged([1.0, 2.0, 3.0], [1.1, 1.9, 3.0], equal=True) == "no difference found"


def test_a_single_seed_says_so():
    assert judged([1.0], [2.0]) == "one seed, no test"


def test_the_text_tells_difference_p_and_what_was_expected():
    claim = Claim("a", "b", "nats").judged({"a": {"nats": CLEAR}, "b": {"nats": NEARLY}})
    assert claim["text"].startswith("nats, a less b: -1.003 ± 0.006, p = ")
    assert claim["text"].endswith("(less expected): same direction.")


def test_claims_that_agree_are_one_word_and_others_are_counted():
    words = [{"verdict": "same direction"}, {"verdict": "same direction"}, {"verdict": "opposite"}]
    assert overall(words[:2]) == "same direction"
    assert overall(words) == "same direction: 2 of 3, opposite: 1 of 3"
    assert overall([]) == "nothing was claimed"
