"""From a teacher's hidden states to what is stored of them: M draws a position, or its k likeliest ids.

The logits come from `model/head.py`, a chunk of rows at a time, and are gone before the next chunk.

A draw inverts the cumulative distribution, in fp64: at 256,000 pieces a running sum in fp32 would lose the
ids below 1e-7. A position's uniforms are sorted when they are made, so its ids come out ascending. They hang
on seed and window number alone: no batch and no resumed run changes them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from gemwright.device import fused
from gemwright.model import head

CHUNK_BYTES = 256 << 20
"""What a chunk of rows takes, all copies of its logits together."""
_COPIES_BYTES = 20  # what a draw makes of a logit: exp (fp32), exp and its running sum (fp64)


class Sampled(NamedTuple):
    """M draws with replacement for each of N positions."""

    ids: Int[Tensor, "N M"]
    """Ascending, an id as often as it was drawn."""
    entropy: Float[Tensor, " N"]
    """Of the distribution drawn from, nats."""
    covered: Float[Tensor, " N"]
    """Its mass on the distinct ids drawn."""


class Top(NamedTuple):
    """The k likeliest ids of each of N positions."""

    ids: Int[Tensor, "N k"]
    """The most probable first."""
    log_probs: Float[Tensor, "N k"]
    """Nats."""
    log_tail: Float[Tensor, " N"]
    """Of all other ids together; -inf where they have no mass."""
    entropy: Float[Tensor, " N"]
    """Of the whole distribution, nats."""
    covered: Float[Tensor, " N"]
    """The mass of the k ids."""


D = TypeVar("D", Sampled, Top)


def uniforms(
    seed: int, window_numbers: Sequence[int], seq_len: int, samples: int, *, stratified: bool = False
) -> Float64[Tensor, "B T M"]:
    """`samples` sorted uniforms for every position of some windows, from 0 to 1, on the CPU.

    Args:
        stratified: one from each of `samples` equal parts of 0 to 1, so that an id of probability p is drawn
            about samples * p times every time, and not just in the mean. Ours: as unbiased, less noisy.
    """
    rows = np.empty((len(window_numbers), seq_len, samples))
    for row, number in zip(rows, window_numbers, strict=True):
        key = np.array([seed % 2**64, number], np.uint64)  # counter-based: any window can be drawn alone
        generator = np.random.Generator(np.random.Philox(key=key))
        if stratified:
            np.divide(np.arange(samples) + generator.random((seq_len, samples)), samples, out=row)
        else:
            places = generator.standard_exponential((seq_len, samples + 1)).cumsum(-1)
            np.divide(places[:, :-1], places[:, -1:], out=row)
    return torch.from_numpy(rows)


def sample(
    raw: Float[Tensor, "N V"],
    uniforms: Float64[Tensor, "N M"],
    *,
    cap: float | None,
    temperature: float = 1.0,
) -> Sampled:
    """M draws a row from softmax(capped logits / temperature), by the inverse of its cumulative distribution.

    Args:
        raw: logits before the cap. An id whose probability underflows to 0 is never drawn.
        uniforms: sorted in each row, from 0 to 1.
    Raises:
        ValueError: logits that are no numbers.
    """
    masses, entropy = fused(_masses, cap=cap, temperature=temperature)(raw)
    _check(entropy)
    running = masses.double().cumsum(-1)
    total = running[:, -1:]
    # Below the total even for a uniform of 1, so that the last id with any mass is the last to be drawn.
    below = torch.nextafter(total, torch.zeros_like(total))
    ids = torch.searchsorted(running, torch.minimum(uniforms.to(total.device) * total, below), right=True)
    drawn = masses.gather(1, ids)
    drawn[:, 1:] *= ids[:, 1:] != ids[:, :-1]
    return Sampled(ids, entropy, drawn.sum(-1) / total[:, 0].float())


def top(raw: Float[Tensor, "N V"], k: int, *, cap: float | None, temperature: float = 1.0) -> Top:
    """The k likeliest ids a row of softmax(capped logits / temperature), and the mass of the others.

    Raises ValueError for logits that are no numbers.
    """
    masses, entropy = fused(_masses, cap=cap, temperature=temperature)(raw)
    _check(entropy)
    kept, ids = masses.topk(k)
    others = masses.scatter_(1, ids, 0.0).sum(-1)  # summed, not 1 - kept: a small tail keeps its digits
    total = kept.sum(-1) + others
    return Top(
        ids, kept.log() - total.log()[:, None], others.log() - total.log(), entropy, kept.sum(-1) / total
    )


@torch.no_grad()
def sample_hidden(
    hidden: Float[Tensor, "N E"],
    weight: Float[Tensor, "V E"],
    uniforms: Float64[Tensor, "N M"],
    *,
    cap: float | None,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Sampled:
    """`sample` from hidden states and the head's weight, in chunks of rows; the result is on the CPU."""

    def draw(raw: Tensor, rows: slice) -> Sampled:
        return sample(raw, uniforms[rows], cap=cap, temperature=temperature)

    return _in_chunks(hidden, weight, draw, chunk_bytes)


@torch.no_grad()
def top_hidden(
    hidden: Float[Tensor, "N E"],
    weight: Float[Tensor, "V E"],
    k: int,
    *,
    cap: float | None,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Top:
    """`top` from hidden states and the head's weight, in chunks of rows; the result is on the CPU."""

    def draw(raw: Tensor, _: slice) -> Top:
        return top(raw, k, cap=cap, temperature=temperature)

    return _in_chunks(hidden, weight, draw, chunk_bytes)


def _in_chunks(hidden: Tensor, weight: Tensor, draw: Callable[[Tensor, slice], D], chunk_bytes: int) -> D:
    # A GEMM of few rows costs what reading the weight costs, so most of the memory is for its result, and the
    # wider copies are made of a few of its rows at a time.
    rows = max(1, chunk_bytes * 3 // 4 // (4 * len(weight)))
    few = max(1, chunk_bytes // 4 // (_COPIES_BYTES * len(weight)))
    parts: list[D] = []
    for start in range(0, len(hidden), rows):
        raw = head.raw_logits(hidden[start : start + rows], weight)
        for at, piece in zip(range(start, start + rows, few), raw.split(few), strict=False):
            parts.append(draw(piece, slice(at, at + len(piece))))
    return type(parts[0])(*(torch.cat(field).cpu() for field in zip(*parts, strict=True)))


def _masses(
    raw: Float[Tensor, "N V"], cap: float | None, temperature: float
) -> tuple[Float[Tensor, "N V"], Float[Tensor, " N"]]:
    """Probabilities but for a factor, 1 for the likeliest id, and the entropy of each row in nats."""
    highest = head.softcap_by_exp(raw.amax(-1, keepdim=True), cap)  # the cap keeps the order
    shifted = (head.softcap_by_exp(raw, cap) - highest) * (1 / temperature)
    masses = torch.exp(shifted)
    total = masses.sum(-1)
    return masses, total.log() - (masses * shifted).sum(-1) / total


def _check(entropy: Float[Tensor, " N"]) -> None:
    if not torch.isfinite(entropy).all():
        raise ValueError(
            "the teacher's logits are no numbers (NaN or infinite): its weights are damaged, or too large "
            "for the number format it runs in. Check the checkpoint, or run it in fp32."
        )
