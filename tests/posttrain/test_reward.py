"""The reward model: Bradley and Terry's loss, a head that begins as a probe, and runs that learn."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma, RewardModel
from gemwright.posttrain import reward as stage
from gemwright.posttrain.reward import RewardConfig, linear_probe, measured, pair_batch, preference, run
from gemwright.reward.pairs import Pair, read_pairs
from gemwright.reward.scoring import states
from gemwright.run import read_card, read_metrics
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.train import resume
from gemwright.train.optim import adamw
from tests.posttrain.killed import kill

CONFIG = RewardConfig.parse(
    {
        "train": {
            "steps": 12, "batch_size": 8, "seq_len": 48, "compile": False, "validate_every": 6,
            "save_every": 1, "optim": {"lr": 3e-3, "warmup_steps": 1},
        },
        "pairs": {"held_back": 3},
    }
)  # fmt: skip
AVERAGE = CONFIG.but(**{"average": 3, "train.steps": 7, "train.batch_size": 4})


def written(path: Path, count: int, first: int = 0) -> Path:
    """Pairs whose truth is plain: the better reply has `return` where the worse one has `else`."""
    draw, words = random.Random(5 + first), ["if", "not", "in", "is", "def", "class", "for", "while"]
    rows = []
    for number in range(first, first + count):
        before, after = (draw.choices(words, k=2) for _ in range(2))
        sides = [" ".join([*before, word, *after]) for word in ("return", "else")]
        rows.append({"prompt": f"say {number}", "chosen": sides[0], "rejected": sides[1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 150)


@pytest.fixture(scope="module")
def made(student: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of a whole run."""
    folder = tmp_path_factory.mktemp("made") / "reward"
    run(CONFIG, folder, student, preferences)
    return folder


