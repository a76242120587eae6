"""Learning from what a teacher left on disk: the loss by its definition, the right windows, and refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gemwright.data.packing import ShardsConfig
from gemwright.data.packing import run as pack
from gemwright.data.shards import Shards
from gemwright.data.sources import Corpus
from gemwright.data.windows import Windows
from gemwright.distill import label, pretrain
from gemwright.distill.label import LabelConfig
from gemwright.distill.pretrain import PretrainConfig, shards_of
from gemwright.losses import divergence
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.run import RunFolder, read_card, read_metrics
from gemwright.targets.store import TargetBatch, Targets
from gemwright.train.loop import Batch, TrainConfig, batches_of, make_batch, train
from gemwright.train.optim import OptimConfig
from gemwright.train.teacher import ObjectiveConfig, StoredTeacher, Teacher, distillation, flat_hidden

T, VOCAB, TOKENS = 16, 700, 1_600
LABEL = LabelConfig(samples=12, seq_len=T, max_tokens=TOKENS, windows_per_file=30, compile=False)
TOP = {"kind": "top-k", "samples": 5}

STALL = """
import json, sys, time
from pathlib import Path
from gemwright.distill import pretrain

measure, calls = pretrain.nats_per_token, 0

def second(*arguments):
    global calls
    calls += 1
    if calls == 2:
        print("stalled", flush=True)
        time.sleep(300)
    return measure(*arguments)

pretrain.nats_per_token = second
config = pretrain.PretrainConfig.parse(json.loads(sys.argv[1]))
out, shards, targets = map(Path, sys.argv[2:])
pretrain.run(config, out, shards, targets=targets)
"""


def labelled(folder: Path, teacher: Path, shards: Path, **changes: Any) -> Path:
    label.run(LABEL.but(**changes), folder, teacher, shards)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("targets")


@pytest.fixture(scope="module")
def sampled(place: Path, teacher_folder: Path, shards_folder: Path) -> Path:
    return labelled(place / "sampled", teacher_folder, shards_folder)


@pytest.fixture(scope="module")
def top(place: Path, teacher_folder: Path, shards_folder: Path) -> Path:
    return labelled(place / "top", teacher_folder, shards_folder, **TOP)


@pytest.fixture(scope="module")
def windows(shards_folder: Path) -> Windows:
    return Windows(Shards.open(shards_folder), "train", T, seed=9, max_tokens=TOKENS)


@pytest.fixture
def batch(windows: Windows) -> Batch:
    """Six windows, with a document's end in two of them."""
    return batch_of(windows, windows.numbers(2, 6))


@pytest.fixture
def ours(tiny: GemmaConfig) -> Gemma:
    """A student whose cap bites."""
    torch.manual_seed(1)
    return Gemma(tiny.but(init_std=0.4, final_softcap=3.0))


