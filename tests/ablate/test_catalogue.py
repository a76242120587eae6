"""Every study there is, run on a recipe that takes seconds; and the page of all of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gemwright.ablate import beyond, catalogue, paper
from gemwright.ablate.catalogue import STUDIES
from gemwright.ablate.study import NATS
from gemwright.benchmarks.forms import FORMS
from gemwright.recipes import laptop
from gemwright.recipes.base import Base

QUICK = [name for name in STUDIES if name not in ("targets", "merging")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablate")


def found(name: str, base: Base, home: Path) -> dict[str, Any]:
    page = catalogue.run(name, base, (0, 1), home)
    return json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_study_tells_rows_claims_and_a_verdict(name: str, base: Base, home: Path):
    told = found(name, base, home)
    assert told["study"] == name
    assert told["rows"]
    assert told["verdict"]
    assert all(math.isfinite(claim["difference"]["mean"]) for claim in told["claims"])
    assert told["seeds"] == [0, 1]
    assert told["report"].get("table", "-") == STUDIES[name].table


@pytest.mark.slow
def test_the_window_is_that_of_four_to_a_row_and_smaller_ones(base: Base, home: Path):
    told = found("window", base, home)
    assert [row["window"] for row in told["rows"]] == [8, 4, 2, 1]
    assert all({"perplexity", "std", "kv_bytes", "tokens_per_second"} <= set(row) for row in told["rows"])
    held = [row["kv_bytes"] for row in told["rows"]]
    assert held == sorted(held, reverse=True)


@pytest.mark.slow
def test_the_window_is_changed_on_the_same_weights(base: Base, home: Path):
    """So perplexities differ, and the students of both seeds are there once."""
    told = found("window", base, home)
    assert len({row["perplexity"] for row in told["rows"]}) == 4


@pytest.mark.slow
def test_of_two_kinds_of_heads_one_holds_half_the_bytes(base: Base, home: Path):
    one, other = found("attention", base, home)["rows"]
    assert (one["arm"], other["arm"]) == ("MHA", "GQA")
    assert one["KV bytes"]["mean"] == 2 * other["KV bytes"]["mean"]
    assert one["parameters"] > other["parameters"]


@pytest.mark.slow
def test_the_spread_is_that_of_twelve_forms(base: Base, home: Path):
    for row in found("formatting", base, home)["rows"]:
        assert len(row["forms"]) == len(FORMS) == 12
        mean = sum(row["forms"]) / 12
        spread = math.sqrt(sum((one - mean) ** 2 for one in row["forms"]) / 11)
        assert row["mean"]["mean"] == pytest.approx(mean, abs=1e-3)
        assert row["spread"]["mean"] == pytest.approx(spread, abs=10), "of means, and mean of spreads"


def test_a_quick_study_has_a_third_of_tokens_and_updates(base: Base):
    quick = base.quick()
    assert (quick.student.train.steps, quick.student.max_tokens) == (2, 213)
    assert quick.tokens == [106, 213]
    assert quick.teachers == base.teachers


@pytest.mark.slow
def test_one_page_has_all_that_ran_and_says_what_did_not(
    base: Base, home: Path, monkeypatch: pytest.MonkeyPatch
):
    few = {name: STUDIES[name] for name in ("temperature", "depth", "merging")}
    monkeypatch.setattr(catalogue, "STUDIES", few)
    page = catalogue.run_all(base, (0, 1), home)
    text = page.read_text(encoding="utf-8")
    assert text.count("<h2>") == 2
    assert "gemwright run laptop --full" in text
    data = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert set(data["studies"]) == {"temperature", "depth"}
    assert list(data["missing"]) == ["merging"]
    assert not any(outside in text for outside in ("src=", "<script", "<link", "@import", "url(http"))


def test_the_laptops_wide_and_deep_have_as_many_parameters(tmp_path: Path):
    from gemwright.model.cost import parameters

    base = laptop.base(tmp_path)
    wide, deep = (parameters(base.student.but(**changes).model) for changes in base.shapes.values())
    assert wide == pytest.approx(deep, rel=0.002)


def test_the_laptops_students_and_teachers_grow(tmp_path: Path):
    from gemwright.model.cost import parameters

    base = laptop.base(tmp_path)
    students = [parameters(base.student.but(**changes).model) for changes in base.sizes.values()]
    teachers = [parameters(one.model) for one in base.teachers.values() if not isinstance(one, str)]
    assert students == sorted(students)
    assert teachers == sorted(teachers)
    assert students[1] == parameters(base.student.model)
    assert students[-1] < teachers[-1]


def test_the_study_of_targets_has_every_kind_in_every_size(base: Base):
    study = beyond.targets(base, (0, 1, 2))
    arms = {arm.name: arm for arm in study.arms}
    assert arms["dense"].teacher
    assert arms["next token"].label is arms["next token"].teacher is None
    kinds = [(arm.label.kind, arm.label.samples, not arm.changes) for arm in study.arms if arm.label]
    assert kinds == [
        (kind, size, plain)
        for kind, plain in (("stratified", True), ("sampled", True), ("top-k", True), ("top-k", False))
        for size in (16, 50, 256)
    ]
    labels = {(arm.label.seq_len, arm.label.max_tokens) for arm in study.arms if arm.label}
    assert labels == {(base.student.train.seq_len, base.student.max_tokens)}
    drawn = {arm for places in study.curves.values() for arm in places.values()}
    assert drawn | set(study.levels) == set(arms)


def test_a_temperature_of_one_is_the_recipe_itself(base: Base):
    (one,) = [arm for arm in beyond.temperature(base, (0,)).arms if arm.name == "T = 1"]
    assert not one.changes


def test_claims_name_arms_of_their_study(base: Base):
    made = [
        make(base, (0,))
        for make in (
            paper.distillation, paper.student_size, paper.attention, paper.depth, beyond.targets,
            beyond.student_tokens, beyond.teacher_size, beyond.temperature,
        )
    ]  # fmt: skip
    for study in made:
        arms = {arm.name for arm in study.arms}
        assert {name for claim in study.claims for name in (claim.better, claim.worse)} <= arms
        assert any(claim.metric in (NATS, "perplexity") for claim in study.claims)
