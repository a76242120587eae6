"""A small model whose window bites after 8 tokens, and which does not repeat itself."""

from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch

from gemwright.model.config import GemmaConfig, alternating
from gemwright.model.gemma import Gemma


@pytest.fixture
def biting() -> Callable[..., Gemma]:
    """`biting(seed, **changes)`: large weights, or no cap and no window would show; small embeddings, or each
    token would be its own successor."""
    base = GemmaConfig(
        d_model=32, d_ff=48, num_heads=2, num_kv_heads=1, head_dim=16, pattern=alternating(2),
        vocab_size=200, query_pre_attn_scalar=16, window=8, max_seq_len=64, init_std=0.5,
    )  # fmt: skip

    def build(seed: int = 1, **changes: Any) -> Gemma:
        torch.manual_seed(seed)
        model = Gemma(base.but(**changes)).eval()
        with torch.no_grad():
            model.unembedding.mul_(0.1)
        return model

    return build


@pytest.fixture
def model(biting: Callable[..., Gemma]) -> Gemma:
    """The first of them."""
    return biting()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is run a thousand times: the shapes of its calls are checked by the tests beside it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
