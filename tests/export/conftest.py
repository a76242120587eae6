"""A small random Gemma 2 in which everything bites, in folders, and text for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig, alternating
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def config() -> GemmaConfig:
    """No value is one that llama.cpp would take by itself, and the table has rows that no piece owns."""
    return GemmaConfig(
        d_model=64, d_ff=96, num_heads=4, num_kv_heads=2, head_dim=32, pattern=alternating(4),
        vocab_size=708, query_pre_attn_scalar=24, window=16, max_seq_len=256, attn_softcap=20.0,
        final_softcap=10.0, rope_theta=500.0, rms_norm_eps=0.5, init_std=0.3,
    )  # fmt: skip


@pytest.fixture
def saved(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., tuple[Gemma, Path]]:
    """`saved(config) -> (model, folder)`: a checkpoint with random weights and norms, and a tokenizer."""

    def save(config: GemmaConfig, name: str = "model", **options: Any) -> tuple[Gemma, Path]:
        torch.manual_seed(4)
        model = Gemma(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name:
                    parameter.normal_(std=0.3)
        checkpoint.save(model, tmp_path / name, **options)
        Tokenizer.load(tokenizer_folder).save(tmp_path / name)
        return model, tmp_path / name

    return save


@pytest.fixture(scope="session")
def prompt(tokenizer_folder: Path, text_folder: Path) -> list[int]:
    """Three windows and a little of what the tokenizer was trained on."""
    text = (text_folder / "3.py").read_text(encoding="utf-8")
    return Tokenizer.load(tokenizer_folder).encode(text, bos=True)[:50]
