"""Scores and distances of many conversations at once are those that naive code finds, one after the other."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gemwright.generate.rollout import Reply, Rollout, in_order
from gemwright.generate.sampling import Sampling
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma, RewardModel
from gemwright.reward import scoring
from gemwright.reward.scoring import log_ratios, measure, scores, shape, states
from gemwright.tokenizer.tokenizer import Tokenizer

DRAW = Sampling(temperature=1.0, max_tokens=9, seed=4)
PROMPTS = [["def f1():"], ["say why", "and then"], ["x"], ["return"]]


def drawn(model: Gemma, seed: int) -> None:
    """Other norms, and another head."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif name == "score.weight":
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def judge(tiny: GemmaConfig) -> RewardModel:
    """With matrices of deviation 1, so that caps bend its scores of attention."""
    torch.manual_seed(3)
    model = RewardModel(tiny.but(init_std=1.0))
    drawn(model, 3)
    return model


@pytest.fixture
def policies(tiny: GemmaConfig) -> tuple[Gemma, Gemma]:
    """A policy, and an anchor a step away from it."""
    torch.manual_seed(1)
    policy, anchor = Gemma(tiny.but(init_std=0.3)), Gemma(tiny.but(init_std=0.3))
    drawn(policy, 1)
    with torch.no_grad():
        for one, other in zip(anchor.parameters(), policy.parameters(), strict=True):
            one.copy_(other + 0.05 * torch.randn(other.shape))
    return policy, anchor


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def texts(count: int, longest: int = 60) -> list[list[int]]:
    draw = random.Random(count)
    return [
        [2, *(draw.randrange(110, 700) for _ in range(draw.randint(1, longest - 1)))] for _ in range(count)
    ]


@torch.no_grad()
def alone(model: RewardModel, ids: Sequence[int]) -> float:
    """The score of one conversation, by itself in a row, with no place told."""
    return float(model.hidden(torch.tensor([list(ids)]))[0, -1] @ model.score.weight[0])


# Scores.


@pytest.mark.parametrize("tokens", [100, 8192])
def test_scores_equal_those_of_conversations_read_alone(
    judge: RewardModel, monkeypatch: pytest.MonkeyPatch, tokens: int
):
    """However many are read at a time; most are longer than several windows."""
    monkeypatch.setattr(scoring, "_TOKENS", tokens)
    many = texts(18)
    assert sum(len(one) > 2 * judge.config.window for one in many) > 9
    expected = torch.tensor([alone(judge, one) for one in many])
    assert expected.std() > 1
    torch.testing.assert_close(scores(judge, many), expected, atol=2e-4, rtol=0)


def test_a_score_is_about_the_last_ids_and_not_about_a_neighbour(judge: RewardModel):
    """The last id and those before it change a score; a conversation in the same row does not."""
    one, other, third = texts(3, 20)
    first = scores(judge, [one, other])
    assert scores(judge, [one, third])[0] == pytest.approx(float(first[0]), abs=2e-4)
    away = []
    for place in range(1, len(other)):
        changed = [*other[:place], 810 - other[place], *other[place + 1 :]]
        away.append(abs(float(scores(judge, [one, changed])[1] - first[1])))
    assert away[-1] > 0.1
    assert max(away[:-1]) > 0.1


def test_a_bos_that_a_policy_drew_does_not_hide_what_stands_before_it(judge: RewardModel):
    text = texts(1, 30)[0]
    with_bos = [*text[:6], 2, *text[6:]]
    others = texts(5, 30)
    assert float(scores(judge, [with_bos, *others])[0]) == pytest.approx(alone(judge, with_bos), abs=2e-4)


def test_no_conversations_have_no_scores(judge: RewardModel):
    assert scores(judge, []).shape == (0,)


def test_a_conversation_beyond_the_context_is_refused(judge: RewardModel):
    assert scores(judge, [[2, *range(110, 173)]]).isfinite().all()
    with pytest.raises(
        ValueError, match=r"has 65 tokens, and the reward model's context 64\. Lower max_tokens"
    ):
        states(judge, [[2, 110], [2, *range(110, 174)]])


# How far a policy has gone.


