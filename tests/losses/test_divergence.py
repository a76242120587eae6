"""The plain definitions, by hand and by their properties."""

import math

import torch

from gemwright.losses.divergence import cross_entropy, forward_kl


def test_cross_entropy_is_minus_the_log_probability_of_the_target():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(7.0), 0.0]])
    expected = torch.tensor([math.log(4 / 3), math.log(8.0)])
    torch.testing.assert_close(cross_entropy(logits, torch.tensor([1, 1])), expected)


def test_forward_kl_weighs_log_ratios_by_the_teacher():
    """KL((1/4, 3/4) || (1/2, 1/2)) by hand; the other direction would give another number."""
    teacher, student = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2)
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    reverse = 0.5 * math.log(2.0) + 0.5 * math.log(2 / 3)
    torch.testing.assert_close(forward_kl(teacher, student), torch.tensor([forward]))
    torch.testing.assert_close(forward_kl(student, teacher), torch.tensor([reverse]))


def test_forward_kl_is_zero_only_between_equals():
    logits = torch.randn(4, 9)
    torch.testing.assert_close(forward_kl(logits, logits + 3.0), torch.zeros(4), rtol=0, atol=1e-6)
    assert (forward_kl(logits, torch.randn(4, 9)) > 0.01).all()


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
