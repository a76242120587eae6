"""Perplexity on a text, and what a cheaper model loses on it.

The text is cut into windows. Each begins with <bos>, as everything that a Gemma reads, and every token of the
text is scored once, after <bos> and the tokens before it in its window. Windows that do not overlap show a
token half of `context` on average. With a `stride` each window begins so many tokens after the one before,
and scores what that one did not: all tokens but the first window's then see `context - stride` or more, for
`context / stride` times the work. Numbers are comparable at the same `context` and `stride` only.

Two models are compared on the same windows: the mean KL divergence between their next-token distributions
says more than two perplexities, in whose difference gains and losses cancel.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemwright.losses.divergence import cross_entropy, forward_kl
from gemwright.model.gemma import Gemma
from gemwright.run import progress
from gemwright.tokenizer.tokenizer import SPECIAL, Tokenizer

MAX_CONTEXT = 4096
"""Tokens a window where nothing else is asked for, if the model reads as many."""
_BATCH_TOKENS = 2048  # of a forward pass
_CHUNK_BYTES = 64 << 20  # of one model's logits at a time


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text."""

    nats_per_token: float
    """Mean of -log P(token)."""
    perplexity: float
    """Its exponential."""
    bits_per_byte: float
    """Of the text's UTF-8: comparable between tokenizers."""
    tokens: int
    """Scored: all of the text's."""
    bytes: int
    """The text's length in UTF-8."""
    stderr: float | None
    """Standard error of `nats_per_token`, windows being the sample; None of a single window."""

    def told(self) -> str:
        """A line for people."""
        error = "" if self.stderr is None else f" ± {self.stderr:.3f}"
        return (
            f"{self.nats_per_token:.3f}{error} nats a token, perplexity {self.perplexity:.2f}, "
            f"{self.bits_per_byte:.3f} bits a byte; {self.tokens:,} tokens"
        )


@dataclass(frozen=True)
class Difference:
    """What one model loses to another on the same tokens."""

    nats_per_token: float
    """The other's nats a token, less the model's."""
    stderr: float | None
    """Its standard error, over windows: far smaller than that of either model."""
    kl: float
    """Mean of KL(model || other) a token, in nats."""

    def told(self) -> str:
        """A few words for people."""
        error = "" if self.stderr is None else f" ± {self.stderr:.5f}"
        return f"{self.nats_per_token:.5f}{error} nats a token lost, KL {self.kl:.5f}"


def perplexity(
    model: Gemma, tokenizer: Tokenizer, text: str, *, context: int | None = None, stride: int | None = None
) -> Perplexity:
    """Nats a token, perplexity and bits a byte of a text.

    Args:
        context: tokens of a window, `min(max_seq_len, 4096)` by default.
        stride: tokens from the beginning of a window to that of the next; by default `context`.
    Raises:
        ValueError: an empty text, a context that the model does not read, or a stride beyond it.
    """
    (score,), _ = _scores([model], tokenizer, text, context, stride)
    return score


def compare(
    model: Gemma,
    other: Gemma,
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
) -> tuple[Perplexity, Perplexity, Difference]:
    """Both models' perplexities on the same windows, and what `other` loses. Both are in memory.

    Arguments and errors as `perplexity`.
    """
    (one, two), difference = _scores([model, other], tokenizer, text, context, stride)
    assert difference is not None
    return one, two, difference


