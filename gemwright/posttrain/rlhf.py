"""RLHF: a chat model learns to write what a reward model likes, without leaving itself too far behind.

The report (section 4) uses "similar RLHF algorithm as Gemma 1.1", on the prompts of SFT; Gemma 1's report has
"a variant of REINFORCE with a KL regularization term towards the initially tuned model". As in WARP (arXiv
2406.16768, algorithm 1), which adds the moving anchor, an update is

    y_1 .. y_K ~ policy(x)           R_k = r(x, y_k) - length |y_k| - beta log(policy(y_k) / anchor(y_k))
    A_k = R_k - mean of the other R_j                        gradient: sum_k A_k grad log policy(y_k)
    anchor <- (1 - mu) anchor + mu policy

The leave-one-out baseline (RLOO, arXiv 2402.14740) is our choice, where neither tells one: it hangs on none
of y_k's own draws, so the gradient stays unbiased. r judges the whole conversation at its last token. log
policy and |y| count the ids that were drawn, the end of a turn among them. A temperature other than 1, or
cuts, make the policy another one than the gradient speaks of.

A reward model is an imperfect judge, and who is optimised against it finds its faults. A second one, of other
pairs, watches: where the first is ever happier and the second no longer, stop.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveInt

from gemwright.config import Config
from gemwright.device import pick_device, seed_everything
from gemwright.generate.rollout import Rollout, in_order
from gemwright.generate.sampling import Sampling
from gemwright.model import checkpoint, cost
from gemwright.model.gemma import Gemma, RewardModel
from gemwright.posttrain import rlhf_report
from gemwright.posttrain.drawn import PromptOrder, batches_of_drawn
from gemwright.posttrain.sft import require_room
from gemwright.reward.scoring import log_ratios, measure, scores, shape
from gemwright.run import Card, RunFolder, run_stage, say
from gemwright.tokenizer.tokenizer import Tokenizer, require_same_tokenizer
from gemwright.train import resume
from gemwright.train.loop import Batch, NonFiniteError, TrainConfig, train
from gemwright.train.teacher import next_token

STAGE = "rlhf"
WATCHED = "watched_reward"
_EMPTY = 0.5  # share of empty replies at which a policy has collapsed


class RlhfConfig(Config):
    """One run of RLHF."""

    train: TrainConfig
    """Steps and optimiser. `batch_size` counts prompts, `seq_len` the tokens that a conversation may have."""
    samples: int = Field(default=4, ge=2)
    """Replies a prompt: each is judged against the mean of the others."""
    beta: NonNegativeFloat = 0.1
    """What a nat of distance from the anchor costs. WARP's is 0.1."""
    mu: float = Field(default=0.0, ge=0, le=1)
    """The anchor's step towards the policy after each update; 0 keeps the start. WARP's is 0.01."""
    length_penalty: NonNegativeFloat = 0.0
    """What a token of a reply costs. WARP tries 0.0005."""
    sampling: Sampling = Sampling(temperature=1.0, max_tokens=128)
    """How the policy writes; at temperature 1 without cuts, as itself."""
    max_batch: PositiveInt = 32
    """Conversations written at a time."""
    measured_samples: PositiveInt = 2
    """Replies to each prompt that is held back, when it is validated."""
    seed: int = 0
    """Of the draws; `train.seed` orders the prompts."""


class CollapsedError(RuntimeError):
    """The policy says nothing any more."""


def run(
    config: RlhfConfig, out: Path, model: Path, reward: Path, prompts: Path, *, watch: Path | None = None,
    start: Path | None = None, fresh: bool = False,
) -> Card:  # fmt: skip
    """Train the chat model `model` to please the reward model `reward`. Killed, it goes on.

    Args:
        prompts: a folder of `gemwright prompts`, or a file of prompts: those of SFT. Two in a hundred are
            held back, and tell reward, distance, entropy and length as training goes on.
        watch: a second reward model, which only looks on.
        start: the model that distances are told from, if not `model`.
    Raises:
        ValueError: another tokenizer, rows longer than a model's context, a language model for a reward
            model, no prompt that fits.
        NonFiniteError: reward or loss is not a number.
        CollapsedError: half of an update's replies are empty.
    """
    tokenizer, asked = opened(config, model, reward, prompts, watch)

    def work(folder: RunFolder) -> dict[str, Any]:
        return _work(config, folder, model, reward, watch, start or model, tokenizer, asked)

    named = {"model": model, "reward": reward, "prompts": prompts, "watch": watch, "start": start}
    card = run_stage(
        STAGE, config, out, work, inputs={name: path for name, path in named.items() if path}, fresh=fresh,
        next_step=f"gemwright chat {out}",
    )  # fmt: skip
    resume.clear(out)
    return card


def opened(
    config: RlhfConfig, model: Path, reward: Path, prompts: Path, watch: Path | None
) -> tuple[Tokenizer, PromptOrder]:
    """The tokenizer that all have, and the prompts; raises ValueError for what does not fit together."""
    tokenizer = Tokenizer.load(model)
    require_room(model, config.train.seq_len)
    for folder in filter(None, (reward, watch)):
        require_room(folder, config.train.seq_len)
        if checkpoint.load_kind(folder) is not RewardModel:
            raise ValueError(f"{folder} is a language model, and has no score. `gemwright reward` makes one.")
        require_same_tokenizer(
            folder, tokenizer, str(model), "Begin it with a model of the same family.", "reward model"
        )
    return tokenizer, PromptOrder(prompts, tokenizer, config.train, config.sampling)


def advantages(rewards: Float[np.ndarray, "B K"]) -> Float[np.ndarray, "B K"]:
    """What each reply's reward has over the mean of the other replies to its prompt."""
    count = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdims=True)) * count / (count - 1)


