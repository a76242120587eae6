"""Measuring replies: sums against the plain definitions, one by one, and models whose replies are known."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gemwright.evaluate.answers import (
    AnswersEvalConfig,
    Asked,
    Measure,
    judge,
    loops,
    nats,
    read_asked,
)
from gemwright.generate.rollout import Rollout, rollouts
from gemwright.generate.sampling import Sampling
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import CONTROL, Tokenizer

END, EOS = CONTROL["<end_of_turn>"], 1
TURNS = [("def a():",), ("one", "and two"), ("return", "if", "else"), ("what is abc",), ("x = 1", "y = 2")]
ASKED = [Asked(turns) for turns in TURNS]
HOW = AnswersEvalConfig(max_tokens=12, seed=5, max_batch=3)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def chatty(config: GemmaConfig, seed: int) -> Gemma:
    """Some of its replies are empty, some short, some cut: <end_of_turn> points where the states do."""
    torch.manual_seed(seed)
    gemma = Gemma(config.but(init_std=0.3, max_seq_len=160)).eval()
    with torch.no_grad():
        states = gemma.hidden(torch.randint(108, 700, (1, 60)))[0]
        gemma.unembedding[END] = 4.0 * states.mean(0)
    return gemma


@pytest.fixture(scope="module")
def model(tiny: GemmaConfig) -> Gemma:
    return chatty(tiny, 11)


@pytest.fixture(scope="module")
def teacher(tiny: GemmaConfig) -> Gemma:
    """Wider, and with a cap that shows."""
    return chatty(tiny.but(d_model=48, d_ff=96, final_softcap=5.0), 4)


@pytest.fixture(scope="module")
def drawn(model: Gemma, tokenizer: Tokenizer) -> list[Rollout]:
    """Two rollouts of each prompt."""
    turns = [(number, TURNS[number // 2]) for number in range(2 * len(TURNS))]
    found = dict(rollouts(model, tokenizer, turns, Sampling(max_tokens=12, temperature=1.0, seed=5)))
    return [found[number] for number in range(len(turns))]


def never(reply: str, key: str) -> bool:
    raise AssertionError((reply, key))


@functools.cache
def one_by_one(model: Gemma, rollout: Rollout) -> float:
    """-log P of what the model chose: a forward pass a token, no batch, no padding."""
    total = 0.0
    with torch.no_grad():
        for place, counts in enumerate(rollout.chosen):
            if counts:
                logits = model(torch.tensor([rollout.ids[:place]]))[0, -1].double()
                total -= float(logits.log_softmax(-1)[rollout.ids[place]])
    return total


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_nats_are_those_of_one_token_after_the_other(
    model: Gemma, teacher: Gemma, drawn: list[Rollout], batch_size: int
):
    for judge_of_all in (model, teacher):
        expected = [one_by_one(judge_of_all, one) for one in drawn]
        assert nats(judge_of_all, drawn, batch_size) == pytest.approx(expected, rel=1e-5)


def test_what_the_model_chose_is_its_replies_and_the_end_of_each(drawn: list[Rollout]):
    two = next(one for one in drawn if one.complete and len(one.turns) == 2)
    first, second = (list(reply.ids) for reply in two.replies)
    said = [id for id, counts in zip(two.ids, two.chosen, strict=True) if counts]
    assert said == [*first, END, *second, END]
    assert two.ids[-1] == EOS, "the one that is put there"


def test_an_end_of_sequence_that_was_drawn_counts():
    one = Rollout(("a",), (), (2, 106, 109, EOS), (False, False, False, True), True)
    assert one.chosen == (False, False, False, True)


def test_a_reply_cut_by_length_counts_to_its_last_token():
    one = Rollout(("a",), (), (2, 106, 300, 301), (False, False, True, True), False)
    assert one.chosen == (False, False, True, True)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], False),
        ([1, 2, 3], False),
        ([1, 2, 3, 4], False),
        ([1, 2, 3, 4, 1, 2, 3, 4], True),
        ([1, 2, 3, 4, 5, 1, 2, 3, 5], False),
        ([9, 1, 2, 3, 4, 8, 7, 1, 2, 3, 4, 6], True),
        ([7, 7, 7, 7], False),
        ([7, 7, 7, 7, 7], True),
        ([1, 2, 1, 2, 1], False),
        ([1, 2, 1, 2, 1, 2], True),
    ],
)
def test_a_reply_loops_if_four_tokens_stand_in_it_twice(ids: list[int], expected: bool):
    assert loops(ids) is expected


def test_the_measures_of_drawn_replies_are_sums_over_sums(
    model: Gemma, teacher: Gemma, tokenizer: Tokenizer, drawn: list[Rollout]
):
    found = judge(model, tokenizer, ASKED, HOW, teacher=teacher, right=never).measures
    graded = sum(one_by_one(teacher, one) for one in drawn)
    own = sum(one_by_one(model, one) for one in drawn)
    tokens = sum(sum(one.chosen) for one in drawn)
    assert found["teacher_nats_per_token"].value == pytest.approx(graded / tokens, rel=1e-5)
    assert found["teacher_nats_per_answer"].value == pytest.approx(
        graded / sum(len(one.replies) for one in drawn), rel=1e-5
    )
    assert found["reverse_kl_per_token"].value == pytest.approx((graded - own) / tokens, rel=1e-4)
    by_prompt = [one_by_one(teacher, drawn[2 * n]) + one_by_one(teacher, drawn[2 * n + 1]) for n in range(5)]
    assert found["teacher_nats_per_token"].over == pytest.approx(by_prompt, rel=1e-5)


def test_a_model_is_no_nat_from_itself(model: Gemma, tokenizer: Tokenizer):
    found = judge(model, tokenizer, ASKED, HOW, teacher=model, right=never)
    assert found.measures["reverse_kl_per_token"].value == 0


def test_the_log_ratio_has_the_reverse_kl_for_its_mean(model: Gemma, teacher: Gemma, tokenizer: Tokenizer):
    """Of the first token alone, whose KL can be written down: 400 draws, four standard errors."""
    how = HOW.but(max_tokens=1, samples=400, max_batch=64)
    found = judge(model, tokenizer, ASKED[:1], how, teacher=teacher, right=never)
    ((_, one),) = rollouts(model, tokenizer, [(0, TURNS[0])], Sampling(max_tokens=1))
    prompt = torch.tensor([one.ids[: one.mask.index(True)]])
    with torch.no_grad():
        own, graded = (each(prompt)[0, -1].double().log_softmax(-1) for each in (model, teacher))
    kl = float((own.exp() * (own - graded)).sum())
    spread = float((own.exp() * (own - graded - kl) ** 2).sum()) ** 0.5
    assert found.measures["reverse_kl_per_token"].value == pytest.approx(kl, abs=4 * spread / 400**0.5)


def test_the_measures_of_greedy_replies_are_counted(model: Gemma, tokenizer: Tokenizer):
    greedy = dict(rollouts(model, tokenizer, enumerate(TURNS), Sampling(max_tokens=12)))
    replies = [reply for number in range(len(TURNS)) for reply in greedy[number].replies]
    assert {reply.finish for reply in replies} == {"stop", "length"}
    judged = judge(model, tokenizer, ASKED, HOW, right=never)
    assert [reply for some in judged.replies for reply in some] == [reply.text for reply in replies]
    expected = {
        "repetition": np.mean([loops(reply.ids) for reply in replies]),
        "tokens": np.mean([len(reply.ids) for reply in replies]),
        "finished": np.mean([reply.finish == "stop" for reply in replies]),
    }
    assert {name: one.value for name, one in judged.measures.items()} == pytest.approx(expected)


def test_accuracy_is_the_share_of_keys_that_are_right(model: Gemma, tokenizer: Tokenizer):
    asked = [Asked(("def a():",), ("yes",)), Asked(("what is abc",), ("no",)), Asked(("return",), (None,))]
    judged = judge(model, tokenizer, asked, HOW, right=lambda reply, key: key == "yes")
    accuracy = judged.measures["accuracy"]
    assert (accuracy.over.tolist(), accuracy.under.tolist()) == ([1, 0, 0], [1, 1, 0])
    assert accuracy.value == 0.5


def test_every_reply_is_held_against_its_own_key(model: Gemma, tokenizer: Tokenizer):
    turns = TURNS[2]
    (said,) = judge(model, tokenizer, [Asked(turns)], HOW, right=never).replies
    assert len(set(said)) > 1
    met: list[tuple[str, str]] = []

    def right(reply: str, key: str) -> bool:
        met.append((reply, key))
        return True

    judge(model, tokenizer, [Asked(turns, ("k0", None, "k2"))], HOW, right=right)
    assert met == [(reply, f"k{turn}") for turn, reply in enumerate(said) if turn != 1]


def test_a_turn_that_was_never_reached_is_not_right(model: Gemma, tokenizer: Tokenizer):
    """A reply that is cut by its length ends the conversation."""
    asked = [Asked(("what is abc", "never asked"), ("k", "k"))]
    judged = judge(model, tokenizer, asked, HOW, right=lambda reply, key: True)
    assert len(judged.replies[0]) == 1
    assert judged.measures["accuracy"].value == 0.5
    assert judged.measures["finished"].value == 0


def test_a_measure_is_a_ratio_of_sums_and_not_a_mean_of_ratios():
    assert Measure(np.array([1.0, 9.0]), np.array([1.0, 3.0])).value == 10 / 4


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(50):
        tokens = draw.integers(1, 20, 80).astype(float)
        low, high = Measure(tokens * draw.normal(2.0, 0.5, 80), tokens).interval()
        covered += low < 2.0 < high
    assert 43 <= covered <= 50


def test_an_interval_is_the_same_every_time_and_narrower_with_more_prompts():
    draw = np.random.default_rng(2)
    over = draw.normal(1.0, 0.3, 400)
    few, many = (Measure(over[:size], np.ones(size)).interval() for size in (25, 400))
    assert few == Measure(over[:25], np.ones(25)).interval()
    assert 2.5 < (few[1] - few[0]) / (many[1] - many[0]) < 6


def test_resamples_are_the_same_prompts_for_every_model():
    """So what one model is better by has an interval of its own, narrower than both models' apart."""
    over, ones = np.random.default_rng(3).normal(1.0, 0.3, 50), np.ones(50)
    better = Measure(over + 0.1, ones).resampled() - Measure(over, ones).resampled()
    assert better == pytest.approx(np.full(len(better), 0.1))


