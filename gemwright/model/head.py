"""The one road to the logits: hidden state, tied unembedding, final soft-cap.

Training, scoring, distillation, generation and merging all come through here; nobody else applies the final
cap. The cap is part of the model's distribution, so it belongs into the student's and the teacher's
probabilities alike (report, section 2). Logits are fp32 whatever the weights: bf16 is spaced 0.125 apart
between 16 and 32.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Unembedding = Float[Tensor, "V D"] | Callable[[Tensor], Tensor]
"""The embedding table, or what multiplies hidden states by one that is quantised."""

_LOG2_E = math.log2(math.e)
_FEW_ROWS = range(4, 65)  # below, MKL reads weights at the memory's speed; above, both are alike
_BLOCK_BYTES = 32 << 20  # of a head in bf16, cast to fp32 at a time


def softcap(scores: Float[Tensor, "*N S"], cap: float | None) -> Float[Tensor, "*N S"]:
    """cap * tanh(scores / cap): the identity near 0, never beyond +-cap. None leaves the scores alone."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def softcap_by_exp(scores: Float[Tensor, "*N S"], cap: float | None) -> Float[Tensor, "*N S"]:
    """`softcap` for kernels whose derivative is written by hand: tanh(x) = 1 - 2 / (exp(2x) + 1).

    On a CPU a vectorised exp is three times as fast as a vectorised tanh. It differs from `softcap` by
    rounding only (at most 1e-7 of the cap), but its automatic derivative is NaN where exp overflows: use
    `softcap_slope`. A power of two, as `exp` below.
    """
    return scores if cap is None else cap - 2 * cap / (torch.exp2(scores * (2 * _LOG2_E / cap)) + 1)


def exp(x: Float[Tensor, "*N S"]) -> Float[Tensor, "*N S"]:
    """e^x as a power of two: torch.compile would write exp's result to memory wherever it is used twice."""
    return torch.exp2(x * _LOG2_E)


def softcap_slope(capped: Float[Tensor, "*N S"], cap: float) -> Float[Tensor, "*N S"]:
    """The derivative of the cap, from its output: 1 - (capped / cap)^2."""
    return 1 - (capped * (1 / cap)) ** 2


def product(x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*N O"]:
    """x times the transpose of the weight, as every projection is.

    On a CPU oneDNN multiplies where few rows meet a large matrix, as when several sequences take a step
    together: torch would leave that to MKL, which takes up to twice as long there (LOG.md).
    """
    rows = x.numel() // x.shape[-1]
    if (
        _FEW_ROWS.start <= rows < _FEW_ROWS.stop
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    ):
        return _by_onednn(x.reshape(rows, -1), weight).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def _by_onednn(x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "N O"]:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def raw_logits(
    hidden: Float[Tensor, "*N D"], weight: Unembedding, out: Float[Tensor, "*N V"] | None = None
) -> Float[Tensor, "*N V"]:
    """Unembed with the tied, un-scaled embedding table: fp32 arithmetic and output, before the cap.

    Without gradients a head in bf16 is never held in fp32 as a whole: see `blocks`. `out` (fp32, no
    gradients) receives the logits.
    """
    if not isinstance(weight, Tensor):
        return weight(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype == torch.float32 or torch.is_grad_enabled():
            if out is None:
                return product(hidden.float(), weight.float())
            return torch.mm(hidden.float(), weight.float().T, out=out)
        if out is None:
            out = hidden.new_empty(*hidden.shape[:-1], len(weight), dtype=torch.float32)
        rows = out.view(-1, len(weight))
        flat = hidden.reshape(-1, hidden.shape[-1])
        if narrow_products(hidden, weight):
            torch.mm(flat, weight.T, out_dtype=torch.float32, out=rows)
        else:
            for block in blocks(weight):
                torch.mm(flat.float(), weight[block].float().T, out=rows[:, block])
        return out


def blocks(weight: Float[Tensor, "V D"]) -> list[slice]:
    """Parts of the vocabulary to be cast to fp32 one after the other: all of it if it is fp32 already."""
    rows = len(weight) if weight.dtype == torch.float32 else max(1, _BLOCK_BYTES // (4 * weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def narrow_products(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the device multiplies bf16 by bf16 into fp32 sums: on CUDA it does, at full speed."""
    return weight.is_cuda and weight.dtype == hidden.dtype == torch.bfloat16


def logits(hidden: Float[Tensor, "*N D"], weight: Unembedding, cap: float | None) -> Float[Tensor, "*N V"]:
    """The model's logits, capped, fp32."""
    return softcap(raw_logits(hidden, weight), cap)
