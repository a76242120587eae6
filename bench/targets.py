"""What does labelling cost over the teacher's bare forward pass, and what do targets take and give?

Labelling: a teacher of 0.48B parameters with 256,000 pieces, and one of the laptop recipe's size, with random
weights and a scaled final norm, so that they are sure of something. The bare pass is the model's own forward
to its capped logits; passes take turns in one process, and the median of their ratios counts.

Storage and reading: draws from Zipf's law over 256,000 pieces, its exponent such that 50 draws hit about 12
distinct ids, as a strong teacher's do (arXiv 2503.16870), in windows of 1,024 tokens ("short": of 128).
Training compares whole updates of the laptop recipe's student on stored targets with ones on the next token.

    python -m bench.targets --json
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from gemwright.device import keep_freed_memory
from gemwright.losses import dense, sparse
from gemwright.model.config import GemmaConfig, size
from gemwright.model.gemma import Gemma, packed
from gemwright.recipes import laptop
from gemwright.targets import draw, store
from gemwright.targets.store import Manifest, Targets, TargetSplit, UsedShards
from gemwright.train.optim import OptimConfig, adamw

SAMPLES = 50
SCALE = {"256k": 5.5, "laptop": 2.4}
"""Of the logits: what the final norm is multiplied with."""
EXPONENT = 1.8
"""Of Zipf's law."""


class Bench:
    """A teacher and some windows for it to read."""

    def __init__(self, config: GemmaConfig, scale: float, windows: int, seq_len: int, compiled: bool) -> None:
        torch.manual_seed(0)
        self.model = Gemma(config).requires_grad_(False).eval()
        self.model.model.norm.weight.fill_(scale - 1)
        if compiled:
            self.model.compile_layers()
        self.ids = torch.randint(300, config.vocab_size, (windows, seq_len))
        self.places = packed(self.ids == 2)

    @torch.no_grad()
    def bare(self) -> None:
        """The teacher's own pass to its logits."""
        self.model(self.ids, self.places)

    @torch.no_grad()
    def label(self) -> Iterator[store.Window]:
        """The same windows, labelled."""
        windows, seq_len = self.ids.shape
        uniforms = draw.uniforms(0, range(windows), seq_len, SAMPLES, stratified=True).flatten(0, 1)
        hidden = self.model.hidden(self.ids, self.places).flatten(0, 1)
        config = self.model.config
        drawn = draw.sample_hidden(hidden, self.model.unembedding, uniforms, cap=config.final_softcap)
        return store.packed(drawn, seq_len, config.vocab_size)

    def ratio(self, folder: Path, rounds: int, batches: int) -> float:
        """Speed of labelling some batches into a file over the speed of as many bare passes."""

        def label() -> None:
            windows = itertools.chain.from_iterable(self.label() for _ in range(batches))
            store.write_file(folder / "timed.targets", windows)

        def bare() -> None:
            for _ in range(batches):
                self.bare()

        return 1 / _ratio(label, bare, rounds)


def zipf(vocab: int, windows: int, seq_len: int) -> Iterator[store.Window]:
    """Windows drawn from Zipf's law, every position with other ids in front."""
    generator = torch.Generator().manual_seed(0)
    law = -EXPONENT * torch.arange(1.0, vocab + 1).log()[torch.randperm(vocab, generator=generator)]
    for number in range(windows):
        turns = torch.randint(vocab, (seq_len,), generator=generator).tolist()
        raw = torch.stack([law.roll(turn) for turn in turns])
        drawn = draw.sample(raw, draw.uniforms(0, [number], seq_len, SAMPLES, stratified=True)[0], cap=None)
        yield from store.packed(drawn, seq_len, vocab)


def stored(folder: Path, some: Iterator[store.Window], copies: int, vocab: int, seq_len: int) -> Targets:
    """A folder that holds some windows `copies` times over, as if that many had been labelled."""
    folder.mkdir()
    windows = list(some)
    file = store.write_file(folder / "train-00000.targets", (w for _ in range(copies) for w in windows))
    split = TargetSplit(total=file.windows, max_tokens=None, subset_seed=0, files=(file,))
    manifest = Manifest(
        format=store.FORMAT, kind="sampled", samples=SAMPLES, temperature=1.0, seed=0, vocab_size=vocab,
        seq_len=seq_len, teacher_sha256="", tokenizer_sha256="", shards=UsedShards(path="", sha256=""),
        splits={"train": split},
    )  # fmt: skip
    return Targets(folder, manifest)


