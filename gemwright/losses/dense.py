"""Losses over a large vocabulary without ever holding the logits of a batch.

At 256,000 pieces the logits of one 8,192-token sequence take 8.4 GB in fp32, and a plain distillation step
holds four to six such tensors. Here a chunk of tokens is unembedded, its loss AND its gradient are made at
once, and the logits are gone before the next chunk: three vocabulary GEMMs for cross-entropy (logits,
d hidden, d weight), four for forward KL (the teacher's logits too), where recomputing them in the backward
pass would take four and six.

The result is exact, soft-caps included. A loss is the weighted SUM over tokens: who calls divides by the
number of target tokens of the whole step, which only the caller knows (gradient accumulation).
"""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemwright.device import can_compile
from gemwright.model import head

CHUNK_BYTES = 256 << 20
"""Logits held at a time, all copies together."""
_MOST_ROWS = 512  # ours: enough rows for the GEMMs; what was measured did not settle it (LOG.md)

Chunk = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""Rows, the head's weight in fp32 -> their summed loss, its gradient with respect to the raw logits."""


def cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    token_weights: Float[Tensor, " N"],
    *,
    cap: float | None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, ""]:
    """Weighted sum over tokens of -log P(target), from hidden states and the head's weight.

    Raises ValueError for a target outside the vocabulary (checked on the CPU, where it costs nothing).
    """
    if (
        not targets.is_cuda
        and targets.numel()
        and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight)
    ):
        raise ValueError(
            f"a target id lies outside 0..{len(weight) - 1}: the text was made with another tokenizer."
        )

    def chunk(rows: slice, wide: Tensor) -> tuple[Tensor, Tensor]:
        raw = head.raw_logits(hidden.detach()[rows], wide)
        return _fused(_cross_entropy_chunk)(raw, targets[rows], token_weights[rows], cap)

    return _sum_in_chunks(hidden, weight, chunk, _rows(len(weight), 2, chunk_bytes))


def forward_kl(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "N E"],
    teacher_weight: Float[Tensor, "_ E"],
    token_weights: Float[Tensor, " N"],
    *,
    cap: float | None,
    teacher_cap: float | None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, ""]:
    """Weighted sum over tokens of KL(teacher || student) over the whole vocabulary (report, section 3.2).

    The teacher may have another width; its side gets no gradient. Raises ValueError if vocabularies differ.
    """
    if len(weight) != len(teacher_weight):
        raise ValueError(
            f"the student's vocabulary has {len(weight)} pieces and the teacher's {len(teacher_weight)}: "
            "their distributions cannot be compared. Give the student the teacher's tokenizer."
        )

    wide_teacher = teacher_weight.detach().float()

    def chunk(rows: slice, wide: Tensor) -> tuple[Tensor, Tensor]:
        raw = head.raw_logits(hidden.detach()[rows], wide)
        raw_teacher = head.raw_logits(teacher_hidden.detach()[rows], wide_teacher)
        return _fused(_forward_kl_chunk)(raw, raw_teacher, token_weights[rows], cap, teacher_cap)

    return _sum_in_chunks(hidden, weight, chunk, _rows(len(weight), 4, chunk_bytes))


def _sum_in_chunks(hidden: Tensor, weight: Tensor, chunk: Chunk, rows: int) -> Float[Tensor, ""]:
    if not torch.is_grad_enabled():  # a Function is asked for gradients even then
        hidden, weight = hidden.detach(), weight.detach()
    return _InChunks.apply(hidden, weight, chunk, rows)


class _InChunks(torch.autograd.Function):
    """Sums a loss over chunks of rows and makes its gradients on the way; the backward pass scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, chunk: Chunk, rows: int) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        loss = hidden.new_zeros((), dtype=torch.float32)
        # Gradients of the head are summed over chunks, so they are kept in fp32 until the end.
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            wide = weight.detach().float()
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                loss_part, grad = chunk(part, wide)
                loss += loss_part
                if grad_hidden is not None:
                    grad_hidden[part] = grad @ wide
                if grad_weight is not None:
                    grad_weight.addmm_(grad.T, hidden.detach()[part].float())
        saved = (
            None if g is None else g.to(like.dtype)
            for g, like in ((grad_hidden, hidden), (grad_weight, weight))
        )
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grad_hidden, grad_weight = (
            None if g is None else (g.float() * upstream).to(g.dtype) for g in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None


def _rows(vocab: int, copies: int, chunk_bytes: int) -> int:
    """Tokens a chunk, so that `copies` fp32 rows of logits each stay within `chunk_bytes`; at least one."""
    return min(max(1, chunk_bytes // (4 * vocab * copies)), _MOST_ROWS)


def _normalised(
    raw: Float[Tensor, "N V"], cap: float | None
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N 1"]]:
    """Capped logits and their log-sum-exp. The cap bounds them: mostly no pass for a maximum is needed."""
    capped = head.softcap_by_exp(raw, cap)
    if cap is not None and cap <= 40:  # exp(-2 * 40) is far from fp32's smallest number
        return capped, cap + torch.exp(capped - cap).sum(-1, keepdim=True).log()
    return capped, capped.logsumexp(-1, keepdim=True)


def _slope(capped: Float[Tensor, "N V"], cap: float | None) -> Float[Tensor, "N V"] | float:
    return 1.0 if cap is None else head.softcap_slope(capped, cap)


def _cross_entropy_chunk(
    raw: Float[Tensor, "N V"], targets: Int[Tensor, " N"], weights: Float[Tensor, " N"], cap: float | None
) -> tuple[Float[Tensor, ""], Float[Tensor, "N V"]]:
    """The summed loss of a chunk, and its gradient with respect to the raw logits."""
    capped, lse = _normalised(raw, cap)
    is_target = torch.arange(raw.shape[1], device=raw.device) == targets[:, None]
    grad = (torch.exp(capped - lse) - is_target.float()) * _slope(capped, cap) * weights[:, None]
    loss = lse[:, 0] - torch.where(is_target, capped, 0.0).sum(-1)
    return (loss * weights).sum(), grad


def _forward_kl_chunk(
    raw: Float[Tensor, "N V"],
    raw_teacher: Float[Tensor, "N V"],
    weights: Float[Tensor, " N"],
    cap: float | None,
    teacher_cap: float | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "N V"]]:
    """The summed KL(teacher || student) of a chunk, and its gradient by the student's raw logits."""
    student, lse = _normalised(raw, cap)
    teacher, teacher_lse = _normalised(raw_teacher, teacher_cap)
    p = torch.exp(teacher - teacher_lse)
    loss = (p * ((teacher - teacher_lse) - (student - lse))).sum(-1)
    grad = (torch.exp(student - lse) - p) * _slope(student, cap) * weights[:, None]
    return (loss * weights).sum(), grad


@functools.cache
def _fused(kernel):
    """The elementwise part compiled: a handful of passes over a chunk that fits the cache become two."""
    return torch.compile(kernel, dynamic=True) if can_compile() else kernel
