"""A reward model of one's own making on human preferences, next to a bag of words.

    python -m bench.reward --json --folds 1

The pairs are HH-RLHF's harmless test set (`safety/hh_rlhf_harmless_test.jsonl.gz` below GEMWRIGHT_DATA): four
fifths to learn from, one fifth held out, by line. There is no pretrained model: a tokenizer and a small Gemma
are made from the dialogues of the four fifths alone, then the reward model from that. It judges the last
exchange alone: the two of a pair differ in nothing but the last answer. The bag of words is a logistic
regression on differences of hashed TF-IDF counts of words and pairs of words in these answers. Both are asked
about the same pairs, and what lies between them has its interval, too.
"""

import argparse
import gzip
import itertools
import json
import math
import os
import re
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemwright.evaluate.answers import Measure
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig, alternating
from gemwright.model.gemma import Gemma
from gemwright.posttrain import reward, sft
from gemwright.posttrain.reward import RewardConfig
from gemwright.posttrain.sft import SftConfig
from gemwright.reward.pairs import Messages, PairsConfig, sides
from gemwright.reward.scoring import scores
from gemwright.tokenizer.chat import encode_conversation
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.tokenizer.train import TokenizerConfig, train
from gemwright.train.loop import TrainConfig
from gemwright.train.optim import OptimConfig

FILE = "safety/hh_rlhf_harmless_test.jsonl.gz"
FOLDS, BUCKETS, RIDGE = 5, 1 << 16, 3e-4
PIECES, SEQ_LEN = 2048, 256
LAST = 2  # messages of a conversation that are judged


def model() -> GemmaConfig:
    """0.5M parameters beside the embedding's 0.3M."""
    return GemmaConfig(
        d_model=128, d_ff=512, num_heads=4, num_kv_heads=2, head_dim=32, pattern=alternating(2),
        vocab_size=PIECES, query_pre_attn_scalar=32, window=64, max_seq_len=1024,
    )  # fmt: skip


def bag_of_words(train_lines: Sequence[str], test_lines: Sequence[str]) -> np.ndarray:
    """Which held-out pairs the baseline ranks rightly."""
    texts = [[side[-1]["content"] for side in sides(line)] for line in (*train_lines, *test_lines)]
    counted = [[_counts(text) for text in pair] for pair in texts]
    seen = Counter(word for pair in counted[: len(train_lines)] for side in pair for word in side)
    total = 2 * len(train_lines)
    idf = torch.tensor([math.log((1 + total) / (1 + seen[bucket])) + 1 for bucket in range(BUCKETS)])
    rows = torch.stack([_vector(one, idf) - _vector(other, idf) for one, other in counted])
    learnt, asked = rows[: len(train_lines)], rows[len(train_lines) :]
    weight = torch.zeros(BUCKETS, requires_grad=True)
    ways = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        ways.zero_grad()
        loss = F.softplus(-learnt @ weight).mean() + RIDGE * weight.square().sum() / 2
        loss.backward()
        return loss

    ways.step(closure)
    return ranked(asked @ weight.detach())


def ranked(apart: Tensor) -> np.ndarray:
    """1 for a pair whose better side has the higher score, by so much; half for a tie."""
    return (apart > 0).double().numpy() + 0.5 * (apart == 0).double().numpy()


def _counts(text: str) -> Counter[int]:
    words = re.findall(r"\w+", text.lower())
    grams = [*words, *(" ".join(pair) for pair in itertools.pairwise(words))]
    return Counter(zlib.crc32(gram.encode()) % BUCKETS for gram in grams)


def _vector(counts: Counter[int], idf: Tensor) -> Tensor:
    row = torch.zeros(BUCKETS)
    for bucket, count in counts.items():
        row[bucket] = (1 + math.log(count)) * idf[bucket]
    return row / row.norm().clamp(min=1e-9)


def judged(folder: Path, lines: Sequence[str]) -> np.ndarray:
    """Which pairs a reward model ranks rightly: of every line, the longest too."""
    model, tokenizer = checkpoint.load_reward(folder), Tokenizer.load(folder)
    room = model.config.max_seq_len
    texts = [
        encode_conversation(tokenizer, side[-LAST:])[0][-room:] for line in lines for side in sides(line)
    ]
    return ranked(scores(model, texts).view(-1, 2) @ torch.tensor([1.0, -1.0]))


