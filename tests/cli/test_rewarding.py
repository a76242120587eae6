"""From preference pairs to a merged policy, by the command line alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer

SMALL = ("--seq-len", 63, "--set", "train.compile=false", "--set", "train.optim.warmup_steps=1")
RL = ("--steps", 2, "--batch-size", 2, "--samples", 2, "--max-tokens", 6)


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "model")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def pipeline(
    gemwright: Callable[..., Any], tiny: GemmaConfig, teacher_folder: Path, tokenizer_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Every verb once, with --json; what each said."""
    root = tmp_path_factory.mktemp("rewarding")
    torch.manual_seed(1)
    checkpoint.save(Gemma(tiny.but(init_std=0.3)), root / "student")
    Tokenizer.load(tokenizer_folder).save(root / "student")
    (root / "prompts.txt").write_text("".join(f"def f{n}():\n" for n in range(60)))
    pairs = [
        {"chosen": chat(f"def f{n}():", "return"), "rejected": chat(f"def f{n}():", "if")} for n in range(40)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = (root / "student", "--reward", root / "reward", "--prompts", root / "prompts.txt")
    said = {
        "reward": gemwright(
            "reward", teacher_folder, root / "pairs.jsonl", "--out", root / "reward", "--epochs", 1,
            "--batch-size", 8, "--average", 2, *SMALL, "--json",
        ),
        "rlhf": gemwright(
            "rlhf", *given, "--out", root / "rlhf", "--watch", root / "reward", *RL, *SMALL, "--json"
        ),
        "warp": gemwright(
            "warp", *given, "--out", root / "warp", "--iterations", 1, *RL, "--set", "rlhf.train.seq_len=63",
            "--set", "rlhf.train.compile=false", "--set", "front=[0,1]", "--json",
        ),
    }  # fmt: skip
    for verb, one in said.items():
        assert one.code == 0, (verb, one.err)
    return root, {verb: json.loads(one.out.splitlines()[-1]) for verb, one in said.items()}


def test_reward_tells_its_accuracy_with_an_interval(pipeline: tuple[Path, dict[str, Any]]):
    found = pipeline[1]["reward"]
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
    assert len(found["members"]) == 2


def test_rlhf_tells_reward_and_distance_before_and_after(pipeline: tuple[Path, dict[str, Any]]):
    found = pipeline[1]["rlhf"]
    assert found["before"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["after"]["kl"] > 0
    assert found["after"]["watched_reward"] == found["after"]["reward"]


def test_warp_leaves_a_checkpoint_and_a_front(pipeline: tuple[Path, dict[str, Any]]):
    root, said = pipeline
    assert [point["eta"] for point in said["warp"]["front"]] == [0, 1]
    assert checkpoint.load(root / "warp").config == checkpoint.load(root / "student").config
    assert (root / "warp/report.html").exists()


def test_a_reward_model_cannot_be_chatted_with(
    pipeline: tuple[Path, dict[str, Any]], gemwright: Callable[..., Any]
):
    said = gemwright("generate", pipeline[0] / "reward", "def")
    assert said.code == 2
    assert "is a reward model: it scores text, and writes none" in said.err


def test_a_file_of_swapped_pairs_is_one_sentence(
    pipeline: tuple[Path, dict[str, Any]], gemwright: Callable[..., Any], teacher_folder: Path, tmp_path: Path
):
    pair = {"chosen": chat("a", "b"), "rejected": chat("a", "c"), "score_chosen": 1, "score_rejected": 2}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    said = gemwright("reward", teacher_folder, tmp_path / "pairs.jsonl", "--out", tmp_path / "out", *SMALL)
    assert said.code == 2
    assert "score_chosen=1 is below score_rejected=2: they are swapped" in said.err
    assert not (tmp_path / "out").exists()
