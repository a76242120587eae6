"""Two models of one config with the same weights: ours, and the one in transformers as the oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def pair() -> Callable[..., tuple[Any, Any]]:
    """Build both models from one config: `pair(**changes) -> (ours, theirs)`.

    Matrices are drawn with a standard deviation of 1, so that scores and logits reach their caps: at 0.02
    these bend nothing. Norms are drawn too: at w = 0 one norm's weight is like another's.
    """
    transformers = pytest.importorskip("transformers")
    from gemwright.model.config import GemmaConfig, alternating
    from gemwright.model.gemma import Gemma

    base = GemmaConfig(
        d_model=32, d_ff=48, num_heads=4, num_kv_heads=2, head_dim=8, pattern=alternating(2),
        vocab_size=96, query_pre_attn_scalar=8, window=8, max_seq_len=64, init_std=1.0,
    )  # fmt: skip

    def build(seed: int = 0, **changes: Any) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        ours = Gemma(base.but(**changes))
        with torch.no_grad():
            for name, parameter in ours.named_parameters():
                if "norm" in name:
                    parameter.normal_(std=0.3)
        config = transformers.Gemma2Config(**ours.config.to_hf(), attn_implementation="eager")
        theirs = transformers.Gemma2ForCausalLM(config)
        told = theirs.load_state_dict(ours.state_dict(), strict=False)
        assert told.unexpected_keys == []
        assert told.missing_keys == ["lm_head.weight"]
        assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
        return ours.eval(), theirs.eval()

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    """Two rows, three windows long, without control tokens."""
    return torch.randint(4, 96, (2, 24), generator=torch.Generator().manual_seed(5))
