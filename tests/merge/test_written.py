"""What a merge leaves: the files, the card; what is left when it is killed; how much memory it takes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemwright.merge import streams
from gemwright.merge.stage import run
from gemwright.model import checkpoint
from gemwright.model.checkpoint import WEIGHTS
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma, RewardModel
from gemwright.run import fingerprint, read_card, read_metrics
from gemwright.tokenizer.tokenizer import Tokenizer
from tests.merge.cases import BF16, Make, Weights, assert_close, assert_equal, config, summed


def test_parents_in_other_parts_are_the_same_parents(
    make: Make, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, one, other = (make(str(seed), seed) for seed in range(3))
    run(config("slerp"), tmp_path / "whole", [one, other], base=base)
    one, other = make("one-in-parts", 1, shard=20_000), make("other-in-parts", 2, shard=6_000)
    assert len(list(one.glob("*.safetensors"))) != len(list(other.glob("*.safetensors")))
    monkeypatch.setattr(checkpoint, "_BLOCK_BYTES", 1000)
    run(config("slerp", max_shard_bytes=9_000), tmp_path / "parts", [one, other], base=base)
    assert not (tmp_path / "parts" / WEIGHTS).exists()
    assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_parts_come_with_an_index_and_load(make: Make, weights: Weights, tmp_path: Path):
    models = [make(str(seed), seed) for seed in range(2)]
    out = tmp_path / "out"
    run(config("linear", max_shard_bytes=9_000), out, models)
    parts = sorted(out.glob("model-*.safetensors"))
    assert len(parts) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for path in parts for name in load_file(path)}
    found = weights(out)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert_equal(dict(checkpoint.load(out).state_dict()), found)


def test_the_result_is_a_checkpoint_with_its_tokenizer(make: Make, small: GemmaConfig, tmp_path: Path):
    models = [make(str(seed), seed) for seed in range(2)]
    run(config("linear"), tmp_path / "out", models)
    assert checkpoint.load_config(tmp_path / "out") == small
    assert Tokenizer.load(tmp_path / "out").sha256 == Tokenizer.load(models[0]).sha256
    assert (tmp_path / "out" / "generation_config.json").exists()
    saved = json.loads((models[0] / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == saved


def test_reward_models_merge_with_their_heads(make: Make, weights: Weights, tmp_path: Path):
    models = [make(str(seed), seed, kind=RewardModel) for seed in range(2)]
    run(config("linear"), tmp_path / "out", models)
    merged = checkpoint.load_reward(tmp_path / "out")
    wanted = summed([0.5, 0.5], [weights(folder) for folder in models])
    assert "score.weight" in wanted
    assert_close(dict(merged.state_dict()), wanted)


def test_the_card_tells_parents_and_coefficients(make: Make, tmp_path: Path):
    models = [make(str(seed), seed) for seed in range(3)]
    card = run(config("ema", mu=0.1), tmp_path / "out", models)
    assert read_card(tmp_path / "out") == card
    assert {name: entry["sha256"] for name, entry in card.inputs.items()} == {
        f"model{number}": fingerprint(folder) for number, folder in enumerate(models, 1)
    }
    assert card.results["coefficients"] == pytest.approx([0.81, 0.09, 0.1])
    assert card.config["mu"] == 0.1


def test_the_card_of_a_slerp_tells_them_and_the_angle_of_every_layer(make: Make, tmp_path: Path):
    base = make("base")
    models = [make(str(seed), seed, step=0.1) for seed in (1, 2)]
    card = run(config("slerp"), tmp_path / "out", models, base=base)
    assert list(card.inputs) == ["base", "model1", "model2"]
    groups = {streams.group(name) for name in checkpoint.stored(base)}
    assert set(card.results["angles"]) == set(card.results["coefficients"]) == groups
    assert card.results["angles"]["layers.0"] == pytest.approx(90, abs=5)
    assert card.results["coefficients"]["layers.0"] == pytest.approx([0.5**0.5] * 2, abs=0.03)


def test_a_layer_that_never_moved_has_no_angle(make: Make, weights: Weights, tmp_path: Path):
    base = make("base")
    models = [make(str(seed), seed) for seed in (1, 2)]
    for folder in models:
        tensors = load_file(folder / WEIGHTS)
        tensors |= {"model.norm.weight": load_file(base / WEIGHTS)["model.norm.weight"]}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    card = run(config("slerp"), tmp_path / "out", models, base=base)
    assert card.results["angles"]["model.norm.weight"] is None
    assert torch.equal(weights(tmp_path / "out")["model.norm.weight"], weights(base)["model.norm.weight"])


def test_the_hashes_in_the_card_are_those_of_the_files(make: Make, tmp_path: Path):
    models = [make(str(seed), seed) for seed in range(2)]
    out = tmp_path / "out"
    card = run(config("linear", max_shard_bytes=9_000), out, models)
    for name, told in card.outputs.items():
        assert told == hashlib.sha256((out / name).read_bytes()).hexdigest()
    assert {path.name for path in out.glob("model*")} <= set(card.outputs)


def test_finished_it_is_not_done_again_and_another_order_is_another_merge(make: Make, tmp_path: Path):
    models = [make(str(seed), seed) for seed in range(2)]
    out = tmp_path / "out"
    first = run(config("linear"), out, models)
    assert run(config("linear"), out, models) == first
    with pytest.raises(ValueError, match=r"input model1.*Choose another --out, or --fresh"):
        run(config("linear"), out, models[::-1])


SLOW = """
import sys, time
from pathlib import Path
from gemwright.merge import stage, streams
quick = streams.combined
def slow(*arguments):
    time.sleep(0.02)
    yield from quick(*arguments)