@pytest.fixture(scope="module")
def averaged(student: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models averaged."""
    folder = tmp_path_factory.mktemp("averaged") / "reward"
    run(AVERAGE, folder, student, preferences)
    return folder


def judge(config: GemmaConfig) -> RewardModel:
    torch.manual_seed(4)
    model = RewardModel(config.but(init_std=0.5))
    with torch.no_grad():
        model.score.weight.normal_(std=0.3)
    return model


def drawn_pairs(count: int, longest: int = 40) -> list[Pair]:
    draw = random.Random(count)

    def text() -> tuple[int, ...]:
        return (2, *(draw.randrange(110, 700) for _ in range(draw.randint(3, longest - 1))))

    return [Pair(text(), text()) for _ in range(count)]


# The loss.


def naive(model: RewardModel, pairs: list[Pair]) -> tuple[Tensor, int]:
    """-log sigma of the difference, each conversation read by itself; and how many are ranked rightly."""
    loss, right = torch.zeros(()), 0
    for pair in pairs:
        one, other = (model.hidden(torch.tensor([side]))[0, -1] @ model.score.weight[0] for side in pair)
        loss = loss - torch.log(torch.sigmoid(one - other))
        right += bool(one > other)
    return loss, right


@pytest.mark.parametrize("seq_len", [40, 64])
def test_the_loss_and_its_gradient_are_bradley_and_terrys_on_conversations_read_alone(
    tiny: GemmaConfig, seq_len: int
):
    pairs, one, other = drawn_pairs(7), judge(tiny), judge(tiny)
    batch = pair_batch(pairs, seq_len)
    assert len(batch.ids) < 14
    assert float(batch.weights.sum()) == 7
    loss, metrics = preference(one, batch)
    expected, right = naive(other, pairs)
    loss.backward()
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert metrics == {"accuracy": right}
    assert 0 < right < 7
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert ours.grad is not None, name
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_micro_batches_add_up_to_the_batch(tiny: GemmaConfig):
    pairs, model = drawn_pairs(6), judge(tiny)
    whole = float(preference(model, pair_batch(pairs, 48))[0])
    parts = sum(float(preference(model, pair_batch(pairs[n : n + 2], 48))[0]) for n in (0, 2, 4))
    assert whole == pytest.approx(parts, rel=1e-4)


@torch.no_grad()
def test_turned_round_a_pair_gives_the_same_difference_with_the_other_sign(tiny: GemmaConfig):
    model, pairs = judge(tiny), drawn_pairs(1)
    one, other = (
        float(preference(model, pair_batch(few, 48))[0])
        for few in (pairs, [Pair(pairs[0].rejected, pairs[0].chosen)])
    )
    assert torch.tensor([-one, -other]).exp().sum() == pytest.approx(1.0, abs=1e-5)


# The head's beginning.


def test_the_probe_is_at_its_optimum(student: Path, preferences: Path):
    """The gradient of the loss with its ridge, by the formula, is next to nothing there."""
    model = RewardModel.of(checkpoint.load(student))
    pairs = read_pairs(preferences, Tokenizer.load(student), 48, CONFIG.pairs).train
    weight = linear_probe(model, pairs)[0].double()
    one, other = (states(model, side).double() for side in zip(*pairs, strict=True))
    apart = one - other

    def gradient(weight: Tensor) -> Tensor:
        return -(torch.sigmoid(-apart @ weight) @ apart) / len(apart) + stage._RIDGE * weight

    assert gradient(weight).norm() < 1e-3 * gradient(torch.zeros_like(weight)).norm()


def test_the_probe_ranks_what_a_plane_separates(tiny: GemmaConfig, monkeypatch: pytest.MonkeyPatch):
    direction, generator = torch.randn(32), torch.Generator().manual_seed(3)
    points = torch.randn(60, 2, 32, generator=generator)
    points = points.gather(1, (points @ direction).argsort(1, descending=True)[..., None].expand(-1, -1, 32))
    monkeypatch.setattr(stage, "states", lambda model, texts: points.flatten(0, 1))
    model = judge(tiny)
    weight = linear_probe(model, drawn_pairs(60))
    assert weight.shape == model.score.weight.shape
    assert ((points[:, 0] - points[:, 1]) @ weight[0] > 0).all()


def test_the_probe_leaves_the_model_as_it_is(tiny: GemmaConfig):
    model, same = judge(tiny), judge(tiny).state_dict()
    linear_probe(model, drawn_pairs(5))
    assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# What is measured.


def test_accuracy_counts_ties_half_and_has_an_interval(tiny: GemmaConfig):
    model, pairs = judge(tiny), drawn_pairs(40)
    found = measured(model, pairs)
    loss, right = naive(model, pairs)
    assert found["accuracy"] == right / 40
    assert found["validation"] == pytest.approx(float(loss.detach()) / 40, rel=1e-4)
    assert 0 <= found["accuracy_low"] < found["accuracy"] < found["accuracy_high"] <= 1
    with torch.no_grad():
        model.score.weight.zero_()
    assert measured(model, pairs)["accuracy"] == 0.5
    assert measured(model, []) == {}


# Runs.


def test_a_run_learns_a_plain_preference_and_its_card_tells(made: Path):
    card = read_card(made)
    found = card.results
    assert found["validation"] < 0.8 * found["validation_before"]
    assert found["accuracy"] >= max(0.9, found["accuracy_before"])
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
    assert found["trained_on"] + found["measured_on"] == 150 == found["pairs"] + found["held_back"]
    assert found["epochs"] == pytest.approx(12 * 8 / found["trained_on"], abs=1e-3)
    assert set(card.inputs) == {"model", "pairs"}
    rows = read_metrics(made)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["validation"] == pytest.approx(found["validation"])
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


def test_from_a_head_of_nothing_accuracy_on_held_back_pairs_rises(
    student: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stage, "linear_probe", lambda model, pairs: torch.zeros(1, 32))
    found = run(
        CONFIG.but(**{"train.steps": 15, "train.optim.lr": 1e-2}), tmp_path / "out", student, preferences
    ).results
    assert found["accuracy_before"] == 0.5
    assert found["accuracy_low"] > 0.7


def test_other_pairs_may_be_held_out_and_epochs_decide_the_steps(
    student: Path, preferences: Path, tmp_path: Path
):
    others = written(tmp_path / "others.jsonl", 20, first=1000)
    card = run(CONFIG, tmp_path / "out", student, preferences, held_out=others, epochs=0.1)
    assert (card.results["trained_on"], card.results["measured_on"]) == (150, 20)
    assert card.config["train"]["steps"] == 2
    assert set(card.inputs) == {"model", "pairs", "held_out"}


def test_what_does_not_fit_is_refused_before_anything_is_made(
    student: Path, preferences: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match="seq_len=65 exceeds max_seq_len=64"):
        run(CONFIG.but(**{"train.seq_len": 65}), tmp_path / "out", student, preferences)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        run(CONFIG, tmp_path / "out", student, tmp_path / "nowhere.jsonl")
    assert not (tmp_path / "out").exists()


# What it leaves.


def test_a_reward_model_loads_as_one_and_is_refused_as_a_language_model(made: Path, student: Path):
    assert checkpoint.load_kind(made) is RewardModel
    model = checkpoint.load_reward(made)
    assert model.score.weight.abs().sum() > 0
    with pytest.raises(ValueError, match=r"is a reward model: it scores text, .* Name a language model"):
        checkpoint.load(made)
    assert checkpoint.load_kind(student) is Gemma
    with pytest.raises(ValueError, match=r"has no scalar head\. `gemwright reward` makes one"):
        checkpoint.load_reward(student)
    assert Tokenizer.load(made).sha256 == Tokenizer.load(student).sha256


def test_a_saved_state_holds_the_head_and_its_moments(tiny: GemmaConfig, tmp_path: Path):
    model = judge(tiny)
    optimizer = adamw(model, CONFIG.train.optim)
    preference(model, pair_batch(drawn_pairs(2), 48))[0].backward()
    optimizer.step()
    resume.save_state(tmp_path, 1, model, optimizer)
    other = RewardModel(tiny)
    again = adamw(other, CONFIG.train.optim)
    assert resume.load_state(tmp_path, other, again) == 1
    assert torch.equal(other.score.weight, model.score.weight)
    moments = [one.state[two.score.weight] for one, two in ((optimizer, model), (again, other))]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])
    assert moments[1]["exp_avg"].abs().sum() > 0


def members(folder: Path) -> list[Path]:
    return [folder / "members" / str(number) for number in range(3)]


def test_an_average_is_its_members_mean_bit_by_bit(averaged: Path):
    """In fp32, from the first of them on: near the exact mean, and by the formula without a difference."""
    first, *others = (load_file(one / "model.safetensors") for one in members(averaged))
    mean = load_file(averaged / "model.safetensors")
    assert "score.weight" in mean
    for name, tensor in mean.items():
        made = first[name].clone()
        for other in others:
            made.sub_(first[name] - other[name], alpha=1 / 3)
        assert torch.equal(tensor, made), name
        exact = torch.stack([one[name].double() for one in (first, *others)]).mean(0)
        torch.testing.assert_close(tensor.double(), exact, atol=1e-6, rtol=1e-5)
    assert not torch.equal(first["score.weight"], others[0]["score.weight"])


def test_members_differ_in_order_and_rate_and_the_card_tells_how_good_each_is(
    averaged: Path, student: Path, preferences: Path
):
    card, cards = read_card(averaged), [read_card(one) for one in members(averaged)]
    assert [one.config["train"]["optim"]["lr"] for one in cards] == [3e-3, 1.5e-3, 6e-3]
    assert [one.config["train"]["seed"] for one in cards] == [0, 1, 2]
    told = card.results["members"]
    assert [one["accuracy"] for one in told] == [one.results["accuracy"] for one in cards]
    found = read_pairs(preferences, Tokenizer.load(student), 48, CONFIG.pairs).held_back
    own = measured(checkpoint.load_reward(averaged), found)
    assert own.items() <= card.results.items()


@pytest.mark.slow
def test_killed_at_its_second_member_an_average_goes_on_to_the_same_bits_and_cards(
    student: Path, preferences: Path, averaged: Path, tmp_path: Path
):
    """The member that was done stays as it is, and the one that was not goes on from its state."""
    out = tmp_path / "out"
    first, second, _ = members(out)
    kill("reward", AVERAGE, out, student, preferences, when=lambda: len(read_metrics(second)) >= 2)
    done = (first / "card.json").read_bytes()
    assert not read_card(second).finished
    assert not read_card(out).finished
    run(AVERAGE, out, student, preferences)
    assert (first / "card.json").read_bytes() == done
    assert [row["step"] for row in read_metrics(second)] == list(range(1, 8))
    for one, other in zip([out, *members(out)], [averaged, *members(averaged)], strict=True):
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
        assert read_card(one).results == read_card(other).results
        assert not (one / "resume").exists()
