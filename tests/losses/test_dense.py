"""Losses in chunks against their definitions in float64: values, gradients, and what they hold meanwhile."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemwright.losses import dense

N, D, E, V = 11, 6, 9, 23
ROW = 4 * V  # bytes of one token's logits
CAPS = [(None, None), (30.0, 30.0), (4.0, 4.0), (4.0, 50.0), (None, 7.0), (50.0, None)]


class Case(NamedTuple):
    """What both losses need; `hidden` and `weight` are leaves."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor
    token_weights: Tensor


def case(tokens: int = N, vocab: int = V, dtype: torch.dtype = torch.float32) -> Case:
    """Logits of some 5: a cap of 4 bends them. A third of the tokens weighs nothing."""
    weights = torch.rand(tokens) * (torch.arange(tokens) % 3 != 1)
    return Case(
        (2 * torch.randn(tokens, D)).to(dtype).requires_grad_(),
        torch.randn(vocab, D).to(dtype).requires_grad_(),
        (1.7 * torch.randn(tokens, E)).to(dtype),
        torch.randn(vocab, E).to(dtype),
        torch.randint(vocab, (tokens,)),
        weights,
    )


def capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def ce(c: Case, cap: float | None, **options: Any) -> Tensor:
    return dense.cross_entropy(c.hidden, c.weight, c.targets, c.token_weights, cap=cap, **options)


def kl(c: Case, cap: float | None, teacher_cap: float | None, **options: Any) -> Tensor:
    return dense.forward_kl(*c[:4], c.token_weights, cap=cap, teacher_cap=teacher_cap, **options)


def exact_ce(c: Case, cap: float | None) -> Tensor:
    """The definition, in float64."""
    logits = capped(c.hidden.double() @ c.weight.double().T, cap)
    return (F.cross_entropy(logits, c.targets, reduction="none") * c.token_weights.double()).sum()


def exact_kl(c: Case, cap: float | None, teacher_cap: float | None) -> Tensor:
    """The definition, in float64."""
    student = capped(c.hidden.double() @ c.weight.double().T, cap).log_softmax(-1)
    teacher = capped(c.teacher_hidden.double() @ c.teacher_weight.double().T, teacher_cap).log_softmax(-1)
    return ((teacher.exp() * (teacher - student)).sum(-1) * c.token_weights.double()).sum()


def with_gradients(loss: Tensor, c: Case) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, (c.hidden, c.weight))]


def assert_equal_to_exact(ours: list[Tensor], exact: list[Tensor], tolerance: float = 2e-5) -> None:
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance)


class Seen(TorchDispatchMode):
    """Notes matrix products with the vocabulary as a side, and the most rows of logits in one tensor."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.products, self.most_rows = vocab, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, out) if isinstance(x, Tensor)]
        if func._overloadpacket.__name__ in {"mm", "addmm", "addmm_", "bmm", "linear"}:
            self.products += any(self.vocab in x.shape for x in tensors)
        turned = func._overloadpacket.__name__ in {"t", "transpose"}  # a view of a weight, no new tensor
        if isinstance(out, Tensor) and out.shape[-1:] == (self.vocab,) and not turned:
            self.most_rows = max(self.most_rows, out.numel() // self.vocab)
        return out


# Bytes that hold all tokens, 2, 3 or 5 of 11, and fewer than one.
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 4 * ROW, 6 * ROW, 10 * ROW, 1])
@pytest.mark.parametrize("cap", [None, 30.0, 4.0, 50.0])
def test_cross_entropy_equals_its_definition(cap: float | None, chunk_bytes: int):
    c = case()
    ours = with_gradients(ce(c, cap, chunk_bytes=chunk_bytes), c)
    assert_equal_to_exact(ours, with_gradients(exact_ce(c, cap), c))


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 8 * ROW, 12 * ROW, 20 * ROW, 1])
@pytest.mark.parametrize(("cap", "teacher_cap"), CAPS)
def test_forward_kl_equals_its_definition(cap: float | None, teacher_cap: float | None, chunk_bytes: int):
    """The teacher is 9 wide and the student 6; their caps may differ."""
    c = case()
    ours = with_gradients(kl(c, cap, teacher_cap, chunk_bytes=chunk_bytes), c)
    assert_equal_to_exact(ours, with_gradients(exact_kl(c, cap, teacher_cap), c))


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[float, ...]]] = {
    "cross_entropy": (ce, exact_ce, (4.0,)),
    "forward_kl": (kl, exact_kl, (4.0, 7.0)),
}
both = pytest.mark.parametrize(("ours", "exact", "caps"), LOSSES.values(), ids=LOSSES)


@both
def test_logits_far_beyond_the_cap_stay_exact(ours: Any, exact: Any, caps: tuple[float, ...]):
    """exp(2 * logit / cap) overflows there; the cap's value is +-cap and its slope 0."""
    c = case()
    with torch.no_grad():
        c.hidden[::2] *= 1000
    assert_equal_to_exact(with_gradients(ours(c, *caps), c), with_gradients(exact(c, *caps), c), 1e-4)


