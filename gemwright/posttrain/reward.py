"""A reward model: preference pairs in, a checkpoint with a scalar head out.

The report (section 4) trains one on human preferences, "an order of magnitude larger than the policy" and
oriented to conversations of several turns; how, it does not tell. Here: Bradley and Terry's model, whose
score stands at the last token of the conversation. Size is free: any chat model can be begun with.

The head begins as a linear probe, the best one on the frozen model's states, so that the first updates do
not disturb what the model knows (WARM, arXiv 2401.12187, section 4). With `average` several are trained from
there, each with its own order of the pairs and its own rate, and their weights are averaged: WARM.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from gemwright.config import Config
from gemwright.data.conversations import pack_whole
from gemwright.device import pick_device, seed_everything
from gemwright.evaluate.answers import Measure
from gemwright.losses.preference import bradley_terry
from gemwright.merge.stage import MergeConfig, prepared
from gemwright.model import checkpoint, cost
from gemwright.model.gemma import Gemma, RewardModel, packed
from gemwright.posttrain.sft import require_room
from gemwright.reward.pairs import Pair, Pairs, PairsConfig, read_pairs
from gemwright.reward.scoring import scores, states
from gemwright.run import Card, RunFolder, run_stage
from gemwright.tokenizer.tokenizer import SPECIAL, Tokenizer
from gemwright.train import resume
from gemwright.train.loop import Batch, TrainConfig, train

STAGE = "reward"
_RATES = (1.0, 0.5, 2.0)  # of the models that are averaged, in turn: what differs is our choice
_RIDGE = 1e-2  # of the linear probe


class RewardConfig(Config):
    """One reward model, or several averaged."""

    train: TrainConfig
    """Steps and optimiser. `batch_size` counts pairs, `seq_len` the tokens that a conversation may have."""
    pairs: PairsConfig = PairsConfig()
    """How the pairs are read."""
    average: PositiveInt = 1
    """WARM: so many models, their weights averaged."""
    seed: int = 0
    """Of anything random but the order of the pairs, which `train.seed` decides."""


def run(
    config: RewardConfig, out: Path, model: Path, pairs: Path, *, held_out: Path | None = None,
    epochs: float | None = None, fresh: bool = False,
) -> Card:  # fmt: skip
    """Train a reward model from the language model `model`. Killed, it goes on.

    Args:
        pairs: a .jsonl file of preference pairs, or .jsonl.gz (`reward.pairs`).
        epochs: how often every pair is seen, at least; in place of `train.steps`.
        held_out: further pairs, to measure on in place of those that are held back of `pairs`.
    Raises:
        FileNotFoundError, ValueError: as `read_pairs`; or a row is longer than the model's context.
        NonFiniteError: the loss is not a number.
    """
    require_room(model, config.train.seq_len)
    tokenizer = Tokenizer.load(model)
    found = read_pairs(pairs, tokenizer, config.train.seq_len, config.pairs)
    if held_out is not None:
        others = read_pairs(held_out, tokenizer, config.train.seq_len, config.pairs)
        found = Pairs(found.train + found.held_back, others.train + others.held_back, found.counts)
    if epochs is not None:
        config = config.but(**{"train.steps": math.ceil(epochs * len(found.train) / config.train.batch_size)})

    def work(folder: RunFolder) -> dict[str, Any]:
        if config.average == 1:
            return _train(config, folder, model, tokenizer, found)
        members: list[Path] = []
        for number in range(config.average):
            members.append(folder.path / "members" / str(number))
            changes: dict[str, Any] = {"average": 1, "train.seed": config.train.seed + number}
            changes["train.optim.lr"] = config.train.optim.lr * _RATES[number % len(_RATES)]
            run(config.but(**changes), members[-1], model, pairs, held_out=held_out)
        prepared(MergeConfig(method="linear"), members)(folder)
        made = [checkpoint.load_reward(one) for one in (folder.path, *members)]
        told = [measured(one, found.held_back) for one in made]
        return _told(found) | told[0] | {"members": told[1:]}

    named = {"model": model, "pairs": pairs, "held_out": held_out}
    card = run_stage(
        STAGE, config, out, work, inputs={name: path for name, path in named.items() if path}, fresh=fresh,
        next_step=f"gemwright rlhf MODEL --reward {out} --prompts PROMPTS --out OUT",
    )  # fmt: skip
    resume.clear(out)
    return card


def _train(
    config: RewardConfig, folder: RunFolder, start: Path, tokenizer: Tokenizer, pairs: Pairs
) -> dict[str, Any]:
    device = pick_device()
    seed_everything(config.seed)
    model = RewardModel.of(checkpoint.load(start, dtype=torch.float32, device=device))
    with torch.no_grad():  # resumed, too: the card tells how good the model was before
        model.score.weight.copy_(linear_probe(model, pairs.train))
    few = config.train.micro_batch_size or config.train.batch_size

    def batches(step: int) -> list[Batch]:
        taken = pairs.batch(step, config.train.batch_size, config.train.seed)
        return [
            pair_batch(taken[first : first + few], config.train.seq_len, device)
            for first in range(0, len(taken), few)
        ]

    def validate(model: Gemma) -> dict[str, float]:
        assert isinstance(model, RewardModel)
        found = measured(model, pairs.held_back)
        return {name: found[name] for name in ("validation", "accuracy") if name in found}

    before = {f"{name}_before": value for name, value in validate(model).items()}
    train(model, preference, batches, config.train, folder, validate)
    checkpoint.save(model, folder.path)
    tokenizer.save(folder.path)
    return {
        "parameters": cost.parameters(model.config) + model.config.d_model,
        **_told(pairs),
        "epochs": round(config.train.steps * config.train.batch_size / len(pairs.train), 3),
        **before, **measured(model, pairs.held_back),
    }  # fmt: skip


def _told(pairs: Pairs) -> dict[str, int]:
    return pairs.counts | {"trained_on": len(pairs.train), "measured_on": len(pairs.held_back)}


def pair_batch(pairs: Sequence[Pair], seq_len: int, device: torch.device | str = "cpu") -> Batch:
    """Pairs in packed rows. At the last id of a conversation the target says whose it is: of the n-th pair's
    chosen one n + 1, of its rejected one -(n + 1). The chosen ones' ends weigh 1."""
    texts = [side for pair in pairs for side in pair]
    rows, ends = pack_whole(texts, seq_len)
    targets, weights = torch.zeros_like(rows), torch.zeros(rows.shape)
    row, column = ends.T
    number = torch.arange(1, len(pairs) + 1)
    targets[row, column] = torch.stack((number, -number), 1).flatten()
    weights[row[::2], column[::2]] = 1.0
    rows = rows.to(device)
    return Batch(rows, targets.to(device), weights.to(device), packed(rows == SPECIAL["<bos>"]))


