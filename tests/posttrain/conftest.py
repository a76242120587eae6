"""What the post-training stages begin with, small and untrained."""

import json
from pathlib import Path

import pytest
import torch

from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma, RewardModel
from gemwright.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def student(tiny: GemmaConfig, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the tests' tokenizer."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(1)
    checkpoint.save(Gemma(tiny.but(init_std=0.3)), folder)
    Tokenizer.load(tokenizer_folder).save(folder)
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty of them, every second one of two turns."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    records = [{"id": f"p{n}", "turns": [f"def f{n}():", "and then"][: 1 + n % 2]} for n in range(60)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def judge(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that likes something, no matter what."""
    folder = tmp_path_factory.mktemp("judge")
    model = RewardModel.of(checkpoint.load(teacher_folder))
    torch.manual_seed(5)
    torch.nn.init.normal_(model.score.weight)
    checkpoint.save(model, folder)
    Tokenizer.load(teacher_folder).save(folder)
    return folder
