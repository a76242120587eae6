"""The plain definitions of the losses, on whole logits: what the chunked ones must equal, for small cases.

All of them are per token, in nats, over the whole vocabulary, and take CAPPED logits (`model/head.py`).
KL direction is settled here: forward KL is KL(teacher || student), the report's objective up to a constant.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """-log P(target): next-token prediction."""
    return -torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]


def forward_kl(teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(P_T || P_S) = sum_x P_T(x) (log P_T(x) - log P_S(x)).

    The report minimises sum_x -P_T(x) log P_S(x) (section 3.2): this plus the teacher's entropy, which has no
    gradient.
    """
    return _kl(torch.log_softmax(teacher, -1), torch.log_softmax(student, -1))


def reverse_kl(teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """KL(P_S || P_T), which on-policy distillation mostly uses (arXiv 2306.13649)."""
    return _kl(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1))


def generalized_jsd(
    teacher: Float[Tensor, "N V"], student: Float[Tensor, "N V"], beta: float
) -> Float[Tensor, " N"]:
    """beta KL(P_T || M) + (1 - beta) KL(P_S || M) with M = beta P_T + (1 - beta) P_S (arXiv 2306.13649).

    The formula vanishes at both ends, so they are defined apart: beta 0 is forward KL, beta 1 reverse KL.
    """
    if beta == 0:
        return forward_kl(teacher, student)
    if beta == 1:
        return reverse_kl(teacher, student)
    log_teacher, log_student = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    mixture = torch.logaddexp(log_teacher + math.log(beta), log_student + math.log1p(-beta))
    return beta * _kl(log_teacher, mixture) + (1 - beta) * _kl(log_student, mixture)


def sparse_cross_entropy(
    logits: Float[Tensor, "N V"], ids: Int[Tensor, "N K"], probs: Float[Tensor, "N K"], *, tail: bool = False
) -> Float[Tensor, " N"]:
    """-sum_k p_k log P(id_k); with `tail`, what `probs` lack of 1 goes to all other ids as one bucket.

    An id with probability 0 is padding. Counts of draws over their number are an unbiased target; the largest
    probabilities, renormalised, are not (arXiv 2503.16870).
    """
    log_p = torch.log_softmax(logits, -1).gather(-1, ids)
    loss = -(probs * log_p).sum(-1)
    if not tail:
        return loss
    kept = torch.zeros_like(logits).scatter_add(-1, ids, (probs > 0).to(logits.dtype)) > 0
    log_rest = logits.masked_fill(kept, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)
    return loss - (1 - probs.sum(-1)) * log_rest


def z_loss(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """(log Z)^2: keeps the normaliser near 1 (arXiv 2204.02311)."""
    return logits.logsumexp(-1) ** 2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)
