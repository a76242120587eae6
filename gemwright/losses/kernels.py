"""The elementwise part of the chunked losses: a few passes over a chunk of logits, in place.

A chunk of raw logits is capped and its sums are taken in a first pass; a last one turns it into the gradient
with respect to the raw logits. Nothing else of that size exists when the kernels are compiled
(`device.fused`); run eagerly, they make temporaries (`chunks.rows_a_chunk` reckons with them).

The cap bounds the logits, so mostly no pass for a maximum is needed: `shift`, which keeps exp in range, is
the cap itself. `beta` is the divergence: None is none (no teacher), 0 forward KL, 1 reverse KL, between them
generalised JSD. Divergences are of P(x / temperature), s and t below.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gemwright.model import head

_SMALLEST = 1.2e-38  # of fp32's normal numbers: log of less would be -inf

Rows = Float[Tensor, " N"]
Logits = Float[Tensor, "N V"]


def student_sums(
    raw: Logits, shift: Float[Tensor, "N 1"], *, cap: float | None, temperature: float
) -> Float[Tensor, "N 2"]:
    """Cap `raw` in place; sums of exp((x - shift) / temperature) and of exp(x - shift)."""
    capped = head.softcap_by_exp(raw, cap)
    total = head.exp(_tempered(capped - shift, temperature)).sum(-1)
    plain = total if temperature == 1 else head.exp(capped - shift).sum(-1)
    raw.copy_(capped)
    return torch.stack((total, plain), -1)


def tail_sum(capped: Logits, shift: Float[Tensor, "N 1"], *, temperature: float) -> Rows:
    """The sum of exp((x - shift) / temperature) over logits that are capped already."""
    return head.exp(_tempered(capped - shift, temperature)).sum(-1)


def sums(
    raw: Logits,
    raw_teacher: Logits,
    shift: Float[Tensor, "N 1"],
    teacher_shift: Float[Tensor, "N 1"],
    *,
    cap: float | None,
    teacher_cap: float | None,
    temperature: float,
    beta: float,
) -> Float[Tensor, "N 4"]:
    """Cap both in place; the sums of `student_sums`, the teacher's, and of e^s (s - t) or e^t (t - s)."""
    capped, capped_teacher = head.softcap_by_exp(raw, cap), head.softcap_by_exp(raw_teacher, teacher_cap)
    e_s = head.exp(_tempered(capped - shift, temperature))
    e_t = head.exp(_tempered(capped_teacher - teacher_shift, temperature))
    total = e_s.sum(-1)
    plain = total if temperature == 1 else head.exp(capped - shift).sum(-1)
    apart = _tempered(capped - capped_teacher, temperature)
    apart = (e_s * apart).sum(-1) if beta == 1 else -(e_t * apart).sum(-1)
    teacher_total = e_t.sum(-1)
    raw.copy_(capped)
    raw_teacher.copy_(capped_teacher)
    return torch.stack((total, plain, teacher_total, apart), -1)


def mixture_sums(
    student: Logits, teacher: Logits, lse: Rows, teacher_lse: Rows, *, temperature: float, beta: float
) -> Float[Tensor, "N 2"]:
    """Generalised JSD, and KL(P_S || M), from capped logits and the log-normalisers."""
    log_p, log_t = (
        _tempered(student, temperature) - lse[:, None],
        _tempered(teacher, temperature) - teacher_lse[:, None],
    )
    log_m = _log_mixture(log_p, log_t, beta)
    to_mixture = (head.exp(log_p) * (log_p - log_m)).sum(-1)
    return torch.stack(
        (beta * (head.exp(log_t) * (log_t - log_m)).sum(-1) + (1 - beta) * to_mixture, to_mixture), -1
    )


def student_gradient(
    student: Logits, lse: Rows, scale: Rows, plain_lse: Rows, plain_scale: Rows, *, cap: float | None,
    temperature: float,
) -> None:  # fmt: skip
    """Overwrite capped logits with (scale P_S + plain_scale P) times the cap's slope.

    P is the distribution without temperature, `plain_lse` its log-normaliser.
    """
    p = head.exp(_tempered(student, temperature) - lse[:, None])
    plain = p if temperature == 1 else head.exp(student - plain_lse[:, None])
    student.copy_((p * scale[:, None] + plain * plain_scale[:, None]) * _slope(student, cap))


def gradient(
    student: Logits, teacher: Logits, lse: Rows, teacher_lse: Rows, inner: Rows, scale: Rows,
    plain_lse: Rows, plain_scale: Rows, *, cap: float | None, temperature: float, beta: float,
) -> None:  # fmt: skip
    """Overwrite capped logits with (scale d + plain_scale P) times the cap's slope.

    d is the divergence's gradient by s, P as in `student_gradient`. `inner` is the mean under P_S of log P_S
    less the log of what it is compared with (unused at beta 0).
    """
    log_p = _tempered(student, temperature) - lse[:, None]
    p = head.exp(log_p)
    log_t = _tempered(teacher, temperature) - teacher_lse[:, None]
    if beta == 0:
        d = p - head.exp(log_t)
    elif beta == 1:
        d = p * (log_p - log_t - inner[:, None])
    else:
        d = (1 - beta) * p * (log_p - _log_mixture(log_p, log_t, beta) - inner[:, None])
    plain = p if temperature == 1 else head.exp(student - plain_lse[:, None])
    student.copy_((d * scale[:, None] + plain * plain_scale[:, None]) * _slope(student, cap))


def bounded(cap: float | None, temperature: float) -> bool:
    """Whether the least that shifting by the cap can leave, exp(-2 cap / temperature), is a normal number.

    The sum without temperature is taken too, so that a high temperature helps nothing.
    """
    return cap is not None and 2 * cap / min(temperature, 1.0) < -math.log(_SMALLEST)


def _tempered(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1 else x * (1 / temperature)


def _log_mixture(log_p: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """log(beta P_T + (1 - beta) P_S), mixed as probabilities; where both vanish, so does its factor."""
    return (beta * head.exp(log_t) + (1 - beta) * head.exp(log_p)).clamp_min(_SMALLEST).log()


def _slope(capped: Tensor, cap: float | None) -> Tensor | float:
    return 1.0 if cap is None else head.softcap_slope(capped, cap)