streams.combined = slow
config, out, *models = sys.argv[1:]
stage.run(stage.MergeConfig.model_validate_json(config), Path(out), list(map(Path, models)))
"""


def test_a_killed_merge_leaves_no_half_file_and_the_same_command_finishes(
    make: Make, weights: Weights, tmp_path: Path
):
    models = [make(str(seed), seed) for seed in range(2)]
    settings = config("linear", max_shard_bytes=3_000)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(settings, whole, models)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, settings.model_dump_json(), *map(str, (killed, *models))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len(list(killed.glob("model-*"))) < 2 or not list(killed.glob(".*.partial-*")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not read_card(killed).finished
    done = weights(killed)
    wanted = weights(whole)
    assert 0 < len(done) < len(wanted)
    assert_equal(done, {name: wanted[name] for name in done})
    run(settings, killed, models)
    assert_equal(weights(killed), wanted)
    assert not list(killed.glob(".*.partial-*"))
    assert not read_metrics(killed)


PEAK = """
import sys
from pathlib import Path
from gemwright.merge.stage import MergeConfig, run

def peak():  # of this program; ru_maxrss begins with the peak of the process that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))

before = peak()
base, one, other, out = map(Path, sys.argv[1:])
run(MergeConfig(method="slerp"), out, [one, other], base=base)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process its peak")
def test_merging_takes_no_memory_to_speak_of(make: Make, small: GemmaConfig, tmp_path: Path):
    """Three models of 290 MB are read and one is written, and not even one of them is ever in memory."""
    big = small.but(vocab_size=4_000_000, d_model=16, d_ff=1_500_000)
    folders = [tmp_path / name for name in ("base", "one", "other")]
    blank = checkpoint.blank(big).state_dict()
    for number, folder in enumerate(folders):

        def put(names: Any, path: Path, number: int = number) -> None:
            save_file({name: torch.full(blank[name].shape, number / 7, dtype=BF16) for name in names}, path)

        sizes = {name: tensor.numel() * 2 for name, tensor in blank.items()}
        checkpoint.write(folder, big.to_hf() | Gemma.hf_head, sizes, put, 160 << 20)
        Tokenizer.load(make("tokenizer")).save(folder)
    parts = [path.stat().st_size for path in folders[0].glob("*.safetensors")]
    command = [sys.executable, "-c", PEAK, *map(str, (*folders, tmp_path / "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(parts) > 2
    assert int(done.stdout) < sum(parts), f"{int(done.stdout) >> 20} MiB, and a model has {sum(parts) >> 20}"
