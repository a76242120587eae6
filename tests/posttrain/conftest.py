"""A student with the tests' tokenizer, small and untrained."""

from pathlib import Path

import pytest
import torch

from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def student(tiny: GemmaConfig, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(1)
    checkpoint.save(Gemma(tiny.but(init_std=0.3)), folder)
    Tokenizer.load(tokenizer_folder).save(folder)
    return folder
