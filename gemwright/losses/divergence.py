"""The plain definitions of the losses, on whole logits: what `dense.py` must equal, and for small cases.

All of them are per token, in nats, over the whole vocabulary, and take CAPPED logits (`model/head.py`).
KL direction is settled here: forward KL is KL(teacher || student), the report's objective up to a constant.
"""

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
    log_teacher, log_student = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
