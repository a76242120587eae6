"""Perplexity by the plain definition, every token scored once; and what int8 loses, on the same tokens."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemwright.evaluate import perplexity as module
from gemwright.evaluate.perplexity import compare, perplexity, read_text
from gemwright.generate.quantize import quantize
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer


@pytest.fixture
def model(tiny: GemmaConfig) -> Gemma:
    return Gemma(tiny.but(init_std=0.3)).eval()


@pytest.fixture
def other(tiny: GemmaConfig) -> Gemma:
    return Gemma(tiny.but(init_std=0.3)).eval()


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="module")
def text(text_folder: Path) -> str:
    return (text_folder / "3.py").read_text(encoding="utf-8")[:700]


@torch.no_grad()
def plainly(model: Gemma, ids: list[int], context: int) -> Tensor:
    """Log-probabilities over the vocabulary for every token of the text, one window after the other."""
    rows = []
    for start in range(0, len(ids), context):
        window = torch.tensor([[2, *ids[start : start + context]]])
        rows.append(model(window[:, :-1])[0].double().log_softmax(-1))
    return torch.cat(rows)


def nats_of(log_probs: Tensor, ids: list[int]) -> Tensor:
    return -log_probs[torch.arange(len(ids)), torch.tensor(ids)]


@pytest.mark.parametrize("context", [1, 7, 40, 64])
def test_it_is_the_mean_cross_entropy_of_every_token(
    model: Gemma, tokenizer: Tokenizer, text: str, context: int
):
    ids = tokenizer.encode(text)
    assert len(ids) % 7
    assert len(ids) > 128
    found = perplexity(model, tokenizer, text, context=context)
    expected = float(nats_of(plainly(model, ids, context), ids).mean())
    assert found.nats_per_token == pytest.approx(expected, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (found.tokens, found.bytes) == (len(ids), len(text.encode()))


def test_a_text_shorter_than_a_window_is_one(model: Gemma, tokenizer: Tokenizer):
    ids = tokenizer.encode("def x")
    found = perplexity(model, tokenizer, "def x")
    expected = float(nats_of(plainly(model, ids, 64), ids).mean())
    assert found.nats_per_token == pytest.approx(expected, rel=1e-6)
    assert found.stderr is None


def test_bits_are_counted_by_bytes_not_characters(tiny: GemmaConfig, tokenizer: Tokenizer):
    model = Gemma(tiny).eval()
    with torch.no_grad():
        model.unembedding.zero_()  # knows nothing
    text = "żółw 乌龟 🐢" * 9
    found = perplexity(model, tokenizer, text)
    assert found.nats_per_token == pytest.approx(math.log(700), rel=1e-6)
    bits = math.log2(700) * len(tokenizer.encode(text))
    assert found.bits_per_byte == pytest.approx(bits / (9 * 19), rel=1e-6)


def test_the_default_context_is_what_the_model_reads_up_to_4096(
    model: Gemma, tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
):
    assert perplexity(model, tokenizer, text) == perplexity(model, tokenizer, text, context=64)
    monkeypatch.setattr(module, "MAX_CONTEXT", 10)
    assert perplexity(model, tokenizer, text) == perplexity(model, tokenizer, text, context=10)


def test_neither_batches_nor_chunks_of_logits_change_it(
    model: Gemma, tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
):
    whole = perplexity(model, tokenizer, text, context=10)
    rows: list[int] = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (rows.append(len(hidden)), logits(hidden))[1])
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 700 * 13)
    monkeypatch.setattr(module, "_BATCH_TOKENS", 30)
    assert asdict(perplexity(model, tokenizer, text, context=10)) == pytest.approx(asdict(whole), rel=1e-6)
    assert max(rows) == 13
    assert sum(rows) == whole.tokens


def test_the_standard_error_is_that_of_the_windows(model: Gemma, tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)[: 12 * 10]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids
    means = nats_of(plainly(model, ids, 10), ids).view(12, 10).mean(1)
    found = perplexity(model, tokenizer, text, context=10)
    assert found.stderr == pytest.approx(float(means.std() / math.sqrt(12)), rel=1e-5)


def test_a_model_loses_nothing_to_itself(model: Gemma, tokenizer: Tokenizer, text: str):
    one, two, lost = compare(model, model, tokenizer, text)
    assert one == two == perplexity(model, tokenizer, text)
    assert (lost.nats_per_token, lost.stderr, lost.kl) == (0.0, 0.0, 0.0)


def test_kl_goes_from_the_model_to_the_other(model: Gemma, other: Gemma, tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    mine, its = plainly(model, ids, 40), plainly(other, ids, 40)
    one, two, lost = compare(model, other, tokenizer, text, context=40)
    kl = float((mine.exp() * (mine - its)).sum(-1).mean())
    assert lost.kl == pytest.approx(kl, rel=1e-5)
    assert abs(float((its.exp() * (its - mine)).sum(-1).mean()) / kl - 1) > 0.001, (
        "the direction was to matter"
    )
    assert two.nats_per_token == pytest.approx(float(nats_of(its, ids).mean()), rel=1e-6)
    assert lost.nats_per_token == pytest.approx(two.nats_per_token - one.nats_per_token, rel=1e-6)


def test_int8_loses_little_and_its_error_is_that_of_the_difference(
    model: Gemma, tokenizer: Tokenizer, text: str
):
    int8 = quantize(model)
    one, two, lost = compare(model, int8, tokenizer, text)
    assert two == perplexity(int8, tokenizer, text)
    assert 0 < lost.kl < 0.03
    assert abs(lost.nats_per_token) < 0.1
    assert lost.stderr is not None
    assert one.stderr is not None
    assert 0 < lost.stderr < one.stderr


def test_people_are_told_the_numbers(model: Gemma, tokenizer: Tokenizer, text: str):
    found, _, lost = compare(model, quantize(model), tokenizer, text)
    assert found.told().startswith(
        f"{found.nats_per_token:.3f} ± {found.stderr:.3f} nats a token, perplexity "
    )
    assert found.told().endswith(f"{found.tokens:,} tokens")
    assert f"KL {lost.kl:.5f}" in lost.told()
    assert "±" not in perplexity(model, tokenizer, "x").told()


@pytest.mark.parametrize("context", [0, 65])
def test_a_context_that_the_model_does_not_read_is_refused(model: Gemma, tokenizer: Tokenizer, context: int):
    with pytest.raises(
        ValueError, match=f"a context of {context} tokens is not between 1 and .*max_seq_len=64"
    ):
        perplexity(model, tokenizer, "text", context=context)


def test_an_empty_text_is_refused(model: Gemma, tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="the text is empty"):
        perplexity(model, tokenizer, "")


def test_it_leaves_gradients_as_they_were(model: Gemma, tokenizer: Tokenizer):
    perplexity(model, tokenizer, "x = 1")
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_text_is_read_as_it_stands(tmp_path: Path):
    path = tmp_path / "text"
    path.write_bytes("a\r\n\tżółw 🐢\n".encode())
    assert read_text(path) == "a\r\n\tżółw 🐢\n"


def write(content: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(content), None)[1]


@pytest.mark.parametrize(
    ("make", "kind", "told"),
    [
        (lambda path: None, FileNotFoundError, "there is no text file"),
        (lambda path: path.mkdir(), FileNotFoundError, "there is no text file"),
        (write(b""), ValueError, "is empty. Perplexity needs a text"),
        (write(b" \n"), ValueError, "is empty"),
        (write(b"ab\xff"), ValueError, r"is not text in UTF-8 \(invalid start byte at byte 2\)"),
        (write(b"a\0b"), ValueError, "it holds zero bytes"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, make: Callable[[Path], None], kind: type[Exception], told: str
):
    make(tmp_path / "text")
    with pytest.raises(kind, match=told):
        read_text(tmp_path / "text")
