"""The plain definitions, by hand and by their properties."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gemwright.losses.divergence import (
    cross_entropy,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    sparse_cross_entropy,
    z_loss,
)

LN2, LN3 = math.log(2), math.log(3)
TEACHER, STUDENT = torch.tensor([[0.0, LN3]]), torch.zeros(1, 2)  # (1/4, 3/4) and (1/2, 1/2)
FORWARD = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
REVERSE = 0.5 * math.log(2.0) + 0.5 * math.log(2 / 3)


def test_cross_entropy_is_minus_the_log_probability_of_the_target():
    logits = torch.tensor([[0.0, LN3], [math.log(7.0), 0.0]])
    expected = torch.tensor([math.log(4 / 3), math.log(8.0)])
    torch.testing.assert_close(cross_entropy(logits, torch.tensor([1, 1])), expected)


def test_forward_kl_weighs_log_ratios_by_the_teacher():
    """KL((1/4, 3/4) || (1/2, 1/2)) by hand; the other direction would give another number."""
    torch.testing.assert_close(forward_kl(TEACHER, STUDENT), torch.tensor([FORWARD]))
    torch.testing.assert_close(forward_kl(STUDENT, TEACHER), torch.tensor([REVERSE]))


def test_reverse_kl_weighs_log_ratios_by_the_student():
    torch.testing.assert_close(reverse_kl(TEACHER, STUDENT), torch.tensor([REVERSE]))
    assert abs(FORWARD - REVERSE) > 0.01


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl])
def test_a_kl_is_zero_only_between_equals(divergence: Callable[..., Tensor]):
    logits = torch.randn(4, 9)
    torch.testing.assert_close(divergence(logits, logits + 3.0), torch.zeros(4), rtol=0, atol=1e-6)
    assert (divergence(logits, torch.randn(4, 9)) > 0.01).all()


def test_forward_kl_is_the_reports_objective_less_the_teachers_entropy():
    teacher, student = torch.randn(3, 9), torch.randn(3, 9)
    t = teacher.softmax(-1)
    objective = -(t * student.log_softmax(-1)).sum(-1)
    entropy = -(t * t.log()).sum(-1)
    torch.testing.assert_close(forward_kl(teacher, student), objective - entropy)


def test_forward_kl_with_a_certain_teacher_is_cross_entropy():
    student, targets = torch.randn(5, 9), torch.tensor([0, 3, 8, 1, 1])
    teacher = torch.full((5, 9), -100.0).scatter(1, targets[:, None], 100.0)
    torch.testing.assert_close(forward_kl(teacher, student), cross_entropy(student, targets))


def test_generalised_jsd_goes_by_the_mixture_of_the_probabilities():
    """At beta 1/4, M = (1/4)(1/4, 3/4) + (3/4)(1/2, 1/2) = (7/16, 9/16)."""
    to_teacher = 0.25 * math.log(4 / 7) + 0.75 * math.log(12 / 9)
    to_student = 0.5 * math.log(8 / 7) + 0.5 * math.log(8 / 9)
    expected = 0.25 * to_teacher + 0.75 * to_student
    torch.testing.assert_close(generalized_jsd(TEACHER, STUDENT, 0.25), torch.tensor([expected]))


def test_a_mixture_of_log_probabilities_would_be_another_divergence():
    t, s = TEACHER.log_softmax(-1), STUDENT.log_softmax(-1)
    m = (0.5 * t + 0.5 * s).log_softmax(-1)
    broken = 0.5 * (t.exp() * (t - m)).sum(-1) + 0.5 * (s.exp() * (s - m)).sum(-1)
    assert abs(broken - generalized_jsd(TEACHER, STUDENT, 0.5)) > 1e-4


def test_generalised_jsd_ends_in_the_two_kls_and_does_not_vanish_there():
    torch.testing.assert_close(generalized_jsd(TEACHER, STUDENT, 0.0), torch.tensor([FORWARD]))
    torch.testing.assert_close(generalized_jsd(TEACHER, STUDENT, 1.0), torch.tensor([REVERSE]))


@pytest.mark.parametrize(("beta", "limit"), [(1e-3, FORWARD), (1 - 1e-3, REVERSE)])
def test_generalised_jsd_near_an_end_is_its_kl_times_the_distance(beta: float, limit: float):
    """That is what the formula vanishes like, and why its ends are defined apart."""
    near = generalized_jsd(TEACHER.double(), STUDENT.double(), beta).item()
    assert near / 1e-3 == pytest.approx(limit, rel=5e-3)


def test_generalised_jsd_at_one_half_is_the_symmetric_one_and_at_most_ln_2():
    teacher, student = 9 * torch.randn(50, 9), 9 * torch.randn(50, 9)
    middle = generalized_jsd(teacher, student, 0.5)
    torch.testing.assert_close(middle, generalized_jsd(student, teacher, 0.5))
    assert (middle > 0).all()
    assert (middle < LN2 + 1e-6).all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jsd_in_fp32_equals_float64_where_the_distributions_hardly_meet(beta: float):
    teacher, student = 60 * torch.randn(8, 9), 60 * torch.randn(8, 9)
    exact = generalized_jsd(teacher.double(), student.double(), beta)
    torch.testing.assert_close(generalized_jsd(teacher, student, beta).double(), exact, rtol=1e-5, atol=1e-6)


QUARTERS = torch.tensor([[0.0, 0.0, LN2, math.log(4)]])  # (1, 1, 2, 4) eighths


def test_sparse_cross_entropy_is_over_the_kept_ids():
    ids, probs = torch.tensor([[3, 1]]), torch.tensor([[0.75, 0.25]])
    expected = 0.75 * LN2 + 0.25 * 3 * LN2
    torch.testing.assert_close(sparse_cross_entropy(QUARTERS, ids, probs), torch.tensor([expected]))


def test_sparse_cross_entropy_with_a_tail_counts_all_other_ids_as_one():
    """Ids 0 and 2 are the tail: 3/8 of the student's mass, and 1 - 0.7 of the teacher's."""
    ids, probs = torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.2]])
    expected = 0.5 * LN2 + 0.2 * 3 * LN2 - 0.3 * math.log(3 / 8)
    loss = sparse_cross_entropy(QUARTERS, ids, probs, tail=True)
    torch.testing.assert_close(loss, torch.tensor([expected]))


@pytest.mark.parametrize("tail", [False, True])
def test_an_id_with_probability_0_is_padding_even_if_it_is_kept_elsewhere(tail: bool):
    without = sparse_cross_entropy(QUARTERS, torch.tensor([[0, 2]]), torch.tensor([[0.3, 0.2]]), tail=tail)
    ids, probs = torch.tensor([[0, 2, 0, 3]]), torch.tensor([[0.3, 0.2, 0.0, 0.0]])
    torch.testing.assert_close(sparse_cross_entropy(QUARTERS, ids, probs, tail=tail), without)


def test_sparse_cross_entropy_to_one_certain_id_is_cross_entropy():
    logits, targets = torch.randn(5, 9), torch.tensor([0, 3, 8, 1, 1])
    sparse = sparse_cross_entropy(logits, targets[:, None], torch.ones(5, 1))
    torch.testing.assert_close(sparse, cross_entropy(logits, targets))


def test_sparse_cross_entropy_to_all_ids_is_forward_kl_plus_the_teachers_entropy():
    teacher, student = torch.randn(3, 9), torch.randn(3, 9)
    t = teacher.softmax(-1)
    loss = sparse_cross_entropy(student, torch.arange(9).expand(3, 9), t)
    torch.testing.assert_close(loss, forward_kl(teacher, student) - (t * t.log()).sum(-1))


def test_z_loss_is_the_squared_log_of_the_normaliser():
    torch.testing.assert_close(
        z_loss(torch.tensor([[0.0, LN3], [0.0, 0.0]])), torch.tensor([4 * LN2**2, LN2**2])
    )


def test_z_loss_sees_a_shift_of_the_logits_that_no_probability_sees():
    logits = torch.randn(4, 9)
    expected = (logits.logsumexp(-1) + 5) ** 2
    torch.testing.assert_close(z_loss(logits + 5), expected)
