"""The loop: one loss a step however it is portioned, learning, bad numbers, metrics, interruptions."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gemwright.data.shards import Shards
from gemwright.data.windows import Windows
from gemwright.losses import divergence
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.run import RunFolder, read_metrics
from gemwright.train.loop import Batch, NonFiniteError, TrainConfig, batches_of, make_batch, train
from gemwright.train.optim import OptimConfig
from gemwright.train.teacher import next_token

CONFIG = TrainConfig(
    steps=6, batch_size=4, seq_len=16, compile=False, save_every=2, validate_every=3,
    optim=OptimConfig(warmup_steps=2),
)  # fmt: skip
ONE_STEP = CONFIG.but(steps=1, **{"optim.eps": 1e-3})  # an epsilon well above the rounding of gradients
BOS, EOS, PAD = 2, 1, 0


class Interrupted(Exception):
    """Stands for whatever ends a run before its time."""


class Rows(Windows):
    """The same rows at every step."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.seq_len = rows.shape[1] - 1
        self.split, self.total, self._kept = "train", len(rows), len(rows)

    def numbers(self, step: int, batch_size: int) -> np.ndarray:
        return np.arange(len(self.rows), dtype=np.uint64)

    def take(self, numbers: np.ndarray) -> Tensor:
        return self.rows[numbers.astype(int)]


@pytest.fixture(scope="module")
def windows(shards_folder: Path) -> Windows:
    return Windows(Shards.open(shards_folder), "train", 16)


@pytest.fixture
def uneven() -> Rows:
    """Four rows with 16, 15, 9 and 2 targets: a document's start, and padding, are no targets."""
    rows = torch.randint(108, 700, (4, 17))
    rows[1, 5] = BOS
    rows[2, 10:] = PAD
    rows[3, 2:] = PAD
    rows[3, 2] = EOS
    return Rows(rows)


def fresh(tiny: GemmaConfig) -> Gemma:
    torch.manual_seed(1)
    return Gemma(tiny.but(init_std=0.2))


def go(
    model: Gemma,
    rows: Windows,
    config: TrainConfig,
    folder: Path,
    loss: Any = next_token,
    validate: Any = None,
) -> list[dict[str, Any]]:
    """Train in a folder; the rows of its metrics."""
    folder.mkdir(exist_ok=True)
    train(
        model,
        loss,
        batches_of(rows, config),
        config,
        RunFolder(folder),
        validate or (lambda model: {"validation": 1.0}),
    )
    return read_metrics(folder)


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


