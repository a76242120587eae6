"""WARP: with nothing to merge it is RLHF, and its line runs from the start to the merged policies."""

from pathlib import Path

import pytest
import torch

from gemwright.merge import coefficients
from gemwright.model import checkpoint
from gemwright.posttrain import rlhf, warp
from gemwright.posttrain.rlhf import RlhfConfig
from gemwright.posttrain.warp import WarpConfig
from gemwright.run import Card, read_card, read_metrics
from tests.posttrain.killed import kill

ONE = RlhfConfig.parse(
    {
        "train": {
            "steps": 2, "batch_size": 2, "seq_len": 63, "compile": False, "validate_every": 2,
            "save_every": 1, "optim": {"lr": 3e-3, "warmup_steps": 1},
        },
        "samples": 2, "sampling": {"temperature": 1.0, "max_tokens": 6}, "measured_samples": 1,
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def made(
    student: Path, judge: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Card]:
    """Two policies, two iterations."""
    out = tmp_path_factory.mktemp("warp") / "out"
    config = WarpConfig(rlhf=ONE.but(mu=0.1), iterations=2, front=(0.0, 0.5, 1.0))
    return out, warp.run(config, out, student, judge, prompts)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder).state_dict()


def test_one_policy_all_the_way_with_a_frozen_anchor_is_plain_rlhf(
    student: Path, judge: Path, prompts: Path, tmp_path: Path
):
    config = WarpConfig(rlhf=ONE, policies=1, iterations=1, eta=1.0, front=(1.0,))
    warp.run(config, tmp_path / "warp", student, judge, prompts)
    rlhf.run(ONE, tmp_path / "rlhf", student, judge, prompts)
    one, other = (tmp_path / name / "model.safetensors" for name in ("warp", "rlhf"))
    ours, theirs = weights(one.parent), weights(other.parent)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_next_start_lies_a_share_of_the_way_to_the_merged_policy(made: tuple[Path, Card], student: Path):
    home = made[0] / "iterations/0"
    start, merged, following = (weights(f) for f in (student, home / "merged", home / "next_start"))
    for name, tensor in start.items():
        torch.testing.assert_close(following[name], tensor + 0.3 * (merged[name] - tensor))


def test_policies_are_merged_by_slerp_from_the_start_of_their_iteration(made: tuple[Path, Card]):
    home = made[0] / "iterations/1"
    start = weights(made[0] / "iterations/0/next_start")
    one, other = (weights(home / name) for name in ("policy0", "policy1"))
    found = weights(made[0])
    names = [name for name in start if ".layers.1." in name]
    parts = [torch.cat([(w[n] - start[n]).flatten() for n in names]).double() for w in (one, other)]
    gram = torch.stack(parts) @ torch.stack(parts).T
    first, second = coefficients.spherical(gram.numpy())
    for name in names:
        task = first * (one[name] - start[name]) + second * (other[name] - start[name])
        torch.testing.assert_close(found[name], start[name] + task, atol=1e-6, rtol=1e-4)


def test_no_two_policies_are_alike(made: tuple[Path, Card]):
    found = [weights(made[0] / f"iterations/{i}/policy{m}") for i in range(2) for m in range(2)]
    tables = [one["model.embed_tokens.weight"] for one in found]
    assert not any(torch.equal(tables[a], tables[b]) for a in range(4) for b in range(a))


def test_the_front_runs_from_the_start_to_the_end(made: tuple[Path, Card]):
    out, card = made
    points = card.results["front"]
    assert [point["eta"] for point in points] == [0.0, 0.5, 1.0]
    assert points[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < points[1]["kl"] < points[2]["kl"]
    assert card.results["updates"] == 8
    assert "distance" in (out / "report.html").read_text(encoding="utf-8")


def test_policies_tell_their_distance_from_the_very_first_model(made: tuple[Path, Card], student: Path):
    card = read_card(made[0] / "iterations/1/policy0")
    assert card.results["before"]["kl"] > 0, "the second iteration begins elsewhere"


@pytest.mark.slow
def test_killed_in_its_second_policy_it_goes_on_to_the_same_bits_and_repeats_nothing(
    student: Path, judge: Path, prompts: Path, tmp_path: Path
):
    one = ONE.but(mu=0.3, samples=6, **{"train.steps": 5, "train.optim.lr": 3e-4})
    config = WarpConfig(rlhf=one, iterations=2, front=(1.0,))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    warp.run(config, whole, student, judge, prompts)
    first, second = (killed / f"iterations/0/policy{number}" for number in range(2))
    kill("warp", config, killed, student, judge, prompts, when=lambda: len(read_metrics(second)) >= 3)
    assert not read_card(killed).finished
    assert not read_card(second).finished
    before = first.joinpath("model.safetensors").stat().st_mtime_ns
    assert warp.run(config, killed, student, judge, prompts).finished
    assert first.joinpath("model.safetensors").stat().st_mtime_ns == before
    assert [row["step"] for row in read_metrics(second)] == list(range(6))
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
