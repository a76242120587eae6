"""Losses in chunks against their definitions in float64: values and both gradients, over all options."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gemwright.losses.divergence import generalized_jsd
from tests.losses.cases import (
    D,
    E,
    N,
    V,
    assert_equal_to_exact,
    both_logits,
    bytes_for,
    capped,
    case,
    ce,
    div,
    exact_ce,
    exact_div,
    with_gradients,
)

CAPS = [(None, None), (30.0, 30.0), (4.0, 4.0), (4.0, 50.0), (None, 7.0), (50.0, None)]
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
ROWS = [11, 5, 3, 2, 1]  # tokens a chunk; of 11


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 30.0, 4.0, 50.0])
def test_cross_entropy_equals_its_definition(cap: float | None, z_loss: float, rows: int):
    c = case()
    ours = ce(c, cap, z_loss=z_loss, chunk_bytes=bytes_for(rows, 1))
    assert_equal_to_exact(with_gradients(ours, c), with_gradients(exact_ce(c, cap, z_loss=z_loss), c))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("cap", "teacher_cap"), CAPS)
def test_a_divergence_equals_its_definition(
    cap: float | None, teacher_cap: float | None, beta: float, temperature: float
):
    """The teacher is 9 wide and the student 6; their caps may differ."""
    c = case()
    exact = with_gradients(exact_div(c, cap, teacher_cap, beta=beta, temperature=temperature), c)
    for rows in (11, 3):
        ours = div(c, cap, teacher_cap, beta=beta, temperature=temperature, chunk_bytes=bytes_for(rows, 2))
        assert_equal_to_exact(with_gradients(ours, c), exact)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("beta", BETAS)
def test_the_size_of_a_chunk_changes_no_divergence(beta: float, rows: int):
    c = case()
    whole = with_gradients(div(c, 4.0, 7.0, beta=beta), c)
    assert_equal_to_exact(
        with_gradients(div(c, 4.0, 7.0, beta=beta, chunk_bytes=bytes_for(rows, 2)), c), whole
    )


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("next_token", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_next_token_prediction_and_z_loss_are_mixed_in_without_temperature(
    beta: float, temperature: float, next_token: float, z_loss: float
):
    c = case()
    options = {"beta": beta, "temperature": temperature, "next_token": next_token, "z_loss": z_loss}
    for caps in ((4.0, 7.0), (None, None)):
        ours = div(c, *caps, chunk_bytes=bytes_for(4, 2), **options)
        assert_equal_to_exact(with_gradients(ours, c), with_gradients(exact_div(c, *caps, **options), c))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("cap", [None, 4.0])
def test_mixed_with_nothing_but_the_next_token_it_is_cross_entropy(cap: float | None, beta: float):
    c = case()
    ours = with_gradients(div(c, cap, 7.0, beta=beta, temperature=2.0, next_token=1.0), c)
    assert_equal_to_exact(ours, with_gradients(ce(c, cap), c))


@pytest.mark.parametrize(("student_pads", "teacher_pads"), [(3, 0), (0, 3), (2, 5)])
@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("beta", BETAS)
def test_padding_rows_of_a_head_are_as_if_they_were_not_there(
    beta: float, cap: float | None, student_pads: int, teacher_pads: int
):
    """They are large here, so that they would be seen; the student's get a gradient of zero."""
    c = case()
    options = {"beta": beta, "temperature": 2.0, "next_token": 0.3, "z_loss": 0.1}
    value, by_hidden, by_weight = with_gradients(exact_div(c, cap, 7.0, **options), c)
    expected = [value, by_hidden, torch.cat((by_weight, torch.zeros(student_pads, D)))]
    padded = c._replace(
        weight=torch.cat((c.weight.detach(), 5 * torch.randn(student_pads, D))).requires_grad_(),
        teacher_weight=torch.cat((c.teacher_weight, 5 * torch.randn(teacher_pads, E))),
    )
    ours = div(padded, cap, 7.0, pieces=V, chunk_bytes=bytes_for(4, 2), **options)
    assert_equal_to_exact(with_gradients(ours, padded), expected)


def broken(name: str, c: Any, beta: float) -> Tensor:
    """What `exact_div(c, 4, 7, beta=beta, temperature=2.0)` would be with one usual mistake in it."""
    student, teacher = both_logits(c, 4.0, None if name == "teacher's cap left out" else 7.0)
    if name == "student's cap left out":
        student, _ = both_logits(c, None, None)
    if name == "temperature before the cap":
        student, teacher = (
            capped(raw / 2, cap) * 2 for raw, cap in zip(both_logits(c, None, None), (4.0, 7.0), strict=True)
        )
    s, t = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    if name == "mixture in log space":
        m = (beta * t + (1 - beta) * s).log_softmax(-1)
    else:
        m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    loss = beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)
    if name not in ("mixture in log space", "ends by the formula"):
        loss = generalized_jsd(teacher / 2, student / 2, 1 - beta if name == "beta turned round" else beta)
    squared = 1 if name == "temperature squared left out" else 4
    return (squared * loss * c.token_weights.double()).sum()