def poisoned(step: int, value: float):
    """The loss of next tokens, but at one update times `value`."""
    count = 0

    def loss(model: Gemma, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        nonlocal count
        count += 1
        total, metrics = next_token(model, batch)
        return (total * value if count == step else total), metrics

    return loss


@pytest.mark.parametrize("portion", [1, 2])
def test_portions_of_a_batch_with_unequal_targets_make_the_same_step(
    uneven: Rows, tiny: GemmaConfig, tmp_path: Path, portion: int
):
    """Normalised by the targets of the whole step: an average of averages is off by per cents here."""
    whole, parts = fresh(tiny), fresh(tiny)
    (a,) = go(whole, uneven, ONE_STEP, tmp_path / "whole")
    (b,) = go(parts, uneven, ONE_STEP.but(micro_batch_size=portion), tmp_path / "parts")
    assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_the_loss_of_a_step_is_the_mean_over_its_targets(uneven: Rows, tiny: GemmaConfig, tmp_path: Path):
    model = fresh(tiny)
    batch = make_batch(uneven.rows, BOS)
    with torch.no_grad():
        logits = model(batch.ids, batch.places).flatten(0, 1)
    tokens = divergence.cross_entropy(logits, batch.targets.flatten())[batch.weights.flatten() == 1]
    assert len(tokens) == 16 + 15 + 9 + 2
    (row,) = go(model, uneven, ONE_STEP.but(micro_batch_size=1), tmp_path / "run")
    assert row["loss"] == pytest.approx(float(tokens.mean()), abs=1e-5)


def test_metrics_of_the_loss_are_means_over_targets_too(uneven: Rows, tiny: GemmaConfig, tmp_path: Path):
    def loss(model: Gemma, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        total, _ = next_token(model, batch)
        return total, {"targets": 3.0 * float(batch.weights.sum())}

    (row,) = go(fresh(tiny), uneven, ONE_STEP.but(micro_batch_size=1), tmp_path / "run", loss)
    assert row["targets"] == pytest.approx(3.0)


def test_padding_and_a_documents_start_are_not_predicted(uneven: Rows):
    batch = make_batch(uneven.rows, BOS)
    assert batch.weights.sum(1).tolist() == [16, 15, 9, 2]
    assert torch.equal(batch.targets, uneven.rows[:, 1:])
    assert not batch.weights[(batch.targets == BOS) | (batch.targets == PAD)].any()
    assert batch.places.document[1].unique().numel() == 2


@pytest.mark.parametrize("portion", [None, 2])
def test_a_batch_knows_which_windows_it_holds(
    windows: Windows, tiny: GemmaConfig, tmp_path: Path, portion: int | None
):
    seen: list[Batch] = []

    def loss(model: Gemma, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        seen.append(batch)
        return next_token(model, batch)

    go(fresh(tiny), windows, CONFIG.but(steps=2, micro_batch_size=portion), tmp_path / "run", loss)
    numbers = [batch.numbers for batch in seen if batch.numbers is not None]
    assert [len(few) for few in numbers] == [portion or 4] * (2 * 4 // (portion or 4))
    assert np.array_equal(np.concatenate(numbers), np.concatenate([windows.numbers(s, 4) for s in (0, 1)]))
    for batch, few in zip(seen, numbers, strict=True):
        assert torch.equal(batch.ids, windows.take(few)[:, :-1])
        assert torch.equal(batch.targets, windows.take(few)[:, 1:])


def test_a_batch_made_by_hand_has_no_numbers(uneven: Rows):
    assert make_batch(uneven.rows, BOS).numbers is None


def test_a_step_without_any_target_changes_nothing_but_the_decay(tiny: GemmaConfig, tmp_path: Path):
    model = fresh(tiny)
    before = [p.detach().clone() for p in model.parameters()]
    padding = Rows(torch.zeros(2, 17, dtype=torch.long))
    (row,) = go(model, padding, ONE_STEP.but(**{"optim.weight_decay": 0.0}), tmp_path / "run")
    assert (row["loss"], row["grad_norm"]) == (0.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_run_learns(windows: Windows, tiny: GemmaConfig, tmp_path: Path):
    config = CONFIG.but(steps=40, batch_size=8, save_every=100, **{"optim.lr": 2e-2})
    curve = losses(go(Gemma(tiny), windows, config, tmp_path / "run"))
    assert curve[0] > math.log(700) - 0.5, "it was to begin with knowing nothing"
    assert sum(curve[-5:]) / 5 < math.log(700) - 2.0


def test_bf16_runs_and_its_loss_is_near_that_of_fp32(windows: Windows, tiny: GemmaConfig, tmp_path: Path):
    wide = losses(go(fresh(tiny), windows, CONFIG, tmp_path / "fp32"))
    model = fresh(tiny)
    narrow = losses(go(model, windows, CONFIG.but(precision="bf16"), tmp_path / "bf16"))
    assert narrow == pytest.approx(wide, rel=2e-2)
    assert narrow != wide, "bf16 was to be used"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_every_update_leaves_a_row_with_its_rate_and_norm(
    windows: Windows, tiny: GemmaConfig, tmp_path: Path
):
    rows = go(fresh(tiny), windows, CONFIG, tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in rows[:3]] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert all(row["grad_norm"] > 0 and row["elapsed_s"] > 0 for row in rows)


def test_validation_comes_when_it_is_due_and_at_the_end(windows: Windows, tiny: GemmaConfig, tmp_path: Path):
    values = iter([3.0, 2.0, 1.0])
    rows = go(
        fresh(tiny), windows, CONFIG.but(steps=5, validate_every=2), tmp_path / "run",
        validate=lambda model: {"validation": next(values)},
    )  # fmt: skip
    assert {row["step"]: row["validation"] for row in rows if "validation" in row} == {2: 3.0, 4: 2.0, 5: 1.0}


def test_the_last_validation_is_what_comes_back(windows: Windows, tiny: GemmaConfig, tmp_path: Path):
    validations = iter([{"validation": 3.0}, {"validation": 2.0}])
    folder = RunFolder(tmp_path)
    last = train(
        fresh(tiny), next_token, batches_of(windows, CONFIG), CONFIG, folder, lambda model: next(validations)
    )
    assert last == {"validation": 2.0}


def test_the_gradient_is_clipped_to_the_chosen_norm(uneven: Rows, tiny: GemmaConfig, tmp_path: Path):
    """Halving a clip that bites changes the step; one that does not bite is as good as none."""

    def weights(clip: float) -> Tensor:
        model = fresh(tiny)
        config = ONE_STEP.but(**{"optim.clip": clip, "optim.eps": 1.0})
        (row,) = go(model, uneven, config, tmp_path / str(clip))
        assert 0.2 < row["grad_norm"] < 100, "the reported norm is the one before clipping"
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(100.0), weights(1e6))
    assert not torch.allclose(weights(0.1), weights(100.0), atol=1e-7, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_and_says_where_and_what_to_do(
    windows: Windows, tiny: GemmaConfig, tmp_path: Path, value: float
):
    with pytest.raises(NonFiniteError) as caught:
        go(fresh(tiny), windows, CONFIG, tmp_path / "run", poisoned(4, value))
    state = tmp_path / "run/resume/step-000003"
    assert f"the loss of update 4 is {value}" in str(caught.value)
    assert all(part in str(caught.value) for part in (str(state), "optim.lr (now 0.001)", "--fresh"))
    assert state.is_dir()


def test_a_bad_loss_does_not_reach_the_weights(windows: Windows, tiny: GemmaConfig, tmp_path: Path):
    good = fresh(tiny)
    go(good, windows, CONFIG.but(steps=3, **{"optim.min_lr_ratio": 1.0}), tmp_path / "good")
    model = fresh(tiny)
    with pytest.raises(NonFiniteError):
        go(model, windows, CONFIG.but(**{"optim.min_lr_ratio": 1.0}), tmp_path / "bad", poisoned(4, math.nan))
    saved = checkpoint.load(tmp_path / "bad/resume/step-000003")
    for expected, held, kept in zip(good.parameters(), model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(expected, held)
        assert torch.equal(expected, kept)


def test_the_steps_before_a_bad_loss_keep_their_rows(windows: Windows, tiny: GemmaConfig, tmp_path: Path):
    with pytest.raises(NonFiniteError):
        go(fresh(tiny), windows, CONFIG, tmp_path / "run", poisoned(4, math.nan))
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(loss) for loss in losses(rows))


def test_a_bad_first_loss_keeps_the_weights_it_began_with(
    windows: Windows, tiny: GemmaConfig, tmp_path: Path
):
    with pytest.raises(NonFiniteError, match="update 1 "):
        go(fresh(tiny), windows, CONFIG, tmp_path / "run", poisoned(1, math.nan))
    saved = checkpoint.load(tmp_path / "run/resume/step-000000")
    for kept, begun in zip(saved.parameters(), fresh(tiny).parameters(), strict=True):
        assert torch.equal(kept, begun)


def test_an_interrupted_run_goes_on_to_the_same_bits(windows: Windows, tiny: GemmaConfig, tmp_path: Path):
    def interrupt(model: Gemma) -> dict[str, float]:
        raise Interrupted

    whole, config = fresh(tiny), CONFIG.but(steps=8, micro_batch_size=2, validate_every=5)
    expected = go(whole, windows, config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(fresh(tiny), windows, config, tmp_path / "run", validate=interrupt)
    assert [path.name for path in (tmp_path / "run/resume").iterdir()] == ["step-000004"]
    torch.manual_seed(99)
    resumed = Gemma(tiny)  # whatever it begins with, the saved state replaces it
    rows = go(resumed, windows, config, tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert losses(rows) == losses(expected)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_that_was_finished_but_for_its_end_is_only_validated(
    windows: Windows, tiny: GemmaConfig, tmp_path: Path
):
    go(fresh(tiny), windows, CONFIG, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    last = train(
        Gemma(tiny),
        poisoned(1, math.nan),
        batches_of(windows, CONFIG),
        CONFIG,
        folder,
        lambda model: {"a": 7.0},
    )
    assert last == {"a": 7.0}
    assert len(read_metrics(tmp_path / "run")) == 6


def test_a_batch_that_does_not_divide_into_portions_is_refused():
    with pytest.raises(ValueError, match=r"batch_size=6 is not a multiple of micro_batch_size=4"):
        TrainConfig.parse({"steps": 1, "batch_size": 6, "seq_len": 8, "micro_batch_size": 4})


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"seq_len": 1}, {"save_every": 0}, {"precision": "fp16"}])
def test_a_setting_that_makes_no_sense_is_refused_by_name(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=f"TrainConfig: {next(iter(wrong))}: "):
        CONFIG.but(**wrong)