@both
def test_without_a_cap_large_logits_overflow_nothing(ours: Any, exact: Any, caps: tuple[float, ...]):
    c, none = case(), [None for _ in caps]
    with torch.no_grad():
        c.hidden.mul_(20)
    assert_equal_to_exact(with_gradients(ours(c, *none), c), with_gradients(exact(c, *none), c), 1e-3)


@both
def test_an_upstream_gradient_scales_both_gradients(ours: Any, exact: Any, caps: tuple[float, ...]):
    c = case()
    mine = torch.autograd.grad(-0.37 * ours(c, *caps) + 5, (c.hidden, c.weight))
    assert_equal_to_exact(list(mine), [-0.37 * g for g in with_gradients(exact(c, *caps), c)[1:]])


@both
def test_tokens_without_weight_give_no_loss_and_no_gradient(ours: Any, exact: Any, caps: tuple[float, ...]):
    c = case()._replace(token_weights=torch.zeros(N))
    for result in with_gradients(ours(c, *caps, chunk_bytes=1), c):
        assert torch.equal(result, torch.zeros_like(result))


@both
def test_a_token_without_weight_gets_no_gradient_of_its_own(ours: Any, exact: Any, caps: tuple[float, ...]):
    c = case()
    (grad,) = torch.autograd.grad(ours(c, *caps), c.hidden)
    assert ((grad != 0).any(-1) == (c.token_weights != 0)).all()


@both
def test_no_tokens_at_all_are_no_loss(ours: Any, exact: Any, caps: tuple[float, ...]):
    c = case(tokens=0)
    for result in with_gradients(ours(c, *caps), c):
        assert not result.any()


@both
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_its_own(
    frozen: str, ours: Any, exact: Any, caps: tuple[float, ...]
):
    c = case()
    expected = dict(zip(("hidden", "weight"), with_gradients(exact(c, *caps), c)[1:], strict=True))
    getattr(c, frozen).requires_grad_(False)
    ours(c, *caps).backward()
    (trained,) = {"hidden", "weight"} - {frozen}
    assert getattr(c, frozen).grad is None
    assert_equal_to_exact([getattr(c, trained).grad], [expected[trained]])


@both
def test_a_frozen_weight_costs_one_product_less(ours: Any, exact: Any, caps: tuple[float, ...]):
    products = []
    for frozen in (False, True):
        c = case()
        c.weight.requires_grad_(not frozen)
        with Seen(V) as seen:
            ours(c, *caps).backward()
        products.append(seen.products)
    assert products[1] == products[0] - 1


@both
def test_without_gradients_only_the_value_is_made(ours: Any, exact: Any, caps: tuple[float, ...]):
    c = case()
    with torch.no_grad(), Seen(V) as seen:
        loss = ours(c, *caps)
    assert not loss.requires_grad
    assert seen.products == len(caps)
    assert_equal_to_exact([loss], [exact(c, *caps).detach()])


