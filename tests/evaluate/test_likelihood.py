"""Nats a token against the plain definition; multiple choice with models whose answers are known."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemwright.data.shards import Shards
from gemwright.data.windows import Windows, target_weights
from gemwright.evaluate import likelihood
from gemwright.evaluate.likelihood import accuracy, nats_per_token
from gemwright.evaluate.task import Item, Task, build_tasks
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

    def hidden(self, ids: Tensor, places: object = None, cache: object = None) -> Tensor:
        self.read.append(ids)
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


def test_choices_are_scored_by_the_plain_definition(model: Gemma, tokenizer: Tokenizer):
    context, choice = tokenizer.encode("def one(", bos=True), tokenizer.encode("two, three=7):")
    (score,) = likelihood._log_likelihoods(model, [(context + choice, len(choice))], 1)
    expected = 0.0
    with torch.no_grad():
        for place, number in enumerate(choice):
            logits = model(torch.tensor([context + choice[:place]]))[0, -1].double()
            expected += float(logits.log_softmax(-1)[number])
    assert score == pytest.approx(expected, rel=1e-5)


def test_padding_changes_no_score(model: Gemma, tokenizer: Tokenizer):
    """Rows of 3 to 40 tokens, alone and together."""
    texts = ["a", "def b():", "return c\n" * 3, "    x = 1\n" * 5, "żółw", "if d:\n"]
    rows = [(tokenizer.encode(text, bos=True), 1 + number % 2) for number, text in enumerate(texts)]
    alone = likelihood._log_likelihoods(model, rows, 1)
    assert likelihood._log_likelihoods(model, rows, 4) == pytest.approx(alone, rel=1e-5)
    assert likelihood._log_likelihoods(model, rows, 100) == pytest.approx(alone, rel=1e-5)
    assert likelihood._log_likelihoods(model, rows[::-1], 3)[::-1] == pytest.approx(alone, rel=1e-5)


def test_accuracy_does_not_hang_on_the_batch_size(tiny: GemmaConfig, tokenizer: Tokenizer, text_folder: Path):
    texts = [path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())[:12]]
    model = Gemma(tiny.but(init_std=0.4, max_seq_len=400)).eval()
    for task in build_tasks(texts, items=20):
        assert accuracy(model, tokenizer, task, batch_size=1) == accuracy(
            model, tokenizer, task, batch_size=50
        )


def test_a_context_that_does_not_fit_loses_its_beginning_but_not_bos(
    tiny: GemmaConfig, tokenizer: Tokenizer, planted: tuple[dict[int, int], Task]
):
    follows, task = planted
    long = [item.but(context="x=1\n" * 100 + item.context) for item in task.items]
    model = Rigged(tiny, follows)
    assert accuracy(model, tokenizer, Task(name="long", items=tuple(long))) == 1.0
    (ids,) = model.read
    assert ids.shape[1] == tiny.max_seq_len
    assert bool((ids[:, 0] == 2).all())


def test_a_choice_may_fill_the_model_but_for_bos(tiny: GemmaConfig, tokenizer: Tokenizer):
    model = Rigged(tiny, {})
    item = Item(context="x=1\n" * 100, choices=("1" * 63, "2"), answer=0)
    accuracy(model, tokenizer, Task(name="full", items=(item,)), batch_size=1)
    assert max(ids.shape[1] for ids in model.read) == 64


def test_a_choice_that_does_not_fit_is_refused(tiny: GemmaConfig, tokenizer: Tokenizer):
    item = Item(context="x", choices=("1" * 64, "2"), answer=0)
    with pytest.raises(ValueError, match=r"'long' has 64 tokens, and with <bos> .* max_seq_len=64"):
        accuracy(Rigged(tiny, {}), tokenizer, Task(name="long", items=(item,)))
