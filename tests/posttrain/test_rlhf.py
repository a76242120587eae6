"""RLHF: the gradient is REINFORCE's, the optimum is the known one, and what goes wrong says so."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemwright.generate.rollout import in_order
from gemwright.model import checkpoint
from gemwright.model.gemma import Gemma, RewardModel
from gemwright.posttrain import rlhf
from gemwright.posttrain.drawn import PromptOrder
from gemwright.posttrain.rlhf import CollapsedError, RlhfConfig, advantages, run
from gemwright.reward.scoring import scores
from gemwright.run import read_card, read_metrics
from gemwright.tokenizer.chat import encode_prompt
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.train.loop import NonFiniteError
from gemwright.train.teacher import next_token
from tests.posttrain.killed import kill

CONFIG = RlhfConfig.parse(
    {
        "train": {
            "steps": 4, "batch_size": 3, "seq_len": 63, "compile": False, "validate_every": 2,
            "save_every": 1, "optim": {"lr": 3e-3, "warmup_steps": 1},
        },
        "samples": 3, "beta": 0.2, "mu": 0.1,
        "sampling": {"temperature": 1.0, "max_tokens": 8, "seed": 3},
    }
)  # fmt: skip


def test_an_advantage_is_what_a_reply_has_over_the_mean_of_the_others():
    rewards = np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
    assert advantages(rewards).tolist() == pytest.approx(np.array([[-3, -1.5, 4.5], [0, 0, 0]]))


def test_leave_one_out_is_unbiased_on_a_bandit_and_steadier_than_no_baseline():
    """A softmax policy over four arms: the gradient of its mean reward is known."""
    logits, value = torch.tensor([0.2, -0.4, 0.9, 0.0]), torch.tensor([3.0, 1.0, 2.0, 7.0])
    p = logits.softmax(-1)
    exact = p * (value - p @ value)
    draws = torch.multinomial(p, 4 * 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    arms = draws.view(-1, 4)
    gains = torch.from_numpy(advantages(value[arms].double().numpy()))
    score = torch.nn.functional.one_hot(arms, 4).double() - p.double()
    ours, plain = ((w[..., None] * score).mean(1) for w in (gains, value[arms].double()))
    error = ours.std(0) / math.sqrt(len(ours))
    assert ((ours.mean(0) - exact).abs() < 4 * error).all()
    assert ours.var(0).sum() < 0.5 * plain.var(0).sum()


def opened(judge: Path, student: Path, prompts: Path, config: RlhfConfig = CONFIG) -> tuple[Any, PromptOrder]:
    tokenizer, asked = rlhf.opened(config, student, judge, prompts, None)
    return rlhf._Run(config, student, judge, None, student, tokenizer), asked


def test_the_gradient_is_reinforces_with_the_distance_inside_the_reward(
    student: Path, judge: Path, prompts: Path
):
    """Made anew from the rollouts, a sequence at a time, with an anchor that is not the policy."""
    config = CONFIG.but(mu=0.0, length_penalty=0.05)
    one, asked = opened(judge, student, prompts, config)
    with torch.no_grad():
        for parameter in one.anchor.parameters():
            parameter.mul_(0.9)
    parts = one.batches(0, asked)
    count = sum(part.count for part in parts)
    assert count == 9
    for part in parts:
        (next_token(one.policy, part)[0] / count).backward()
    other = checkpoint.load(student, dtype=torch.float32)
    asked_for = [(n * 3 + k, turns) for n, turns in asked.batch(0, 3) for k in range(3)]
    drawn = in_order(other, one.tokenizer, asked_for, config.sampling, 32)
    rewards = scores(one.judges["reward"], [d.ids for d in drawn]).tolist()
    log_p, returns = [], []
    for rollout, reward in zip(drawn, rewards, strict=True):
        ids, own = torch.tensor([rollout.ids]), torch.tensor(rollout.chosen[1:])
        mine, its = (
            m(ids)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0][own].sum()
            for m in (other, one.anchor)
        )
        log_p.append(mine)
        returns.append(reward - 0.2 * float(mine.detach() - its) - 0.05 * int(own.sum()))
    gains = torch.from_numpy(advantages(np.array(returns).reshape(3, 3)).flatten()).float()
    (-(gains * torch.stack(log_p)).sum() / 9).backward()
    for mine, its in zip(one.policy.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, atol=2e-4, rtol=2e-3)


def test_a_tiny_task_ends_at_its_known_optimum(
    student: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One token a reply, and one token that is worth 1. Under a KL of weight beta the best policy has odds of
    e^(1 / beta) times what they were on it: neither the start nor all that the reward asks for."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def f():\n")

    def likely(folder: Path) -> torch.Tensor:
        model, tokenizer = checkpoint.load(folder), Tokenizer.load(folder)
        ids = encode_prompt(tokenizer, [{"role": "user", "content": "def f():"}])
        with torch.no_grad():
            return model(torch.tensor([ids]))[0, -1].softmax(-1)

    start = likely(student)
    token = int(start.topk(2).indices[1])
    before = float(start[token])
    monkeypatch.setattr(
        rlhf, "scores", lambda _, texts: torch.tensor([float(ids[-1] == token) for ids in texts])
    )
    monkeypatch.setattr(rlhf, "_EMPTY", 1.0)  # many tokens of a random model are blanks
    config = CONFIG.but(
        **{
            "beta": 0.25, "mu": 0.0, "samples": 16, "sampling.max_tokens": 1, "train.steps": 40,
            "train.batch_size": 2, "train.optim.lr": 4e-3, "train.save_every": 40,
            "train.validate_every": 40, "train.optim.weight_decay": 0.0, "train.optim.min_lr_ratio": 0.02,
        }
    )  # fmt: skip
    run(config, tmp_path / "out", student, judge, prompts)
    best = before * math.exp(4) / (before * math.exp(4) + 1 - before)
    after = float(likely(tmp_path / "out")[token])
    assert after == pytest.approx(best, abs=0.08)


def test_the_anchor_is_a_moving_average_of_the_policy(student: Path, judge: Path, prompts: Path):
    one, asked = opened(judge, student, prompts)
    start = [parameter.clone() for parameter in one.anchor.parameters()]
    one.batches(0, asked)
    assert all(torch.equal(a, b) for a, b in zip(start, one.anchor.parameters(), strict=True))
    with torch.no_grad():
        one.policy.unembedding.add_(1.0)
    one.batches(1, asked)
    torch.testing.assert_close(one.anchor.unembedding, start[0] + 0.1)


def test_curves_and_a_page_tell_reward_distance_entropy_and_length(
    student: Path, judge: Path, prompts: Path, tmp_path: Path
):
    card = run(CONFIG, tmp_path / "out", student, judge, prompts, watch=judge)
    rows = read_metrics(tmp_path / "out")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert {"reward", "kl", "entropy", "tokens", "finished"} <= set(rows[1])
    assert card.results["before"]["kl"] == pytest.approx(0, abs=1e-6)
    assert card.results["after"]["kl"] > 0
    assert card.results["after"]["watched_reward"] == card.results["after"]["reward"]
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert all(word in page for word in ("watched_reward", "entropy", "tokens a reply"))
    assert card.results["best_watched"] in (0, 2, 4)


def test_a_reward_that_is_no_number_stops_the_run_and_keeps_what_was_saved(
    student: Path, judge: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def broken(model: RewardModel, texts: Any) -> torch.Tensor:
        calls.append(1)
        return scores(model, texts) * (math.nan if len(calls) > 2 else 1.0)

    monkeypatch.setattr(rlhf, "scores", broken)
    with pytest.raises(NonFiniteError, match=r"the reward of a reply in update 3 .* Check the reward model"):
        run(CONFIG, tmp_path / "out", student, judge, prompts)
    assert (tmp_path / "out/resume/step-000002/model.safetensors").exists()
    monkeypatch.setattr(rlhf, "scores", scores)
    assert run(CONFIG, tmp_path / "out", student, judge, prompts).finished
    run(CONFIG, tmp_path / "whole", student, judge, prompts)
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_a_policy_that_says_nothing_any_more_stops_the_run(
    student: Path, judge: Path, prompts: Path, tmp_path: Path
):
    """Every token ends a reply, so all are empty."""
    silent = CONFIG.but(**{"sampling.stop_ids": tuple(range(700))})
    with pytest.raises(CollapsedError, match=r"100% of the replies of update 1 are empty.* Raise beta"):
        run(silent, tmp_path / "out", student, judge, prompts)


def test_a_language_model_is_no_reward_model(student: Path, prompts: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"is a language model, and has no score\. `gemwright reward`"):
        run(CONFIG, tmp_path / "out", student, student, prompts)
    assert not (tmp_path / "out").exists()


def test_a_reward_model_of_another_tokenizer_is_refused(
    student: Path, judge: Path, prompts: Path, tmp_path: Path, text_folder: Path
):
    from gemwright.tokenizer.train import TokenizerConfig, train

    texts = (path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir()))
    other = tmp_path / "judge"
    checkpoint.save(checkpoint.load_reward(judge), other)
    Tokenizer(train(texts, TokenizerConfig(vocab_size=650))).save(other)
    with pytest.raises(ValueError, match=r"the reward model .* has another tokenizer"):
        run(CONFIG, tmp_path / "out", student, other, prompts)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits_its_moving_anchor_too(
    student: Path, judge: Path, prompts: Path, tmp_path: Path
):
    config = CONFIG.but(**{"train.steps": 10, "train.validate_every": 10, "mu": 0.3, "beta": 1.0})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(config, whole, student, judge, prompts)
    kill("rlhf", config, killed, student, judge, prompts, when=lambda: len(read_metrics(killed)) >= 5)
    assert not read_card(killed).finished
    run(config, killed, student, judge, prompts)
    assert [row["step"] for row in read_metrics(killed)] == list(range(11))
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_validation_leaves_the_policy_as_it_is(student: Path, judge: Path, prompts: Path):
    one, asked = opened(judge, student, prompts)
    before = one.validate(one.policy, asked.held_back or [("def f():",)])
    assert before == one.validate(one.policy, asked.held_back or [("def f():",)])
    assert isinstance(one.policy, Gemma)