@both
def test_bf16_states_and_weights_are_computed_in_fp32(ours: Any, exact: Any, caps: tuple[float, ...]):
    """The loss is that of the rounded inputs, exact to fp32; gradients alone are rounded, once."""
    c = case(dtype=torch.bfloat16)
    loss, *grads = with_gradients(ours(c, *caps, chunk_bytes=8 * ROW), c)
    expected, *expected_grads = with_gradients(exact(c, *caps), c)
    assert loss.dtype == torch.float32
    assert_equal_to_exact([loss], [expected])
    for grad, should in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        torch.testing.assert_close(grad, should.bfloat16(), rtol=2**-7, atol=1e-4)


@both
def test_under_autocast_the_logits_stay_fp32(ours: Any, exact: Any, caps: tuple[float, ...]):
    c = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours(c, *caps)
    assert_equal_to_exact(with_gradients(loss, c), with_gradients(exact(c, *caps), c))


@both
def test_the_number_of_vocabulary_products_is_as_promised(ours: Any, exact: Any, caps: tuple[float, ...]):
    """Three for cross-entropy, four for forward KL, forward and backward together, in one chunk."""
    c = case()
    with Seen(V) as seen:
        ours(c, *caps).backward()
    assert seen.products == 2 + len(caps)


@both
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_largest_tensor_of_logits_is_a_chunk(rows: int, ours: Any, exact: Any, caps: tuple[float, ...]):
    """All copies together stay within chunk_bytes: two for cross-entropy, four for forward KL."""
    c, copies = case(tokens=40, vocab=101), 2 * len(caps)
    with Seen(101) as seen:
        ours(c, *caps, chunk_bytes=copies * rows * 4 * 101 + 7).backward()
    assert seen.most_rows == rows


@both
def test_a_chunk_has_512_rows_at_most(ours: Any, exact: Any, caps: tuple[float, ...]):
    c = case(tokens=1200)
    with Seen(V) as seen:
        ours(c, *caps)
    assert seen.most_rows == 512


def test_equal_distributions_have_no_divergence_and_no_gradient():
    c = case()
    same = c._replace(teacher_hidden=c.hidden.detach(), teacher_weight=c.weight.detach())
    for result in with_gradients(kl(same, 4.0, 4.0), same):
        assert torch.equal(result, torch.zeros_like(result))


def test_the_gradient_of_distillation_is_p_minus_t_times_the_caps_slope():
    c = case()._replace(token_weights=torch.ones(N))
    with torch.no_grad():
        raw = c.hidden @ c.weight.T
        p = capped(raw, 4.0).softmax(-1)
        t = capped(c.teacher_hidden @ c.teacher_weight.T, 7.0).softmax(-1)
        expected = ((p - t) * (1 - torch.tanh(raw / 4.0) ** 2)) @ c.weight
    (grad,) = torch.autograd.grad(kl(c, 4.0, 7.0), c.hidden)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_gets_no_gradient():
    c = case()
    c.teacher_hidden.requires_grad_()
    c.teacher_weight.requires_grad_()
    kl(c, 4.0, 4.0).backward()
    assert c.teacher_hidden.grad is None
    assert c.teacher_weight.grad is None


def test_vocabularies_that_differ_are_refused_with_both_sizes():
    c = case()
    with pytest.raises(ValueError, match="vocabulary has 23 pieces and the teacher's 22"):
        kl(c._replace(teacher_weight=c.teacher_weight[:-1]), 4.0, 4.0)


@pytest.mark.parametrize("wrong", [-1, -100, V])
def test_a_target_outside_the_vocabulary_is_refused(wrong: int):
    c = case()
    c.targets[3] = wrong
    with pytest.raises(ValueError, match=r"outside 0\.\.22: the text was made with another tokenizer"):
        ce(c, 4.0)


@both
@pytest.mark.compiled
def test_the_compiled_kernel_equals_the_eager_one(ours: Any, exact: Any, caps: tuple[float, ...]):
    """With a cap, logits far beyond it, and a last chunk that is shorter."""
    c = case()
    with torch.no_grad():
        c.hidden[::4] *= 1000
    mine = with_gradients(ours(c, *caps, chunk_bytes=12 * ROW), c)
    assert_equal_to_exact(mine, with_gradients(exact(c, *caps), c), 1e-4)
