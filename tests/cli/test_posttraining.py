"""From prompts to a student that was graded on its own words, by the command line alone."""

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

SMALL = (
    "--batch-size", 4, "--seq-len", 63, "--set", "train.compile=false", "--set", "train.validate_every=5",
    "--set", "train.optim.warmup_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(
    gemwright: Callable[..., Any], tiny: GemmaConfig, teacher_folder: Path, tokenizer_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:  # fmt: skip
    """Every verb once, with --json; what each said."""
    root = tmp_path_factory.mktemp("posttraining")
    torch.manual_seed(1)
    checkpoint.save(Gemma(tiny.but(init_std=0.3)), root / "student")
    Tokenizer.load(tokenizer_folder).save(root / "student")
    prompts = root / "prompts.jsonl"
    records = [
        {
            "messages": [
                {"role": "user", "content": f"def f{n}():"},
                {"role": "assistant", "content": "SECRET"},
            ]
        }
        for n in range(60)
    ]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    answers, json_ = root / "answers", ("--json",)
    said = {
        "answer": gemwright(
            "answer", teacher_folder, prompts, "--out", answers, "--max-tokens", 12, "--set",
            "truncated=true", "--set", "near_duplicates=null", "--set", "unsafe=null", *json_,
        ),
        "sft": gemwright(
            "sft", root / "student", answers, "--out", root / "sft", "--epochs", 2, *SMALL, *json_
        ),
        "label": gemwright(
            "label", teacher_folder, answers, "--out", root / "targets", "--seq-len", 63, "--samples", 8,
            "--set", "compile=false", *json_,
        ),
        "distilled": gemwright(
            "sft", root / "student", answers, "--targets", root / "targets", "--out", root / "distilled",
            "--steps", 3, *SMALL, *json_,
        ),
        "on-policy": gemwright(
            "on-policy", root / "sft", "--teacher", teacher_folder, "--prompts", prompts, "--out",
            root / "op", "--steps", 3, "--max-tokens", 8, *SMALL, *json_,
        ),
    }  # fmt: skip
    return root, said


@pytest.mark.parametrize("verb", ["answer", "sft", "label", "distilled", "on-policy"])
def test_each_verb_ends_well_with_one_line_of_json(pipeline: tuple[Path, dict[str, Any]], verb: str):
    said = pipeline[1][verb]
    assert said.code == 0, said.err
    assert said.out.count("\n") == 1
    told = json.loads(said.out)
    assert Path(told["out"]).is_dir()


def test_answers_are_counted_and_nobody_elses_are_among_them(pipeline: tuple[Path, dict[str, Any]]):
    told = json.loads(pipeline[1]["answer"].out)
    assert (told["prompts"], told["answers_ignored"]) == (60, 60)
    assert told["kept"] + sum(told["dropped"].values()) == 60
    assert told["tokens_per_s"] > 0
    assert "SECRET" not in (pipeline[0] / "answers" / "answers.jsonl").read_text()


def test_epochs_become_updates(pipeline: tuple[Path, dict[str, Any]]):
    told = json.loads(pipeline[1]["sft"].out)
    assert 2 <= told["epochs"] < 2 + 4 / told["rows"] * 2
    assert json.loads(pipeline[1]["distilled"].out)["rows"] == told["rows"]


def test_updates_by_set_are_not_overruled_by_the_default_epochs(
    pipeline: tuple[Path, dict[str, Any]], gemwright: Callable[..., Any]
):
    root, _ = pipeline
    student, out = root / "student", root / "by-set"
    said = gemwright("sft", student, root / "answers", "--out", out, *SMALL, "--set", "train.steps=2")
    assert said.code == 0, said.err
    assert json.loads((out / "card.json").read_text())["config"]["train"]["steps"] == 2


def test_two_teachers_are_a_sentence_and_code_2(
    pipeline: tuple[Path, dict[str, Any]], gemwright: Callable[..., Any], teacher_folder: Path
):
    root, _ = pipeline
    said = gemwright(
        "sft", root / "student", root / "answers", "--out", root / "no", "--teacher", teacher_folder,
        "--targets", root / "targets", *SMALL,
    )  # fmt: skip
    assert said.code == 2
    assert "Give a teacher or its targets, not both" in said.err


def test_what_comes_next_is_told(pipeline: tuple[Path, dict[str, Any]]):
    root, said = pipeline
    assert "Next: gemwright sft" in said["answer"].err
    assert f"Next: gemwright chat {root / 'sft'}" in said["sft"].err
    assert "Next: gemwright sft" in said["label"].err


def test_without_json_people_read_how_it_went(
    pipeline: tuple[Path, dict[str, Any]], gemwright: Callable[..., Any], teacher_folder: Path
):
    root, _ = pipeline
    said = gemwright(
        "on-policy", root / "sft", "--teacher", teacher_folder, "--prompts", root / "prompts.jsonl", "--out",
        root / "op", "--steps", 3, "--max-tokens", 8, *SMALL,
    )  # fmt: skip
    assert said.code == 0, said.err
    assert said.out.startswith(f"{root / 'op'}: 3 updates on 5")
    assert "divergence from the teacher on others" in said.out


def test_answers_and_share_that_do_not_go_together_are_a_sentence_and_code_2(
    pipeline: tuple[Path, dict[str, Any]], gemwright: Callable[..., Any], teacher_folder: Path
):
    root, _ = pipeline
    said = gemwright(
        "on-policy", root / "sft", "--teacher", teacher_folder, "--prompts", root / "prompts.jsonl", "--out",
        root / "no", "--lambda", 0.5, *SMALL,
    )  # fmt: skip
    assert said.code == 2
    assert "Give them together with a share below 1" in said.err