class _Run:
    """Policy, anchor and judges of a run."""

    def __init__(
        self, config: RlhfConfig, model: Path, reward: Path, watch: Path | None, start: Path,
        tokenizer: Tokenizer,
    ) -> None:  # fmt: skip
        device = pick_device()
        self.config, self.tokenizer = config, tokenizer
        self.policy = checkpoint.load(model, dtype=torch.float32, device=device)
        self.anchor = checkpoint.load(model, dtype=torch.float32, device=device).requires_grad_(False)
        self.start = checkpoint.load(start, dtype=torch.float32, device=device).requires_grad_(False)
        self.judges: dict[str, RewardModel] = {}
        for name, folder in (("reward", reward), (WATCHED, watch)):
            if folder is not None:
                self.judges[name] = checkpoint.load_reward(folder, device=device).requires_grad_(False)
        self.sampling = config.sampling.but(seed=(config.sampling.seed + config.seed) % 2**63)

    def batches(self, step: int, asked: PromptOrder) -> list[Batch]:
        """The conversations of an update, weighted by their advantages; the anchor moves before it."""
        config = self.config
        if step and config.mu:
            with torch.no_grad():
                for mine, its in zip(self.anchor.parameters(), self.policy.parameters(), strict=True):
                    mine.lerp_(its, config.mu)
        prompts = [
            (number * config.samples + sample, turns)
            for number, turns in asked.batch(step, config.train.batch_size)
            for sample in range(config.samples)
        ]
        drawn = in_order(self.policy, self.tokenizer, prompts, self.sampling, config.max_batch)
        told = self._judged(drawn, step)
        returns = told["reward"] - config.beta * told["log_ratio"] - config.length_penalty * told["length"]
        gains = advantages(returns.reshape(-1, config.samples)).flatten()
        weights = [[gain * own for own in one.chosen] for one, gain in zip(drawn, gains, strict=True)]
        parts = batches_of_drawn(drawn, weights, config.train, self.policy.device)
        sums = {name: float(told[name].sum()) for name in ("reward", "kl", "entropy", "tokens", "finished")}
        return [
            part._replace(count=0.0, known={})
            if number
            else part._replace(count=float(len(drawn)), known=sums)
            for number, part in enumerate(parts)
        ]

    def _judged(self, drawn: list[Rollout], step: int) -> dict[str, np.ndarray]:
        """Reward, distance and shape of an update's conversations; raises where there is nothing to learn."""
        told = log_ratios(self.policy, self.anchor, drawn, self.config.max_batch) | shape(drawn)
        told["reward"] = scores(self.judges["reward"], [one.ids for one in drawn]).double().numpy()
        if not all(np.isfinite(told[name]).all() for name in ("reward", "log_ratio")):
            what = "the reward" if not np.isfinite(told["reward"]).all() else "the distance from the anchor"
            raise NonFiniteError(
                f"{what} of a reply in update {step + 1} is not a number. Weights up to the last saved state "
                "are in the run's resume folder. Check the reward model (gemwright reward tells its "
                "accuracy), or lower optim.lr and start anew with --fresh."
            )
        if told["empty"].mean() > _EMPTY:
            raise CollapsedError(
                f"{told['empty'].mean():.0%} of the replies of update {step + 1} are empty: the policy has "
                "collapsed, as silence pleases the reward model best. Weights up to the last saved state are "
                f"in the run's resume folder. Raise beta (now {self.config.beta:g}), lower optim.lr or "
                "length_penalty, or mend the reward model; then start anew with --fresh."
            )
        return told

    def validate(self, policy: Gemma, held_back: list[tuple[str, ...]]) -> dict[str, float]:
        """Means over replies to the prompts that are held back, drawn with the same seeds every time."""
        if not held_back:
            return {}
        config = self.config
        found, _ = measure(
            policy, self.tokenizer, held_back, config.sampling, self.judges, self.start,
            samples=config.measured_samples, max_batch=config.max_batch,
        )  # fmt: skip
        return {f"held_back.{name}": float(values.mean()) for name, values in found.items()}


def _work(
    config: RlhfConfig, folder: RunFolder, model: Path, reward: Path, watch: Path | None, start: Path,
    tokenizer: Tokenizer, asked: PromptOrder,
) -> dict[str, Any]:  # fmt: skip
    seed_everything(config.seed)
    one = _Run(config, model, reward, watch, start, tokenizer)
    before = one.validate(one.policy, asked.held_back)
    if not resume.saved_steps(folder.path):
        folder.log(step=0, **before)
    last = train(
        one.policy, next_token, lambda step: one.batches(step, asked), config.train, folder,
        lambda policy: one.validate(policy, asked.held_back),
        also={"anchor": one.anchor} if config.mu else {},
    )  # fmt: skip
    checkpoint.save(one.policy, folder.path)
    tokenizer.save(folder.path)
    rlhf_report.write(folder.path)
    best = rlhf_report.best_watched(folder.path)
    if best is not None and best < config.train.steps:
        say(
            f"{folder.path}: the reward model that only looks on liked the policy best after update {best}. "
            "See report.html; fewer updates or a higher beta may serve."
        )
    return {
        "parameters": cost.parameters(one.policy.config),
        "prompts": len(asked), "held_back": len(asked.held_back), "too_long": asked.too_long,
        "epochs": round(config.train.steps * config.train.batch_size / len(asked), 3),
        "before": {name.removeprefix("held_back."): value for name, value in before.items()},
        "after": {name.removeprefix("held_back."): value for name, value in last.items()},
        "best_watched": best,
    }  # fmt: skip