def read_text(path: Path) -> str:
    """A file's text. Raises FileNotFoundError or ValueError: no such file, a folder, not text, or empty."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no text file {path}. Name a file in UTF-8.")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}).") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text: it holds zero bytes.")
    if not text.strip():
        raise ValueError(f"{path} is empty. Perplexity needs a text.")
    return text


@torch.no_grad()
def _scores(
    models: Sequence[Gemma], tokenizer: Tokenizer, text: str, context: int | None, stride: int | None
) -> tuple[list[Perplexity], Difference | None]:
    config = models[0].config
    width = min(config.max_seq_len, MAX_CONTEXT) if context is None else context
    if not 1 <= width <= config.max_seq_len:
        raise ValueError(
            f"a context of {width} tokens is not between 1 and the model's max_seq_len={config.max_seq_len}."
        )
    step = width if stride is None else stride
    if not 1 <= step <= width:
        raise ValueError(
            f"a stride of {step} tokens is not between 1 and the context of {width}: tokens between two "
            "windows would not be scored. Lower the stride."
        )
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the text is empty: there is no token to score.")
    nats: list[list[Tensor]] = [[] for _ in models]  # summed over each window
    apart, counts = list[Tensor](), list[Tensor]()
    # Layers compiled for training run eagerly here, as in `likelihood`.
    with (
        progress("scoring", len(ids), unit="tokens") as advance,
        torch.compiler.set_stance("eager_on_recompile"),
    ):
        for targets, scored in _windows(ids, width, step):
            targets, scored = targets.to(models[0].device), scored.to(models[0].device)
            read = torch.cat((torch.full_like(targets[:, :1], SPECIAL["<bos>"]), targets[:, :-1]), 1)
            found = _nats([(model, model.hidden(read)[scored]) for model in models], targets[scored])
            row = scored.nonzero()[:, 0].cpu()
            *each, kl = (part.new_zeros(len(targets)).index_add(0, row, part) for part in found)
            for sums, part in zip(nats, each, strict=True):
                sums.append(part)
            apart.append(kl)
            counts.append(scored.sum(1).cpu())
            advance(len(row))
    sizes = torch.cat(counts)
    size = len(text.encode())
    found = [torch.cat(sums) for sums in nats]
    scores = [_perplexity(sums, sizes, size) for sums in found]
    if len(models) == 1:
        return scores, None
    mean, stderr = _mean(found[1] - found[0], sizes)
    return scores, Difference(mean, stderr, _mean(torch.cat(apart), sizes)[0])


def _windows(
    ids: list[int], width: int, step: int
) -> Iterator[tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]]:
    """The text's ids, some windows at a time, and which are scored; a shorter last one stands alone."""
    starts = [0, *range(step, max(1, len(ids) - width + step), step)]
    whole = [start for start in starts if start + width <= len(ids)]
    text = torch.tensor(ids)
    rows = text.unfold(0, width, 1)[whole] if whole else text.new_empty(0, width)
    scored = torch.ones_like(rows, dtype=torch.bool)
    scored[1:, : width - step] = False
    few = max(1, _BATCH_TOKENS // width)
    yield from zip(rows.split(few), scored.split(few), strict=True) if whole else ()
    if len(whole) < len(starts):
        rest = text[None, starts[-1] :]
        known = torch.ones_like(rest, dtype=torch.bool)
        known[:, : width - step if whole else 0] = False
        yield rest, known


def _nats(
    sides: list[tuple[Gemma, Float[Tensor, "N D"]]], targets: Int[Tensor, " N"]
) -> Float[Tensor, "M N"]:
    """-log P(target) by each model, and last the KL between the first two (0 of one); in fp64, on the CPU."""
    rows = max(1, _CHUNK_BYTES // (4 * sides[0][0].config.vocab_size))
    chunks: list[Tensor] = []
    for start in range(0, len(targets), rows):
        taken = slice(start, start + rows)
        logits = [model.logits(hidden[taken]) for model, hidden in sides]
        kl = forward_kl(logits[0], logits[-1])
        chunks.append(torch.stack([*(cross_entropy(each, targets[taken]) for each in logits), kl]))
    return torch.cat(chunks, 1).double().cpu()


def _perplexity(sums: Float[Tensor, " W"], sizes: Int[Tensor, " W"], size: int) -> Perplexity:
    nats, stderr = _mean(sums, sizes)
    tokens = int(sizes.sum())
    return Perplexity(nats, math.exp(nats), nats * tokens / math.log(2) / size, tokens, size, stderr)


def _mean(sums: Float[Tensor, " W"], sizes: Int[Tensor, " W"]) -> tuple[float, float | None]:
    """The mean of a token, and its standard error: tokens of one window are not independent."""
    mean = sums.sum() / sizes.sum()
    if len(sums) == 1:
        return float(mean), None
    spread = (sums - mean * sizes).square().sum() * len(sums) / (len(sums) - 1)
    return float(mean), float(spread.sqrt() / sizes.sum())