def fold(
    lines: Sequence[str], number: int, home: Path, lm_steps: int, steps: int, average: int
) -> dict[str, Any]:
    """One fold: everything from the four fifths, measured on the fifth. What is right, pair by pair, too."""
    parts = {
        "train": [line for place, line in enumerate(lines) if place % FOLDS != number],
        "test": lines[number::FOLDS],
    }
    home.mkdir(parents=True)
    for name, some in parts.items():
        pairs = [
            dict(zip(("chosen", "rejected"), (side[-LAST:] for side in sides(x)), strict=True)) for x in some
        ]
        write(home / f"{name}.jsonl", pairs)
    chats: list[Messages] = []
    for better, worse in map(sides, parts["train"]):
        chats += [better, worse[-LAST:]]  # what both say is learnt once
    write(home / "chats.jsonl", [{"messages": chat} for chat in chats])
    texts = (message["content"] for chat in chats for message in chat)
    start = home / "start"
    torch.manual_seed(0)
    checkpoint.save(Gemma(model()), start)
    Tokenizer(train(texts, TokenizerConfig(vocab_size=PIECES))).save(start)

    def training(steps: int, rate: float, size: int, seq_len: int) -> TrainConfig:
        return TrainConfig(
            steps=steps, batch_size=size, seq_len=seq_len, optim=OptimConfig(lr=rate), compile=False,
            validate_every=steps, save_every=steps,
        )  # fmt: skip

    language = SftConfig(train=training(lm_steps, 5e-3, 8, SEQ_LEN))
    card = sft.run(language, home / "language", start, home / "chats.jsonl")
    config = RewardConfig(
        train=training(steps, 1e-3, 16, 384), average=average, pairs=PairsConfig(malformed="skip")
    )
    out = home / "reward"
    reward.run(config, out, home / "language", home / "train.jsonl", held_out=home / "test.jsonl")
    probed = out if average == 1 else out / "members/0"
    probe = json.loads((probed / "card.json").read_text(encoding="utf-8"))["results"]
    right = {"accuracy": judged(out, parts["test"]), "baseline": bag_of_words(parts["train"], parts["test"])}
    found = {name: round(float(which.mean()), 4) for name, which in right.items()}
    told = {"probe": probe["accuracy_before"], "pairs": len(parts["test"])}
    return {"right": right, **found, **told, "nats_a_token": card.results["validation"]}


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    """So many folds, each from nothing."""
    parser = argparse.ArgumentParser(description="A reward model on human preferences, and a bag of words.")
    parser.add_argument("--folds", type=int, default=1)
    parser.add_argument("--lm-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=115)
    parser.add_argument("--average", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with gzip.open(Path(os.environ["GEMWRIGHT_DATA"]) / FILE, "rt", encoding="utf-8") as file:
        lines = [line for line in file if _is_pair(line)]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        found = [
            fold(lines, number, Path(scratch) / str(number), options.lm_steps, options.steps, options.average)
            for number in range(options.folds)
        ]
    right = {name: np.concatenate([one["right"][name] for one in found]) for name in ("accuracy", "baseline")}
    low, high = interval(right["accuracy"])
    ahead = right["accuracy"] - right["baseline"]
    told: dict[str, Any] = {name: round(float(which.mean()), 4) for name, which in right.items()}
    told |= {
        "low": low, "high": high, "probe": round(float(np.mean([one["probe"] for one in found])), 4),
        "ahead": round(float(ahead.mean()), 4), "ahead_interval": interval(ahead), "pairs": len(ahead),
        "folds": [{name: value for name, value in one.items() if name != "right"} for one in found],
        "seconds": round(time.monotonic() - begun, 1), "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(told, indent=None if options.json else 2))


def interval(values: np.ndarray) -> list[float]:
    """The 95 % bootstrap interval of a mean."""
    return [round(end, 4) for end in Measure(values, np.ones(len(values))).interval()]


def _is_pair(line: str) -> bool:
    try:
        return all(len(side) % 2 == 0 for side in sides(line))
    except ValueError:
        return False


if __name__ == "__main__":
    main()
