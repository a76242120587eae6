"""What a chat model replies: whether it is right, whether it loops, and what a teacher thinks of it.

A model answers every prompt greedily, as it is used: so one sees whether its replies hold what they have to.
And it answers some times from its own distribution, for the teacher to grade. Of the tokens y that it drew,

    -log P_T(y)                   tells how likely the teacher would have said the same;
    log P_S(y) - log P_T(y)       has for its mean the reverse KL, KL(P_S || P_T): a Monte-Carlo estimate.

Both are taken on the ids that were drawn, never on text that would be encoded anew. A token counts where the
model chose it, each `<end_of_turn>` included; the `<eos>` after the last one is put there by rule.

Prompts, and not tokens, are the sample: a measure is a ratio of sums over prompts, and its interval is the
bootstrap's over prompts. All measures are resampled alike, so two models that were asked the same can be
compared prompt by prompt.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from gemwright.config import Config
from gemwright.generate.rollout import Rollout, padded, rollouts
from gemwright.generate.sampling import Sampling
from gemwright.losses.divergence import cross_entropy
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer

_CHUNK_BYTES = 64 << 20  # of logits at a time
_RESAMPLES, _COVERED = 1000, 0.95
_RUN = 4  # tokens that stand twice: a loop


@dataclass(frozen=True)
class Asked:
    """A user's turns, and what a right reply to each holds."""

    turns: tuple[str, ...]
    keys: tuple[str | None, ...] = ()
    """One a turn, None where a reply cannot be checked; or none at all."""

    def __post_init__(self) -> None:
        """Raise ValueError for no turns, or keys for some of them only."""
        if not self.turns:
            raise ValueError("it has no turn of the user. Give at least one.")
        if self.keys and len(self.keys) != len(self.turns):
            raise ValueError(
                f"it has {len(self.turns)} turns and {len(self.keys)} keys. Give one a turn, null where a "
                "reply cannot be checked."
            )


class AnswersEvalConfig(Config):
    """How models are asked."""

    samples: PositiveInt = 2
    """Replies a prompt that are drawn for the teacher to grade."""
    temperature: PositiveFloat = 1.0
    """Of the draws; at 1 alone is the mean of their log-ratios a reverse KL."""
    max_tokens: PositiveInt = 128
    """Most tokens a reply."""
    seed: NonNegativeInt = 0
    """Of the draws."""
    max_batch: PositiveInt = 8
    """Conversations at a time."""


@dataclass(frozen=True)
class Measure:
    """A ratio of two sums over prompts."""

    over: Float[np.ndarray, " P"]
    """What each prompt adds above the line."""
    under: Float[np.ndarray, " P"]
    """What it adds below."""

    @property
    def value(self) -> float:
        """The ratio; NaN where nothing stands below."""
        return float(_ratio(self.over.sum(), self.under.sum()))

    def resampled(self) -> Float[np.ndarray, " R"]:
        """The ratio on 1,000 resamples of the prompts, the same ones for every measure of as many prompts."""
        draw, size = np.random.default_rng(0), len(self.over)
        taken = (draw.integers(size, size=size) for _ in range(_RESAMPLES))
        return np.array([_ratio(self.over[prompts].sum(), self.under[prompts].sum()) for prompts in taken])

    def interval(self) -> tuple[float, float]:
        """The middle 95 % of them."""
        tail = (1 - _COVERED) / 2
        low, high = np.nanquantile(self.resampled(), (tail, 1 - tail))
        return float(low), float(high)


@dataclass(frozen=True)
class Judged:
    """What one model's replies were like, by the name of the measure.

    `accuracy` (of turns with a key), `repetition` (share of replies that loop), `tokens` (a reply) and
    `finished` (share that ended by themselves) are of the greedy replies; `teacher_nats_per_token`,
    `teacher_nats_per_answer` and `reverse_kl_per_token` of the drawn ones.
    """

    measures: dict[str, Measure]
    """Without those that nothing was measured for: no key, no teacher."""
    replies: tuple[tuple[str, ...], ...]
    """The greedy ones, by prompt."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a card: of every measure value, low and high, and the number of prompts."""
        rows = {
            name: dict(zip(("value", "low", "high"), (one.value, *one.interval()), strict=True))
            for name, one in self.measures.items()
        }
        return {"prompts": len(self.replies), **rows}

    def told(self) -> str:
        """A line for people."""
        parts: list[str] = []
        for name, one in self.measures.items():
            low, high = one.interval()
            parts.append(f"{name} {one.value:.3g} ({low:.3g} to {high:.3g})")
        return f"{len(self.replies):,} prompts: {', '.join(parts)}"


