"""A loss over a large vocabulary, a chunk of tokens at a time: value AND gradients in the forward pass.

A chunk is unembedded, its loss and gradient are made at once, and its buffer serves the next one: three
vocabulary GEMMs for cross-entropy (logits, d hidden, d weight), four for a divergence (the teacher's logits
too), where recomputing logits in the backward pass takes four and six.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from gemwright.device import can_compile, fused
from gemwright.losses import kernels
from gemwright.losses.sharded import Slice
from gemwright.model import head

CHUNK_BYTES = 384 << 20
"""Logits held at a time, all copies together."""
_MOST_ROWS = 512  # ours: enough rows for the GEMMs; what was measured did not settle it (LOG.md)
_EAGER_COPIES = 8  # an eager kernel holds as many chunks of temporaries

Chunk = Callable[[slice, Float[Tensor, "N V"]], Float[Tensor, ""]]
"""Rows, and their raw logits, which are to be overwritten with the gradient by them -> the summed loss."""


def sum_in_chunks(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], chunk: Chunk, rows: int, part: Slice
) -> Float[Tensor, ""]:
    """Sum `chunk` over chunks of `rows` tokens, differentiably by `hidden` and `weight`."""
    if not torch.is_grad_enabled():  # a Function is asked for gradients even then
        hidden, weight = hidden.detach(), weight.detach()
    return _InChunks.apply(hidden, weight, chunk, rows, part)


def rows_a_chunk(tokens: int, vocab: int, copies: int, chunk_bytes: int) -> int:
    """Tokens a chunk, so that `copies` fp32 rows of logits each stay within `chunk_bytes`; at least one.

    All chunks are about equal: a short last one would read the whole head for a few rows.
    """
    copies += 0 if can_compile() else _EAGER_COPIES
    most = max(1, min(chunk_bytes // (4 * max(vocab, 1) * copies), _MOST_ROWS))
    return math.ceil(tokens / math.ceil(tokens / most)) if tokens else 1


def shift_of(
    raw: Float[Tensor, "N V"], cap: float | None, temperature: float, part: Slice
) -> Float[Tensor, "N 1"]:
    """What to take off capped logits so that exp stays in range: the cap, or the largest of them."""
    if kernels.bounded(cap, temperature):
        return raw.new_full((len(raw), 1), cap or 0.0)
    return head.softcap(part.max(raw.amax(-1, keepdim=True)), cap)


def scatter(
    grad: Float[Tensor, "N V"], index: Tensor, amounts: Tensor, capped: Tensor, cap: float | None
) -> None:
    """Add `amounts`, which are by the capped logits `capped`, to the gradient by the raw ones at `index`."""
    grad.scatter_add_(1, index, amounts if cap is None else amounts * head.softcap_slope(capped, cap))


def kernel(which: Callable[..., Tensor | None], **static: float | None) -> Callable[..., Tensor]:
    """One of `kernels`, fused, with its constants."""
    return fused(which, **static)


class _InChunks(torch.autograd.Function):
    """Sums a loss over chunks of rows and makes its gradients on the way; the backward pass scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, chunk: Chunk, rows: int, part: Slice) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        states, head_weight = hidden.detach(), weight.detach()
        loss = states.new_zeros((), dtype=torch.float32)
        # Sums over chunks, blocks of the vocabulary and ranks, so they are kept in fp32 until the end.
        grad_hidden = torch.zeros_like(states, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.zeros_like(head_weight, dtype=torch.float32) if needs_weight else None
        buffer = states.new_empty(min(rows, len(states)), len(weight), dtype=torch.float32)
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), rows):
                taken = slice(start, start + rows)
                few = states[taken]
                logits = head.raw_logits(few, head_weight, out=buffer[: len(few)])
                loss += chunk(taken, logits)
                _add_products(
                    logits, few, head_weight, None if grad_hidden is None else grad_hidden[taken], grad_weight
                )
        if grad_hidden is not None:
            part.sum(grad_hidden)
        ctx.gradients = [
            None if grad is None else grad.to(like.dtype)
            for grad, like in ((grad_hidden, hidden), (grad_weight, weight))
        ]
        return loss

    @staticmethod
    def backward(ctx, upstream: Tensor):
        # Scaled in place and handed on: a copy of the head's gradient would be the largest tensor of all.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "this loss was backpropagated before and gave its gradients away. Compute it again."
            )
        if upstream.is_cuda or upstream != 1:  # on a GPU looking would cost a wait
            for grad in gradients:
                if grad is not None:
                    grad.mul_(upstream)
        return *gradients, None, None, None


def _add_products(
    grad: Float[Tensor, "N V"],
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    grad_hidden: Float[Tensor, "N D"] | None,
    grad_weight: Float[Tensor, "V D"] | None,
) -> None:
    """From the gradient by the logits to those by the hidden states and the head, added to fp32 sums."""
    if head.narrow_products(hidden, weight):  # the gradient's rounding to bf16 averages out in the sums
        narrow = grad.to(weight.dtype)
        if grad_hidden is not None:
            torch.addmm(grad_hidden, narrow, weight, out_dtype=torch.float32, out=grad_hidden)
        if grad_weight is not None:
            torch.addmm(grad_weight, narrow.T, hidden, out_dtype=torch.float32, out=grad_weight)
        return
    for block in head.blocks(weight):
        if grad_hidden is not None:
            grad_hidden.addmm_(grad[:, block], weight[block].float())
        if grad_weight is not None:
            grad_weight[block].addmm_(grad[:, block].T, hidden.float())
