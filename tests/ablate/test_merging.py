"""The study of merging: two roads are compared where both are as far from the start."""

from pathlib import Path

import pytest

from gemwright.ablate import merging
from gemwright.recipes.laptop_full import rlhf as laptop_rlhf


def road(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"kl": float(kl), "reward": float(reward)} for kl, reward in points]


def test_a_road_that_lies_higher_at_every_distance_is_told_by_how_much():
    roads = {"WARP": road((0, 0), (2, 4)), "one long run": road((0, 0), (1, 1), (4, 4))}
    assert merging.apart(roads, "reward") == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def test_nothing_is_compared_beyond_what_both_reach():
    roads = {"WARP": road((0, 0), (1, 1)), "one long run": road((0, 0), (1, 1), (100, 0))}
    assert merging.apart(roads, "reward") == pytest.approx([0.0] * 5)


def test_the_long_run_may_have_stopped_where_it_was_best():
    """It went on to a greater distance and a lower reward: who stops earlier does not lose by that."""
    roads = {"WARP": road((0, 0), (2, 2)), "one long run": road((0, 0), (1, 3), (2, 1))}
    assert merging.apart(roads, "reward")[-1] == pytest.approx(-1.0)


def test_a_folder_without_the_long_form_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="gemwright run laptop --full"):
        merging.run(merging.MergingConfig(), tmp_path, tmp_path / "out")


def test_warp_and_the_long_run_cost_the_same_updates():
    one, other = laptop_rlhf.merged(1), laptop_rlhf.long_run(1)
    assert one.policies * one.iterations * one.rlhf.train.steps == other.train.steps
    assert one.rlhf.but(mu=0.0, **{"train.steps": other.train.steps}) == other


def test_the_reward_model_is_another_than_the_one_that_looks_on():
    assert laptop_rlhf.PAIRS != laptop_rlhf.WATCHED
    assert laptop_rlhf.judge().average == 3
