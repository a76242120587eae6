"""From logits to the next token: greedy, or drawn at a temperature. Small pure functions."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def sample(
    logits: Float[Tensor, "B V"], temperature: float, generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    """The next ids: the likeliest at temperature 0, else a draw from softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
