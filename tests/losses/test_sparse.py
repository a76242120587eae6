"""Cross-entropy to few ids a token: against its definition in float64, and as an estimate of dense KL."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gemwright.losses import sparse
from tests.losses.cases import (
    Case,
    D,
    E,
    K,
    N,
    Seen,
    V,
    assert_equal_to_exact,
    both_logits,
    bytes_for,
    case,
    ce,
    div,
    exact_few,
    few,
    few_ce,
    with_gradients,
)

CAPS = [None, 30.0, 4.0, 50.0]


def compare(c: Case, ids: Tensor, probs: Tensor, cap: float | None, rows: int = 3, **options: Any) -> None:
    """The loss and both gradients with the definition."""
    ours = few_ce(c, ids, probs, cap, chunk_bytes=bytes_for(rows, 1), **options)
    assert_equal_to_exact(
        with_gradients(ours, c), with_gradients(exact_few(c, ids, probs, cap, **options), c)
    )


@pytest.mark.parametrize("rows", [11, 3, 1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("tail", "mass"), [(False, 1.0), (True, 0.7), (True, 1.0)])
@pytest.mark.parametrize("cap", CAPS)
def test_it_equals_its_definition(cap: float | None, tail: bool, mass: float, temperature: float, rows: int):
    compare(case(), *few(mass), cap, rows, tail=tail, temperature=temperature)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("next_token", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("tail", "mass"), [(False, 1.0), (True, 0.7)])
@pytest.mark.parametrize("cap", [None, 4.0])
def test_next_token_prediction_and_z_loss_are_mixed_in_without_temperature(
    cap: float | None, tail: bool, mass: float, temperature: float, next_token: float, z_loss: float
):
    options = {"tail": tail, "temperature": temperature, "next_token": next_token, "z_loss": z_loss}
    compare(case(), *few(mass), cap, **options)


def test_the_next_token_may_be_a_kept_id():
    """Its logit is taken out of the tail's sum, and is still what next-token prediction needs."""
    c, (ids, probs) = case(), few(0.7)
    compare(c._replace(targets=ids[:, 0].clone()), ids, probs, 4.0, tail=True, next_token=0.3, z_loss=0.1)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("cap", [None, 4.0])
def test_padding_is_nothing_also_where_its_id_is_kept(cap: float | None, tail: bool):
    c = case()
    ids, probs = few(0.7 if tail else 1.0)
    ids[:, :-1] = torch.arange(K - 1)  # 0 is kept, and is the id of the padding
    padded = torch.cat((ids, torch.zeros(N, 3, dtype=ids.dtype)), 1)
    more = torch.cat((probs, torch.zeros(N, 3)), 1)
    compare(c, padded, more, cap, tail=tail)
    short = with_gradients(few_ce(c, ids[:, :-1], probs[:, :-1], cap, tail=tail), c)
    assert_equal_to_exact(with_gradients(few_ce(c, padded, more, cap, tail=tail), c), short, 1e-6)


