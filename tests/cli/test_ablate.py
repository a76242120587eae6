"""`gemwright ablate`: what is listed, and what is told of a study."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemwright.ablate.catalogue import STUDIES
from gemwright.distill.pretrain import PretrainConfig
from gemwright.model.config import GemmaConfig
from gemwright.recipes import laptop
from gemwright.recipes.base import Base
from gemwright.train.loop import TrainConfig


def test_every_study_is_listed_with_its_table_in_the_report(gemwright: Callable[..., Any]):
    said = gemwright("ablate", "--list")
    assert said.code == 0
    assert [line.split()[0] for line in said.out.splitlines()] == list(STUDIES)
    assert "Table 10" in said.out
    told = json.loads(gemwright("ablate", "--list", "--json").out)
    assert [one["study"] for one in told["studies"]] == list(STUDIES)


def test_a_study_is_told_as_a_table_or_as_one_line_of_json(
    gemwright: Callable[..., Any], tiny: GemmaConfig, shards_folder: Path, teacher_folder: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    train = TrainConfig(steps=3, batch_size=4, seq_len=16, compile=False)
    tokens = {"max_tokens": 640, "validation_tokens": 160, "held_out_tokens": 160}
    base = Base(
        name="small", root=shards_folder.parent, prepare=lambda: None,
        student=PretrainConfig(model=tiny, train=train).but(**tokens), sizes={}, shapes={}, teachers={},
        tokens=(), teacher=str(teacher_folder),
    )  # fmt: skip
    monkeypatch.setattr(laptop, "base", lambda root, corpus=None: base)
    command = ("ablate", "temperature", "--out", tmp_path / "out", "--quick")
    said = gemwright(*command)
    assert said.code == 0, said.err
    assert said.out.splitlines()[0].split()[:1] == ["parameters"]
    assert said.out.rstrip().endswith(str(tmp_path / "out/temperature/report.html"))
    (line,) = gemwright(*command, "--json").out.splitlines()
    told = json.loads(line)
    assert {"study", "rows", "report", "claims", "verdict", "seeds", "page"} <= set(told)
    assert told["seeds"] == [0]
    assert "shown" not in told
