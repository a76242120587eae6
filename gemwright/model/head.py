"""The one road to the logits: hidden state, tied unembedding, final soft-cap.

Training, scoring, distillation, generation and merging all come through here; nobody else applies the final
cap. The cap is part of the model's distribution, so it belongs into the student's and the teacher's
probabilities alike (report, section 2). Logits are fp32 whatever the weights: bf16 is spaced 0.125 apart
between 16 and 32.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def softcap(scores: Float[Tensor, "*N S"], cap: float | None) -> Float[Tensor, "*N S"]:
    """cap * tanh(scores / cap): the identity near 0, never beyond +-cap. None leaves the scores alone."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def softcap_by_exp(scores: Float[Tensor, "*N S"], cap: float | None) -> Float[Tensor, "*N S"]:
    """`softcap` for kernels whose derivative is written by hand: tanh(x) = 1 - 2 / (exp(2x) + 1).

    On a CPU a vectorised exp is three times as fast as a vectorised tanh. It differs from `softcap` by
    rounding only (at most 1e-7 of the cap), but its automatic derivative is NaN where exp overflows: use
    `softcap_slope`.
    """
    return scores if cap is None else cap - 2 * cap / (torch.exp(scores * (2 / cap)) + 1)


def softcap_slope(capped: Float[Tensor, "*N S"], cap: float) -> Float[Tensor, "*N S"]:
    """The derivative of the cap, from its output: 1 - (capped / cap)^2."""
    return 1 - (capped * (1 / cap)) ** 2


def raw_logits(hidden: Float[Tensor, "*N D"], weight: Float[Tensor, "V D"]) -> Float[Tensor, "*N V"]:
    """Unembed with the tied, un-scaled embedding table: fp32 arithmetic and output, before the cap."""
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), weight.float())


def logits(
    hidden: Float[Tensor, "*N D"], weight: Float[Tensor, "V D"], cap: float | None
) -> Float[Tensor, "*N V"]:
    """The model's logits, capped, fp32."""
    return softcap(raw_logits(hidden, weight), cap)