@pytest.mark.parametrize("cap", [None, 4.0])
def test_one_certain_id_is_dense_cross_entropy(cap: float | None):
    c = case()
    mine = with_gradients(few_ce(c, c.targets[:, None], torch.ones(N, 1), cap), c)
    assert_equal_to_exact(mine, with_gradients(ce(c, cap), c), 0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradients_to_all_ids_are_those_of_dense_forward_kl(temperature: float):
    c = case()
    teacher = (both_logits(c, 4.0, 7.0)[1] / temperature).softmax(-1).float()
    mine = few_ce(c, torch.arange(V).expand(N, V), teacher, 4.0, temperature=temperature)
    dense = div(c, 4.0, 7.0, temperature=temperature)
    assert_equal_to_exact(with_gradients(mine, c)[1:], with_gradients(dense, c)[1:])


def test_with_all_ids_kept_the_tail_is_empty_and_changes_nothing():
    c, ids = case(), torch.stack([torch.randperm(V) for _ in range(N)])
    probs = torch.randn(N, V).softmax(-1)
    results = [with_gradients(few_ce(c, ids, probs, 4.0, tail=tail), c) for tail in (True, False)]
    assert_equal_to_exact(results[0], results[1], 1e-4)


def test_a_tail_that_the_student_all_but_rules_out_is_exact():
    """It believes 1e-20 to 1e-30 in it, which 1 - (the kept ids' probabilities) rounds to zero."""
    ids = torch.arange(3).expand(N, 3)
    probs = torch.tensor([0.5, 0.2, 0.1]).expand(N, 3)
    c = case(vocab=D)._replace(
        weight=torch.eye(D).requires_grad_(), targets=torch.zeros(N, dtype=torch.int64)
    )
    with torch.no_grad():
        c.hidden[:, 3:] -= torch.linspace(46, 69, N)[:, None]
    compare(c, ids, probs, None, tail=True)


def test_a_tail_that_the_student_rules_out_entirely_leaves_all_finite():
    c = case(vocab=D)._replace(
        weight=torch.eye(D).requires_grad_(), targets=torch.zeros(N, dtype=torch.int64)
    )
    with torch.no_grad():
        c.hidden[:, 3:] -= 500
    loss = few_ce(c, torch.arange(3).expand(N, 3), torch.full((N, 3), 0.3), None, tail=True)
    assert all(result.isfinite().all() for result in with_gradients(loss, c))


def draws(teacher: Tensor, many: int, each: int) -> tuple[Tensor, Tensor]:
    """What `each` draws from a distribution count, `many` times: distinct ids, and counts over draws."""
    drawn = torch.multinomial(teacher.expand(many, -1), each, replacement=True)
    counts = torch.zeros(many, len(teacher)).scatter_add(1, drawn, torch.ones(many, each))
    amounts, ids = counts.topk(each, -1)  # no more than `each` differ; the others count 0
    return ids, amounts / each


def test_the_gradient_by_the_logits_is_p_minus_the_share_of_the_draws():
    logits = torch.randn(N, V).requires_grad_()
    ids, probs = draws(torch.randn(V).softmax(-1), N, 8)
    loss = sparse.cross_entropy(logits, torch.eye(V), ids, probs, torch.ones(N), cap=None)
    shares = torch.zeros(N, V).scatter_add(1, ids, probs)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, logits.detach().softmax(-1) - shares, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_an_unbiased_estimate_of_dense_forward_kl_and_the_largest_renormalised_are_not(
    temperature: float,
):
    """400 times 8 draws; the mean of their gradients lies within 4 standard errors of the dense one.

    The teacher is flat: there is much that the 8 largest leave out.
    """
    many = 400
    c = case(tokens=1)._replace(token_weights=torch.ones(1), teacher_hidden=0.5 * torch.randn(1, E))
    teacher = (both_logits(c, 4.0, 4.0)[1][0] / temperature).softmax(-1).float()
    (dense,) = torch.autograd.grad(div(c, 4.0, 4.0, temperature=temperature), c.hidden)

    def gradients(ids: Tensor, probs: Tensor) -> Tensor:
        hidden = c.hidden.detach().expand(len(ids), D).clone().requires_grad_()
        loss = sparse.cross_entropy(
            hidden, c.weight, ids, probs, torch.ones(len(ids)), cap=4.0, temperature=temperature
        )
        return torch.autograd.grad(loss, hidden)[0]

    sampled = gradients(*draws(teacher, many, 8))
    error = sampled.std(0) / many**0.5
    assert ((sampled.mean(0) - dense[0]).abs() < 4 * error).all()
    top, ids = teacher.topk(8)
    off = gradients(ids[None], (top / top.sum())[None])[0] - dense[0]
    assert off.norm() > 5 * error.norm()


def test_leaving_out_the_tail_would_be_noticed():
    c, (ids, probs) = case(), few(0.7)
    right = with_gradients(exact_few(c, ids, probs, 4.0, tail=True), c)
    wrong = with_gradients(exact_few(c, ids, probs, 4.0), c)
    for good, bad in zip(right, wrong, strict=True):
        assert (good - bad).abs().max() > 0.01


@pytest.mark.parametrize("tail", [False, True])
def test_tokens_without_weight_give_no_loss_and_no_gradient(tail: bool):
    c = case()._replace(token_weights=torch.zeros(N))
    for result in with_gradients(few_ce(c, *few(0.7), 4.0, tail=tail, chunk_bytes=1), c):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("tail", [False, True])
def test_it_takes_three_products_and_stays_within_chunk_bytes(tail: bool):
    c, (ids, probs), allowed = case(tokens=40, vocab=101), few(0.7, 40, 101), bytes_for(8, 1, 101)
    with Seen(101) as seen:
        few_ce(c, ids, probs, 4.0, temperature=2.0, tail=tail, chunk_bytes=allowed).backward()
    assert seen.products == 3 * 5
    assert seen.most_rows == 8
    assert seen.most_bytes <= allowed


def test_bf16_states_and_weights_are_computed_in_fp32():
    c, (ids, probs) = case(dtype=torch.bfloat16), few(0.7)
    loss, *grads = with_gradients(few_ce(c, ids, probs, 4.0, tail=True), c)
    expected, *expected_grads = with_gradients(exact_few(c, ids, probs, 4.0, tail=True), c)
    assert_equal_to_exact([loss], [expected])
    for grad, should in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, should.bfloat16(), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("wrong", [-1, V])
def test_an_id_outside_the_vocabulary_is_refused(wrong: int):
    ids, probs = few()
    ids[2, 1] = wrong
    with pytest.raises(ValueError, match=r"outside 0\.\.22: the text was made with another tokenizer"):
        few_ce(case(), ids, probs, 4.0)


def test_next_token_prediction_without_targets_is_refused():
    with pytest.raises(ValueError, match=r"next_token=0\.3 .* give its ids as targets"):
        few_ce(case()._replace(targets=None), *few(), 4.0, next_token=0.3)
