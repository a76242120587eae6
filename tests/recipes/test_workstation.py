"""The workstation recipe with a tiny checkpoint for a teacher: what it makes, and what studies get of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from gemwright.ablate import catalogue
from gemwright.distill.pretrain import PretrainConfig
from gemwright.model.config import GemmaConfig
from gemwright.model.cost import non_embedding_parameters, parameters
from gemwright.recipes import workstation
from gemwright.run import read_card


@pytest.fixture
def small(tiny: GemmaConfig, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    """The student in seconds."""
    plain = workstation.student()
    config = plain.but(
        **{
            "model": tiny.to_dict(), "train.steps": 3, "train.batch_size": 2, "train.micro_batch_size": 1,
            "train.seq_len": 32, "train.precision": "fp32", "train.compile": False, "max_tokens": 640,
            "validation_tokens": 320, "held_out_tokens": 320,
        }
    )  # fmt: skip
    monkeypatch.setattr(workstation, "student", lambda *args, **more: config)
    kept = workstation.curated().but(quality=None)
    monkeypatch.setattr(workstation, "curated", lambda: kept)
    return config


@pytest.mark.slow
def test_text_and_a_checkpoint_become_a_student_its_twin_and_a_page(
    small: PretrainConfig, text_folder: Path, teacher_folder: Path, tmp_path: Path
):
    root = tmp_path / "workstation"
    page = workstation.run(root, str(text_folder), str(teacher_folder))
    assert set(read_card(root / "distilled").inputs) == {"shards", "teacher"}
    assert set(read_card(root / "scratch").inputs) == {"shards"}
    assert read_card(root / "distilled").config == read_card(root / "scratch").config
    told = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert set(told["results"]) == {"distilled", "scratch"}
    base = workstation.base(root, str(text_folder), str(teacher_folder))
    found = catalogue.run("temperature", base, (0,), tmp_path / "ablate")
    rows: list[dict[str, Any]] = json.loads(found.with_suffix(".json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["T = 0.5", "T = 1", "T = 2", "T = 4"]


@pytest.mark.parametrize("name", ["100m", "200m", "400m", "1b"])
def test_students_have_the_parameters_of_their_names(name: str):
    count = non_embedding_parameters(workstation.student(name).model)
    assert count == pytest.approx({"100m": 1e8, "200m": 2e8, "400m": 4e8, "1b": 1e9}[name], rel=0.25)


def test_a_student_reads_every_token_once():
    config = workstation.student()
    seen = config.train.steps * config.train.batch_size * config.train.seq_len
    assert config.max_tokens is not None
    assert seen == pytest.approx(config.max_tokens, rel=0.01)


def test_the_deep_student_has_twice_the_layers_and_as_many_parameters(tmp_path: Path):
    base = workstation.base(tmp_path, "text")
    wide, deep = (base.student.but(**changes).model for changes in base.shapes.values())
    assert deep.num_layers == 2 * wide.num_layers
    assert parameters(deep) == pytest.approx(parameters(wide), rel=0.002)


def test_teachers_of_hugging_faces_are_named_and_not_trained(tmp_path: Path):
    base = workstation.base(tmp_path, "text")
    assert base.teachers == {"2b": "google/gemma-2-2b", "9b": "google/gemma-2-9b"}
