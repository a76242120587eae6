"""The laptop recipe in small, from text to report: what it leaves behind, and that it is done once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemwright.distill.pretrain import PretrainConfig
from gemwright.recipes import laptop
from gemwright.run import Card, read_card
from gemwright.train import loop

pytestmark = pytest.mark.slow

TINY = {
    "model.d_ff": 64, "model.num_heads": 2, "model.num_kv_heads": 1, "model.head_dim": 16,
    "model.vocab_size": 700, "model.window": 16,
    "train.steps": 4, "train.batch_size": 2, "train.seq_len": 32, "train.compile": False,
    "train.optim.warmup_steps": 1, "max_tokens": 3_200, "validation_tokens": 640, "held_out_tokens": 640,
}  # fmt: skip


def small(config: PretrainConfig, width: int) -> PretrainConfig:
    """The same run in seconds; runs that differ in `max_tokens` still do."""
    tokens = max(64, (config.max_tokens or 100_000) // 100)
    return config.but(**TINY | {"model.d_model": width, "max_tokens": tokens})


@pytest.fixture(scope="module")
def patched() -> Iterator[None]:
    teacher, student = laptop.teacher, laptop.student
    tokenizer, evaluation = laptop.tokenizer(), laptop.evaluation()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laptop, "teacher", lambda: small(teacher(), 48))
        patch.setattr(laptop, "student", lambda *args, **more: small(student(*args, **more), 32))
        patch.setattr(laptop, "tokenizer", lambda: tokenizer.but(vocab_size=700))
        patch.setattr(laptop, "evaluation", lambda: evaluation.but(items=20, sample_tokens=4))
        yield


@pytest.fixture(scope="module")
def root(patched: None, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, gone through once."""
    folder = tmp_path_factory.mktemp("runs") / "laptop"
    assert laptop.run(folder, text_folder) == folder / "report.html"
    return folder


@pytest.fixture
def report(root: Path) -> dict[str, Any]:
    return json.loads((root / "report.json").read_text(encoding="utf-8"))


def cards(root: Path) -> list[Card]:
    """Every stage's card, once: a folder that was adopted from another has the other's."""
    texts = {path.read_text(encoding="utf-8") for path in root.rglob("card.json")}
    return [Card(**json.loads(text)) for text in sorted(texts)]


def test_the_report_has_nats_of_teacher_student_and_twin(report: dict[str, Any]):
    nats = report["nats_per_token"]
    assert set(nats) == {"teacher", "scratch", "distilled"}
    assert all(set(stats) == {"mean", "std", "seeds"} for stats in nats.values())
    assert nats["teacher"]["seeds"] == 1
    assert nats["scratch"]["seeds"] == nats["distilled"]["seeds"] >= 2
    assert all(0 < stats["mean"] < 12 for stats in nats.values())


def test_the_recovered_share_is_of_the_distance_between_twin_and_teacher(report: dict[str, Any]):
    teacher, twin, student = (
        report["nats_per_token"][k]["mean"] for k in ("teacher", "scratch", "distilled")
    )
    assert report["recovered_share"] == pytest.approx((twin - student) / (twin - teacher), abs=1e-2)


def test_the_seconds_add_up_to_those_of_all_stages(root: Path, report: dict[str, Any]):
    seconds = dict(report["seconds"])
    total = seconds.pop("total")
    assert total == pytest.approx(sum(seconds.values()), abs=0.06)
    assert total == pytest.approx(sum(card.seconds for card in cards(root)), abs=0.06)


def test_every_stage_is_finished(root: Path):
    stages = {"curate", "tokenizer", "shards", "pretrain", "distill", "evaluate"}
    assert {card.stage for card in cards(root)} == stages
    assert all(card.finished for card in cards(root))


def test_student_and_twin_are_trained_by_the_same_configs_but_for_the_rate(root: Path):
    """Whoever was distilled has a twin with the same weights to begin with and the same tokens."""

    def configs(stage: str) -> set[str]:
        found = [PretrainConfig.parse(card.config) for card in cards(root) if card.stage == stage]
        alike = [config.but(**{"train.optim.lr": 1.0}).to_dict() for config in found]
        return {json.dumps(config) for config in alike if config["model"]["d_model"] == 32}

    assert configs("distill") == configs("pretrain")
    assert len(configs("distill")) >= 2


def test_student_and_twin_had_as_many_rates_to_choose_from(root: Path, report: dict[str, Any]):
    assert report["sweep"]["distilled"].keys() == report["sweep"]["scratch"].keys()
    for kind in ("distilled", "scratch"):
        tried = report["sweep"][kind]
        chosen = read_card(root / kind).config["train"]["optim"]["lr"]
        assert tried[f"{chosen:g}"] == min(tried.values())


def test_the_page_speaks_of_all_three(root: Path, report: dict[str, Any]):
    page = (root / "report.html").read_text(encoding="utf-8")
    for kind in report["nats_per_token"].values():
        assert f"{kind['mean']:.3f}" in page
    assert "<svg" in page


def test_started_again_no_stage_is_run_again(
    root: Path, text_folder: Path, report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments: Any) -> None:
        pytest.fail("an update was made again")

    before = {path: path.stat().st_mtime_ns for path in root.rglob("card.json")}
    monkeypatch.setattr(loop, "_update", refuse)
    page = laptop.run(root, text_folder)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("card.json")} == before
    assert json.loads(page.with_suffix(".json").read_text(encoding="utf-8")) == report


def test_other_text_in_the_same_folder_is_refused(root: Path, text_folder: Path, tmp_path: Path):
    for path in text_folder.iterdir():
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8") + "x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"was made with other settings: input .*--fresh"):
        laptop.run(root, tmp_path)
