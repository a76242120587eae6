"""The long form in small: from the demo's models to a chat model, stage by stage, and once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemwright.ablate import merging
from gemwright.recipes import laptop
from gemwright.recipes.laptop_full import rlhf as laptop_rlhf
from gemwright.recipes.laptop_full import stages as laptop_full
from gemwright.run import read_card
from tests.recipes.test_laptop_run import small

QUICK = {"train.steps": 6, "train.batch_size": 4, "train.validate_every": 3, "train.optim.warmup_steps": 1}


def test_longer_sft_takes_as_many_updates_at_the_same_rate_as_on_policy():
    graded, longer = laptop_full.graded(1).train, laptop_full.longer(1).train
    assert (longer.steps, longer.optim, longer.seed) == (graded.steps, graded.optim, 1)


def test_seeds_change_the_order_and_nothing_else():
    one, other = laptop_full.student(0), laptop_full.student(2)
    assert one.but(seed=2, **{"train.seed": 2}) == other


def test_there_are_three_seeds():
    assert len(set(laptop_full.SEEDS)) == 3


@pytest.fixture(scope="module")
def patched() -> Iterator[None]:
    teacher, student = laptop.teacher, laptop.student
    tokenizer, evaluation = laptop.tokenizer(), laptop.evaluation()
    full = {name: getattr(laptop_full, name) for name in ("chats", "chat_teacher", "student", "graded")}
    answers, measured = laptop_full.answers(), laptop_full.measured()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laptop, "teacher", lambda: small(teacher(), 48))
        patch.setattr(laptop, "student", lambda *args, **more: small(student(*args, **more), 32))
        patch.setattr(laptop, "tokenizer", lambda: tokenizer.but(vocab_size=700))
        patch.setattr(laptop, "evaluation", lambda: evaluation.but(items=20, sample_tokens=4))
        patch.setattr(laptop_full, "SEEDS", (0, 1))
        patch.setattr(
            laptop_full, "chats", lambda: full["chats"]().but(lessons=120, log=100, held_out=12, slips=8)
        )
        patch.setattr(laptop_full, "chat_teacher", lambda: full["chat_teacher"]().but(**QUICK))
        patch.setattr(laptop_full, "student", lambda *args: full["student"](*args).but(**QUICK))
        patch.setattr(laptop_full, "graded", lambda seed: full["graded"](seed).but(**QUICK))
        # An untrained teacher says nothing to the end: its answers are cut, and kept here.
        kept = {"truncated": True, "near_duplicates": None, "sampling.max_tokens": 8}
        patch.setattr(laptop_full, "answers", lambda: answers.but(**kept))
        patch.setattr(laptop_full, "measured", lambda: measured.but(max_tokens=8))
        _shorten_rlhf(patch)
        yield


def _shorten_rlhf(patch: pytest.MonkeyPatch) -> None:
    preferred, judge, long_run = laptop_rlhf.preferred(), laptop_rlhf.judge, laptop_rlhf.long_run
    few = {"train.steps": 8, "train.batch_size": 2, "train.validate_every": 4, "sampling.max_tokens": 8}
    patch.setattr(laptop_rlhf, "QUESTIONS", 60)
    patch.setattr(laptop_rlhf, "STEPS", 2)
    patch.setattr(laptop_rlhf, "preferred", lambda: preferred.but(**{"sampling.max_tokens": 8}))
    patch.setattr(laptop_rlhf, "judge", lambda average=2: judge(min(average, 2)).but(**QUICK))
    patch.setattr(laptop_rlhf, "long_run", lambda seed: long_run(seed).but(measured_samples=1, **few))


@pytest.fixture(scope="module")
def root(patched: None, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "laptop-full"
    assert laptop_full.run(folder, text_folder) == folder / "report.html"
    return folder


@pytest.fixture
def report(root: Path) -> dict[str, Any]:
    return json.loads((root / "report.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_stage_is_finished(root: Path):
    cards = [read_card(path.parent) for path in root.rglob("card.json")]
    assert all(card.finished for card in cards)
    stages = {card.stage for card in cards}
    assert {"chats", "prompts", "sft", "answer", "on-policy", "measure", "distill", "pretrain"} <= stages
    assert {"preferences", "reward", "rlhf", "warp", "merge"} <= stages


@pytest.mark.slow
def test_every_way_to_train_is_measured_with_every_seed(root: Path, report: dict[str, Any]):
    assert set(report["models"]) == {
        "chat_teacher", "distilled", *(f"{arm}/seed{seed}" for arm in laptop_full.ARMS for seed in (0, 1)),
    }  # fmt: skip
    for arm in laptop_full.ARMS:
        assert all(len(values) == 2 for values in report["values"][arm].values())
    page = (root / "report.html").read_text(encoding="utf-8")
    for told in (
        "on-policy",
        "distilled SFT",
        "What each step gains",
        "planted",
        "Replies",
        "WARP, as many updates",
    ):
        assert told in page
    assert (root / "pretraining" / "report.html").exists()


@pytest.mark.slow
def test_what_was_planted_in_the_log_was_dropped(report: dict[str, Any]):
    for reason, count in report["planted"].items():
        assert report["prompts"]["dropped"].get(reason, 0) >= 0.9 * count, reason


@pytest.mark.slow
def test_the_questions_of_the_measurement_are_about_what_no_lesson_showed(root: Path):
    asked = [json.loads(line) for line in (root / "chats" / "held_out.jsonl").read_text().splitlines()]
    learnt = (root / "chats" / "lessons.jsonl").read_text() + (root / "chats" / "log.jsonl").read_text()
    for one in asked:
        header = one["turns"][0].replace("`", "\n").split("def ")[-1].split("\n")[0].split(")")[0]
        assert f"def {header})" not in learnt


@pytest.mark.slow
def test_a_second_run_does_nothing_again(root: Path, text_folder: Path, report: dict[str, Any]):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("model.safetensors")}
    laptop_full.run(root, text_folder)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("model.safetensors")}
    assert json.loads((root / "report.json").read_text(encoding="utf-8")) == report


@pytest.mark.slow
def test_text_without_enough_definitions_is_refused_with_a_remedy(
    patched: None, tmp_path: Path, text_folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(laptop_full, "chats", lambda: laptop_full.ChatsConfig(lessons=10**6))
    monkeypatch.setattr(laptop_full.laptop, "pretrained", lambda *args, **more: ({}, _text(root)))
    monkeypatch.setattr("gemwright.recipes.laptop_report.write", lambda *args: None)
    (tmp_path / "curated").symlink_to(root / "curated")
    with pytest.raises(ValueError, match="different questions, not 1,000,000"):
        laptop_full.run(tmp_path, text_folder)


def _text(root: Path) -> Any:
    from gemwright.data.curated import Curated

    return Curated.open(root / "curated")


@pytest.mark.slow
def test_the_study_of_merging_sets_every_model_beside_its_parents(root: Path, tmp_path: Path):
    config = merging.MergingConfig(samples=1, max_tokens=8)
    page = merging.run(config, root, tmp_path / "study").write(tmp_path)
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert [row["model"] for row in found["rows"]] == list(merging.MODELS)
    assert all({"mean", "std"} <= set(row["reward"]) and row["kl"] >= -1e-6 for row in found["rows"])
    assert found["rows"][0]["kl"] == pytest.approx(0, abs=1e-6)
    claims = {(one["better"], one["worse"], one["metric"]) for one in found["claims"]}
    assert ("WARP", "SFT, the start", "right") in claims
    assert ("WARP's line", "the long run's", "watched reward") in claims
    assert found["verdict"]
