"""What the dense losses hold, cost, round and refuse; gradients scaled, summed, and not asked for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gemwright.losses import chunks
from gemwright.model import head
from tests.losses.cases import (
    Case,
    D,
    E,
    N,
    Seen,
    V,
    assert_equal_to_exact,
    bytes_for,
    case,
    ce,
    div,
    exact_ce,
    exact_div,
    with_gradients,
)


class Loss(NamedTuple):
    """One of the losses with caps, its definition, and how many sides have logits."""

    ours: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    sides: int


def divergence(beta: float) -> Loss:
    def ours(c: Case, **options: Any) -> Tensor:
        return div(c, 4.0, 7.0, beta=beta, temperature=2.0, next_token=0.3, z_loss=0.1, **options)

    def exact(c: Case) -> Tensor:
        return exact_div(c, 4.0, 7.0, beta=beta, temperature=2.0, next_token=0.3, z_loss=0.1)

    return Loss(ours, exact, 2)


def plain(c: Case, **options: Any) -> Tensor:
    return ce(c, 4.0, z_loss=0.1, **options)


def exact_plain(c: Case) -> Tensor:
    return exact_ce(c, 4.0, z_loss=0.1)


LOSSES = {
    "cross_entropy": Loss(plain, exact_plain, 1),
    "forward_kl": divergence(0.0),
    "jsd": divergence(0.5),
    "reverse_kl": divergence(1.0),
}
each = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each
def test_an_upstream_gradient_scales_both_gradients(loss: Loss):
    c = case()
    mine = torch.autograd.grad(-0.37 * loss.ours(c) + 5, (c.hidden, c.weight))
    assert_equal_to_exact(list(mine), [-0.37 * g for g in with_gradients(loss.exact(c), c)[1:]])


@each
def test_a_second_backward_pass_is_refused_as_the_first_took_the_gradients(loss: Loss):
    value = loss.ours(case())
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backpropagated before"):
        value.backward()


@each
def test_two_halves_accumulate_to_the_whole(loss: Loss):
    """Sums, not means: what a half gives does not hang on how long it is."""
    c = case()
    whole = with_gradients(loss.ours(c), c)
    value = torch.zeros(())
    for part in (slice(0, 4), slice(4, N)):
        half = loss.ours(c._replace(**{name: x[part] for name, x in c._asdict().items() if len(x) == N}))
        half.backward()
        value += half.detach()
    assert_equal_to_exact([value, c.hidden.grad, c.weight.grad], whole)


@each
def test_tokens_without_weight_give_no_loss_and_no_gradient(loss: Loss):
    c = case()._replace(token_weights=torch.zeros(N))
    for result in with_gradients(loss.ours(c, chunk_bytes=1), c):
        assert torch.equal(result, torch.zeros_like(result))


@each
def test_a_token_without_weight_gets_no_gradient_of_its_own(loss: Loss):
    c = case()
    (grad,) = torch.autograd.grad(loss.ours(c), c.hidden)
    assert ((grad != 0).any(-1) == (c.token_weights != 0)).all()


@each
def test_no_tokens_at_all_are_no_loss(loss: Loss):
    c = case(tokens=0)
    for result in with_gradients(loss.ours(c), c):
        assert not result.any()


@each
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_its_own(frozen: str, loss: Loss):
    c = case()
    expected = dict(zip(("hidden", "weight"), with_gradients(loss.exact(c), c)[1:], strict=True))
    getattr(c, frozen).requires_grad_(False)
    loss.ours(c).backward()
    (trained,) = {"hidden", "weight"} - {frozen}
    assert getattr(c, frozen).grad is None
    assert_equal_to_exact([getattr(c, trained).grad], [expected[trained]])


@each
def test_a_tied_head_gets_the_sum_of_both_gradients_and_an_untied_one_its_own(loss: Loss):
    c, ids = case(), torch.randint(V, (N,))
    table = c.weight.detach().clone().requires_grad_()
    for weight in (table, c.weight):
        leaves = tuple({id(x): x for x in (table, weight)}.values())
        mine, theirs = (
            torch.autograd.grad(made(c._replace(hidden=table[ids].tanh() * 2, weight=weight)), leaves)
            for made in (loss.ours, loss.exact)
        )
        assert_equal_to_exact(list(mine), list(theirs))


@each
def test_without_gradients_only_the_value_is_made(loss: Loss):
    c = case()
    with torch.no_grad(), Seen() as seen:
        value = loss.ours(c)
    assert not value.requires_grad
    assert seen.products == loss.sides
    assert_equal_to_exact([value], [loss.exact(c).detach()])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_teacher_gets_no_gradient(beta: float):
    c = case()
    c.teacher_hidden.requires_grad_()
    c.teacher_weight.requires_grad_()
    div(c, 4.0, 4.0, beta=beta).backward()
    assert c.teacher_hidden.grad is None
    assert c.teacher_weight.grad is None


@each
def test_bf16_states_and_weights_are_computed_in_fp32(loss: Loss):
    """The loss is that of the rounded inputs, exact to fp32; gradients alone are rounded, once."""
    c = case(dtype=torch.bfloat16)
    value, *grads = with_gradients(loss.ours(c, chunk_bytes=bytes_for(4, loss.sides)), c)
    expected, *expected_grads = with_gradients(loss.exact(c), c)
    assert value.dtype == torch.float32
    assert_equal_to_exact([value], [expected])
    for grad, should in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad, should.bfloat16(), rtol=2**-7, atol=1e-4)


@each
def test_a_bf16_head_is_cast_in_blocks_and_never_whole(loss: Loss, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head, "_BLOCK_BYTES", 5 * 4 * E)  # 5 of the teacher's rows, 7 of the student's
    c = case(dtype=torch.bfloat16)
    with Seen() as seen:
        value = loss.ours(c, chunk_bytes=bytes_for(4, loss.sides))
    assert max(rows for rows, *width in seen.casts if width == [D]) == 7
    if loss.sides == 2:
        assert max(rows for rows, *width in seen.casts if width == [E]) == 5
    assert_equal_to_exact([value.detach()], [loss.exact(c).detach()])


@each
def test_under_autocast_the_logits_stay_fp32(loss: Loss):
    c = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss.ours(c)
    assert_equal_to_exact(with_gradients(value, c), with_gradients(loss.exact(c), c))


@each
def test_the_number_of_vocabulary_products_is_as_promised(loss: Loss):
    """Three for cross-entropy, four for every divergence, forward and backward together, in one chunk."""
    c = case()
    with Seen() as seen:
        loss.ours(c).backward()
    assert seen.products == {1: 3, 2: 4}[loss.sides]


@each
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_one_product_less(frozen: str, loss: Loss):
    c = case()
    getattr(c, frozen).requires_grad_(False)
    with Seen() as seen:
        loss.ours(c).backward()
    assert seen.products == {1: 2, 2: 3}[loss.sides]


@each
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_largest_tensor_of_logits_is_a_chunk(rows: int, loss: Loss):
    c = case(tokens=40, vocab=101)
    with Seen(101) as seen:
        loss.ours(c, chunk_bytes=bytes_for(rows, loss.sides, 101) + 7).backward()
    assert seen.most_rows == rows


@each
@pytest.mark.parametrize("rows", [1, 8])
def test_all_logits_alive_at_a_time_stay_within_chunk_bytes(rows: int, loss: Loss):
    """With the temporaries of eager kernels."""
    c, allowed = case(tokens=40, vocab=101), bytes_for(rows, loss.sides, 101)
    with Seen(101) as seen:
        loss.ours(c, chunk_bytes=allowed).backward()
    assert rows * 4 * 101 * loss.sides < seen.most_bytes <= allowed


@each
def test_chunks_are_equal_and_have_512_rows_at_most(loss: Loss):
    c = case(tokens=1200)
    with Seen() as seen:
        loss.ours(c)
    assert seen.most_rows == 400
    assert chunks.rows_a_chunk(512, V, 2, 1 << 30) == 512


def test_compiled_kernels_are_reckoned_without_temporaries(monkeypatch: pytest.MonkeyPatch):
    eager = chunks.rows_a_chunk(500, V, 2, 800 * V)
    monkeypatch.setattr(chunks, "can_compile", lambda: True)
    assert (eager, chunks.rows_a_chunk(500, V, 2, 800 * V)) == (20, 100)


def test_vocabularies_that_differ_are_refused_with_both_sizes():
    c = case()
    with pytest.raises(ValueError, match="vocabulary has 23 pieces and the teacher's 22"):
        div(c._replace(teacher_weight=c.teacher_weight[:-1]), 4.0, 4.0)


@pytest.mark.parametrize(
    "wrong", [{"beta": -0.1}, {"beta": 1.1}, {"temperature": 0.0}, {"next_token": 1.5}, {"next_token": -1.0}]
)
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, float]):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        div(case(), 4.0, 4.0, **wrong)


def test_next_token_prediction_without_targets_is_refused():
    with pytest.raises(ValueError, match=r"next_token=0\.3 .* give its ids as targets"):
        div(case()._replace(targets=None), 4.0, 4.0, next_token=0.3)


@each
@pytest.mark.parametrize("wrong", [-1, -100, V])
def test_a_target_outside_the_vocabulary_is_refused(wrong: int, loss: Loss):
    c = case()
    c.targets[3] = wrong
    with pytest.raises(ValueError, match=r"outside 0\.\.22: the text was made with another tokenizer"):
        loss.ours(c)


@pytest.mark.gpu
@each
def test_on_a_gpu_bf16_products_are_summed_in_fp32(loss: Loss):
    """The loss as exact as in fp32 from the rounded inputs; gradients as good as bf16 products allow."""
    c = case(tokens=64, vocab=101, dtype=torch.bfloat16)
    there = type(c)(*(x.detach().cuda().requires_grad_(x.requires_grad) for x in c))
    mine = [x.cpu() for x in with_gradients(loss.ours(there), there)]
    exact = with_gradients(loss.exact(c), c)
    torch.testing.assert_close(mine[0].double(), exact[0].double(), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(mine[1:], exact[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2e-2, atol=2e-2)
