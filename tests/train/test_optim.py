"""The schedule, drawn; which weights decay; one fused update, by hand."""

import math
from itertools import pairwise

import pytest
import torch

from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.train.optim import OptimConfig, adamw, learning_rate

OPTIM = OptimConfig(lr=2.0, min_lr_ratio=0.25, warmup_steps=4)


def drawn(config: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(step, steps, config) for step in range(steps)]


def test_the_rate_climbs_in_equal_steps_from_the_first_update_to_the_peak():
    assert drawn(OPTIM, 20)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_after_the_peak_the_rate_falls_along_half_a_cosine():
    rates = drawn(OPTIM, 20)
    for step in range(4, 20):
        share = 0.25 + 0.75 * (1 + math.cos(math.pi * (step - 4) / 16)) / 2
        assert rates[step] == pytest.approx(2.0 * share)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert rates[12] == pytest.approx(2.0 * (1 + 0.25) / 2)


def test_the_end_of_the_schedule_is_the_chosen_share_of_the_peak():
    assert learning_rate(20, 20, OPTIM) == pytest.approx(0.5)
    assert drawn(OPTIM, 2_000)[-1] == pytest.approx(0.5, abs=1e-4)


def test_without_warm_up_the_first_update_has_the_peak():
    assert learning_rate(0, 10, OPTIM.but(warmup_steps=0)) == 2.0


def test_a_run_shorter_than_its_warm_up_only_climbs():
    assert drawn(OPTIM.but(warmup_steps=8), 3) == pytest.approx([0.25, 0.5, 0.75])


def test_matrices_and_the_embedding_decay_and_norms_do_not(tiny: GemmaConfig):
    model = Gemma(tiny)
    matrices, vectors = adamw(model, OptimConfig(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, spared = ({names[id(p)] for p in group["params"]} for group in (matrices, vectors))
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert spared == {name for name in names.values() if "norm" in name}
    assert "model.embed_tokens.weight" in decaying
    assert decaying | spared == set(names.values())


def test_a_frozen_weight_is_left_out(tiny: GemmaConfig):
    model = Gemma(tiny)
    model.unembedding.requires_grad_(False)
    groups = adamw(model, OPTIM).param_groups
    assert all(p is not model.unembedding for group in groups for p in group["params"])


def test_the_optimiser_is_fused(tiny: GemmaConfig):
    assert all(group["fused"] for group in adamw(Gemma(tiny), OPTIM).param_groups)


def test_an_update_is_adamws_with_decay_apart_from_the_gradient():
    """Loshchilov and Hutter 2019: the first update moves by lr * sign(g), after shrinking by lr * decay."""
    layer = torch.nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer = adamw(layer, OptimConfig(lr=0.1, weight_decay=0.5))
    gradient = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    layer.weight.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.1 * 0.5) - 0.1 * gradient.sign())


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"min_lr_ratio": 1.5}, {"warmup_steps": -1}, {"clip": 0.0}, {"weight_decay": -1.0}]
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(wrong: dict[str, float]):
    with pytest.raises(ValueError, match=f"OptimConfig: {next(iter(wrong))}: "):
        OptimConfig().but(**wrong)