def test_prompts_without_a_key_may_be_all_of_a_resample():
    low, high = Measure(np.array([1.0, 0.0]), np.array([1.0, 0.0])).interval()
    assert (low, high) == (1, 1)


def test_a_judgement_goes_into_a_card_and_into_a_line(model: Gemma, teacher: Gemma, tokenizer: Tokenizer):
    judged = judge(model, tokenizer, ASKED, HOW, teacher=teacher, right=never)
    card = json.loads(json.dumps(judged.to_dict(), allow_nan=False))
    assert card["prompts"] == 5
    assert list(card)[1:] == [
        "repetition", "tokens", "finished",
        "teacher_nats_per_token", "teacher_nats_per_answer", "reverse_kl_per_token",
    ]  # fmt: skip
    assert card["tokens"]["low"] <= card["tokens"]["value"] <= card["tokens"]["high"]
    assert judged.told().startswith("5 prompts: repetition ")


def test_judging_leaves_no_gradients(model: Gemma, teacher: Gemma, tokenizer: Tokenizer):
    judge(model, tokenizer, ASKED[:1], HOW, teacher=teacher, right=never)
    assert all(parameter.grad is None for each in (model, teacher) for parameter in each.parameters())
    assert torch.is_grad_enabled()


def test_a_teacher_that_knows_or_reads_less_is_refused(model: Gemma, tiny: GemmaConfig, tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="the teacher's max_seq_len=64 is less than the model's 160"):
        judge(model, tokenizer, ASKED, HOW, teacher=Gemma(tiny), right=never)
    small = Gemma(tiny.but(vocab_size=650, max_seq_len=160))
    with pytest.raises(ValueError, match="the teacher's vocab_size=650"):
        judge(model, tokenizer, ASKED, HOW, teacher=small, right=never)


def test_nothing_to_ask_is_refused(model: Gemma, tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="nothing is asked"):
        judge(model, tokenizer, [], HOW, right=never)


def test_prompts_are_read_with_their_keys(tmp_path: Path):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"turns": ["a", "b"], "keys": ["3", null], "id": 1}\n\n{"turns": ["c"]}\n')
    assert read_asked(path) == [Asked(("a", "b"), ("3", None)), Asked(("c",))]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"turns": "a"}', "it has no turns, a list of texts"),
        ('["a"]', "it has no turns"),
        ('{"turns": []}', "no turn of the user"),
        ('{"turns": ["a"], "keys": ["x", "y"]}', "1 turns and 2 keys"),
        ('{"turns": ["a"], "keys": [3]}', "no list of texts and nulls"),
        ("{", "Expecting property name"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, told: str):
    path = tmp_path / "asked.jsonl"
    path.write_text(f'{{"turns": ["a"]}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"asked\.jsonl, line 2: .*{told}"):
        read_asked(path)


def test_a_file_that_is_missing_or_empty_is_told(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_asked(tmp_path / "asked.jsonl")
    (tmp_path / "asked.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="asks nothing"):
        read_asked(tmp_path / "asked.jsonl")
