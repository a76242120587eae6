"""A study: the arms of a seed share all but what is compared, nothing is run twice, and the table adds up."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemwright.ablate.page import Finding
from gemwright.ablate.study import AVERAGE, NATS, PERPLEXITY, RECIPES, Arm, Study, run, student_of
from gemwright.ablate.verdict import Claim
from gemwright.benchmarks.made import Item, Task
from gemwright.distill import label, pretrain
from gemwright.distill.label import LabelConfig
from gemwright.distill.pretrain import PretrainConfig
from gemwright.generate.language_model import LanguageModel
from gemwright.model.config import GemmaConfig
from gemwright.run import Card, read_card
from gemwright.train.loop import TrainConfig

DRAWN = LabelConfig(samples=8, seq_len=16, max_tokens=640, compile=False)
LARGEST = DRAWN.but(kind="top-k", samples=4)
ARMS = (
    Arm("dense", teacher=RECIPES),
    Arm("drawn", label=DRAWN),
    Arm("tail", label=LARGEST),
    Arm("cut", label=LARGEST, changes={"objective.tail": False}),
    Arm("next token"),
    Arm("own teacher", teacher="small"),
)
QUESTIONS = tuple(Item(context=f"def f{n}(", choices=("self", "x, y"), answer=n % 2) for n in range(6))


def width(model: LanguageModel) -> dict[str, float]:
    return {"width": float(model.config.d_model)}


@pytest.fixture(scope="module")
def study(tiny: GemmaConfig) -> Study:
    def base(seed: int) -> PretrainConfig:
        train = TrainConfig(steps=3, batch_size=4, seq_len=16, compile=False, seed=seed)
        tokens = {"max_tokens": 640, "validation_tokens": 160, "held_out_tokens": 160}
        return PretrainConfig(model=tiny, train=train, seed=seed).but(**tokens)

    return Study(
        name="small", title="What is kept", question="Which is best?", base=base, arms=ARMS, seeds=(0, 1),
        claims=[Claim("drawn", "dense", NATS)], report={"table": "Table 0", "rows": {"dense": 1.5}},
        teachers={"small": base(7)}, tasks=[Task(name="names", items=QUESTIONS)], measure=width,
        against="dense",
        columns={
            "ids": lambda _, label: None if label is None else label.results["ids_a_token"],
            "validation": lambda card, _: card.results["validation"],
        },
        curves={"drawn": {8.0: "drawn"}, "top k": {4.0: "tail"}}, levels=("dense",), x="ids",
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def found(study: Study, home: Path, shards_folder: Path, teacher_folder: Path) -> Finding:
    return run(study, home, shards_folder, teacher_folder)


@pytest.fixture
def rows(found: Finding) -> dict[str, Any]:
    return {row["arm"]: row for row in found.rows}


def card_of(study: Study, home: Path, arm: Arm, seed: int) -> Card:
    return read_card(student_of(study, arm, seed, home))


def test_every_arm_was_run_with_every_seed(study: Study, home: Path, rows: dict[str, Any]):
    for arm in ARMS:
        runs = [card_of(study, home, arm, seed) for seed in (0, 1)]
        assert [(card.finished, card.seed) for card in runs] == [(True, 0), (True, 1)]
        assert rows[arm.name]["values"][NATS] == [card.results["held_out"] for card in runs]


def test_an_arm_learns_from_its_own_kind_of_teacher(study: Study, home: Path, found: Finding):
    inputs = {arm.name: card_of(study, home, arm, 0).inputs for arm in ARMS}
    assert {name: sorted(some) for name, some in inputs.items()} == {
        "dense": ["shards", "teacher"],
        "drawn": ["shards", "targets"],
        "tail": ["shards", "targets"],
        "cut": ["shards", "targets"],
        "next token": ["shards"],
        "own teacher": ["shards", "teacher"],
    }
    assert "/teachers/small-" in inputs["own teacher"]["teacher"]["path"]
    assert inputs["dense"]["teacher"]["sha256"] != inputs["own teacher"]["teacher"]["sha256"]


def test_arms_of_a_seed_differ_in_what_they_change_alone(study: Study, home: Path, found: Finding):
    for seed in (0, 1):
        base = card_of(study, home, ARMS[0], seed).config
        for arm in ARMS:
            config = PretrainConfig.parse(base).but(**arm.changes)
            assert card_of(study, home, arm, seed).config == config.to_dict()
    assert card_of(study, home, ARMS[0], 0).config != card_of(study, home, ARMS[0], 1).config


def test_draws_are_made_anew_for_every_seed_and_the_largest_are_shared(
    study: Study, home: Path, found: Finding
):
    folders = sorted(path.name.rsplit("-", 1)[0] for path in (home / "targets").iterdir())
    assert folders == ["stratified-8-seed0", "stratified-8-seed1", "top-k-4"]
    used = {
        card_of(study, home, arm, seed).inputs["targets"]["sha256"] for arm in ARMS[2:4] for seed in (0, 1)
    }
    assert len(used) == 1


def test_the_difference_is_taken_seed_by_seed(rows: dict[str, Any]):
    """So its spread is that of the difference, and the arm it is taken from has none."""
    assert rows["dense"]["difference"] == {"mean": 0.0, "std": 0.0, "seeds": 2}
    base = rows["dense"]["values"][NATS]
    for arm in ARMS[1:]:
        row = rows[arm.name]
        one, two = (mine - other for mine, other in zip(row["values"][NATS], base, strict=True))
        assert row["difference"]["mean"] == pytest.approx((one + two) / 2, abs=1e-5)
        assert row["difference"]["std"] == pytest.approx(abs(one - two) / 2**0.5, abs=1e-5)
        assert row["difference"]["mean"] != 0


def test_perplexity_benchmarks_and_what_the_study_measures_stand_in_every_row(rows: dict[str, Any]):
    for row in rows.values():
        assert row["values"][PERPLEXITY] == [math.exp(nats) for nats in row["values"][NATS]]
        assert row["values"][AVERAGE] == row["values"]["names"]
        assert all(0 <= value <= 100 for value in row["values"]["names"])
        assert row["width"]["mean"] > 0


def test_a_column_is_a_mean_over_seeds_of_the_cards(study: Study, home: Path, rows: dict[str, Any]):
    assert rows["tail"]["ids"]["mean"] == 4
    assert rows["dense"]["ids"] is None
    validation = [card_of(study, home, ARMS[3], seed).results["validation"] for seed in (0, 1)]
    assert rows["cut"]["validation"]["mean"] == pytest.approx(sum(validation) / 2, abs=1e-5)


def test_the_table_has_a_line_an_arm_in_their_order(found: Finding):
    assert [row[0] for row in found.table] == [arm.name for arm in ARMS]
    assert all(len(row) == len(found.header) for row in found.table)
    assert found.table[0][-2] == "-", "a column that an arm has not is a dash"
    assert all(name in found.header for name in (NATS, PERPLEXITY, AVERAGE, "width", "less dense", "ids"))


def test_a_claim_is_judged_on_the_arms_it_names(found: Finding, rows: dict[str, Any]):
    (claim,) = found.claims
    assert (claim["better"], claim["worse"], claim["metric"]) == ("drawn", "dense", NATS)
    assert claim["difference"] == rows["drawn"]["difference"]


def test_the_seconds_count_what_arms_share_once(study: Study, home: Path, found: Finding):
    cards = [read_card(path.parent) for path in home.rglob("card.json")]
    assert found.seconds == pytest.approx(sum(card.seconds for card in cards), abs=0.1)


def test_what_is_finished_is_not_run_again(
    study: Study, home: Path, found: Finding, shards_folder: Path, teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    def refuse(*arguments: Any) -> None:
        pytest.fail("something was computed again")

    monkeypatch.setattr(pretrain, "_work", refuse)
    monkeypatch.setattr(label, "_label", refuse)
    assert run(study, home, shards_folder, teacher_folder).to_dict() == found.to_dict()


def test_another_study_in_the_same_place_shares_its_runs(
    study: Study, home: Path, found: Finding, shards_folder: Path, teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Under other names, and with a further seed, which alone is trained."""
    made: list[Path] = []
    work = pretrain._work

    def count(config: Any, folder: Any, *others: Any) -> dict[str, Any]:
        made.append(folder.path)
        return work(config, folder, *others)

    monkeypatch.setattr(pretrain, "_work", count)
    arms = (replace(ARMS[0], name="distilled"), replace(ARMS[4], name="twin"))
    more = replace(
        study, name="other", seeds=(0, 1, 2), arms=arms, curves={}, levels=(), against=None, claims=()
    )
    again = run(more, home, shards_folder, teacher_folder)
    assert made == [student_of(more, arm, 2, home) for arm in arms]
    assert [row["values"][NATS][:2] for row in again.rows] == [
        found.rows[0]["values"][NATS], found.rows[4]["values"][NATS],
    ]  # fmt: skip


def test_a_missing_teacher_is_named(study: Study, shards_folder: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nobody"):
        run(study, tmp_path / "study", shards_folder, tmp_path / "nobody")


def test_the_page_has_question_reports_row_table_plot_verdict_and_cost(found: Finding, tmp_path: Path):
    page = found.write(tmp_path).read_text(encoding="utf-8")
    assert all(
        part in page
        for part in (
            "Which is best?",
            "Table 0",
            "<svg",
            "Verdict: ",
            "2 seeds",
            "s of computing",
            "1.5",
            "A dot a seed",
        )
    )
    assert all(f"<td>{arm.name}</td>" in page for arm in ARMS)
    data = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {"study", "rows", "report", "claims", "verdict", "seeds", "seconds", "table"} <= set(data)
    assert "NaN" not in json.dumps(data)