@pytest.fixture(scope="module")
def config(tiny: GemmaConfig) -> PretrainConfig:
    return PretrainConfig(
        model=tiny,
        train=TrainConfig(
            steps=8, batch_size=4, micro_batch_size=2, seq_len=T, compile=False, save_every=2,
            validate_every=4, optim=OptimConfig(lr=1e-2, warmup_steps=2),
        ),
        max_tokens=TOKENS, validation_tokens=400, held_out_tokens=400,
    )  # fmt: skip


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be computed: a model is not even built."""

    def refuse(*arguments: Any) -> None:
        pytest.fail("a model was built although the stage was to refuse")

    monkeypatch.setattr(pretrain, "Gemma", refuse)


def batch_of(windows: Windows, numbers: np.ndarray) -> Batch:
    rows = windows.take(numbers)
    rows[:2, 7] = 2
    return make_batch(rows, 2, "cpu", numbers)


def read(folder: Path, windows: Windows, numbers: np.ndarray) -> TargetBatch:
    """The targets of windows, found among those labelled by looking for each."""
    labelled = windows.in_order().tolist()
    return Targets.open(folder).read("train", [labelled.index(number) for number in numbers.tolist()])


def loss_of(folder: Path, model: Gemma, batch: Batch, windows: Windows, **objective: float | bool) -> float:
    config = ObjectiveConfig.parse(objective)
    teacher = StoredTeacher(Targets.open(folder), windows, config)
    total, metrics = distillation(teacher, config)(model, batch)
    assert metrics == {}
    return float(total.detach())


@torch.no_grad()
def logits_of(model: Gemma, batch: Batch) -> Tensor:
    return model(batch.ids, batch.places).flatten(0, 1)


def summed(values: Tensor, batch: Batch) -> float:
    assert float(batch.weights.sum()) < batch.weights.numel()
    return float((values * batch.weights.flatten()).sum())


def test_the_loss_of_draws_is_the_cross_entropy_to_them(
    sampled: Path, ours: Gemma, batch: Batch, windows: Windows
):
    assert batch.numbers is not None
    found = read(sampled, windows, batch.numbers)
    naive = divergence.sparse_cross_entropy(
        logits_of(ours, batch), found.ids.flatten(0, 1), found.probs.flatten(0, 1)
    )
    assert loss_of(sampled, ours, batch, windows) == pytest.approx(summed(naive, batch), rel=1e-5)
    assert loss_of(sampled, ours, batch, windows, tail=False) == pytest.approx(summed(naive, batch), rel=1e-5)


def test_the_loss_of_the_largest_has_the_rest_as_one_bucket(
    top: Path, ours: Gemma, batch: Batch, windows: Windows
):
    assert batch.numbers is not None
    found = read(top, windows, batch.numbers)
    ids, probs = found.ids.flatten(0, 1), found.probs.flatten(0, 1)
    naive = divergence.sparse_cross_entropy(logits_of(ours, batch), ids, probs, tail=True)
    assert loss_of(top, ours, batch, windows) == pytest.approx(summed(naive, batch), rel=1e-5)


def test_the_loss_of_the_largest_renormalised_leaves_the_rest_out(
    top: Path, ours: Gemma, batch: Batch, windows: Windows
):
    assert batch.numbers is not None
    found = read(top, windows, batch.numbers)
    ids, probs = found.ids.flatten(0, 1), found.probs.flatten(0, 1)
    assert float(probs.sum(-1).min()) < 0.9
    naive = divergence.sparse_cross_entropy(logits_of(ours, batch), ids, probs / probs.sum(-1, keepdim=True))
    assert loss_of(top, ours, batch, windows, tail=False) == pytest.approx(summed(naive, batch), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, TOP])
def test_targets_at_a_temperature_are_learned_at_it(
    tmp_path: Path, teacher_folder: Path, shards_folder: Path, ours: Gemma, batch: Batch, windows: Windows,
    changes: dict[str, Any],
):  # fmt: skip
    assert batch.numbers is not None
    folder = labelled(tmp_path / "warm", teacher_folder, shards_folder, temperature=2.0, **changes)
    found = read(folder, windows, batch.numbers)
    naive = 4 * divergence.sparse_cross_entropy(
        logits_of(ours, batch) / 2, found.ids.flatten(0, 1), found.probs.flatten(0, 1), tail=bool(changes)
    )
    total = loss_of(folder, ours, batch, windows, temperature=2.0)
    assert total == pytest.approx(summed(naive, batch), rel=1e-5)


def test_the_next_token_and_a_z_loss_are_mixed_in_by_their_shares(
    sampled: Path, ours: Gemma, batch: Batch, windows: Windows
):
    assert batch.numbers is not None
    found, logits = read(sampled, windows, batch.numbers), logits_of(ours, batch)
    drawn = divergence.sparse_cross_entropy(logits, found.ids.flatten(0, 1), found.probs.flatten(0, 1))
    following = divergence.cross_entropy(logits, batch.targets.flatten())
    naive = 0.7 * drawn + 0.3 * following + 0.01 * divergence.z_loss(logits)
    total = loss_of(sampled, ours, batch, windows, next_token=0.3, z_loss=0.01)
    assert total == pytest.approx(summed(naive, batch), rel=1e-5)


def test_the_gradient_of_draws_is_on_the_mean_that_of_the_whole_distribution(
    tmp_path: Path, teacher_folder: Path, shards_folder: Path, ours: Gemma
):
    """Over seeds the mean is as far off as its own spread makes it (ratio 1); a bias would not shrink."""
    windows = Windows(Shards.open(shards_folder), "train", T, max_tokens=8 * T)
    numbers = windows.numbers(0, 8)
    batch = make_batch(windows.take(numbers), 2, "cpu", numbers)  # as labelled: the teacher reads it too
    hidden = flat_hidden(ours, batch).detach().requires_grad_()

    def gradient(teacher: Teacher | StoredTeacher, objective: ObjectiveConfig) -> Tensor:
        return torch.autograd.grad(teacher.loss(ours, hidden, batch, objective), hidden)[0]

    def stored(name: str, objective: ObjectiveConfig, **changes: Any) -> Tensor:
        folder = labelled(tmp_path / name, teacher_folder, shards_folder, max_tokens=8 * T, **changes)
        return gradient(StoredTeacher(Targets.open(folder), windows, objective), objective)

    report, cut = ObjectiveConfig(), ObjectiveConfig(tail=False)
    whole = gradient(Teacher(checkpoint.load(teacher_folder)), report)
    drawn = torch.stack([stored(f"seed{seed}", report, seed=seed) for seed in range(20)])
    error = drawn.var(0).sum() / len(drawn)
    assert 0.7 < float((drawn.mean(0) - whole).square().sum() / error) < 1.3
    biased = stored("top", cut, kind="top-k", samples=2)
    assert float((biased - whole).square().sum() / error) > 2


def test_the_loss_is_the_same_from_a_subset_and_from_all_windows(
    tmp_path: Path, teacher_folder: Path, shards_folder: Path, ours: Gemma, top: Path
):
    """A window's targets are found by its number whatever else was labelled, in any order."""
    shards = Shards.open(shards_folder)
    small = Windows(shards, "train", T, seed=4, max_tokens=320)
    batch = batch_of(small, small.numbers(0, 20))
    fewer = labelled(tmp_path / "few", teacher_folder, shards_folder, max_tokens=320, **TOP)
    assert loss_of(fewer, ours, batch, small) == pytest.approx(loss_of(top, ours, batch, small), rel=1e-5)
    backwards = batch_of(small, small.numbers(0, 20)[::-1].copy())
    teacher = StoredTeacher(Targets.open(top), small)
    assert torch.equal(teacher.read(backwards).ids, teacher.read(batch).ids.flip(0))