def read_asked(path: Path) -> list[Asked]:
    """Prompts from jsonl: `turns` (texts) and, optionally, `keys` (a text or null a turn).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is something else, which the message names; or no line.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}. Name one with an object a line, with turns and keys."
        )
    found: list[Asked] = []
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for line in file:
                number += 1
                if line.strip():
                    found.append(_parse(json.loads(line)))
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path} asks nothing. Write an object with turns a line.")
    return found


def _parse(record: Any) -> Asked:
    match record:
        case {"turns": [*turns]} if all(isinstance(turn, str) for turn in turns):
            keys = record.get("keys") or []
            if isinstance(keys, list) and all(isinstance(key, str | None) for key in keys):
                return Asked(tuple(turns), tuple(keys))
            raise ValueError("its keys are no list of texts and nulls.")
    raise ValueError("it has no turns, a list of texts.")


def judge(
    model: Gemma,
    tokenizer: Tokenizer,
    asked: Sequence[Asked],
    config: AnswersEvalConfig,
    *,
    teacher: Gemma | None = None,
    right: Callable[[str, str], bool],
) -> Judged:
    """Ask a model everything, and measure its replies.

    Args:
        teacher: grades what was drawn; None: nothing is drawn. It reads the same ids, so it has to have the
            model's tokenizer.
        right: whether a reply holds a key. A turn that was never reached, because the reply before it did not
            end, is not right.
    Raises:
        ValueError: nothing is asked, the teacher knows fewer ids or reads fewer than the model, or a first
            turn does not fit the model.
    """
    if not asked:
        raise ValueError("nothing is asked. Give at least one prompt.")
    if teacher is not None:
        for what in ("vocab_size", "max_seq_len"):
            has, needed = getattr(teacher.config, what), getattr(model.config, what)
            if has < needed:
                raise ValueError(
                    f"the teacher's {what}={has:,} is less than the model's {needed:,}: it could not read "
                    "all that the model may write. Take another teacher."
                )

    def answered(samples: int, temperature: float) -> list[list[Rollout]]:
        """So many rollouts of each prompt."""
        sampling = Sampling(max_tokens=config.max_tokens, temperature=temperature, seed=config.seed)
        turns = ((number, asked[number // samples].turns) for number in range(len(asked) * samples))
        done = dict(rollouts(model, tokenizer, turns, sampling, max_batch=config.max_batch))
        return [[done[n * samples + k] for k in range(samples)] for n in range(len(asked))]

    greedy = [one for (one,) in answered(1, 0.0)]
    measures = _of_greedy(greedy, asked, right)
    if teacher is not None:
        drawn = answered(config.samples, config.temperature)
        measures |= _of_drawn(drawn, model, teacher, config.max_batch)
    measures = {name: one for name, one in measures.items() if one.under.any()}
    return Judged(measures, tuple(tuple(reply.text for reply in one.replies) for one in greedy))


def _of_greedy(
    greedy: Sequence[Rollout], asked: Sequence[Asked], right: Callable[[str, str], bool]
) -> dict[str, Measure]:
    hits = [
        [
            right(reply.text, key)
            for reply, key in zip(one.replies, prompt.keys, strict=False)
            if key is not None
        ]
        for one, prompt in zip(greedy, asked, strict=True)
    ]
    keyed = [sum(key is not None for key in prompt.keys) for prompt in asked]
    replies = [[*one.replies] for one in greedy]
    every = [len(some) for some in replies]
    return {
        "accuracy": _measure(map(sum, hits), keyed),
        "repetition": _measure((sum(loops(reply.ids) for reply in some) for some in replies), every),
        "tokens": _measure((sum(len(reply.ids) for reply in some) for some in replies), every),
        "finished": _measure((sum(reply.finish == "stop" for reply in some) for some in replies), every),
    }


def _of_drawn(
    drawn: Sequence[Sequence[Rollout]], model: Gemma, teacher: Gemma, batch_size: int
) -> dict[str, Measure]:
    flat = [one for some in drawn for one in some]

    def by_prompt(values: Sequence[float] | Sequence[int]) -> np.ndarray:
        return np.array(values, dtype=float).reshape(len(drawn), -1).sum(1)

    own = by_prompt(nats(model, flat, batch_size))
    graded = by_prompt(nats(teacher, flat, batch_size))
    tokens = by_prompt([sum(one.chosen) for one in flat])
    return {
        "teacher_nats_per_token": Measure(graded, tokens),
        "teacher_nats_per_answer": Measure(graded, by_prompt([len(one.replies) for one in flat])),
        "reverse_kl_per_token": Measure(graded - own, tokens),
    }


def loops(ids: Sequence[int]) -> bool:
    """Whether some run of four tokens stands in a reply more than once; overlapping ones count."""
    runs = [tuple(ids[start : start + _RUN]) for start in range(len(ids) - _RUN + 1)]
    return len(set(runs)) < len(runs)


@torch.no_grad()
def nats(model: Gemma, drawn: Sequence[Rollout], batch_size: int = 8) -> list[float]:
    """-log P of the ids that were chosen in each rollout, summed, by any model of the same tokenizer."""
    few = max(1, _CHUNK_BYTES // (4 * model.config.vocab_size))
    sums = torch.zeros(len(drawn), dtype=torch.float64)
    # Layers compiled for training run eagerly here, as in `likelihood`.
    with torch.compiler.set_stance("eager_on_recompile"):
        for numbers, ids, scored in padded(drawn, batch_size, model.device):
            row, column = scored.nonzero().T
            hidden = model.hidden(ids)[row, column - 1]
            parts = zip(hidden.split(few), ids[row, column].split(few), strict=True)
            each = [cross_entropy(model.logits(states), targets) for states, targets in parts]
            if each:
                sums.index_add_(0, torch.tensor(numbers)[row.cpu()], torch.cat(each).double().cpu())
    return sums.tolist()


def _measure(over: Any, under: Any) -> Measure:
    return Measure(np.array([*over], dtype=float), np.array([*under], dtype=float))


def _ratio(over: np.floating, under: np.floating) -> float:
    return float(over / under) if under else float("nan")
