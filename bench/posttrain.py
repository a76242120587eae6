"""Where the time of post-training goes: answers at once against one by one, and an on-policy update in parts.

    python -m bench.posttrain --json

Answers: a teacher with random weights answers the same short prompts one at a time, and in batches.

On-policy: updates of a student under a teacher, every second of them booked. `forward` are the passes of
student and teacher, those of decoding too; then come the exact head losses, the backward pass, drawing and
scheduling, packing, the optimiser; `rest` is what is left of the loop.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.generate import write_tokenizer
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig, alternating, size
from gemwright.model.gemma import Gemma

PROMPT = "How many parameters does this function take?\n\ndef parse_{}(self, text, default=None)"
TOKENS = 24
BATCHES = (8, 32)
VOCABULARY = 800


def laptop(layers: int, width: int, heads: int) -> GemmaConfig:
    """The shape of the laptop recipe's models."""
    return GemmaConfig(
        d_model=width, d_ff=4 * width, num_heads=heads, num_kv_heads=heads // 2, head_dim=32,
        pattern=alternating(layers), vocab_size=VOCABULARY, query_pre_attn_scalar=32, window=64,
        max_seq_len=512,
    )  # fmt: skip


PAIRS = {
    "laptop": (laptop(2, 64, 2), laptop(4, 128, 4)),
    "30m": (size("6m").but(vocab_size=VOCABULARY), size("30m").but(vocab_size=VOCABULARY)),
}
"""Student and teacher."""


def write(folder: Path, config: GemmaConfig) -> Path:
    """A checkpoint with random weights and a tokenizer."""
    torch.manual_seed(0)
    checkpoint.save(Gemma(config), folder)
    write_tokenizer(folder)
    return folder


def answers(folder: Path, rounds: int) -> dict[str, float]:
    """Tokens a second of a teacher, by conversations at a time; the median of some rounds, taken in turns."""
    from gemwright.generate.rollout import rollouts
    from gemwright.generate.sampling import Sampling
    from gemwright.tokenizer.tokenizer import Tokenizer

    model, tokenizer = checkpoint.load(folder), Tokenizer.load(folder)
    sampling = Sampling(temperature=1.0, max_tokens=TOKENS, stop_ids=())
    speeds: dict[int, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for batch in (1, *BATCHES):
            asked = [(number, [PROMPT.format(number)]) for number in range(16 if batch == 1 else 64)]
            start = time.perf_counter()
            found = list(rollouts(model, tokenizer, asked, sampling, max_batch=batch))
            speeds[batch].append(len(found) * TOKENS / (time.perf_counter() - start))
    return {str(batch): round(statistics.median(values), 1) for batch, values in speeds.items()}


class Clock:
    """Seconds by part; a part that begins inside another is taken out of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open = ["outside"]
        self._since = time.perf_counter()

    def watched(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, with every call booked."""

        def call(*arguments: Any, **options: Any) -> Any:
            self._book()
            self._open.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self._book()
                self._open.pop()

        return call

    def _book(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


def on_policy(student: Path, teacher: Path, out: Path, steps: int) -> dict[str, Any]:
    """Seconds of an update, and the shares of its parts."""
    from gemwright.generate.sampling import Sampling
    from gemwright.losses import dense
    from gemwright.posttrain import drawn
    from gemwright.posttrain import on_policy as stage
    from gemwright.train import loop
    from gemwright.train.loop import TrainConfig
    from gemwright.train.optim import OptimConfig

    config = stage.OnPolicyConfig(
        train=TrainConfig(
            steps=steps, batch_size=16, seq_len=128, optim=OptimConfig(lr=1e-6), validate_every=10**6,
            save_every=10**6, compile=False,
        ),
        sampling=Sampling(temperature=1.0, max_tokens=TOKENS, stop_ids=()),
    )  # fmt: skip
    prompts = out.with_suffix(".txt")
    prompts.write_text(
        "".join(PROMPT.replace("\n", " ").format(n) + "\n" for n in range(200)), encoding="utf-8"
    )
    clock = Clock()
    with ExitStack() as patched:
        for owner, name, part in (
            (stage, "train", "rest"),
            (stage, "in_order", "decode: drawing, scheduling"),
            (stage, "batches_of_drawn", "packing"),
            (Gemma, "hidden", "forward"),
            (Gemma, "logits", "forward"),
            (dense, "divergence", "head loss, forward and backward"),
            (torch.Tensor, "backward", "backward"),
            (loop, "_update", "optimiser, clipping"),
        ):
            watched = clock.watched(getattr(owner, name), part)
            patched.enter_context(mock.patch.object(owner, name, watched))
        # No validation: only updates are timed.
        patched.enter_context(mock.patch.object(drawn, "is_held_back", return_value=False))
        stage.run(config, out, student, teacher, prompts)
    spent = {part: seconds for part, seconds in clock.seconds.items() if part != "outside"}
    total = sum(spent.values())
    return {"seconds": round(total / steps, 4), **{p: round(s / total, 3) for p, s in sorted(spent.items())}}


def main() -> None:
    """Both benchmarks for every pair."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as scratch:
        for name, configs in PAIRS.items():
            home = Path(scratch) / name
            student, teacher = (
                write(home / role, c) for role, c in zip(("student", "teacher"), configs, strict=True)
            )
            speeds = answers(teacher, options.rounds)
            results[name] = {
                "answers_tokens_per_s": speeds,
                "answers_over_one_by_one": {b: round(s / speeds["1"], 2) for b, s in speeds.items()},
                "on_policy_update": on_policy(student, teacher, home / "run", options.steps),
            }
    print(json.dumps(results, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
