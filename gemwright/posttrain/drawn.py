"""Training on what a model itself writes: prompts in the order of a run, and its conversations as batches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gemwright.data.conversations import is_held_back, pack
from gemwright.data.windows import in_turn
from gemwright.generate.rollout import Rollout
from gemwright.generate.sampling import Sampling
from gemwright.reading.prompts import read_prompts
from gemwright.tokenizer.chat import encode_prompt
from gemwright.tokenizer.tokenizer import SPECIAL, Tokenizer
from gemwright.train.loop import Batch, TrainConfig, make_batch

_VALIDATED = 64  # prompts, at most


class PromptOrder:
    """The prompts that fit a row, in the order of training, and those held back."""

    def __init__(self, prompts: Path, tokenizer: Tokenizer, train: TrainConfig, sampling: Sampling) -> None:
        """Read a folder of `gemwright prompts`, or a file.

        Raises:
            FileNotFoundError, ValueError: as `read_prompts`; or no prompt fits.
        """
        asked = read_prompts(prompts).asked
        room = train.seq_len + 1 - sampling.max_tokens
        fit: list[tuple[str, ...]] = []
        for prompt in asked:
            if len(encode_prompt(tokenizer, [{"role": "user", "content": prompt.turns[0]}])) < room:
                fit.append(prompt.turns)
        self.too_long = len(asked) - len(fit)
        self.held_back = [turns for turns in fit if is_held_back(turns[0])][:_VALIDATED]
        self._train = [turns for turns in fit if not is_held_back(turns[0])]
        self._seed = train.seed
        if not self._train:
            raise ValueError(
                f"none of {len(asked):,} prompts fits: with sampling.max_tokens={sampling.max_tokens} a row "
                f"of train.seq_len={train.seq_len} has room for {max(0, room - 1)} tokens of a prompt. Raise "
                "seq_len or lower max_tokens."
            )

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, step: int, size: int) -> list[tuple[int, tuple[str, ...]]]:
        """The prompts of an update, each with the number of its place in the run."""
        places = np.arange(step * size, (step + 1) * size, dtype=np.uint64)
        chosen = in_turn(places, len(self._train), self._seed)
        return [(int(place), self._train[int(i)]) for place, i in zip(places, chosen, strict=True)]


def batches_of_drawn(
    drawn: Sequence[Rollout], weights: Sequence[Sequence[float] | Sequence[bool]], config: TrainConfig,
    device: torch.device | str = "cpu",
) -> list[Batch]:  # fmt: skip
    """Conversations packed into rows, and these into portions. What a row cannot hold of one is cut off.

    A `<bos>` that a model drew is a token of its reply, and begins nothing.

    Args:
        weights: of each conversation, what each of its ids counts as a target.
    """
    most = config.seq_len + 1
    examples = [
        (one.ids[:most], [float(weight) for weight in those[:most]])
        for one, those in zip(drawn, weights, strict=True)
    ]
    packed = pack(examples, config.seq_len)
    parts = zip(*(one.split(config.micro_batch_size or len(one)) for one in packed), strict=True)
    return [
        make_batch(rows, SPECIAL["<bos>"], device, weights=counted, starts=begun)
        for rows, counted, begun in parts
    ]
