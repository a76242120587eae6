"""What may be drawn, and how likely, against transformers' logits processors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gemwright.generate.sampling import Sampler, Sampling

pytestmark = pytest.mark.parity
Pair = Callable[..., tuple[Any, Any]]

TEXT = [5, 17, 5, 60, 33, 17]
ALL: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.05,
}
CASES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_k": 7},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.6, "top_p": 0.5},
    {"temperature": 0.8, "top_p": 0.97},
    {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 2.0, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 1.5},
    {"temperature": 1.0, "repetition_penalty": 0.6},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.8},
    {"temperature": 1.5, "top_p": 0.8, "min_p": 0.2},
    ALL,
]


def theirs(logits: Tensor, text: list[int], options: dict[str, Any]) -> Tensor:
    """The probabilities of transformers' processors, in the order in which its `generate` has them."""
    from transformers.generation import logits_process as made

    steps = {
        "repetition_penalty": made.RepetitionPenaltyLogitsProcessor,
        "temperature": made.TemperatureLogitsWarper,
        "top_k": made.TopKLogitsWarper,
        "top_p": made.TopPLogitsWarper,
        "min_p": made.MinPLogitsWarper,
    }
    scores, ids = logits[None].clone(), torch.tensor([text])
    for name, step in steps.items():
        if name in options:
            scores = step(options[name])(ids, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
def test_probabilities_equal_those_of_transformers(options: dict[str, Any], spread: float):
    for _ in range(20):
        logits = spread * torch.randn(64)
        ours = Sampler(Sampling(**options), TEXT, 64).probabilities(logits)
        expected = theirs(logits, TEXT, options)
        assert torch.equal(ours > 0, expected > 0)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options", [{"top_k": 2000}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_p": 0.6}], ids=str
)
def test_so_they_do_over_the_whole_vocabulary(options: dict[str, Any]):
    """Where sums over 256,000 tokens end is a matter of rounding: a token in a million may differ."""
    logits = torch.randn(256_000)
    ours = Sampler(Sampling(temperature=1.0, **options), TEXT, 256_000).probabilities(logits)
    expected = theirs(logits, TEXT, options)
    assert int(((ours > 0) != (expected > 0)).sum()) <= 3
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_comparison_tells_when_a_step_is_left_out(name: str):
    other = {key: value for key, value in ALL.items() if key != name}
    told = []
    for logits in 1.2 * torch.randn(40, 64):
        ours = Sampler(Sampling(**ALL), TEXT, 64).probabilities(logits)
        told.append(not torch.allclose(ours, theirs(logits, TEXT, other), rtol=1e-3, atol=1e-5))
    assert sum(told) > 2


def test_the_order_of_all_steps_is_that_of_transformers_generate(pair: Pair, ids: Tensor):
    """Its own processed scores at every step of a sampled continuation, and ours from the raw logits."""
    _, model = pair(init_std=0.4)
    prompt = ids[:1, :5]
    told = model.generate(
        prompt, max_new_tokens=12, min_new_tokens=12, do_sample=True, output_logits=True, output_scores=True,
        return_dict_in_generate=True, attention_mask=torch.ones_like(prompt), eos_token_id=95, **ALL,
    )  # fmt: skip
    sampler = Sampler(Sampling(**ALL), prompt[0].tolist(), 96)
    sizes = set()
    for step, (raw, scores) in enumerate(zip(told.logits, told.scores, strict=True)):
        raw[0, 95] = -30.0  # min_new_tokens has taken it out of theirs
        ours = sampler.probabilities(raw[0].float())
        torch.testing.assert_close(ours, scores[0].softmax(-1), rtol=1e-4, atol=1e-6)
        sampler.saw(int(told.sequences[0, 5 + step]))
        sizes.add(int((ours > 0).sum()))
    assert max(sizes) > 1


def test_a_greedy_choice_under_a_penalty_equals_transformers(pair: Pair, ids: Tensor):
    _, model = pair(init_std=0.4)
    prompt = ids[:1, :5]
    told = model.generate(
        prompt, max_new_tokens=20, do_sample=False, repetition_penalty=1.7, output_logits=True,
        return_dict_in_generate=True, attention_mask=torch.ones_like(prompt), eos_token_id=None,
    )  # fmt: skip
    sampler = Sampler(Sampling(repetition_penalty=1.7), prompt[0].tolist(), 96)
    chosen = [sampler.choose(raw[0].float()).id for raw in told.logits]
    assert chosen == told.sequences[0, 5:].tolist()
    assert chosen != [int(raw[0].argmax()) for raw in told.logits]
