"""What a distillation run tells of itself: by its definitions, and in the metrics when it validates."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemwright.data.shards import Shards
from gemwright.data.windows import Windows
from gemwright.distill import label, pretrain
from gemwright.distill.label import LabelConfig
from gemwright.distill.pretrain import PretrainConfig
from gemwright.losses import divergence
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.run import read_card, read_metrics
from gemwright.targets.store import Targets
from gemwright.train.diagnostics import watch
from gemwright.train.loop import Batch, TrainConfig, make_batch
from gemwright.train.teacher import REPORT, ObjectiveConfig, StoredTeacher, Teacher

T, TOKENS = 16, 1_600
ONLINE = {"teacher_entropy", "student_entropy", "top1_agreement", "gradient_cosine"}
STORED = ONLINE | {"mass_covered", "distinct_ids"}


@pytest.fixture(scope="module")
def windows(shards_folder: Path) -> Windows:
    return Windows(Shards.open(shards_folder), "train", T, max_tokens=TOKENS)


@pytest.fixture(scope="module")
def targets(teacher_folder: Path, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("targets") / "targets"
    config = LabelConfig(samples=20, seq_len=T, max_tokens=TOKENS, compile=False)
    label.run(config, out, teacher_folder, shards_folder)
    return out


@pytest.fixture
def batch(windows: Windows) -> Batch:
    """Six windows, in two of them a token that is no target."""
    numbers = windows.numbers(0, 6)
    rows = windows.take(numbers)
    rows[:2, 7] = 2
    return make_batch(rows, 2, "cpu", numbers)


def student(tiny: GemmaConfig) -> Gemma:
    torch.manual_seed(1)
    return Gemma(tiny.but(init_std=0.4, final_softcap=3.0))


def mean(values: Tensor, batch: Batch) -> float:
    return float((values.flatten() * batch.weights.flatten()).sum() / batch.weights.sum())


def entropy(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def logits_at(model: Gemma, hidden: Tensor) -> Tensor:
    cap = model.config.final_softcap
    assert cap is not None
    return cap * torch.tanh(hidden @ model.unembedding.detach().T / cap)


def pulls(model: Gemma, batch: Batch, naive: Callable[[Tensor], Tensor]) -> float:
    """The cosine between the gradients of a loss on whole logits and of the next token's."""
    hidden = model.hidden(batch.ids, batch.places).flatten(0, 1).detach().requires_grad_()
    weights, gradients = batch.weights.flatten(), []
    for loss in (naive, lambda logits: divergence.cross_entropy(logits, batch.targets.flatten())):
        total = (loss(logits_at(model, hidden)) * weights).sum()
        gradients.append(torch.autograd.grad(total, hidden)[0].flatten())
    return float(torch.dot(*gradients) / (gradients[0].norm() * gradients[1].norm()))


def test_who_is_its_own_teacher_agrees_with_it_everywhere(tiny: GemmaConfig, batch: Batch):
    seen = watch(Teacher(student(tiny)), REPORT, batch)(student(tiny))
    assert seen["top1_agreement"] == 1
    assert seen["student_entropy"] == pytest.approx(seen["teacher_entropy"], rel=1e-6)
    assert -1 <= seen["gradient_cosine"] <= 1
    assert set(seen) == ONLINE


def test_beside_a_teacher_that_runs_along_all_is_as_defined(
    tiny: GemmaConfig, teacher_folder: Path, batch: Batch
):
    ours, theirs = student(tiny), checkpoint.load(teacher_folder)
    seen = watch(Teacher(theirs), REPORT, batch)(ours)
    with torch.no_grad():
        mine, taught = (model(batch.ids, batch.places).flatten(0, 1) for model in (ours, theirs))
    assert seen == pytest.approx(
        {
            "teacher_entropy": mean(entropy(taught), batch),
            "student_entropy": mean(entropy(mine), batch),
            "top1_agreement": mean((mine.argmax(-1) == taught.argmax(-1)).float(), batch),
            "gradient_cosine": pulls(ours, batch, lambda logits: divergence.forward_kl(taught, logits)),
        },
        abs=1e-4,
    )


