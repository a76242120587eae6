"""A study: the arms of a seed share all but what is compared, nothing is run twice, and the table adds up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemwright.ablate import targets
from gemwright.ablate.study import Arm, Study, run
from gemwright.distill import label, pretrain
from gemwright.distill.label import LabelConfig
from gemwright.distill.pretrain import PretrainConfig
from gemwright.model.config import GemmaConfig
from gemwright.recipes import laptop
from gemwright.run import Card, read_card
from gemwright.train.loop import TrainConfig

DRAWN = LabelConfig(samples=8, seq_len=16, max_tokens=640, compile=False)
LARGEST = DRAWN.but(kind="top-k", samples=4)
ARMS = (
    Arm("dense", teacher=True),
    Arm("drawn", label=DRAWN),
    Arm("tail", label=LARGEST),
    Arm("cut", label=LARGEST, changes={"objective.tail": False}),
    Arm("next token"),
)


@pytest.fixture(scope="module")
def study(tiny: GemmaConfig) -> Study:
    def base(seed: int) -> PretrainConfig:
        train = TrainConfig(steps=3, batch_size=4, seq_len=16, compile=False, seed=seed)
        tokens = {"max_tokens": 640, "validation_tokens": 160, "held_out_tokens": 160}
        return PretrainConfig(model=tiny, train=train, seed=seed).but(**tokens)

    return Study(
        name="small", title="What is kept", base=base, arms=ARMS, against="dense", seeds=(0, 1),
        columns={
            "ids": lambda _, label: None if label is None else label.results["ids_a_token"],
            "validation": lambda card, _: card.results["validation"],
        },
        curves={"drawn": {8.0: "drawn"}, "top k": {4.0: "tail"}}, levels=("dense",), x="ids",
    )  # fmt: skip


@pytest.fixture(scope="module")
def out(
    study: Study, shards_folder: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("studies") / "small"
    assert run(study, out, shards_folder, teacher_folder) == out / "report.html"
    return out


@pytest.fixture
def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def card_of(out: Path, arm: str, seed: int) -> Card:
    return read_card(out / "students" / arm.replace(" ", "-") / f"seed{seed}")


def test_every_arm_was_run_with_every_seed(out: Path, report: dict[str, Any]):
    for arm in ARMS:
        runs = [card_of(out, arm.name, seed) for seed in (0, 1)]
        assert [(card.finished, card.seed) for card in runs] == [(True, 0), (True, 1)]
        assert report["values"][arm.name] == [card.results["held_out"] for card in runs]
    assert report["seeds"] == [0, 1]


def test_an_arm_learns_from_its_own_kind_of_teacher(out: Path):
    inputs = {arm.name: sorted(card_of(out, arm.name, 0).inputs) for arm in ARMS}
    assert inputs == {
        "dense": ["shards", "teacher"],
        "drawn": ["shards", "targets"],
        "tail": ["shards", "targets"],
        "cut": ["shards", "targets"],
        "next token": ["shards"],
    }


def test_arms_of_a_seed_differ_in_what_they_change_alone(out: Path):
    for seed in (0, 1):
        base = card_of(out, "dense", seed).config
        for arm in ARMS:
            config = PretrainConfig.parse(base).but(**arm.changes)
            assert card_of(out, arm.name, seed).config == config.to_dict()
    assert card_of(out, "dense", 0).config != card_of(out, "dense", 1).config


def test_draws_are_made_anew_for_every_seed_and_the_largest_are_shared(out: Path):
    folders = {path.name for path in (out / "targets").iterdir()}
    assert folders == {"stratified-8-seed0", "stratified-8-seed1", "top-k-4"}
    drawn = [read_card(out / "targets" / f"stratified-8-seed{seed}") for seed in (0, 1)]
    assert [card.seed for card in drawn] == [0, 1]
    assert drawn[0].outputs != drawn[1].outputs
    used = {card_of(out, arm, seed).inputs["targets"]["sha256"] for arm in ("tail", "cut") for seed in (0, 1)}
    assert len(used) == 1


def test_the_difference_is_taken_seed_by_seed(report: dict[str, Any]):
    """So its spread is that of the difference, and the arm it is taken from has none."""
    nothing = {"mean": 0.0, "std": 0.0, "seeds": 2}
    assert report["arms"]["dense"]["difference"] == nothing
    base = report["values"]["dense"]
    for arm in ARMS[1:]:
        one, two = (mine - other for mine, other in zip(report["values"][arm.name], base, strict=True))
        told = report["arms"][arm.name]["difference"]
        assert told["mean"] == pytest.approx((one + two) / 2, abs=1e-5)
        assert told["std"] == pytest.approx(abs(one - two) / 2**0.5, abs=1e-5)
        assert told["mean"] != 0


def test_a_column_is_a_mean_over_seeds_of_the_cards(out: Path, report: dict[str, Any]):
    drawn = [
        read_card(out / "targets" / f"stratified-8-seed{seed}").results["ids_a_token"] for seed in (0, 1)
    ]
    assert report["arms"]["drawn"]["ids"]["mean"] == pytest.approx(sum(drawn) / 2, abs=1e-5)
    assert report["arms"]["tail"]["ids"]["mean"] == 4
    validation = [card_of(out, "cut", seed).results["validation"] for seed in (0, 1)]
    assert report["arms"]["cut"]["validation"]["mean"] == pytest.approx(sum(validation) / 2, abs=1e-5)


def test_the_table_has_a_line_an_arm_in_their_order(report: dict[str, Any]):
    header, _, *lines = report["table"].splitlines()
    assert header.split("  ")[0] == ""
    assert all(column in header for column in ("held_out", "less dense", "ids", "validation"))
    assert [line.split("  ")[0] for line in lines] == [arm.name for arm in ARMS]
    assert all(" ± " in line for line in lines)


def test_the_page_shows_the_table_and_the_plot(out: Path):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What is kept" in page
    assert all(f"<td>{arm.name}</td>" in page for arm in ARMS)
    assert page.count("<svg") == 1
    assert "2 seeds" in page


def test_the_seconds_count_a_shared_label_once(out: Path, report: dict[str, Any]):
    students = sum(card_of(out, arm.name, seed).seconds for arm in ARMS for seed in (0, 1))
    labels = sum(read_card(folder).seconds for folder in (out / "targets").iterdir())
    assert report["seconds"] == pytest.approx(students + labels, abs=0.06)


def test_what_is_finished_is_not_run_again(
    study: Study, out: Path, shards_folder: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments: Any) -> None:
        pytest.fail("something was computed again")

    monkeypatch.setattr(pretrain, "_work", refuse)
    monkeypatch.setattr(label, "_label", refuse)
    before = {path: path.read_bytes() for path in (out / "report.html", out / "report.json")}
    run(study, out, shards_folder, teacher_folder)
    assert {path: path.read_bytes() for path in before} == before


def test_a_study_that_was_stopped_runs_what_is_missing(
    study: Study, out: Path, shards_folder: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Here a further seed of two of its arms; what is there stays."""
    made: list[Path] = []
    work = pretrain._work

    def count(config: Any, folder: Any, *others: Any) -> dict[str, Any]:
        made.append(folder.path)
        return work(config, folder, *others)

    monkeypatch.setattr(pretrain, "_work", count)
    more = replace(study, seeds=(0, 1, 2), arms=(ARMS[0], ARMS[2]), curves={})
    page = run(more, out, shards_folder, teacher_folder)
    assert made == [out / "students" / arm / "seed2" for arm in ("dense", "tail")]
    assert len(list((out / "targets").iterdir())) == 3
    assert "<svg" not in page.read_text(encoding="utf-8")
    run(study, out, shards_folder, teacher_folder)