def preference(model: Gemma, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The summed loss of `pair_batch`, and how many pairs were ranked rightly."""
    assert isinstance(model, RewardModel)
    ends = batch.targets != 0
    values = model.scores(model.hidden(batch.ids, batch.places)[ends])
    owner = batch.targets[ends]
    chosen, rejected = (values[side][owner[side].abs().argsort()] for side in (owner > 0, owner < 0))
    return bradley_terry(chosen, rejected).sum(), {"accuracy": float((chosen > rejected).sum())}


def measured(model: RewardModel, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Share of pairs that a model ranks rightly, with its 95 % bootstrap interval, and nats a pair."""
    if not pairs:
        return {}
    apart = scores(model, [side for pair in pairs for side in pair]).view(-1, 2) @ torch.tensor([1.0, -1.0])
    right = Measure((apart > 0).double().numpy() + 0.5 * (apart == 0).double().numpy(), np.ones(len(pairs)))
    low, high = right.interval()
    return {
        "accuracy": right.value, "accuracy_low": low, "accuracy_high": high,
        "validation": float(F.softplus(-apart).mean()), "margin": float(apart.mean()),
    }  # fmt: skip


def linear_probe(model: RewardModel, pairs: Sequence[Pair]) -> Float[Tensor, "1 D"]:
    """The head that tells the pairs apart best while the model is frozen, by Newton's way with a ridge."""
    found = states(model, [side for pair in pairs for side in pair]).double()
    apart = found[::2] - found[1::2]
    weight = torch.zeros(apart.shape[1], dtype=torch.float64, requires_grad=True)
    ways = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        ways.zero_grad()
        loss = F.softplus(-apart @ weight).mean() + _RIDGE * weight.square().sum() / 2
        loss.backward()
        return loss

    ways.step(closure)
    return weight.detach().float()[None].to(model.device)
