"""The loss of preferences: how sure a score is of the better of two (Bradley and Terry, 1952)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def bradley_terry(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """-log P(chosen before rejected) = -log sigma(chosen - rejected), in nats a pair (WARM, 2401.12187)."""
    return F.softplus(rejected - chosen)
