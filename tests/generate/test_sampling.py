"""The next token: the likeliest, or one drawn as often as its probability says."""

import pytest
import torch

from gemwright.generate.sampling import sample

LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0]])
DRAWS = 20_000


def drawn(temperature: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sample(LOGITS.expand(DRAWS, -1), temperature, generator)


def test_at_temperature_0_the_likeliest_token_is_taken():
    logits = torch.randn(50, 30)
    assert torch.equal(sample(logits, 0.0), logits.argmax(-1))


def test_of_two_equal_logits_the_first_is_taken_at_temperature_0():
    assert sample(torch.tensor([[1.0, 4.0, 4.0]]), 0.0).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_tokens_are_drawn_as_often_as_the_temperature_says(temperature: float):
    """Chi-square with 5 degrees of freedom: a right sampler exceeds 20.5 once in a thousand seeds."""
    expected = DRAWS * (LOGITS[0].double() / temperature).softmax(-1)
    counts = torch.bincount(drawn(temperature), minlength=6).double()
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5


def test_another_temperature_would_be_noticed():
    """The test above bites: the draws at 1.0 against what 1.1 would give."""
    expected = DRAWS * (LOGITS[0].double() / 1.1).softmax(-1)
    counts = torch.bincount(drawn(1.0), minlength=6).double()
    assert float(((counts - expected) ** 2 / expected).sum()) > 50


def test_near_temperature_0_every_draw_is_the_likeliest():
    assert set(drawn(1e-3).tolist()) == {0}


def test_one_seed_gives_one_sequence():
    assert torch.equal(drawn(1.0, seed=3), drawn(1.0, seed=3))
    assert not torch.equal(drawn(1.0, seed=3), drawn(1.0, seed=4))


def test_each_row_is_drawn_from_its_own_distribution():
    certain = torch.full((4, 5), -1e4).scatter(1, torch.tensor([[3], [0], [4], [1]]), 0.0)
    assert sample(certain, 1.0).tolist() == [3, 0, 4, 1]
