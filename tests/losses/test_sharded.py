"""Two processes with a slice of the vocabulary each, against one process with all of it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.losses.cases import N, V, assert_equal_to_exact, with_gradients
from tests.losses.ranks import FIRST, cases, inputs, loss_of

HOUSE = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found for all cases: one pair of processes, as starting is what takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    surroundings = {
        **os.environ, "OMP_NUM_THREADS": "1", "GEMWRIGHT_COMPILE": "0", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(HOUSE),
    }  # fmt: skip
    script = HOUSE / "tests" / "losses" / "ranks.py"
    started = [
        subprocess.Popen(
            [sys.executable, script, str(rank), folder],
            env=surroundings, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    found = [folder / f"{rank}.pt" for rank in (0, 1)]
    assert all(path.exists() for path in found), "\n".join(said)
    return [torch.load(path) for path in found]


def assert_equal_to_one_process(ranks: list[dict[str, Any]], name: str, which: str, options: Any) -> None:
    c, few = inputs()
    loss, by_hidden, by_weight = with_gradients(loss_of(which, c, few, **options), c)
    for results, taken in zip(ranks, (slice(None, FIRST), slice(FIRST, None)), strict=True):
        assert not isinstance(results[name], str), results[name]
        assert_equal_to_exact(results[name], [loss, by_hidden, by_weight[taken]])


def test_slices_of_different_size_know_where_they_start(ranks: list[dict[str, Any]]):
    assert [results["slice"] for results in ranks] == [(0, V), (FIRST, V)]


def test_targets_lie_in_both_slices():
    """So each rank has tokens whose target only the other one holds."""
    c, (ids, _) = inputs()
    weighing = c.token_weights > 0
    for chosen in (c.targets[weighing], ids[weighing]):
        assert (chosen < FIRST).any()
        assert (chosen >= FIRST).any()


@pytest.mark.parametrize("name", cases())
def test_every_rank_has_the_loss_the_whole_hidden_gradient_and_its_slices(
    name: str, ranks: list[dict[str, Any]]
):
    assert_equal_to_one_process(ranks, name, *cases()[name])


def test_small_chunks_are_cut_alike_on_slices_of_different_size(ranks: list[dict[str, Any]]):
    assert_equal_to_one_process(ranks, "small chunks", "ce", {"cap": 4.0, "z_loss": 0.1})


def test_no_collective_ever_carries_the_vocabulary(ranks: list[dict[str, Any]]):
    """A few sums a token and d hidden, no side of which is as long as a slice or the whole of it."""
    for results in ranks:
        assert results["sizes"]
        assert any(N in size for size in results["sizes"])
        assert not [size for size in results["sizes"] if {FIRST, V - FIRST, V} & set(size)]
