"""How long do multiple-choice questions take, next to lm-evaluation-harness with transformers?

    python -m bench.evaluate --json

Models with random weights, of the laptop recipe's shape and of one with 256,000 pieces, answer questions with
four choices, without examples and with five: made here, and where GEMWRIGHT_DATA is set ARC-easy's
(`benchmarks/arc_easy_test.json` below it, with Gemma's own tokenizer for the wide model). What is timed is
`loglikelihood`, from texts to scores, on the same requests: that of `gemwright.evaluate.harness`, and that of
the harness's own `hf` at some batch sizes, of which the best counts. Each has a process of its own, and they
take turns, round after round; the better round counts. Log-likelihoods must agree.
"""

import argparse
import inspect
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.turns import Ask, in_turns
from gemwright.benchmarks.forms import Form, Pair, ask
from gemwright.benchmarks.questions import Benchmark, Question
from gemwright.model.config import GemmaConfig, alternating

ARC, GEMMA = "benchmarks/arc_easy_test.json", "tokenizer/gemma2.model"
SHOTS = (0, 5)
NEAR = 1e-2
"""Nats between two log-likelihoods that are the same but for rounding."""
MODELS = {
    "laptop": GemmaConfig(
        d_model=128, d_ff=512, num_heads=4, num_kv_heads=2, head_dim=32, pattern=alternating(4),
        vocab_size=2048, query_pre_attn_scalar=32, window=64, max_seq_len=2048,
    ),
    "wide": GemmaConfig(
        d_model=256, d_ff=1024, num_heads=4, num_kv_heads=2, head_dim=64, pattern=alternating(4),
        vocab_size=256_000, query_pre_attn_scalar=64, window=256, max_seq_len=2048,
    ),
}  # fmt: skip
ITEMS = {"laptop": 100, "wide": 25}
BATCHES = {"laptop": (1, 4, 16, 64), "wide": (1, 2, 4)}
"""Of `hf`. Its own search, "auto", fills whatever memory there is, which on a CPU is all of the machine's."""


def synthetic(items: int) -> Benchmark:
    """What line comes next in a program? With what does not."""
    lines = [line for line in inspect.getsource(argparse).splitlines() if len(line) > 30]
    draw, questions = random.Random(0), list[Question]()
    for _ in range(items + 30):
        place = draw.randrange(len(lines) - 4)
        right = draw.randrange(4)
        choices = [line.strip() for line in draw.sample(lines, 4)]
        choices[right] = lines[place + 3].strip()
        if len(set(choices)) == 4:
            text = "\n".join(lines[place : place + 3])
            questions.append(Question(text, tuple(choices), (right,), gold=choices[right]))
    return Benchmark("synthetic", "choice", tuple(questions))


def benchmarks(items: int) -> list[Benchmark]:
    """What is asked on this machine."""
    data = os.environ.get("GEMWRIGHT_DATA")
    found = [synthetic(items)]
    if data is not None and (path := Path(data) / ARC).is_file():
        from gemwright.benchmarks.files import read_benchmark

        found.append(read_benchmark(path))
    return found


def pairs_of(benchmark: Benchmark, shots: int, items: int) -> tuple[list[Pair], list[int]]:
    """Contexts and continuations, those of a question one after the other; and how many each has."""
    each = [
        ask(benchmark, number, Form(), shots, benchmark.questions).pairs
        for number in range(min(items, len(benchmark.questions)))
    ]
    return [pair for pairs in each for pair in pairs], [len(pairs) for pairs in each]


def write_model(folder: Path, name: str) -> None:
    """Random weights, and a tokenizer that knows some of the model's pieces, or all."""
    from gemwright.model import checkpoint
    from gemwright.model.gemma import Gemma
    from gemwright.tokenizer.tokenizer import Tokenizer
    from gemwright.tokenizer.train import TokenizerConfig, train

    torch.manual_seed(0)
    checkpoint.save(Gemma(MODELS[name]), folder)
    data = os.environ.get("GEMWRIGHT_DATA")
    if name == "wide" and data is not None and (path := Path(data) / GEMMA).is_file():
        tokenizer = Tokenizer.load(path)
    else:
        texts = [inspect.getsource(module) for module in (argparse, inspect, tempfile, random)]
        tokenizer = Tokenizer(train(texts, TokenizerConfig(vocab_size=MODELS["laptop"].vocab_size)))
    tokenizer.save(folder)


