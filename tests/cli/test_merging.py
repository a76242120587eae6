"""`gemwright merge`: what it prints, to programs and to people, and what it makes of its options."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemwright.model import checkpoint
from gemwright.model.checkpoint import WEIGHTS
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def family(tiny: GemmaConfig, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and two models."""
    root = tmp_path_factory.mktemp("merging")
    for seed, name in enumerate(("base", "one", "other")):
        torch.manual_seed(seed)
        checkpoint.save(Gemma(tiny.but(init_std=0.3)), root / name)
        Tokenizer.load(tokenizer_folder).save(root / name)
    return root


def parents(root: Path) -> tuple[Path, Path, str, Path]:
    return root / "one", root / "other", "--base", root / "base"


def card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "card.json").read_text())


def test_slerp_ends_well_with_one_line_of_json(family: Path, gemwright: Run, tmp_path: Path):
    said = gemwright("merge", "slerp", *parents(family), "--out", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    assert said.out.count("\n") == 1
    told = json.loads(said.out)
    assert told["out"] == str(tmp_path / "out")
    assert set(told["angles"]) == set(told["coefficients"])
    assert "layers.1" in told["angles"]
    assert f"Next: gemwright chat {tmp_path / 'out'}" in said.err
    checkpoint.load(tmp_path / "out")


def test_people_read_between_which_angles_the_models_stand(family: Path, gemwright: Run, tmp_path: Path):
    command = ("merge", "slerp", *parents(family), "--out", tmp_path / "out", "--eta", 0.3)
    said = gemwright(*command)
    assert said.code == 0, said.err
    first, second, third = said.out.splitlines()
    assert first.startswith(f"{tmp_path / 'out'}: 2 models, ")
    assert first.endswith(" parameters in float32")
    angles = [angle for key, angle in card(tmp_path / "out")["results"]["angles"].items() if "layers" in key]
    wanted = f"angles between task vectors: {min(angles):.1f} to {max(angles):.1f} degrees in the layers, "
    assert second.startswith(wanted)
    assert " in embed_tokens" in second
    assert third == f"0.3 of the way from {family / 'base'}"
    assert gemwright(*command).out == said.out, "finished, it says the same again"


def test_models_that_did_not_move_have_no_angles(family: Path, gemwright: Run, tmp_path: Path):
    base = family / "base"
    said = gemwright("merge", "slerp", base, base, "--base", base, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert "angles between task vectors: none, as no two models moved" in said.out


def test_people_read_what_each_model_counts(family: Path, gemwright: Run, tmp_path: Path):
    models = parents(family)[:2]
    said = gemwright("merge", "linear", *models, "--out", tmp_path / "out", "--weights", "0.6,0.2")
    assert said.code == 0, said.err
    assert said.out.splitlines()[1] == "each counts: 0.75, 0.25"


def test_options_reach_the_config(family: Path, gemwright: Run, tmp_path: Path):
    said = gemwright(
        "merge", "ema", *parents(family), "--out", tmp_path / "out", "--mu", 0.2, "--eta", 0.5, "--dtype",
        "bf16", "--set", "max_shard_bytes=40000",
    )  # fmt: skip
    assert said.code == 0, said.err
    made = card(tmp_path / "out")["config"]
    wanted = {"method": "ema", "mu": 0.2, "eta": 0.5, "dtype": "bf16", "max_shard_bytes": 40_000}
    assert made == wanted | {"weights": None}
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_factors_of_task_vectors_may_be_negative(family: Path, gemwright: Run, tmp_path: Path):
    said = gemwright("merge", "task", *parents(family), "--out", tmp_path / "out", "--weights", "-0.5,1")
    assert said.code == 0, said.err
    base, one, other, made = (
        load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
        for folder in (family / "base", family / "one", family / "other", tmp_path / "out")
    )
    torch.testing.assert_close(made, base - 0.5 * (one - base) + (other - base))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("linear", ["--weights", "0.3;0.7"], "is not a list of numbers. Write one a model, with commas"),
        ("linear", ["--weights", ""], "is not a list of numbers"),
        ("linear", ["--mu", "0.1"], "--mu is of a moving average, and linear is none. Leave it out, or take"),
        ("linear", ["--weights", "1,2,3"], "3 weights for 2 models. Give one a model"),
        ("linear", ["--weights", "nan,1"], "finite number"),
        ("slerp", [], "no base is given, and slerp is about task vectors"),
        ("linear", ["--set", "etta=1"], "Did you mean 'eta'?"),
    ],
)
def test_what_does_not_go_together_is_a_sentence_and_code_2(
    family: Path, gemwright: Run, tmp_path: Path, method: str, options: list[str], said: str
):
    done = gemwright("merge", method, *parents(family)[:2], "--out", tmp_path / "out", *options)
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "out").exists()