@torch.no_grad()
def naive(model: Gemma, anchor: Gemma, one: Rollout) -> tuple[float, float, float]:
    """Ratio, KL and entropy of a conversation, by softmax on whole logits in fp64, token by token."""
    ids = torch.tensor([one.ids])
    p, q = (each(ids)[0].double().softmax(-1) for each in (model, anchor))
    ratio = kl = entropy = 0.0
    for place in (place for place, own in enumerate(one.chosen) if own):
        own, its, id = p[place - 1], q[place - 1], one.ids[place]
        ratio += float(own[id].log() - its[id].log())
        kl += float((own * (own / its).log()).sum())
        entropy -= float((own * own.log()).sum())
    return ratio, kl, entropy / max(1, sum(one.chosen))


@pytest.mark.parametrize(("batch", "room"), [(1, 64 << 20), (3, 4 * 700 * 2), (32, 64 << 20)])
def test_log_ratios_equal_naive_ones(
    policies: tuple[Gemma, Gemma],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    room: int,
):
    """Of conversations of one turn and of two, cut or ended, however few logits fit into memory."""
    monkeypatch.setattr(scoring, "_CHUNK_BYTES", room)
    asked = list(enumerate(PROMPTS * 3))
    rolled = in_order(policies[0], tokenizer, asked, DRAW, 4)
    rolled.append(
        Rollout(("a",), (Reply("", (), "stop"),), (2, 300, 107, 1), (False,) * 2 + (True,) * 2, True)
    )
    found = log_ratios(*policies, rolled, batch)
    expected = np.array([naive(*policies, one) for one in rolled]).T
    for name, values in zip(("log_ratio", "kl", "entropy"), expected, strict=True):
        np.testing.assert_allclose(found[name], values, atol=1e-4, rtol=1e-4)
    assert found["length"].tolist() == [sum(one.chosen) for one in rolled]
    assert found["length"][-1] == 1
    assert found["kl"].min() > 1e-3


def test_a_policy_is_at_no_distance_from_itself(policies: tuple[Gemma, Gemma], tokenizer: Tokenizer):
    policy, _ = policies
    rolled = in_order(policy, tokenizer, list(enumerate(PROMPTS)), DRAW, 4)
    found = log_ratios(policy, policy, rolled)
    np.testing.assert_allclose(found["kl"], 0, atol=1e-6)
    np.testing.assert_allclose(found["log_ratio"], 0, atol=1e-6)


def test_the_sampled_ratio_approaches_the_exact_kl_and_varies_more(
    policies: tuple[Gemma, Gemma], tokenizer: Tokenizer
):
    asked = [(number, ["def f1():"]) for number in range(160)]
    rolled = in_order(policies[0], tokenizer, asked, DRAW.but(max_tokens=4), 160)
    found = log_ratios(*policies, rolled, 160)
    ratio, kl = found["log_ratio"], found["kl"]
    error = (ratio - kl).std() / len(kl) ** 0.5
    assert abs(ratio.mean() - kl.mean()) < 4 * error < 0.5 * kl.mean()
    assert ratio.std() > 2 * kl.std()


# What is measured of a policy.


def test_measured_is_a_number_for_every_sample_of_every_prompt_and_the_same_twice(
    policies: tuple[Gemma, Gemma], judge: RewardModel, tokenizer: Tokenizer
):
    policy, anchor = policies
    rewards = {"one": judge, "other": judge}
    found, rolled = measure(policy, tokenizer, PROMPTS, DRAW, rewards, anchor, samples=3)
    again, same = measure(policy, tokenizer, PROMPTS, DRAW, rewards, anchor, samples=3)
    assert set(found) == {"one", "other", "kl", "entropy", "tokens", "finished", "empty"}
    assert {values.shape for values in found.values()} == {(4, 3)}
    assert rolled == same
    for name, values in found.items():
        np.testing.assert_array_equal(values, again[name])
    assert [one.turns[0] for one in rolled] == [turns[0] for turns in PROMPTS for _ in range(3)]
    assert len({one.ids for one in rolled}) == 12
    expected = [alone(judge, one.ids) for one in rolled]
    np.testing.assert_allclose(found["one"].flatten(), expected, atol=2e-4)
    np.testing.assert_array_equal(found["one"], found["other"])


def test_the_shape_of_replies_is_told():
    def rolled(*replies: Reply) -> Rollout:
        return Rollout(("a",) * len(replies), replies, (2, 5), (False, True), True)

    said, cut, empty = Reply("b", (5,), "stop"), Reply("b c", (5, 6, 7), "length"), Reply(" ", (), "stop")
    found = shape([rolled(said), rolled(said, cut), rolled(empty)])
    assert found["tokens"].tolist() == [1, 2, 0]
    assert found["finished"].tolist() == [1, 0, 1]
    assert found["empty"].tolist() == [0, 0, 1]
