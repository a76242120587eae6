"""The stage that trains from scratch or distils: its loss, the twin, what it refuses and leaves behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gemwright
from gemwright.data.packing import ShardsConfig
from gemwright.data.packing import run as pack
from gemwright.data.shards import Shards
from gemwright.data.sources import Corpus
from gemwright.data.windows import Windows
from gemwright.distill import pretrain
from gemwright.distill.pretrain import PretrainConfig, run, tokenizer_of
from gemwright.evaluate.likelihood import nats_per_token
from gemwright.losses import divergence
from gemwright.model import checkpoint, cost
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.run import read_card, read_metrics
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.tokenizer.train import TokenizerConfig
from gemwright.tokenizer.train import train as train_tokenizer
from gemwright.train import loop
from gemwright.train.loop import Batch, Batches, TrainConfig, make_batch
from gemwright.train.optim import OptimConfig
from gemwright.train.teacher import Teacher, distillation, next_token


class Interrupted(Exception):
    """Stands for whatever ends a stage before its time."""


@pytest.fixture(scope="module")
def config(tiny: GemmaConfig) -> PretrainConfig:
    return PretrainConfig(
        model=tiny,
        train=TrainConfig(
            steps=8, batch_size=4, seq_len=16, compile=False, save_every=4, validate_every=4,
            optim=OptimConfig(lr=1e-2, warmup_steps=2),
        ),
        max_tokens=4_000,
        validation_tokens=400,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(config: PretrainConfig, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of another width, with another cap."""
    model = {"model.d_model": 48, "model.d_ff": 96, "model.final_softcap": 20.0}
    out = tmp_path_factory.mktemp("teachers") / "teacher"
    run(config.but(**model), out, shards_folder)
    return out


