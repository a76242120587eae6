"""Decoding with a cache is the same as reading everything again for every token."""

import math
from typing import Any

import pytest
import torch

from gemwright.generate.engine import decode
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma

PROMPT = [2, 150, 300, 450, 600]


@pytest.fixture
def model(tiny: GemmaConfig) -> Gemma:
    """Weights large enough that the window bites; small embeddings, or each token would repeat itself."""
    made = Gemma(tiny.but(init_std=0.5)).eval()
    with torch.no_grad():
        made.unembedding.mul_(0.1)
    return made


def read_again(model: Gemma, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 5, 7, 8, 9, 20])
def test_greedy_decoding_is_the_argmax_of_the_full_forward_pass(model: Gemma, length: int):
    """Prompts shorter than the window, as long, and longer: the rolling cache may not forget too early."""
    prompt = [2, *torch.randint(108, 700, (length - 1,)).tolist()]
    decoded = list(decode(model, prompt, max_tokens=30))
    assert decoded == read_again(model, prompt, 30)
    assert len(set(decoded)) > 5, "a model that repeats itself would prove little"


def test_the_window_matters_to_that_comparison(model: Gemma):
    wider = Gemma(model.config.but(window=9))
    wider.load_state_dict(model.state_dict())
    assert list(decode(model, PROMPT, max_tokens=30)) != list(decode(wider, PROMPT, max_tokens=30))


def test_decoding_ends_after_max_tokens(model: Gemma):
    whole = list(decode(model, PROMPT, max_tokens=12))
    assert len(whole) == 12
    assert list(decode(model, PROMPT, max_tokens=1)) == whole[:1]


def test_decoding_ends_before_a_stop_id(model: Gemma):
    whole = list(decode(model, PROMPT, max_tokens=12))
    stop = whole[5]
    assert list(decode(model, PROMPT, max_tokens=12, stop_ids=(699, stop))) == whole[: whole.index(stop)]


def test_one_seed_gives_one_continuation(model: Gemma):
    def drawn(seed: int) -> list[int]:
        return list(decode(model, PROMPT, max_tokens=12, temperature=1.5, seed=seed))

    first = drawn(1)
    torch.rand(7)  # the draws of others do not count
    assert drawn(1) == first
    assert drawn(2) != first


def test_the_seed_means_nothing_to_greedy_decoding(model: Gemma):
    one, other = (list(decode(model, PROMPT, max_tokens=6, seed=seed)) for seed in (1, 2))
    assert one == other


def test_two_continuations_at_once_do_not_disturb_each_other(model: Gemma):
    alone = [list(decode(model, prompt, max_tokens=8)) for prompt in (PROMPT, [2, 333])]
    together = zip(decode(model, PROMPT, max_tokens=8), decode(model, [2, 333], max_tokens=8), strict=True)
    assert [list(ids) for ids in zip(*together, strict=True)] == alone


def test_who_takes_one_token_only_pays_for_one(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    widths: list[int] = []
    hidden = model.hidden

    def watch(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        widths.append(ids.shape[1])
        return hidden(ids, **options)

    monkeypatch.setattr(model, "hidden", watch)
    ids = decode(model, PROMPT, max_tokens=10)
    next(ids)
    assert widths == [5]
    next(ids)
    assert widths == [5, 1]


def test_decoding_leaves_no_gradients_switched_off(model: Gemma):
    ids = decode(model, PROMPT, max_tokens=3)
    next(ids)
    assert torch.is_grad_enabled()


def test_prompt_and_new_tokens_may_fill_the_model(model: Gemma):
    assert len(list(decode(model, PROMPT, max_tokens=64 - 5))) == 59


@pytest.mark.parametrize(
    ("prompt", "settings", "told"),
    [
        ([], {}, "the prompt is empty: begin with <bos>"),
        ([2, 700], {}, r"an id outside 0\.\.699"),
        ([2, -1], {}, r"an id outside 0\.\.699"),
        (PROMPT, {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        (PROMPT, {"temperature": -0.1}, "temperature=-0.1 finite and at least 0"),
        (PROMPT, {"temperature": math.nan}, "temperature=nan"),
        (PROMPT, {"temperature": math.inf}, "temperature=inf"),
        (PROMPT, {"max_tokens": 60}, "5 tokens of prompt and 60 new ones exceed the model's max_seq_len=64"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_anything_is_computed(
    model: Gemma, monkeypatch: pytest.MonkeyPatch, prompt: list[int], settings: dict[str, Any], told: str
):
    """At the call, not at the first token that somebody asks for."""
    monkeypatch.setattr(model, "hidden", lambda *arguments, **options: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=told):
        decode(model, prompt, **{"max_tokens": 4, **settings})
