"""Cross-entropy to few ids a token: the teacher's draws or largest probabilities, or the one next token.

From hidden states and the head's weight, without the logits of a batch (`chunks`). The definitions are in
`divergence.py`; a loss is the weighted SUM over tokens.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemwright.losses import kernels
from gemwright.losses.chunks import CHUNK_BYTES, kernel, rows_a_chunk, scatter, shift_of, sum_in_chunks
from gemwright.losses.sharded import Slice

_FAR = 1e5  # below every other logit: exp gives 0, and its square is still far from overflow
_LEAST = 1e-30  # of the student's mass in the tail: its log and its inverse are taken


def cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    ids: Int[Tensor, "N K"],
    probs: Float[Tensor, "N K"],
    token_weights: Float[Tensor, " N"],
    *,
    cap: float | None,
    temperature: float = 1.0,
    tail: bool = False,
    targets: Int[Tensor, " N"] | None = None,
    next_token: float = 0.0,
    z_loss: float = 0.0,
    part: Slice | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, ""]:
    """Weighted sum over tokens of -sum_k p_k log P(id_k), times temperature^2 (arXiv 2503.16870).

    Args:
        ids, probs: the targets, ids distinct within a token; probability 0 is padding. Without `tail` they
            have to sum to 1 (counts over draws, or probabilities renormalised).
        temperature: of the student's distribution; the targets are taken to have it already.
        tail: what `probs` lack of 1 is the target of all other ids together, as one bucket.
        targets, next_token, z_loss: as in `dense.divergence`.
        part: the slice of the vocabulary that this rank holds (`sharded`).
        chunk_bytes: bound on the logits held at a time, all copies together.
    Raises:
        ValueError: temperature or next_token out of range, targets missing; an id outside the vocabulary
            (checked on the CPU, where it costs nothing).
    """
    part = part or Slice.whole(weight)
    require_options(temperature, next_token)
    require_ids(part.total, ids, targets if next_token else None)
    constants = {"cap": cap, "temperature": temperature}

    def chunk(rows: slice, logits: Tensor) -> Tensor:
        p, w = probs[rows].float(), token_weights[rows].float()
        shift = shift_of(logits, cap, temperature, part)
        totals = kernel(kernels.student_sums, **constants)(logits, shift)
        index, inside = part.local(ids[rows], len(weight))
        picked = logits.gather(1, index)
        p_here = p if inside is None else p * inside
        reached = (p_here * picked).sum(-1, keepdim=True)
        total, plain, reached = part.sum(torch.cat((totals, reached), 1)).unbind(-1)
        lse, plain_lse = shift[:, 0] / temperature + total.log(), shift[:, 0] + plain.log()
        mixed, plain_scale, next_one = mix(targets, next_token, z_loss, rows, logits, plain_lse, part)
        share, plain_share = w * (1 - next_token), w * plain_scale
        given = p.sum(-1)
        loss, factor, amounts = given * lse - reached / temperature, given, -p_here
        if tail:
            # The kept ids are taken out, so that the others' sum is exact where it is small, and their
            # gradient, which has no part in the bucket's, is put in whole.
            kept = (p_here > 0).float()
            logits.scatter_add_(1, index, kept * -_FAR * temperature)
            rest = part.sum(kernel(kernels.tail_sum, temperature=temperature)(logits, shift)) / total
            rest, bucket = rest.clamp_min(_LEAST), 1 - given
            loss, factor = loss - bucket * rest.log(), 1 - bucket / rest
            amounts = amounts + kept * torch.exp(picked / temperature - lse[:, None])
        amounts = amounts * (share * temperature)[:, None]
        if tail:
            amounts += kept * torch.exp(picked - plain_lse[:, None]) * plain_share[:, None]
        kernel(kernels.student_gradient, **constants)(
            logits, lse, share * factor * temperature, plain_lse, plain_share
        )
        scatter(logits, index, amounts, picked, cap)
        if next_one is not None:
            scatter(logits, next_one[0], w[:, None] * next_one[1], next_one[2], cap)
        return (share * temperature**2 * loss + w * mixed).sum()

    rows = rows_a_chunk(len(hidden), part.most, 1, chunk_bytes)
    return sum_in_chunks(hidden, weight, chunk, rows, part)


def mix(
    targets: Int[Tensor, " T"] | None,
    next_token: float,
    z_loss: float,
    rows: slice,
    capped: Float[Tensor, "N V"],
    lse: Float[Tensor, " N"],
    part: Slice,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """What next-token prediction and z-loss add for a chunk, without the token's weight.

    Returns the loss (N,), the factor of P in the gradient by the capped logits (N,), and what is to be
    scattered into it: indices, amounts, and the capped logits there, each (N, 1).
    """
    loss, scale = z_loss * lse**2, 2 * z_loss * lse + next_token
    if not next_token:
        return loss, scale, None
    if targets is None:
        raise ValueError(f"next_token={next_token} mixes in the next token: give its ids as targets.")
    index, inside = part.local(targets[rows, None], capped.shape[1])
    picked = capped.gather(1, index)
    amounts = torch.full_like(picked, -next_token) if inside is None else -next_token * inside
    reached = part.sum((picked if inside is None else picked * inside)[:, 0].clone())
    return loss + next_token * (lse - reached), scale, (index, amounts, picked)


def require_options(temperature: float, next_token: float, beta: float = 0.0) -> None:
    """Raise ValueError for options outside their range."""
    if not (0 <= beta <= 1 and 0 <= next_token <= 1 and temperature > 0):
        raise ValueError(
            f"beta={beta} and next_token={next_token} have to lie in 0..1, temperature={temperature} above 0."
        )


def require_ids(vocab: int, *given: Tensor | None) -> None:
    """Raise ValueError if an id lies outside the vocabulary. On a GPU looking would cost a wait."""
    for ids in given:
        if ids is None or ids.is_cuda or not ids.numel():
            continue
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise ValueError(
                f"a target id lies outside 0..{vocab - 1}: the text was made with another tokenizer."
            )
