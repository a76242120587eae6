"""What a model makes of text: nats a token on held-out shards, and multiple choice by log-likelihood."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gemwright.data.conversations import Conversations
from gemwright.data.windows import Windows
from gemwright.evaluate.task import Task
from gemwright.losses import dense
from gemwright.model import head
from gemwright.model.gemma import Gemma, packed
from gemwright.tokenizer.tokenizer import SPECIAL, Tokenizer


@torch.no_grad()
def nats_per_token(model: Gemma, windows: Windows | Conversations, batch_size: int = 16) -> float:
    """Mean of -log P(next token) over every target that counts; its exponential is the perplexity."""
    device = model.device
    total, count = 0.0, 0.0
    # Layers compiled for training run eagerly here: compiling them again, without gradients, would cost more.
    with torch.compiler.set_stance("eager_on_recompile"):
        for rows, weights in windows.all(batch_size):
            rows, weights = rows.to(device), weights.to(device)
            ids = rows[:, :-1].contiguous()
            total += float(
                dense.cross_entropy(
                    model.hidden(ids, packed(ids == SPECIAL["<bos>"])).flatten(0, 1), model.unembedding,
                    rows[:, 1:].flatten(), weights.flatten(), cap=model.config.final_softcap,
                )
            )  # fmt: skip
            count += float(weights.sum())
    return total / count


@torch.no_grad()
def accuracy(model: Gemma, tokenizer: Tokenizer, task: Task, batch_size: int = 64) -> float:
    """Share of items whose true choice has the highest log-likelihood after the context, per character.

    Dividing by length in characters (as lm-evaluation-harness's `acc_norm` does) keeps long choices from
    losing for being long. Context and choice are tokenised apart, alike for every choice. A context that does
    not fit the model's `max_seq_len` loses its beginning, but never `<bos>`.

    Raises:
        ValueError: a choice alone is longer than `max_seq_len`.
    """
    rows: list[tuple[list[int], int]] = []  # ids, and how many of them at the end are the choice
    for item in task.items:
        before = tokenizer.encode(item.context, bos=True)
        for choice in item.choices:
            ids = tokenizer.encode(choice)
            room = model.config.max_seq_len - len(ids) - 1
            if room < 0:
                raise ValueError(
                    f"a choice of {task.name!r} has {len(ids)} tokens, and with <bos> that exceeds the "
                    f"model's max_seq_len={model.config.max_seq_len}. Leave it out, or use another model."
                )
            rows.append((before[:1] + before[max(1, len(before) - room) :] + ids, len(ids)))
    scores = _log_likelihoods(model, rows, batch_size)
    right, start = 0, 0
    for item in task.items:
        stop = start + len(item.choices)
        per_character = [s / len(c) for s, c in zip(scores[start:stop], item.choices, strict=True)]
        right += per_character.index(max(per_character)) == item.answer
        start = stop
    return right / len(task.items)


def _log_likelihoods(model: Gemma, rows: Sequence[tuple[list[int], int]], batch_size: int) -> list[float]:
    """Sum of log P over the last ids of each row; rows of like length share a batch, padded on the right."""
    device = model.device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    scores = [0.0] * len(rows)
    with torch.compiler.set_stance("eager_on_recompile"):
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            width = max(len(rows[i][0]) for i in chosen)
            ids = torch.full((len(chosen), width), SPECIAL["<pad>"], device=device)
            asked: list[tuple[int, int]] = []  # (row, column) of the id before each scored one
            for row, i in enumerate(chosen):
                tokens, length = rows[i]
                ids[row, : len(tokens)] = torch.tensor(tokens, device=device)
                asked += [(row, column - 1) for column in range(len(tokens) - length, len(tokens))]
            row, column = torch.tensor(asked, device=device).T
            logits = head.logits(
                model.hidden(ids)[row, column], model.unembedding, model.config.final_softcap
            )
            gathered: Tensor = logits.log_softmax(-1).gather(-1, ids[row, column + 1, None])[:, 0]
            sums = torch.zeros(len(chosen), device=device).index_add(0, row, gathered)
            for i, value in zip(chosen, sums.tolist(), strict=True):
                scores[i] = value
    return scores