def test_targets_of_the_whole_split_serve_any_subset(
    tmp_path: Path, teacher_folder: Path, few_shards_folder: Path
):
    """Their rows are the windows' numbers."""
    config = {"max_tokens": None, "windows_per_file": 500, "batch_size": 100, "kind": "top-k", "samples": 1}
    folder = labelled(tmp_path / "all", teacher_folder, few_shards_folder, **config)
    windows = Windows(Shards.open(few_shards_folder), "train", T, max_tokens=320)
    numbers = windows.numbers(0, 20)
    batch = make_batch(windows.take(numbers), 2, "cpu", numbers)
    found = StoredTeacher(Targets.open(folder), windows).read(batch)
    expected = Targets.open(folder).read("train", numbers.astype(int).tolist())
    assert torch.equal(found.ids, expected.ids)
    logits = logits_of(checkpoint.load(teacher_folder), batch)
    assert torch.equal(found.ids[..., 0].flatten(), logits.argmax(-1))


def test_portions_of_a_batch_read_the_targets_of_their_own_windows(
    sampled: Path, tiny: GemmaConfig, windows: Windows, tmp_path: Path
):
    config = TrainConfig(
        steps=2, batch_size=6, seq_len=T, compile=False, optim=OptimConfig(warmup_steps=1, eps=1e-3)
    )
    loss, models = distillation(StoredTeacher(Targets.open(sampled), windows)), []
    for portion in (None, 3, 2, 1):
        torch.manual_seed(1)
        models.append(Gemma(tiny.but(init_std=0.2)))
        (tmp_path / str(portion)).mkdir()
        folder, portions = RunFolder(tmp_path / str(portion)), config.but(micro_batch_size=portion)
        train(models[-1], loss, batches_of(windows, portions), portions, folder, lambda model: {})
    rows = [read_metrics(tmp_path / str(portion)) for portion in (None, 3, 2, 1)]
    for model, row in zip(models[1:], rows[1:], strict=True):
        assert [r["loss"] for r in row] == pytest.approx([r["loss"] for r in rows[0]], abs=1e-5)
        for one, other in zip(models[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train.seq_len": 8}, r"targets for [\d,]+ windows of 16 tokens.* of 8: .*train.seq_len=16"),
        (
            {"max_tokens": 1_616},
            r"targets for 1,600 tokens, .* take 1,616. Set max_tokens=1600, or label more",
        ),
        ({"max_tokens": None}, r"targets for 1,600 tokens, .* Set max_tokens=1600, or label more"),
        ({"objective.beta": 0.5}, r"at temperature 1.0, which serves forward KL .*not objective.beta=0.5"),
        ({"objective.temperature": 2.0}, r"objective.temperature=2.0. Set them so, or let the teacher run"),
    ],
)
def test_what_these_targets_cannot_serve_is_refused_before_anything_is_computed(
    config: PretrainConfig, sampled: Path, shards_folder: Path, tmp_path: Path, stopped: None, changes: Any,
    told: str,
):  # fmt: skip
    with pytest.raises(ValueError, match=told):
        pretrain.run(config.but(**changes), tmp_path / "run", shards_folder, targets=sampled)
    assert not (tmp_path / "run").exists()