def test_a_missing_teacher_is_named(study: Study, shards_folder: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nobody"):
        run(study, tmp_path / "study", shards_folder, tmp_path / "nobody")


def test_the_study_of_targets_has_every_kind_in_every_size():
    study = targets.study(3)
    arms = {arm.name: arm for arm in study.arms}
    assert list(study.seeds) == [0, 1, 2]
    assert study.against == "dense"
    assert arms.pop("dense") == Arm("dense", teacher=True)
    assert arms.pop("next token") == Arm("next token")
    kinds = [
        (arm.label.kind, arm.label.samples, not arm.changes) for arm in arms.values() if arm.label is not None
    ]
    assert kinds == [
        (kind, size, plain)
        for kind, plain in (("stratified", True), ("sampled", True), ("top-k", True), ("top-k", False))
        for size in (16, 50, 256)
    ]
    renormalised = [arm.changes for name, arm in arms.items() if name.endswith("renormalised")]
    assert renormalised == [{"objective.tail": False}] * 3
    assert not any(arm.teacher for arm in arms.values())


def test_the_study_of_targets_trains_the_laptop_student_on_what_is_labelled():
    study = targets.study(2)
    for seed in study.seeds:
        base = study.base(seed)
        assert base == laptop.student(seed, targets.RATE)
        assert (base.seed, base.train.seed) == (seed, seed)
        labels = [arm.label for arm in study.arms if arm.label is not None]
        assert {(one.seq_len, one.max_tokens) for one in labels} == {(base.train.seq_len, base.max_tokens)}


def test_the_lines_of_the_plot_are_arms_of_the_study():
    study = targets.study(1)
    names = {arm.name for arm in study.arms}
    drawn = {arm for places in study.curves.values() for arm in places.values()}
    assert drawn | set(study.levels) == names


def test_a_column_that_an_arm_has_not_is_null_and_a_dash(report: dict[str, Any]):
    assert report["arms"]["dense"]["ids"] is None
    assert "NaN" not in json.dumps(report)
    (line,) = (line for line in report["table"].splitlines() if line.startswith("dense"))
    assert line.split()[-2] == "-"
