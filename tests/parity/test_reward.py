"""A reward model's scores are those of transformers' Gemma2ForSequenceClassification, from our files."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemwright.model import checkpoint
from gemwright.model.gemma import RewardModel
from gemwright.reward.scoring import scores

pytestmark = [pytest.mark.parity, pytest.mark.interop]
Pair = Callable[..., tuple[Any, Any]]
Both = Callable[..., tuple[RewardModel, Any]]


@pytest.fixture
def both(pair: Pair, tmp_path: Path) -> Both:
    """`both(**changes) -> (ours, theirs)`: we save a folder, and both are loaded from it."""

    def build(**changes: Any) -> tuple[RewardModel, Any]:
        from transformers import AutoModelForSequenceClassification

        model = RewardModel.of(pair(**changes)[0])
        with torch.no_grad():
            model.score.weight.normal_()
        checkpoint.save(model, tmp_path)
        theirs, told = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, attn_implementation="eager", output_loading_info=True
        )
        assert type(theirs).__name__ == "Gemma2ForSequenceClassification"
        assert not any(told[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return checkpoint.load_reward(tmp_path).eval(), theirs.eval()

    return build


def texts() -> list[list[int]]:
    """Of one window up to four; without <pad>, by which transformers finds a text's end."""
    draw = random.Random(3)
    return [[2, *(draw.randrange(4, 96) for _ in range(length))] for length in (5, 16, 17, 24, 30)]


@torch.no_grad()
def of(theirs: Any) -> Tensor:
    """Their scores: rows padded on the right, a mask beside them."""
    many = texts()
    ids = torch.zeros(len(many), max(map(len, many)), dtype=torch.long)
    for row, text in zip(ids, many, strict=True):
        row[: len(text)] = torch.tensor(text)
    return theirs(ids, attention_mask=(ids != 0).long()).logits[:, 0]


def difference(ours: RewardModel, theirs: Any) -> float:
    return (scores(ours, texts()) - of(theirs)).abs().max().item()


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_heads": 1}, {"attn_softcap": 5.0}, {"head_dim": 4, "query_pre_attn_scalar": 8}],
    ids=str,
)
def test_scores_equal_transformers(both: Both, changes: dict[str, Any]):
    """Matrices of standard deviation 1, so that the cap bends; texts beyond two windows."""
    ours, theirs = both(**changes)
    assert of(theirs).std() > 1
    assert difference(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"window": 7},
        {"window": 9},
        {"attn_softcap": None},
        {"query_pre_attn_scalar": 12},
        {"rope_theta": 9e3},
    ],
    ids=str,
)
def test_those_scores_tell_when_one_thing_is_another(both: Both, changes: dict[str, Any]):
    ours, theirs = both()
    other = RewardModel(ours.config.but(**changes))
    other.load_state_dict(ours.state_dict())
    assert difference(other, theirs) > 1e-2


def test_those_scores_tell_when_the_last_norm_or_the_head_is_lost(both: Both):
    ours, theirs = both()
    for weight in (ours.model.norm.weight, ours.score.weight):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
            assert difference(ours, theirs) > 1e-2
            weight.copy_(kept)
    assert difference(ours, theirs) < 1e-4


def test_their_reward_model_is_read_by_us(both: Both, tmp_path: Path):
    _, theirs = both()
    theirs.save_pretrained(tmp_path / "theirs")
    assert difference(checkpoint.load_reward(tmp_path / "theirs"), theirs) < 1e-4
