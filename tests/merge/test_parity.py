"""A merged checkpoint is one that transformers loads, with the weights and the logits that ours has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemwright.merge.stage import run
from gemwright.model import checkpoint
from gemwright.model.gemma import RewardModel
from tests.merge.cases import Make, config

pytestmark = [pytest.mark.parity, pytest.mark.interop]  # files that others load, too
IDS = torch.arange(4, 24).reshape(2, 10)


@pytest.fixture
def theirs() -> Callable[[str, Path], Any]:
    """`theirs(name, folder)`: load with a class of transformers."""
    transformers: Any = pytest.importorskip("transformers")

    def load(name: str, folder: Path) -> Any:
        options = {"attn_implementation": "eager", "output_loading_info": True}
        model, told = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **options)
        assert not any(told.values()), told
        return model.eval()

    return load


@torch.no_grad()
def test_transformers_loads_a_merge_in_parts(make: Make, tmp_path: Path, theirs: Callable[..., Any]):
    base, *models = (make(str(seed), seed) for seed in range(3))
    run(config("slerp", max_shard_bytes=9_000), tmp_path / "out", models, base=base)
    ours = checkpoint.load(tmp_path / "out")(IDS)
    torch.testing.assert_close(
        theirs("AutoModelForCausalLM", tmp_path / "out")(IDS).logits, ours, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_transformers_loads_merged_reward_models(make: Make, tmp_path: Path, theirs: Callable[..., Any]):
    models = [make(str(seed), seed, kind=RewardModel) for seed in range(2)]
    run(config("linear"), tmp_path / "out", models)
    model = checkpoint.load_reward(tmp_path / "out")
    scores = theirs("AutoModelForSequenceClassification", tmp_path / "out")(IDS).logits[:, 0]
    torch.testing.assert_close(scores, model.scores(model.hidden(IDS))[:, -1], atol=1e-4, rtol=1e-4)