def test_beside_draws_on_disk_all_is_as_defined(
    tiny: GemmaConfig, targets: Path, windows: Windows, batch: Batch
):
    ours, teacher = student(tiny), StoredTeacher(Targets.open(targets), windows)
    seen, found = watch(teacher, REPORT, batch)(ours), teacher.read(batch)
    ids, probs = found.ids.flatten(0, 1), found.probs.flatten(0, 1)
    with torch.no_grad():
        mine = ours(batch.ids, batch.places).flatten(0, 1)
    likeliest = torch.stack([row[p.argmax()] for row, p in zip(ids, probs, strict=True)])
    assert seen == pytest.approx(
        {
            "teacher_entropy": float(found.entropy.mean()),
            "mass_covered": float(found.covered.mean()),
            "distinct_ids": mean((probs > 0).sum(-1).float(), batch),
            "student_entropy": mean(entropy(mine), batch),
            "top1_agreement": mean((mine.argmax(-1) == likeliest).float(), batch),
            "gradient_cosine": pulls(
                ours, batch, lambda logits: divergence.sparse_cross_entropy(logits, ids, probs)
            ),
        },
        abs=1e-4,
    )
    assert 0 <= seen["top1_agreement"] < 1
    assert 1 < seen["distinct_ids"] <= 20
    assert 0 < seen["mass_covered"] < 1


def test_what_is_stored_of_a_teacher_tells_nearly_what_it_would_itself(
    tiny: GemmaConfig, teacher_folder: Path, targets: Path, windows: Windows
):
    """On windows that are targets throughout, where a window's mean is its tokens'."""
    ours, numbers = student(tiny), windows.numbers(1, 60)
    whole = make_batch(windows.take(numbers), 2, "cpu", numbers)
    online = watch(Teacher(checkpoint.load(teacher_folder)), REPORT, whole)(ours)
    stored = watch(StoredTeacher(Targets.open(targets), windows), REPORT, whole)(ours)
    assert set(stored) == STORED
    assert stored["teacher_entropy"] == pytest.approx(online["teacher_entropy"], rel=0.02)
    assert stored["student_entropy"] == online["student_entropy"]


def test_looking_leaves_the_student_as_it_was(tiny: GemmaConfig, teacher_folder: Path, batch: Batch):
    ours = student(tiny)
    before = [parameter.clone() for parameter in ours.parameters()]
    look = watch(Teacher(checkpoint.load(teacher_folder)), REPORT, batch)
    assert look(ours) == look(ours)
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_the_next_token_alone_pulls_where_it_pulls(tiny: GemmaConfig, teacher_folder: Path, batch: Batch):
    objective = ObjectiveConfig(next_token=1.0)
    seen = watch(Teacher(checkpoint.load(teacher_folder)), objective, batch)(student(tiny))
    assert seen["gradient_cosine"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["online", "stored", "scratch"])
def test_the_metrics_have_them_at_validations_and_the_card_the_last(
    tiny: GemmaConfig, teacher_folder: Path, targets: Path, shards_folder: Path, tmp_path: Path, kind: str
):
    config = PretrainConfig(
        model=tiny,
        train=TrainConfig(steps=5, batch_size=4, seq_len=T, compile=False, validate_every=2),
        max_tokens=TOKENS, validation_tokens=160, held_out_tokens=160,
    )  # fmt: skip
    pretrain.run(
        config, tmp_path / "run", shards_folder,
        teacher=teacher_folder if kind == "online" else None, targets=targets if kind == "stored" else None,
    )  # fmt: skip
    keys = {"online": ONLINE, "stored": STORED, "scratch": set()}[kind]
    rows = read_metrics(tmp_path / "run")
    assert {row["step"] for row in rows if "validation" in row} == {2, 4, 5}
    for row in rows:
        assert row.keys() & STORED == (keys if "validation" in row else set())
        assert -1 <= row.get("gradient_cosine", 0) <= 1
    results = read_card(tmp_path / "run").results
    assert {key: results[key] for key in keys} == {key: rows[-1][key] for key in keys}


def test_the_padding_of_a_head_changes_nothing(tiny: GemmaConfig, batch: Batch):
    """Four rows more, far from what the model would say: no pieces, so no part of any distribution."""
    wide = student(tiny.but(vocab_size=tiny.vocab_size + 4))
    with torch.no_grad():
        for name, weight in student(tiny).state_dict().items():
            wide.state_dict()[name][: len(weight)].copy_(weight)
        wide.unembedding[tiny.vocab_size :] = -3 * wide.unembedding[300:304]
    theirs = student(tiny.but(d_model=48))
    plain = watch(Teacher(theirs, tiny.vocab_size), REPORT, batch)(student(tiny))
    assert watch(Teacher(theirs, tiny.vocab_size), REPORT, batch)(wide) == pytest.approx(
        plain | {"gradient_cosine": pytest.approx(plain["gradient_cosine"], abs=0.05)}, abs=1e-5
    )
    seen = watch(Teacher(wide, tiny.vocab_size), REPORT, batch)(theirs)
    unpadded = watch(Teacher(student(tiny), tiny.vocab_size), REPORT, batch)(theirs)
    assert seen == pytest.approx(unpadded, abs=1e-5)