def make(name: str, folder: str, model: str, items: int) -> Ask:
    """One implementation, in its own process: answers `benchmark shots` with seconds and scores."""
    from lm_eval.api.instance import Instance

    asked = {
        f"{one.name} {shots}": [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
            for pair in pairs_of(one, shots, items)[0]
        ]
        for one in benchmarks(items)
        for shots in SHOTS
    }
    score = {"gemwright": ours, "hf": theirs}[name](folder, model)

    def answer(question: str) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        scores: list[tuple[float, bool]] = []
        for label, function in score.items():
            start = time.perf_counter()
            scores = function(asked[question])
            seconds[label] = time.perf_counter() - start
        return {"seconds": seconds, "scores": scores}

    return answer


def ours(folder: str, model: str) -> dict[str, Any]:
    """By no batch size: it needs none."""
    from gemwright.evaluate.harness import as_lm
    from gemwright.generate.language_model import load

    return {"": as_lm(load(folder, device="cpu")).loglikelihood}


def theirs(folder: str, model: str) -> dict[str, Any]:
    """By batch size."""
    from lm_eval.models.huggingface import HFLM

    one = HFLM(folder, device="cpu", dtype="float32")

    def sized(batch: int) -> Any:
        def score(requests: Sequence[Any]) -> Any:
            one.batch_size_per_gpu = batch
            return one.loglikelihood(requests, disable_tqdm=True)

        return score

    return {str(batch): sized(batch) for batch in BATCHES[model]}


def accuracy(scores: Sequence[tuple[float, bool]], benchmark: Benchmark, counts: Sequence[int]) -> float:
    """Share of questions whose likeliest choice is right."""
    left, right = [log_p for log_p, _ in scores], 0
    for question, count in zip(benchmark.questions, counts, strict=False):
        each, left = left[:count], left[count:]
        right += each.index(max(each)) in question.right
    return right / len(counts)


def measure(name: str, rounds: int, items: int) -> dict[str, Any]:
    """Every benchmark with every number of examples."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), name)
        asked = [(one, shots) for one in benchmarks(items) for shots in SHOTS]
        questions = [f"{one.name} {shots}" for one, shots in asked] * rounds
        answers = in_turns(("gemwright", "hf"), make, (folder, name, items), questions)
    told: dict[str, Any] = {}
    for number, (benchmark, shots) in enumerate(asked):
        pairs, counts = pairs_of(benchmark, shots, items)
        ours, theirs = ([one[turn] for turn in range(number, len(questions), len(asked))]
                        for one in (answers["gemwright"], answers["hf"]))  # fmt: skip
        seconds = min(one["seconds"][""] for one in ours)
        by_batch = {label: min(one["seconds"][label] for one in theirs) for label in theirs[0]["seconds"]}
        best = min(by_batch, key=by_batch.__getitem__)
        both = list(zip(ours[0]["scores"], theirs[0]["scores"], strict=True))
        apart = max(abs(one - other) for (one, _), (other, _) in both)
        flags = all(one == other for (_, one), (_, other) in both)
        if apart > NEAR or not flags:
            print(f"{name}, {benchmark.name}: the log-likelihoods differ by {apart}", file=sys.stderr)
        told[f"{benchmark.name}, {shots} shots"] = {
            "gemwright_s": round(seconds, 3),
            "harness_hf_s": round(by_batch[best], 3),
            "ratio": round(by_batch[best] / seconds, 2),
            "hf_batch_size": int(best),
            "hf_s_by_batch": {label: round(value, 3) for label, value in by_batch.items()},
            "questions": len(counts),
            "requests": len(pairs),
            "largest_difference": round(apart, 6),
            "same_scores": apart <= NEAR and flags,
            "accuracy": [round(accuracy(one[0]["scores"], benchmark, counts), 4) for one in (ours, theirs)],
        }
    return told


def main() -> None:
    """Make the models, measure, and remove them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--items", type=int, help=f"questions a benchmark; by model: {ITEMS}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    by_model = {name: measure(name, options.rounds, options.items or ITEMS[name]) for name in options.models}
    results = {
        "threads": torch.get_num_threads(),
        "ratio": min(one["ratio"] for found in by_model.values() for one in found.values()),
        "same_scores": all(one["same_scores"] for found in by_model.values() for one in found.values()),
        **by_model,
    }
    print(json.dumps(results, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
