"""The workstation recipe: students of 100M to 1B parameters from a Gemma 2 of Hugging Face's, on one GPU.

The laptop recipe at a scale where the report's numbers come into sight: your text, the teacher's tokenizer, a
teacher that is there already. Student and twin differ in the loss alone, as on the laptop. The report's
Table 7 has students of these sizes; how many tokens they read, it does not say, so the counts are ours: an
evening on one GPU of 80 GB for student and twin. `gemwright ablate --recipe workstation` runs the studies.

Rates are ours, and go down with the width. Try two or three for another size or another text.
"""

import math
from pathlib import Path
from typing import Any

from gemwright.config import Config
from gemwright.curate import pipeline
from gemwright.curate.pipeline import CurateConfig
from gemwright.data import packing
from gemwright.data.curated import Curated
from gemwright.data.packing import ShardsConfig
from gemwright.distill import pretrain
from gemwright.distill.pretrain import PretrainConfig
from gemwright.hub import fetch
from gemwright.model.config import SIZES, GemmaConfig, alternating, size
from gemwright.recipes.base import Base
from gemwright.report import COLOURS, Report, Series, text_table
from gemwright.run import Card, RunFolder, move_aside, read_metrics, run_stage, say
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.train.loop import TrainConfig
from gemwright.train.optim import OptimConfig

TEACHER, LARGER = "google/gemma-2-2b", "google/gemma-2-9b"
STUDENT = "200m"
SEQ_LEN, BATCH, ROWS = 2048, 64, 8
"""Tokens a row, rows an update, and rows at a time."""
TOKENS = 200_000_000
"""Distinct tokens, each seen once."""
RATES = {"100m": 1.5e-3, "200m": 1e-3, "400m": 8e-4, "1b": 5e-4}


class _Adopted(Config):
    """The teacher's tokenizer needs no settings."""


def curated() -> CurateConfig:
    """All filters."""
    return CurateConfig()


def student(name: str = STUDENT, seed: int = 0, tokens: int = TOKENS) -> PretrainConfig:
    """A student, or its twin: `100m`, `200m`, `400m` or `1b`, with the teacher's 256,000 pieces."""
    return PretrainConfig(
        model=size(name),
        train=TrainConfig(
            steps=max(1, tokens // (BATCH * SEQ_LEN)), batch_size=BATCH, micro_batch_size=ROWS,
            seq_len=SEQ_LEN, optim=OptimConfig(lr=RATES[name]), precision="bf16", validate_every=250,
            save_every=250, seed=seed,
        ),
        max_tokens=tokens,
        validation_tokens=1_000_000,
        held_out_tokens=4_000_000,
        seed=seed,
    )  # fmt: skip


def prepared(root: Path, corpus: str, teacher: str = TEACHER) -> tuple[dict[str, Card], Path]:
    """Text, tokenizer and shards, in `root`; their cards, and the teacher's folder.

    Args:
        corpus: as `gemwright curate` takes a source: a folder, a file, `hf:owner/name`.
        teacher: a folder, or a name on Hugging Face.
    Raises:
        FileNotFoundError, ValueError: the teacher or the text is missing, or there is too little of it.
    """
    folder = fetch(teacher)
    tokens = root / "tokenizer"

    def adopt(into: RunFolder) -> dict[str, Any]:
        tokenizer = Tokenizer.load(folder)
        tokenizer.save(into.path)
        return {"pieces": tokenizer.vocab_size}

    cards = {"curated": pipeline.curate(curated(), root / "curated", [corpus])}
    text = Curated.open(root / "curated")
    text.require_splits()
    facts = {"tokenizer": Tokenizer.load(folder).sha256}
    cards["tokenizer"] = run_stage("adopt-tokenizer", _Adopted(), tokens, adopt, facts=facts)
    cards["shards"] = packing.run(ShardsConfig(), root / "shards", text, tokens)
    return cards, folder


def run(root: Path, corpus: str, teacher: str = TEACHER, *, fresh: bool = False) -> Path:
    """Distil a student, train its twin, and write a page with both; errors as `prepared`."""
    if fresh:
        move_aside(root)
    cards, folder = prepared(root, corpus, teacher)
    shards = root / "shards"
    for name, taught in (("distilled", folder), ("scratch", None)):
        cards[name] = pretrain.run(student(), root / name, shards, teacher=taught)
    page = _report(root, cards, teacher)
    say(f"the report is {page}. Next: gemwright ablate distillation --recipe workstation --runs {root}")
    return page


def base(root: Path, corpus: str, teacher: str = TEACHER) -> Base:
    """What studies vary; shapes, sizes and counts are ours."""
    one = student()
    wide, deep = _shapes(one.model)
    return Base(
        name="workstation",
        root=root,
        prepare=lambda: prepared(root, corpus, teacher) and None,
        student=one,
        sizes={
            name: {"model": SIZES[name].to_dict(), "train.optim.lr": RATES[name]}
            for name in ("200m", "400m", "1b")
        },
        shapes={"wide": {"model": wide.to_dict()}, "deep": {"model": deep.to_dict()}},
        teachers={"2b": TEACHER, "9b": LARGER},
        tokens=(TOKENS // 10, TOKENS // 3, TOKENS, 3 * TOKENS),
        teacher=teacher,
    )


def _shapes(model: GemmaConfig) -> tuple[GemmaConfig, GemmaConfig]:
    """The student as it is, and with twice the layers and feed-forwards that make up for them."""
    layers = 2 * model.num_layers
    attention = 2 * model.d_model * model.head_dim * (model.num_heads + model.num_kv_heads)
    norms = 4 * model.d_model
    left = model.num_layers * (attention + 3 * model.d_model * model.d_ff + norms)
    d_ff = round((left / layers - attention - norms) / (3 * model.d_model))
    return model, model.but(pattern=alternating(layers), d_ff=d_ff)


def _report(root: Path, cards: dict[str, Card], teacher: str) -> Path:
    rows = [
        [
            name, f"{cards[name].results['parameters']:,}", f"{cards[name].results['held_out']:.4f}",
            f"{math.exp(cards[name].results['held_out']):.2f}", f"{cards[name].seconds:.0f}",
        ]
        for name in ("distilled", "scratch")
    ]  # fmt: skip
    header = ["", "parameters", "held-out nats", "perplexity", "seconds"]
    results = {name: cards[name].results for name in ("distilled", "scratch")}
    table = text_table(header, rows)
    page = Report(f"A student of {teacher}, and its twin from scratch", {"results": results, "table": table})
    page.table(header, rows)
    lines: list[Series] = []
    for name in ("distilled", "scratch"):
        seen = [row for row in read_metrics(root / name) if "validation" in row]
        steps, nats = [float(row["step"]) for row in seen], [row["validation"] for row in seen]
        lines.append(Series(name, steps, nats, colour=COLOURS[name]))
    page.plot(lines, x="updates", y="validation, nats a token")
    return page.write(root)
