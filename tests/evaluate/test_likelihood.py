"""Nats a token against the plain definition; multiple choice with models whose answers are known."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemwright.benchmarks.made import Item, Task, build_tasks
from gemwright.data.shards import Shards
from gemwright.data.windows import Windows, target_weights
from gemwright.evaluate import likelihood
from gemwright.evaluate.likelihood import Request, accuracy, log_likelihoods, nats_per_token
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma, packed
from gemwright.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def model(tiny: GemmaConfig) -> Gemma:
    return Gemma(tiny.but(init_std=0.4)).eval()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="module")
def windows(shards_folder: Path) -> Windows:
    return Windows(Shards.open(shards_folder), "held_out", 40, max_tokens=1_600)


class Rigged(Gemma):
    """A model that knows one thing: which id follows which. Its hidden state is the next id, one-hot."""

    def __init__(self, config: GemmaConfig, follows: dict[int, int]) -> None:
        super().__init__(config.but(d_model=config.vocab_size, pattern=config.pattern[:1]))
        with torch.no_grad():
            self.model.embed_tokens.weight.copy_(torch.eye(config.vocab_size))
        self.follows = follows
        self.read: list[Tensor] = []
        self.held = 0  # ids in all caches, at most

    def hidden(self, ids: Tensor, places: object = None, caches: Any = (), lengths: Any = ()) -> Tensor:
        self.read.append(ids)
        for cache, new in zip(caches, lengths, strict=True):
            cache.advance(new)
        self.held = max(self.held, sum(cache.length for cache in caches))
        known = torch.tensor([self.follows.get(number, -1) for number in range(self.config.vocab_size)])[ids]
        return 20.0 * (known[..., None] == torch.arange(self.config.vocab_size)).float()


@pytest.fixture
def planted(tokenizer: Tokenizer) -> tuple[dict[int, int], Task]:
    """After a letter comes its digit: 'a' 3, 'b' 1, ... and then nothing but another of the same digit."""
    follows: dict[int, int] = {}
    items: list[Item] = []
    for number, letter in enumerate("bcdfgh"):
        digit = str((3 * number + 1) % 4)
        (before,), (after,) = tokenizer.encode(letter), tokenizer.encode(digit)
        follows[before] = after
        choices = tuple("0123")
        items.append(Item(context=f"\n{letter}", choices=choices, answer=choices.index(digit)))
    return follows, Task(name="planted", items=tuple(items))


def test_nats_a_token_are_the_mean_cross_entropy_of_real_targets(model: Gemma, windows: Windows):
    total, count = 0.0, 0.0
    with torch.no_grad():
        for rows, _ in windows.all(3):
            logits = model(rows[:, :-1].contiguous(), packed(rows[:, :-1] == 2)).double()
            nats = -logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
            weights = target_weights(rows)
            total, count = total + float((nats * weights).sum()), count + float(weights.sum())
    assert count < windows.tokens, "a start of a document was to be among the targets"
    assert nats_per_token(model, windows) == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 1_000])
def test_nats_a_token_do_not_hang_on_the_batch_size(model: Gemma, windows: Windows, batch_size: int):
    assert nats_per_token(model, windows, batch_size) == pytest.approx(
        nats_per_token(model, windows), rel=1e-6
    )


def test_who_knows_nothing_has_the_logarithm_of_the_vocabulary(tiny: GemmaConfig, windows: Windows):
    assert nats_per_token(Rigged(tiny, {}), windows) == pytest.approx(math.log(700), rel=1e-6)


def test_measuring_leaves_no_gradients(model: Gemma, windows: Windows):
    nats_per_token(model, windows)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_planted_answer_is_found(
    tiny: GemmaConfig, tokenizer: Tokenizer, planted: tuple[dict[int, int], Task]
):
    follows, task = planted
    assert accuracy(Rigged(tiny, follows), tokenizer, task) == 1.0


def test_accuracy_is_the_share_of_right_answers(
    tiny: GemmaConfig, tokenizer: Tokenizer, planted: tuple[dict[int, int], Task]
):
    follows, task = planted
    wrong = [item.but(answer=(item.answer + 1) % 4) if n < 2 else item for n, item in enumerate(task.items)]
    assert accuracy(Rigged(tiny, follows), tokenizer, Task(name="a", items=tuple(wrong))) == pytest.approx(
        4 / 6
    )


def test_likelihood_is_counted_a_character(tiny: GemmaConfig, tokenizer: Tokenizer):
    """Every token costs the same to who knows nothing, so the choice with the longest tokens wins."""
    spaces, digits = " " * 8, "1234"
    assert (len(tokenizer.encode(spaces)), len(tokenizer.encode(digits))) == (1, 4)
    short, long = "1", "=" + spaces * 3
    assert len(tokenizer.encode(long)) > len(tokenizer.encode(short))
    item = Item(context="x", choices=(short, digits, long), answer=2)
    assert accuracy(Rigged(tiny, {}), tokenizer, Task(name="a", items=(item,))) == 1.0


ROADS = {"every text by itself": 10**6, "whatever can be on caches": 1, "as it pays": likelihood._SHARED}


@pytest.fixture(params=ROADS.values(), ids=ROADS)
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """From how many ids on texts share what they have in common."""
    monkeypatch.setattr(likelihood, "_SHARED", request.param)


def ids(draw: random.Random, least: int, most: int) -> list[int]:
    return [draw.randrange(108, 700) for _ in range(draw.randint(least, most))]


def questions(seed: int = 0) -> list[Request]:
    """Choices of contexts, some beyond two windows, and all that two texts can have in common."""
    draw = random.Random(seed)
    shots = [2, *ids(draw, 20, 20)]
    found: list[Request] = []
    for most in (1, 3, 6, 9):
        context, choice = [*shots, *ids(draw, 0, 14)], ids(draw, 5, 5)
        found += [(context, ids(draw, 1, most)) for _ in range(3)]
        found += [
            (context, choice),
            (context, choice[:2]),
            (context, [*choice, 300]),
            (context, [*choice, 301]),
        ]
        found += [([*context, *choice[:2]], choice[2:])]  # the same texts, and fewer of their ids asked
    found += [([2, *ids(draw, 0, 30)], ids(draw, 1, 9)) for _ in range(9)]
    draw.shuffle(found)
    return [*found, found[0]]


@torch.no_grad()
def plainly(model: Gemma, requests: Sequence[Request]) -> list[tuple[float, bool]]:
    """Every text by itself, all its logits, in fp64."""
    scored = []
    for context, continuation in requests:
        logits = model(torch.tensor([[*context, *continuation]]))[0, len(context) - 1 : -1].double()
        wanted = torch.tensor(continuation)
        log_p = float(logits.log_softmax(-1)[torch.arange(len(wanted)), wanted].sum())
        scored.append((log_p, bool((logits.argmax(-1) == wanted).all())))
    return scored


def continued(model: Gemma, requests: Sequence[Request]) -> list[Request]:
    """The contexts, and what the model would say next: greedy to the end, or but for the last id."""
    found: list[Request] = []
    for context, continuation in requests:
        said = list(context)
        for _ in continuation:
            said.append(int(model(torch.tensor([said]))[0, -1].argmax()))
        found += [(context, said[len(context) :]), (context, [*said[len(context) :], 300])]
    return found


@pytest.mark.usefixtures("road")
@pytest.mark.parametrize("batch_tokens", [1, 40, 150, 10_000])
def test_continuations_are_scored_by_the_plain_definition(model: Gemma, batch_tokens: int):
    """One at a time, some, and all together; logits in chunks of three rows, too."""
    requests = questions()
    found = log_likelihoods(model, requests, batch_tokens=batch_tokens)
    for one, (log_p, greedy) in zip(found, plainly(model, requests), strict=True):
        assert one.log_p == pytest.approx(log_p, abs=1e-4)
        assert one.greedy == greedy


@pytest.mark.usefixtures("road")
def test_greedy_is_what_the_model_would_say_to_the_last_id(model: Gemma):
    with torch.no_grad():
        requests = continued(model, questions()[:12])
    found = log_likelihoods(model, requests)
    assert [one.greedy for one in found] == [greedy for _, greedy in plainly(model, requests)]
    assert [one.greedy for one in found] == [True, False] * 12


@pytest.mark.usefixtures("road")
def test_scores_do_not_hang_on_the_chunks_of_logits(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    requests = questions()
    expected = [one.log_p for one in log_likelihoods(model, requests)]
    monkeypatch.setattr(likelihood, "_CHUNK_BYTES", 3 * 4 * 700)
    assert [one.log_p for one in log_likelihoods(model, requests)] == pytest.approx(expected, abs=1e-4)


def test_only_a_few_rows_of_logits_exist_at_a_time(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    rows: list[int] = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (rows.append(len(hidden)), logits(hidden))[1])
    monkeypatch.setattr(likelihood, "_CHUNK_BYTES", 3 * 4 * 700)
    log_likelihoods(model, questions())
    assert max(rows) == 3
    assert rows.count(3) > 20


def test_choices_read_their_context_once(tiny: GemmaConfig):
    """And of a choice the model reads all but the last id, so that letters cost nothing more."""
    model, context = Rigged(tiny, {}), [2, *range(110, 140)]
    log_likelihoods(model, [(context, [200 + choice]) for choice in range(4)])
    assert [ids.numel() for ids in model.read] == [31]
    model.read.clear()
    log_likelihoods(model, [(context, [200 + choice, 300, 301]) for choice in range(4)])
    assert sum(ids.numel() for ids in model.read) == 31 + 4 * 2


def test_questions_read_the_examples_before_them_a_few_times(tiny: GemmaConfig):
    """Runs of texts are cut, so that many are read side by side: then a fifth of the ids are examples."""
    model, shots = Rigged(tiny, {}), [2, *range(110, 150)]
    log_likelihoods(model, [([*shots, *range(200 + n, 210 + n)], [n]) for n in range(200)])
    assert sum(ids.numel() for ids in model.read) < 1.35 * 200 * 10
    assert len(model.read) < 30


@pytest.mark.usefixtures("road")
def test_a_batch_holds_no_more_tokens_than_asked(tiny: GemmaConfig):
    """In its rows, or in the caches under it."""
    model, draw = Rigged(tiny, {}), random.Random(0)
    contexts = [[2, *ids(draw, 25, 30)] for _ in range(20)]
    requests = [(context, ids(draw, 2, 4)) for context in contexts for _ in range(3)]
    log_likelihoods(model, requests, batch_tokens=100)
    most = max(ids.numel() for ids in model.read)
    assert 60 < most <= 100
    assert model.held <= 100


@pytest.mark.usefixtures("road")
def test_whoever_waits_is_told_of_every_request_once(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(likelihood, "_CHUNK_BYTES", 3 * 4 * 700)
    requests, told = questions(), list[int]()
    log_likelihoods(model, requests, batch_tokens=100, advance=told.append)
    assert sum(told) == len(requests)
    assert sum(map(bool, told)) > 10


def test_nothing_asked_is_nothing_scored(model: Gemma):
    assert log_likelihoods(model, []) == []


def test_what_the_model_cannot_read_is_refused(model: Gemma):
    longest = model.config.max_seq_len
    (full,) = log_likelihoods(model, [([2] * 60, [3] * (longest - 59))])
    assert math.isfinite(full.log_p)
    with pytest.raises(ValueError, match=r"request 1 has 60 ids of context and 6 to score: .*max_seq_len=64"):
        log_likelihoods(model, [([2], [3]), ([2] * 60, [3] * (longest - 58))])
    with pytest.raises(ValueError, match=r"request 0 has no context\. Give .*<bos>"):
        log_likelihoods(model, [([], [3])])
    with pytest.raises(ValueError, match="request 0 has no continuation"):
        log_likelihoods(model, [([2], [])])


def test_a_model_in_bf16_is_scored_by_its_own_logits(tiny: GemmaConfig):
    """Their sums are fp32, so a long continuation loses nothing to the number format."""
    model = Gemma(tiny).eval().bfloat16()
    requests = questions()
    for one, (log_p, _) in zip(log_likelihoods(model, requests), plainly(model, requests), strict=True):
        assert one.log_p == pytest.approx(log_p, rel=1e-2)


def test_accuracy_takes_the_likeliest_a_character(tiny: GemmaConfig, tokenizer: Tokenizer, text_folder: Path):
    texts = [path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())[:12]]
    model = Gemma(tiny.but(init_std=0.4, max_seq_len=400)).eval()
    for task in build_tasks(texts, items=8):
        right = 0
        for item in task.items:
            context = tokenizer.encode(item.context, bos=True)
            scores = plainly(model, [(context, tokenizer.encode(choice)) for choice in item.choices])
            each = [log_p / len(c) for (log_p, _), c in zip(scores, item.choices, strict=True)]
            right += each.index(max(each)) == item.answer
        assert accuracy(model, tokenizer, task) == right / len(task.items)


def test_a_context_that_does_not_fit_loses_its_beginning_but_not_bos(
    tiny: GemmaConfig, tokenizer: Tokenizer, planted: tuple[dict[int, int], Task]
):
    follows, task = planted
    long = [item.but(context="x=1\n" * 100 + item.context) for item in task.items]
    model = Rigged(tiny, follows)
    assert accuracy(model, tokenizer, Task(name="long", items=tuple(long))) == 1.0
    begun = [ids for ids in model.read if ids.shape[1] > 1]
    assert {ids.shape[1] for ids in begun} == {tiny.max_seq_len - 1}  # all but the choice's last id
    assert all(bool((ids[:, 0] == 2).all()) for ids in begun)


def test_a_choice_may_fill_the_model_but_for_bos(tiny: GemmaConfig, tokenizer: Tokenizer):
    model = Rigged(tiny, {})
    item = Item(context="x=1\n" * 100, choices=("1" * 63, "2"), answer=0)
    accuracy(model, tokenizer, Task(name="full", items=(item,)))
    assert max(ids.shape[1] for ids in model.read) == 63


def test_a_choice_that_does_not_fit_is_refused(tiny: GemmaConfig, tokenizer: Tokenizer):
    item = Item(context="x", choices=("1" * 64, "2"), answer=0)
    with pytest.raises(ValueError, match=r"'long' has 64 tokens, and with <bos> .* max_seq_len=64"):
        accuracy(Rigged(tiny, {}), tokenizer, Task(name="long", items=(item,)))