def _ratio(one: Callable[[], object], other: Callable[[], object], rounds: int) -> float:
    """The median over rounds of the time of `one` over that of `other`, after a round that warms up."""
    ratios = []
    for turn in range(rounds + 1):
        seconds = []
        for run in (one, other):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        if turn:
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def read_speed(targets: Targets, batch: int, rounds: int) -> float:
    """Tokens a second, in random batches as training takes them."""
    total, order = targets.manifest.splits["train"].windows, np.random.default_rng(0)
    speeds = []
    for _ in range(rounds):
        rows = order.permutation(total).reshape(-1, batch)
        start = time.perf_counter()
        for some in rows:
            targets.read("train", some.tolist())
        speeds.append(total * targets.manifest.seq_len / (time.perf_counter() - start))
    return statistics.median(speeds)


def train_ratio(targets: Targets, rounds: int) -> float:
    """Time of an update of the laptop recipe's student on stored targets over one on the next token."""
    config, count = laptop.student(0, 1e-3).model, targets.manifest.splits["train"].windows
    torch.manual_seed(0)
    model = Gemma(config)
    optimizer = adamw(model, OptimConfig(lr=1e-4))
    ids = torch.randint(300, config.vocab_size, (laptop.BATCH, laptop.SEQ_LEN))
    places, next_ids = packed(ids == 2), ids.roll(-1, 1).flatten()
    ones, order = torch.ones(ids.numel()), np.random.default_rng(0)

    def update(stored: bool) -> None:
        hidden, head = model.hidden(ids, places).flatten(0, 1), model.unembedding
        if stored:
            found = targets.read("train", order.integers(count, size=laptop.BATCH).tolist())
            loss = sparse.cross_entropy(
                hidden, head, found.ids.flatten(0, 1), found.probs.flatten(0, 1), ones,
                cap=config.final_softcap,
            )  # fmt: skip
        else:
            loss = dense.cross_entropy(hidden, head, next_ids, ones, cap=config.final_softcap)
        (loss / ids.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def some(stored: bool) -> None:
        for _ in range(20):
            update(stored)

    return _ratio(lambda: some(True), lambda: some(False), rounds)


def measure(rounds: int) -> dict[str, float]:
    """Everything, as the keys of the line of JSON."""
    keep_freed_memory()
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        big = Bench(size("200m"), SCALE["256k"], windows=4, seq_len=128, compiled=False)
        print(f"{sum(p.numel() for p in big.model.parameters()):,} parameters", file=sys.stderr)
        result["label_ratio"] = big.ratio(folder, rounds, batches=1)
        del big
        short = stored(folder / "short", zipf(256_000, 16, 128), 64, 256_000, 128)
        result["read_tokens_per_s_short"] = read_speed(short, 8, rounds)
        targets = stored(folder / "zipf", zipf(256_000, 4, 1024), 64, 256_000, 1024)
        (file,) = targets.manifest.splits["train"].files
        tokens = file.windows * targets.manifest.seq_len
        result["bytes_per_id"] = file.bytes / file.ids
        result["bytes_per_token"] = file.bytes / tokens
        result["distinct_per_token"] = file.ids / tokens
        result["read_tokens_per_s"] = read_speed(targets, 8, rounds)
        small = Bench(laptop.teacher().model, SCALE["laptop"], laptop.BATCH, laptop.SEQ_LEN, compiled=False)
        result["label_ratio_laptop"] = small.ratio(folder, rounds, batches=32)
        vocab = small.model.config.vocab_size
        targets = stored(folder / "small", small.label(), 64, vocab, laptop.SEQ_LEN)
        (file,) = targets.manifest.splits["train"].files
        result["distinct_per_token_laptop"] = file.ids / (file.windows * targets.manifest.seq_len)
        result["train_ratio_laptop"] = train_ratio(targets, rounds)
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    """Measure, and print a table or one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    options = parser.parse_args()
    result = measure(options.rounds)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:28} {value:,.3f}")


if __name__ == "__main__":
    main()
