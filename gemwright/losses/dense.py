"""Losses over the whole vocabulary without ever holding the logits of a batch.

At 256,000 pieces the logits of one 8,192-token sequence take 8.4 GB in fp32, and a plain distillation step
holds four to six such tensors. Here they exist for a chunk of tokens at a time (`chunks`).

The result is exact, soft-caps included; `divergence.py` has the definitions. A loss is the weighted SUM over
tokens: who calls divides by the number of target tokens of the whole step, which only the caller knows
(gradient accumulation, data parallelism).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemwright.losses import kernels, sparse
from gemwright.losses.chunks import CHUNK_BYTES, kernel, rows_a_chunk, scatter, shift_of, sum_in_chunks
from gemwright.losses.sharded import Slice
from gemwright.model import head


def cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    token_weights: Float[Tensor, " N"],
    *,
    cap: float | None,
    z_loss: float = 0.0,
    part: Slice | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, ""]:
    """Weighted sum over tokens of -log P(target) + z_loss (log Z)^2: a sparse target with one id.

    Raises ValueError for a target outside the vocabulary (checked on the CPU, where it costs nothing).
    """
    sure = torch.ones(len(targets), 1, device=targets.device)
    return sparse.cross_entropy(
        hidden, weight, targets[:, None], sure, token_weights, cap=cap, z_loss=z_loss, part=part,
        chunk_bytes=chunk_bytes,
    )  # fmt: skip


def divergence(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "W E"],
    token_weights: Float[Tensor, " N"],
    *,
    cap: float | None,
    teacher_cap: float | None,
    beta: float = 0.0,
    temperature: float = 1.0,
    targets: Int[Tensor, " N"] | None = None,
    next_token: float = 0.0,
    z_loss: float = 0.0,
    pieces: int | None = None,
    part: Slice | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, ""]:
    """Weighted sum over tokens of a divergence between teacher and student (report, section 3.2).

    (1 - next_token) temperature^2 D(teacher, student) + next_token * -log P(target) + z_loss (log Z)^2, the
    combination of arXiv 2502.08606. The teacher may have another width; its side gets no gradient.

    Args:
        beta: 0 forward KL (the report's), 1 reverse KL, between them generalised JSD (arXiv 2306.13649).
        temperature: both capped logits are divided by it in D, and in D alone.
        targets, next_token: the next tokens, and the share of the loss that they get.
        pieces: how many of the rows are pieces, where a head is padded (256,128 rows for 256,000 pieces). The
            other rows of either head are as if they were not there. Without it heads must be equally long.
            With `part`, rows of this rank's slice.
        part: the slice of the vocabulary that this rank holds (`sharded`), the same ids of both heads.
        chunk_bytes: bound on the logits held at a time, both sides together.
    Raises:
        ValueError: vocabularies differ; beta, temperature or next_token out of range; targets missing.
    """
    sparse.require_options(temperature, next_token, beta)
    if pieces is not None:
        if pieces > max(len(weight), len(teacher_weight)):
            raise ValueError(
                f"pieces={pieces} are more than either head has rows. Give the tokenizer's number."
            )
        # Not a slice of everything: its derivative would copy the gradient.
        weight, teacher_weight = (w[:pieces] if len(w) > pieces else w for w in (weight, teacher_weight))
    if len(weight) != len(teacher_weight):
        raise ValueError(
            f"the student's vocabulary has {len(weight)} pieces and the teacher's {len(teacher_weight)}: "
            "their distributions cannot be compared. Give the student the teacher's tokenizer; if the longer "
            "head is only padded, say how many rows are pieces."
        )
    part = part or Slice.whole(weight)
    sparse.require_ids(part.total, targets if next_token else None)
    rows = rows_a_chunk(len(hidden), part.most, 2, chunk_bytes)
    states, teacher_head = teacher_hidden.detach(), teacher_weight.detach()
    buffer = states.new_empty(rows, len(weight), dtype=torch.float32)
    constants = {"cap": cap, "temperature": temperature, "beta": beta}

    def chunk(taken: slice, logits: Tensor) -> Tensor:
        w = token_weights[taken].float()
        with torch.no_grad():
            teacher = head.raw_logits(states[taken], teacher_head, out=buffer[: len(w)])
        shift = shift_of(logits, cap, temperature, part)
        teacher_shift = shift_of(teacher, teacher_cap, temperature, part)
        sums = kernel(kernels.sums, teacher_cap=teacher_cap, **constants)(
            logits, teacher, shift, teacher_shift
        )
        total, plain, teacher_total, apart = part.sum(sums).unbind(-1)
        lse, plain_lse = shift[:, 0] / temperature + total.log(), shift[:, 0] + plain.log()
        teacher_lse = teacher_shift[:, 0] / temperature + teacher_total.log()
        if beta == 0:
            loss = inner = apart / teacher_total - teacher_lse + lse
        elif beta == 1:
            loss = inner = apart / total - lse + teacher_lse
        else:
            mixed = kernel(kernels.mixture_sums, temperature=temperature, beta=beta)
            loss, inner = part.sum(mixed(logits, teacher, lse, teacher_lse)).unbind(-1)
        also, plain_scale, scattered = sparse.mix(targets, next_token, z_loss, taken, logits, plain_lse, part)
        share = w * (1 - next_token)
        kernel(kernels.gradient, **constants)(
            logits, teacher, lse, teacher_lse, inner, share * temperature, plain_lse, w * plain_scale
        )
        if scattered is not None:
            scatter(logits, scattered[0], w[:, None] * scattered[1], scattered[2], cap)
        return (share * temperature**2 * loss + w * also).sum()

    return sum_in_chunks(hidden, weight, chunk, rows, part)