@pytest.mark.parametrize(
    ("mistake", "beta"),
    [
        ("teacher's cap left out", 0.0),
        ("student's cap left out", 0.0),
        ("temperature before the cap", 0.0),
        ("temperature squared left out", 0.0),
        ("temperature squared left out", 0.5),
        ("mixture in log space", 0.5),
        ("mixture in log space", 0.1),
        ("ends by the formula", 0.0),
        ("ends by the formula", 1.0),
        ("beta turned round", 0.0),
        ("beta turned round", 0.1),
    ],
)
def test_the_comparison_would_notice(mistake: str, beta: float):
    """By far: a hundred times the tolerance, in the value and in some element of each gradient."""
    c = case()
    wrong = with_gradients(broken(mistake, c, beta), c)
    right = with_gradients(exact_div(c, 4.0, 7.0, beta=beta, temperature=2.0), c)
    assert_equal_to_exact(with_gradients(broken("none", c, beta), c), right)
    for bad, good in zip(wrong, right, strict=True):
        with pytest.raises(AssertionError):
            torch.testing.assert_close(bad, good, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_distributions_have_no_divergence_and_no_gradient(beta: float):
    c = case()
    same = c._replace(teacher_hidden=c.hidden.detach(), teacher_weight=c.weight.detach())
    for result in with_gradients(div(same, 4.0, 4.0, beta=beta), same):
        torch.testing.assert_close(result, torch.zeros_like(result), rtol=0, atol=2e-6)


def test_the_gradient_of_distillation_is_p_minus_t_times_the_caps_slope():
    c = case()._replace(token_weights=torch.ones(N))
    with torch.no_grad():
        raw = c.hidden @ c.weight.T
        p = capped(raw, 4.0).softmax(-1)
        t = capped(c.teacher_hidden @ c.teacher_weight.T, 7.0).softmax(-1)
        expected = ((p - t) * (1 - torch.tanh(raw / 4.0) ** 2)) @ c.weight
    (grad,) = torch.autograd.grad(div(c, 4.0, 7.0), c.hidden)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("cap", "factor", "tolerance"), [(4.0, 1000, 1e-4), (None, 20, 1e-3)])
def test_extreme_logits_overflow_nothing(
    cap: float | None, factor: float, tolerance: float, beta: float, temperature: float
):
    """Far beyond a cap exp(2 * logit / cap) overflows; without one, logits are some hundreds."""
    c = case()
    with torch.no_grad():
        c.hidden[::2] *= factor
        c.teacher_hidden[::3] *= factor
    options = {"beta": beta, "temperature": temperature, "next_token": 0.3}
    teacher_cap = cap and 7.0
    ours = with_gradients(div(c, cap, teacher_cap, **options), c)
    assert_equal_to_exact(ours, with_gradients(exact_div(c, cap, teacher_cap, **options), c), tolerance)


@pytest.mark.parametrize(("cap", "factor", "tolerance"), [(4.0, 1000, 1e-4), (None, 20, 1e-3)])
def test_extreme_logits_overflow_nothing_in_cross_entropy(cap: float | None, factor: float, tolerance: float):
    c = case()
    with torch.no_grad():
        c.hidden[::2] *= factor
    options = {"z_loss": 1e-3}
    ours = with_gradients(ce(c, cap, **options), c)
    assert_equal_to_exact(ours, with_gradients(exact_ce(c, cap, **options), c), tolerance)


def all_at_minus_the_cap(temperature: float, cap: float, **options: Any) -> None:
    c = case()
    with torch.no_grad():
        c.hidden.copy_(torch.full((N, D), -1e4))
        c.weight.abs_()
    options = {"temperature": temperature, **options}
    ours = with_gradients(div(c, cap, 7.0, **options), c)
    assert_equal_to_exact(ours, with_gradients(exact_div(c, cap, 7.0, **options), c), 1e-4)


def test_logits_that_all_lie_at_minus_a_cap_of_30_are_exact():
    all_at_minus_the_cap(2.0, 30.0, z_loss=0.1, next_token=0.3)


@pytest.mark.parametrize(
    ("temperature", "cap", "z_loss"), [(2.0, 50.0, 0.1), (2.0, 60.0, 0.0), (4.0, 100.0, 0.0)]
)
def test_logits_that_all_lie_at_minus_a_large_cap_are_exact(temperature: float, cap: float, z_loss: float):
    """The sum without temperature, which next-token prediction and z-loss need, is of exp(-2 cap)."""
    all_at_minus_the_cap(temperature, cap, z_loss=z_loss)