def test_targets_of_shards_that_were_packed_again_are_refused(
    config: PretrainConfig, sampled: Path, text_folder: Path, tokenizer_folder: Path, tmp_path: Path,
    stopped: None,
):  # fmt: skip
    """By their hash: here one text more, and the same tokenizer."""
    shutil.copytree(text_folder, tmp_path / "text")
    (tmp_path / "text/more.py").write_text("more = 'text'\n" * 40)
    pack(ShardsConfig(), tmp_path / "shards", Corpus.folder(tmp_path / "text"), tokenizer_folder)
    with pytest.raises(ValueError, match=r"targets for other shards than .*shards, .* Label them"):
        pretrain.run(config, tmp_path / "run", tmp_path / "shards", targets=sampled)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes", [{"beta": 1.0}, {"temperature": 2.0}, {"next_token": 0.5}, {"tail": False}]
)
def test_from_scratch_there_is_no_objective(
    config: PretrainConfig, shards_folder: Path, tmp_path: Path, stopped: None, changes: Any
):
    changes = {f"objective.{name}": value for name, value in changes.items()}
    with pytest.raises(ValueError, match=r"from scratch there is the next token alone"):
        pretrain.run(config.but(**changes), tmp_path / "run", shards_folder)
    assert not (tmp_path / "run").exists()


def test_from_scratch_a_z_loss_counts(config: PretrainConfig, shards_folder: Path, tmp_path: Path):
    config = config.but(**{"train.steps": 1})
    pretrain.run(config, tmp_path / "plain", shards_folder)
    pretrain.run(config.but(**{"objective.z_loss": 0.1}), tmp_path / "z", shards_folder)
    plain, more = (read_metrics(tmp_path / name)[0]["loss"] for name in ("plain", "z"))
    torch.manual_seed(config.seed)
    first = make_batch(Windows(Shards.open(shards_folder), "train", T, max_tokens=TOKENS).batch(0, 4), 2)
    model, weights = Gemma(config.model), first.weights.flatten()
    squares = divergence.z_loss(logits_of(model, first)) * weights
    assert more - plain == pytest.approx(0.1 * float(squares.sum() / weights.sum()), rel=1e-4)


def test_the_shards_of_targets_are_found_or_missed(sampled: Path, shards_folder: Path, tmp_path: Path):
    assert shards_of(sampled) == shards_folder.resolve()
    shutil.copytree(sampled, tmp_path / "away/targets")
    with pytest.raises(FileNotFoundError, match=r"which are gone. Put them back there"):
        shards_of(tmp_path / "away/targets")


def test_the_card_names_the_targets(
    config: PretrainConfig, sampled: Path, shards_folder: Path, tmp_path: Path
):
    card = pretrain.run(config, tmp_path / "run", shards_folder, targets=sampled)
    assert (card.stage, sorted(card.inputs)) == ("distill", ["shards", "targets"])
    assert card.results["distinct_tokens"] == TOKENS


def test_a_student_of_stored_targets_comes_near_its_teacher(
    config: PretrainConfig, sampled: Path, shards_folder: Path, tmp_path: Path
):
    longer = config.but(**{"train.steps": 30, "train.validate_every": 30, "train.optim.lr": 2e-2})
    pretrain.run(longer, tmp_path / "run", shards_folder, targets=sampled)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3


def test_training_from_targets_killed_in_the_middle_reaches_the_same_bits(
    config: PretrainConfig, sampled: Path, shards_folder: Path, tmp_path: Path
):
    """Killed at the second validation, two updates after the last saved state."""
    config = config.but(**{"train.steps": 12, "train.save_every": 6})
    out, whole = tmp_path / "run", tmp_path / "whole"
    pretrain.run(config, whole, shards_folder, targets=sampled)
    order = [json.dumps(config.to_dict()), out, shards_folder, sampled]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-c", STALL, *map(str, order)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "stalled\n", child.stderr.read()
        child.send_signal(signal.SIGKILL)
    assert len(read_metrics(out)) == 7
    assert [path.name for path in (out / "resume").iterdir()] == ["step-000006"]
    pretrain.run(config, out, shards_folder, targets=sampled)
    without = [
        [{key: value for key, value in row.items() if key != "elapsed_s"} for row in read_metrics(folder)]
        for folder in (out, whole)
    ]
    assert without[0] == without[1]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert read_card(out).outputs == read_card(whole).outputs
