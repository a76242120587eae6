"""Shares, moving averages and arcs, against loops and formulas that are written as the papers have them."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as draws
from torch import Tensor

from gemwright.merge.coefficients import mean_angle, moving_average, shares, spherical

PARTS = draws.floats(min_value=0, max_value=1)


def gram(vectors: Sequence[Tensor]) -> np.ndarray:
    return np.array([[float(one.double() @ other.double()) for other in vectors] for one in vectors])


def turned(vectors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """What the coefficients make of the vectors."""
    coefficients = spherical(gram(vectors), weights)
    return sum((c * v.double() for c, v in zip(coefficients, vectors, strict=True)), torch.zeros(()))


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """The textbook's, on tensors."""
    one, other = one.double(), other.double()
    angle = math.acos(float(one @ other / one.norm() / other.norm()))
    keep, take = math.sin((1 - share) * angle), math.sin(share * angle)
    return (keep * one + take * other) / math.sin(angle)


def pair(degrees: float, one: float = 1.0, other: float = 1.0) -> np.ndarray:
    """The products of two vectors of some lengths at an angle."""
    across = one * other * math.cos(math.radians(degrees))
    return np.array([[one * one, across], [across, other * other]])


def test_shares_are_equal_unless_weights_are_given():
    assert shares(4, None) == [0.25] * 4


def test_weights_need_not_sum_to_1():
    assert shares(2, [6.0, 2.0]) == [0.75, 0.25]


@given(mu=PARTS, values=draws.lists(draws.floats(-1, 1), min_size=1, max_size=6))
def test_a_moving_average_is_its_loop(mu: float, values: list[float]):
    ema = values[0]
    for value in values[1:]:
        ema = (1 - mu) * ema + mu * value
    counted = moving_average(len(values), mu)
    assert math.fsum(counted) == pytest.approx(1)
    assert math.fsum(c * v for c, v in zip(counted, values, strict=True)) == pytest.approx(ema, abs=1e-12)


@given(degrees=draws.floats(0.1, 179.9), share=PARTS, lengths=draws.tuples(*[draws.floats(0.01, 100)] * 2))
def test_two_vectors_turn_by_the_textbooks_formula(
    degrees: float, share: float, lengths: tuple[float, float]
):
    angle = math.radians(degrees)
    wanted = [math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)]
    assert spherical(pair(degrees, *lengths), [1 - share, share]) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_half_way_between_orthogonal_vectors_both_count_root_half():
    """WARP's usual case: two runs' task vectors stand at 90 degrees."""
    assert spherical(pair(90)) == pytest.approx([math.sqrt(0.5)] * 2)


@given(share=PARTS)
def test_the_length_of_orthogonal_vectors_is_kept_where_an_average_shrinks_it(share: float):
    one, other = torch.eye(8)[:2] * 3
    assert float(turned([one, other], [1 - share, share]).norm()) == pytest.approx(3)
    averaged = ((1 - share) * one + share * other).norm()
    assert float(averaged) == pytest.approx(3 * math.sqrt(1 - 2 * (share - share**2)), rel=1e-5)


@pytest.mark.parametrize("degrees", [0, 0.01, 30, 90, 150, 179.99, 180])
def test_the_ends_of_an_arc_are_met_exactly(degrees: float):
    assert spherical(pair(degrees, 1.7, 0.3), [1.0, 0.0]) == [1, 0]
    assert spherical(pair(degrees, 1.7, 0.3), [0.0, 1.0]) == [0, 1]


@pytest.mark.parametrize("weights", [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
def test_a_share_of_everything_is_the_model_itself_wherever_it_stands(weights: list[float]):
    vectors = torch.randn(3, 50)
    assert spherical(gram(list(vectors)), weights) == weights


@pytest.mark.parametrize(
    "products",
    [
        pytest.param(pair(0, 2, 3), id="parallel"),
        pytest.param(pair(0.01), id="almost parallel"),
        pytest.param(pair(180, 2, 3), id="opposite"),
        pytest.param(pair(179.99), id="almost opposite"),
        pytest.param(pair(60, 0, 1), id="the first is nothing"),
        pytest.param(pair(60, 1, 0), id="the second is nothing"),
        pytest.param(pair(60, 0, 0), id="both are nothing"),
    ],
)
def test_where_there_is_no_arc_it_is_a_line(products: np.ndarray):
    assert spherical(products, [0.25, 0.75]) == [0.25, 0.75]


def test_where_the_arc_gives_way_to_the_line_they_are_as_good_as_one():
    """At 0.001 radians the formula, computed, and the line differ by less than fp32 can hold."""
    degrees = math.degrees(1.0001e-3)
    assert spherical(pair(degrees), [0.3, 0.7]) == pytest.approx([0.3, 0.7], abs=1e-6)


def test_rounding_takes_no_cosine_beyond_1():
    vector = torch.randn(999)
    assert spherical(gram([vector, vector * 3])) == [0.5, 0.5]
    products = np.array([[1.0, 1.0 + 1e-12], [1.0 + 1e-12, 1.0]])
    assert spherical(products) == [0.5, 0.5]
    assert mean_angle(products) == 0


def test_a_third_vector_joins_with_a_third_and_a_fourth_with_a_quarter():
    one, two, three, four = torch.randn(4, 200)
    of_three = slerp(slerp(one, two, 1 / 2), three, 1 / 3)
    torch.testing.assert_close(turned([one, two, three]), of_three)
    torch.testing.assert_close(turned([one, two, three, four]), slerp(of_three, four, 1 / 4))


def test_with_weights_each_joins_with_its_share_of_those_so_far():
    one, two, three = torch.randn(3, 200)
    wanted = slerp(slerp(one, two, 3 / 5), three, 5 / 10)
    torch.testing.assert_close(turned([one, two, three], [2.0, 3.0, 5.0]), wanted)


def test_the_order_of_three_counts_a_little():
    vectors = list(torch.randn(3, 20))
    one, other = turned(vectors), turned(vectors[::-1])
    assert not torch.allclose(one, other, atol=1e-3)
    assert float(one @ other / one.norm() / other.norm()) > 0.9


def test_one_alone_counts_1():
    assert spherical(np.array([[2.0]])) == [1.0]


def test_the_mean_angle_is_over_all_pairs():
    one, other = torch.eye(3)[0], torch.eye(3)[1]
    assert mean_angle(gram([one, other])) == pytest.approx(90)
    assert mean_angle(gram([one, other, -2 * one])) == pytest.approx((90 + 90 + 180) / 3)


def test_what_is_nothing_has_no_angle():
    one, nothing = torch.ones(3), torch.zeros(3)
    assert mean_angle(gram([one, nothing])) is None
    assert mean_angle(gram([one, nothing, one])) == pytest.approx(0, abs=1e-5)
