"""Checkpoints to be merged: children of one base, with drawn weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def small(tiny: GemmaConfig) -> GemmaConfig:
    return tiny.but(d_model=16, d_ff=32, head_dim=8)


@pytest.fixture
def make(small: GemmaConfig, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """`make(name)`: a checkpoint with a tokenizer; equal seeds give equal weights, norms drawn as well."""

    def written(
        name: str, seed: int = 0, *, dtype: torch.dtype = torch.float32, kind: type[Gemma] = Gemma,
        config: GemmaConfig = small, shard: int = 1 << 30, step: float = 0.0, of: int = 0,
    ) -> Path:  # fmt: skip
        """With `step`, the weights of seed `of` and a step of that size away from them."""

        def drawn(seed: int) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(seed)
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

        model = kind(config)
        weights = drawn(of if step else seed)
        if step:
            weights = {name: weights[name] + step * away for name, away in drawn(seed).items()}
        model.load_state_dict(weights)
        checkpoint.save(model.to(dtype), tmp_path / name, shard)
        Tokenizer.load(tokenizer_folder).save(tmp_path / name)
        return tmp_path / name

    return written


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, Tensor]]:
    """`weights(folder)`: what safetensors itself reads in a checkpoint's files."""

    def read(folder: Path) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path in sorted(folder.glob("model*.safetensors")):
            found |= load_file(path)
        return found

    return read