@pytest.fixture(scope="module")
def student(
    config: PretrainConfig, shards_folder: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("students") / "student"
    run(config, out, shards_folder, teacher=teacher)
    return out


@pytest.fixture
def batch(shards_folder: Path) -> Batch:
    """Three rows, two documents in one of them."""
    rows = Windows(Shards.open(shards_folder), "train", 48).batch(0, 3)
    rows[1, 20] = 2
    return make_batch(rows, bos_id=2)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be computed: a model is not even built."""

    def refuse(*arguments: Any) -> None:
        pytest.fail("a model was built although the stage was to refuse")

    monkeypatch.setattr(pretrain, "Gemma", refuse)


def biting(tiny: GemmaConfig, seed: int, **changes: Any) -> Gemma:
    torch.manual_seed(seed)
    return Gemma(tiny.but(init_std=0.4, **changes))


def test_the_loss_is_the_kl_of_whole_capped_distributions(tiny: GemmaConfig, batch: Batch):
    """Both caps bite here, and they differ."""
    ours, theirs = biting(tiny, 1, final_softcap=3.0), biting(tiny, 2, d_model=48, final_softcap=5.0)
    total, metrics = distillation(Teacher(theirs))(ours, batch)
    with torch.no_grad():
        logits = [model(batch.ids, batch.places).flatten(0, 1) for model in (theirs, ours)]
    naive = divergence.forward_kl(*logits)
    assert float(total.detach()) == pytest.approx(float((naive * batch.weights.flatten()).sum()), rel=1e-5)
    assert metrics == {}
    assert float(batch.weights.sum()) < batch.weights.numel()


def test_the_loss_from_scratch_is_the_cross_entropy_of_the_next_token(tiny: GemmaConfig, batch: Batch):
    model = biting(tiny, 1, final_softcap=3.0)
    total, _ = next_token(model, batch)
    with torch.no_grad():
        logits = model(batch.ids, batch.places).flatten(0, 1)
    naive = divergence.cross_entropy(logits, batch.targets.flatten())
    assert float(total.detach()) == pytest.approx(float((naive * batch.weights.flatten()).sum()), rel=1e-5)


def test_who_is_distilled_from_itself_has_nothing_to_learn(tiny: GemmaConfig, batch: Batch):
    ours, theirs = biting(tiny, 1), biting(tiny, 1)
    total, _ = distillation(Teacher(theirs))(ours, batch)
    (total / batch.weights.sum()).backward()
    assert abs(float(total.detach())) / float(batch.weights.sum()) < 1e-5
    largest = max(float(p.grad.abs().max()) for p in ours.parameters() if p.grad is not None)
    assert largest < 1e-5


def test_the_teacher_gets_no_gradient_and_does_not_change(tiny: GemmaConfig, batch: Batch):
    ours, theirs = biting(tiny, 1), biting(tiny, 2)
    before = [p.clone() for p in theirs.parameters()]
    total, _ = distillation(Teacher(theirs))(ours, batch)
    total.backward()
    assert all(p.grad is None and not p.requires_grad for p in theirs.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, theirs.parameters(), strict=True))
    assert all(p.grad is not None and bool(p.grad.any()) for p in ours.parameters())


def test_a_bf16_student_is_taught_by_a_teacher_in_its_own_number_format(tiny: GemmaConfig, batch: Batch):
    theirs = Teacher(biting(tiny, 2))
    expected = theirs.hidden(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(theirs.hidden(batch), expected)


def test_student_and_twin_begin_alike_and_see_the_same_batches(
    config: PretrainConfig,
    shards_folder: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    seen: list[tuple[dict[str, Tensor], list[Tensor]]] = []

    def watch(model: Gemma, loss: Any, batches: Batches, *others: Any) -> dict[str, float]:
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seen.append((weights, [part.ids for step in range(8) for part in batches(step)]))
        return {"validation": 1.0}

    monkeypatch.setattr(pretrain, "train", watch)
    run(config, tmp_path / "student", shards_folder, teacher=teacher)
    run(config, tmp_path / "twin", shards_folder)
    run(config.but(seed=1, **{"train.seed": 1}), tmp_path / "another", shards_folder)
    (weights, batches), (twins, same), (others, different) = seen
    assert all(torch.equal(weights[name], twins[name]) for name in weights)
    assert all(torch.equal(a, b) for a, b in zip(batches, same, strict=True))
    assert not torch.equal(weights["model.embed_tokens.weight"], others["model.embed_tokens.weight"])
    assert not any(torch.equal(a, b) for a, b in zip(batches, different, strict=True))


def test_the_card_says_what_came_of_it(student: Path, config: PretrainConfig, shards_folder: Path):
    card, model = read_card(student), checkpoint.load(student)
    held_out = Windows(Shards.open(shards_folder), "held_out", 16)
    assert (card.stage, card.finished, sorted(card.inputs)) == ("distill", True, ["shards", "teacher"])
    assert card.results["parameters"] == cost.parameters(config.model)
    assert card.results["tokens_seen"] == 8 * 4 * 16
    assert card.results["distinct_tokens"] == 4_000
    assert card.results["held_out"] == pytest.approx(nats_per_token(model, held_out), rel=1e-5)


def test_the_card_has_the_last_validation(student: Path, shards_folder: Path):
    part = Windows(Shards.open(shards_folder), "validation", 16, max_tokens=400)
    expected = nats_per_token(checkpoint.load(student), part)
    assert read_card(student).results["validation"] == pytest.approx(expected, rel=1e-5)
    assert read_card(student).results["validation"] == read_metrics(student)[-1]["validation"]


def test_the_measurement_at_the_end_can_be_kept_short(
    config: PretrainConfig, shards_folder: Path, tmp_path: Path
):
    card = run(config.but(held_out_tokens=320), tmp_path / "run", shards_folder)
    part = Windows(Shards.open(shards_folder), "held_out", 16, max_tokens=320)
    expected = nats_per_token(checkpoint.load(tmp_path / "run"), part)
    assert card.results["held_out"] == pytest.approx(expected, rel=1e-5)


def test_a_stage_without_a_teacher_is_named_otherwise(teacher: Path):
    assert read_card(teacher).stage == "pretrain"
    assert sorted(read_card(teacher).inputs) == ["shards"]


def test_the_folder_is_a_model_with_its_tokenizer(student: Path, tokenizer_folder: Path):
    loaded = gemwright.load(student)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.sha256 == Tokenizer.load(tokenizer_folder).sha256
    assert isinstance(loaded.generate("def ", max_tokens=4), str)
    assert not (student / "resume").exists()


def test_a_finished_stage_is_not_run_again(
    student: Path, config: PretrainConfig, shards_folder: Path, teacher: Path, stopped: None
):
    before = {path.name: path.stat().st_mtime_ns for path in student.iterdir() if path.name != ".lock"}
    assert run(config, student, shards_folder, teacher=teacher) == read_card(student)
    assert {
        path.name: path.stat().st_mtime_ns for path in student.iterdir() if path.name != ".lock"
    } == before


def test_a_folder_distilled_from_one_teacher_is_not_taken_for_another(
    student: Path, config: PretrainConfig, shards_folder: Path, stopped: None
):
    with pytest.raises(ValueError, match="'distill', not 'pretrain'"):
        run(config, student, shards_folder)
    with pytest.raises(ValueError, match=r"input teacher: .*--fresh"):
        run(config, student, shards_folder, teacher=student)


def test_a_kill_during_the_last_evaluation_costs_no_training(
    config: PretrainConfig, shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(model: Gemma, windows: Windows) -> float:
        if windows.split == "held_out":
            raise Interrupted
        return nats_per_token(model, windows)

    def refuse(*arguments: Any) -> None:
        pytest.fail("an update was made again")

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "nats_per_token", interrupt)
        with pytest.raises(Interrupted):
            run(config, tmp_path / "run", shards_folder)
    monkeypatch.setattr(loop, "_update", refuse)
    assert run(config, tmp_path / "run", shards_folder).finished
    assert not (tmp_path / "run/resume").exists()


def test_a_state_that_a_kill_left_in_a_finished_folder_goes(
    config: PretrainConfig, shards_folder: Path, teacher: Path, stopped: None
):
    (teacher / "resume/step-000008").mkdir(parents=True)
    run(PretrainConfig.parse(read_card(teacher).config), teacher, shards_folder)
    assert not (teacher / "resume").exists()


def test_a_teacher_with_another_tokenizer_is_refused_before_anything_is_computed(
    config: PretrainConfig,
    shards_folder: Path,
    text_folder: Path,
    teacher: Path,
    tmp_path: Path,
    stopped: None,
):
    """And the folder is not marked as that teacher's work: the right one can be named next."""
    texts = [document.text for document in Corpus.folder(text_folder).documents("train")]
    Tokenizer(train_tokenizer(texts, TokenizerConfig(vocab_size=690))).save(tmp_path / "tokenizer")
    pack(ShardsConfig(), tmp_path / "shards", Corpus.folder(text_folder), tmp_path / "tokenizer")
    with pytest.raises(
        ValueError, match=r"another tokenizer .*the shards 690\. Make shards with the teacher"
    ):
        run(config, tmp_path / "run", tmp_path / "shards", teacher=teacher)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_there_is_named(config: PretrainConfig, shards_folder: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nobody does not exist"):
        run(config, tmp_path / "run", shards_folder, teacher=tmp_path / "nobody")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.vocab_size": 699}, r"699 rows, but the shards use 700 pieces. Set model.vocab_size=700"),
        ({"train.seq_len": 65}, r"train.seq_len=65 exceeds the model's max_seq_len=64. Shorten"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_anything_is_computed(
    config: PretrainConfig, shards_folder: Path, tmp_path: Path, stopped: None, changes: Any, told: str
):
    with pytest.raises(ValueError, match=told):
        run(config.but(**changes), tmp_path / "run", shards_folder)
    assert not (tmp_path / "run").exists()


def test_the_tokenizer_of_shards_is_found_or_missed(
    shards_folder: Path, tokenizer_folder: Path, tmp_path: Path
):
    assert tokenizer_of(shards_folder).sha256 == Tokenizer.load(tokenizer_folder).sha256
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/card.json").write_bytes((shards_folder / "card.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="which is gone"):
        tokenizer_of(tmp_path / "shards")
