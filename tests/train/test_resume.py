"""A killed run goes on to the same bits, whenever it is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemwright.distill.pretrain import PretrainConfig, run
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.run import read_card, read_metrics
from gemwright.train import resume
from gemwright.train.loop import TrainConfig
from gemwright.train.optim import OptimConfig, adamw

NURSERY = """
import json, os, sys, time, traceback
from pathlib import Path
import torch._dynamo  # or every child would import it, at its first update
from gemwright.distill import pretrain
from gemwright.model import checkpoint
from gemwright.train import resume

def stall_at(module, call):
    # The call writes half of its file, says so, and waits to be killed.
    save, count = module.save_file, 0
    def half(tensors, path, **options):
        nonlocal count
        count += 1
        save(tensors, path, **options)
        if count == call:
            os.truncate(path, os.path.getsize(path) // 2)
            Path(order["out"] + ".stalled").touch()
            time.sleep(300)
    module.save_file = half

for line in sys.stdin:  # torch is imported once, and every run is a child with nothing but that
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            if order["stall"]:
                stall_at({"state": resume, "checkpoint": checkpoint}[order["stall"][0]], order["stall"][1])
            config = pretrain.PretrainConfig.parse(order["config"])
            pretrain.run(config, Path(order["out"]), Path(order["shards"]))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    """Starts runs as processes of their own and kills them."""

    def __init__(self, shards: Path, threads: int) -> None:
        self.shards = shards
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def _line(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def start(self, config: PretrainConfig, out: Path, stall: tuple[str, int] | None = None) -> int:
        order = {"config": config.to_dict(), "out": str(out), "shards": str(self.shards), "stall": stall}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._line()

    def finish(self, config: PretrainConfig, out: Path) -> None:
        self.start(config, out)
        assert self._line() == 0

    def kill(
        self,
        config: PretrainConfig,
        out: Path,
        moment: Callable[[], bool],
        stall: tuple[str, int] | None = None,
    ) -> bool:
        """Start a run and kill it at a moment; False where it finished first."""
        child, deadline = self.start(config, out, stall), time.monotonic() + 120
        try:
            while not moment():
                os.kill(child, 0)
                assert time.monotonic() < deadline
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return self._line() == signal.SIGKILL


@pytest.fixture(scope="module")
def nursery(shards_folder: Path) -> Iterator[Nursery]:
    made = Nursery(shards_folder, threads=1)
    yield made
    made.process.communicate()


@pytest.fixture(scope="module")
def config(tiny: GemmaConfig) -> PretrainConfig:
    return PretrainConfig(
        model=tiny,
        train=TrainConfig(
            steps=30, batch_size=4, micro_batch_size=2, seq_len=16, compile=False, save_every=4,
            validate_every=11, optim=OptimConfig(warmup_steps=5),
        ),
        validation_tokens=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(nursery: Nursery, config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody kills."""
    out = tmp_path_factory.mktemp("whole") / "run"
    nursery.finish(config, out)
    return out


def curve(out: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.get(key) for key in ("step", "loss", "lr", "grad_norm")) for row in read_metrics(out)]


def same(out: Path, whole: Path) -> bool:
    """Every loss, every weight, every file that is handed on."""
    assert curve(out) == curve(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    return read_card(out).outputs == read_card(whole).outputs


def tidy(out: Path) -> bool:
    """Nothing lies in a finished folder but what the stage hands on, its card, its metrics and its lock."""
    outputs = read_card(out).outputs
    return {path.name for path in out.iterdir()} == {*outputs, "card.json", "metrics.jsonl", ".lock"}


def rows(out: Path) -> int:
    return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0


def test_a_run_killed_again_and_again_ends_with_the_same_bits(
    nursery: Nursery, config: PretrainConfig, whole: Path, tmp_path: Path
):
    """Kills in the steps, and as soon as a state is being written."""
    draw, out, kills = random.Random(4), tmp_path / "run", 0
    for low in (1, 6, 11, 16, 21):
        least, pause = low + draw.randrange(5), draw.random() / 50

        def moment(least: int = least, pause: float = pause) -> bool:
            if rows(out) < least:
                return False
            time.sleep(pause)
            return True

        kills += nursery.kill(config, out, moment)
        kills += nursery.kill(config, out, (out / "resume/partial").exists)
    assert kills >= 5
    nursery.finish(config, out)
    assert same(out, whole)
    assert tidy(out)


@pytest.mark.parametrize("stall", [("state", 1), ("state", 3), ("checkpoint", 2)])
def test_a_run_killed_while_it_writes_a_state_goes_on_from_the_one_before(
    nursery: Nursery, config: PretrainConfig, whole: Path, tmp_path: Path, stall: tuple[str, int]
):
    out = tmp_path / "run"
    assert nursery.kill(config, out, (tmp_path / "run.stalled").exists, stall)
    assert (out / "resume/partial").is_dir(), "the kill was to leave a torn state behind"
    assert len(resume.saved_steps(out)) == (0 if stall == ("state", 1) else stall[1] > 1)
    nursery.finish(config, out)
    assert same(out, whole)
    assert tidy(out)


def test_a_run_killed_while_it_writes_the_last_checkpoint_leaves_no_rubbish(
    nursery: Nursery, config: PretrainConfig, whole: Path, tmp_path: Path
):
    out, states = tmp_path / "run", -(-config.train.steps // config.train.save_every)
    assert nursery.kill(config, out, (tmp_path / "run.stalled").exists, ("checkpoint", states + 1))
    assert list(out.glob(".model.safetensors.partial-*")), "the kill was to leave a torn file behind"
    nursery.finish(config, out)
    assert same(out, whole)
    assert tidy(out)


@pytest.mark.slow
@pytest.mark.compiled
def test_a_killed_run_of_compiled_layers_ends_with_the_same_bits(
    shards_folder: Path, config: PretrainConfig, tmp_path: Path
):
    nursery = Nursery(shards_folder, threads=2)
    config = config.but(**{"train.compile": True, "train.steps": 12})
    nursery.finish(config, tmp_path / "whole")
    assert nursery.kill(config, tmp_path / "run", lambda: rows(tmp_path / "run") >= 6)
    nursery.finish(config, tmp_path / "run")
    nursery.process.communicate()
    assert same(tmp_path / "run", tmp_path / "whole")


def test_going_on_with_another_config_is_refused_by_name(
    config: PretrainConfig, shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(resume, "save_state", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", shards_folder)
    with pytest.raises(ValueError, match=r"train\.optim\.lr: 0\.001 -> 0\.002.*--fresh"):
        run(config.but(**{"train.optim.lr": 2e-3}), tmp_path / "run", shards_folder)


@pytest.fixture
def trained(tiny: GemmaConfig) -> tuple[Gemma, torch.optim.AdamW]:
    """A model and its optimiser after two updates."""
    model = Gemma(tiny)
    optimizer = adamw(model, OptimConfig())
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return model, optimizer


def test_only_the_newest_state_is_kept(trained: tuple[Gemma, torch.optim.AdamW], tmp_path: Path):
    """By number, not by name: step-1000000 comes before step-999999 in the alphabet."""
    for step in (8, 120, 999_999, 1_000_000):
        state = resume.save_state(tmp_path, step, *trained)
        assert resume.saved_steps(tmp_path) == [state]
    assert resume.load_state(tmp_path, *trained) == 1_000_000


def test_a_state_is_a_checkpoint_like_any_other(trained: tuple[Gemma, torch.optim.AdamW], tmp_path: Path):
    loaded = checkpoint.load(resume.save_state(tmp_path, 2, *trained))
    for one, other in zip(trained[0].parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_gives_back_weights_and_moments_to_the_last_bit(
    trained: tuple[Gemma, torch.optim.AdamW], tiny: GemmaConfig, tmp_path: Path
):
    model, optimizer = trained
    resume.save_state(tmp_path, 2, model, optimizer)
    again = Gemma(tiny)
    other = adamw(again, OptimConfig())
    assert resume.load_state(tmp_path, again, other) == 2
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == other.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, other.state[b][key]) for key, value in optimizer.state[a].items())


def test_without_a_state_a_run_begins_at_the_beginning(
    trained: tuple[Gemma, torch.optim.AdamW], tmp_path: Path
):
    assert resume.load_state(tmp_path, *trained) == 0
    assert resume.saved_steps(tmp_path) == []


def test_a_torn_state_is_not_taken_for_one(trained: tuple[Gemma, torch.optim.AdamW], tmp_path: Path):
    (tmp_path / "resume/partial").mkdir(parents=True)
    (tmp_path / "resume/partial/optimizer.safetensors").write_bytes(b"half")
    assert resume.load_state(tmp_path, *trained) == 0
    (tmp_path / "resume/partial/rubbish").touch()
    state = resume.save_state(tmp_path, 3, *trained)
    assert list((tmp_path / "resume").iterdir()) == [state]
    assert not (state / "rubbish").exists()


def test_a_state_appears_at_once_when_all_of_it_is_written(
    trained: tuple[Gemma, torch.optim.AdamW], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    held: list[set[str]] = []

    def watch(source: Path, target: Path) -> None:
        held.append({path.name for path in source.iterdir()})
        assert not target.exists()

    monkeypatch.setattr(Path, "rename", watch)
    resume.save_state(tmp_path, 3, *trained)
    assert resume.saved_steps(tmp_path) == []
    assert {"model.safetensors", "config.json", "optimizer.safetensors", "state.json"} <= held[0]
