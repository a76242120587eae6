"""A reward model of one's own making on human preferences, next to a bag of words.

    python -m bench.reward --json --folds 1

The pairs are HH-RLHF's harmless test set (`safety/hh_rlhf_harmless_test.jsonl.gz` below GEMWRIGHT_DATA): four
fifths to learn from, one fifth held out, by line. There is no pretrained model: a tokenizer and a small Gemma
are made from the dialogues of the four fifths alone, then the reward model from that. The bag of words is a
logistic regression on differences of hashed TF-IDF counts of words and pairs of words in the last answers.
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

import torch
import torch.nn.functional as F
from torch import Tensor

from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig, alternating
from gemwright.model.gemma import Gemma
from gemwright.posttrain import reward, sft
from gemwright.posttrain.reward import RewardConfig
from gemwright.posttrain.sft import SftConfig
from gemwright.reward.pairs import PairsConfig, sides
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.tokenizer.train import TokenizerConfig, train
from gemwright.train.loop import TrainConfig
from gemwright.train.optim import OptimConfig

FILE = "safety/hh_rlhf_harmless_test.jsonl.gz"
FOLDS, BUCKETS, RIDGE = 5, 1 << 16, 3e-4
PIECES, SEQ_LEN = 4096, 384


def model() -> GemmaConfig:
    """1.3M parameters beside the embedding's 0.8M."""
    return GemmaConfig(
        d_model=192, d_ff=512, num_heads=6, num_kv_heads=3, head_dim=32, pattern=alternating(4),
        vocab_size=PIECES, query_pre_attn_scalar=32, window=128, max_seq_len=512,
    )  # fmt: skip


def bag_of_words(train_lines: Sequence[str], test_lines: Sequence[str]) -> float:
    """The share of held-out pairs that the baseline ranks rightly."""
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
    return float((asked @ weight.detach() > 0).double().mean())


def _counts(text: str) -> Counter[int]:
    words = re.findall(r"\w+", text.lower())
    grams = [*words, *(" ".join(pair) for pair in itertools.pairwise(words))]
    return Counter(zlib.crc32(gram.encode()) % BUCKETS for gram in grams)


def _vector(counts: Counter[int], idf: Tensor) -> Tensor:
    row = torch.zeros(BUCKETS)
    for bucket, count in counts.items():
        row[bucket] = (1 + math.log(count)) * idf[bucket]
    return row / row.norm().clamp(min=1e-9)


def fold(
    lines: Sequence[str], number: int, home: Path, lm_steps: int, steps: int, average: int
) -> dict[str, Any]:
    """One fold: everything from the four fifths, measured on the fifth."""
    parts = {
        "train": [line for place, line in enumerate(lines) if place % FOLDS != number],
        "test": lines[number::FOLDS],
    }
    home.mkdir(parents=True)
    for name, some in parts.items():
        (home / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
    chats = [side for line in parts["train"] for side in sides(line)]
    rows = (json.dumps({"messages": chat}) + "\n" for chat in chats)
    (home / "chats.jsonl").write_text("".join(rows), encoding="utf-8")
    texts = (message["content"] for chat in chats for message in chat)
    start = home / "start"
    torch.manual_seed(0)
    checkpoint.save(Gemma(model()), start)
    Tokenizer(train(texts, TokenizerConfig(vocab_size=PIECES))).save(start)

    def training(steps: int, rate: float, size: int) -> TrainConfig:
        return TrainConfig(
            steps=steps, batch_size=size, seq_len=SEQ_LEN, optim=OptimConfig(lr=rate), compile=False,
            validate_every=steps, save_every=steps,
        )  # fmt: skip

    language = SftConfig(train=training(lm_steps, 4e-3, 8))
    card = sft.run(language, home / "language", start, home / "chats.jsonl")
    judged = RewardConfig(
        train=training(steps, 1e-4, 16), average=average, pairs=PairsConfig(malformed="skip")
    )
    found = reward.run(
        judged, home / "reward", home / "language", home / "train.jsonl", held_out=home / "test.jsonl"
    ).results
    probed = home / ("reward" if average == 1 else "reward/members/0")
    probe = json.loads((probed / "card.json").read_text(encoding="utf-8"))["results"]
    return {
        "accuracy": found["accuracy"], "low": found["accuracy_low"], "high": found["accuracy_high"],
        "probe": probe["accuracy_before"], "members": [one["accuracy"] for one in found.get("members", [])],
        "baseline": bag_of_words(parts["train"], parts["test"]), "pairs": found["measured_on"],
        "nats_a_token": card.results["validation"],
    }  # fmt: skip


def main() -> None:
    """So many folds, each from nothing."""
    parser = argparse.ArgumentParser(description="A reward model on human preferences, and a bag of words.")
    parser.add_argument("--folds", type=int, default=1)
    parser.add_argument("--lm-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=40)
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
    told = {"folds": found, "seconds": round(time.monotonic() - begun, 1), "threads": torch.get_num_threads()}
    for name in ("accuracy", "probe", "baseline"):
        told[name] = round(sum(one[name] for one in found) / len(found), 4)
    print(json.dumps(told, indent=None if options.json else 2))


def _is_pair(line: str) -> bool:
    try:
        return all(len(side) % 2 == 0 for side in sides(line))
    except ValueError:
        return False


if __name__ == "__main__":
    main()
