"""The laptop recipe: the Gemma 2 result in minutes, on a CPU, on text that every machine has.

The text curated, a tokenizer, shards, a teacher trained from scratch; then, several times over, a student
distilled from it and its twin trained from scratch: the same weights to begin with, the same tokens in the
same order as often, only the loss differs. Each function below returns the whole config of one stage, in
order; `run` goes through them, skipping what is finished.

The comparison is fair on purpose. The learning rate is chosen for the student and for the twin apart, each by
its own validation loss. The teacher has more than four times the student's parameters and has read more text,
as in the report (a 7B teacher for the 2B of Table 6). The student sees few distinct tokens, and a curve shows
how the gain shrinks as it sees more (arXiv 2502.08606 predicts that it does).
"""

import shutil
from pathlib import Path
from typing import Any

from gemwright.benchmarks.made import Task, build_tasks
from gemwright.config import Config
from gemwright.curate import pipeline
from gemwright.curate.pipeline import CurateConfig
from gemwright.data import packing
from gemwright.data.curated import Curated
from gemwright.data.packing import ShardsConfig
from gemwright.distill import pretrain
from gemwright.distill.pretrain import PretrainConfig
from gemwright.evaluate.likelihood import accuracy
from gemwright.generate.language_model import load
from gemwright.model.config import GemmaConfig, alternating
from gemwright.reading.units import LIBRARY
from gemwright.recipes.base import Base
from gemwright.run import Card, RunFolder, move_aside, run_stage, say
from gemwright.tokenizer import train as tokenizing
from gemwright.tokenizer.train import TokenizerConfig
from gemwright.train.loop import TrainConfig
from gemwright.train.optim import OptimConfig

SEEDS = (0, 1)
RATES = (1e-2, 2e-2)
"""Learning rates tried for the student and for its twin, with the first seed."""
RATE = 2e-2
"""The better one for both: what studies train with."""
TEACHER_TOKENS = 800_000
"""Distinct tokens that the teacher sees, once each."""
TOKENS = 100_000
"""Distinct tokens that student and twin see; as many again on the curve, fewer and more."""
CURVE = (30_000, 300_000)
EPOCHS = 4
"""How often student and twin see the main curve's tokens; the other points take as many steps."""
VOCABULARY, SEQ_LEN = 2048, 128
BATCH = 8
"""Rows an update. So small, compiled layers are no faster than eager ones, and compiling takes its time."""
PROMPTS = ("def __init__(self", "import os\n", "class Error(")


class EvaluationConfig(Config):
    """The benchmarks made from the corpus, and samples of text."""

    items: int = 150
    """Questions a benchmark."""
    seed: int = 0
    """Of the questions."""
    prompts: tuple[str, ...] = PROMPTS
    """Beginnings that each model continues, greedily."""
    sample_tokens: int = 40
    """Length of those continuations."""


def curated() -> CurateConfig:
    """All filters but the rules for prose, which the source code of the default text is not."""
    return CurateConfig(quality=None)


def tokenizer() -> TokenizerConfig:
    """A small vocabulary with Gemma's properties."""
    return TokenizerConfig(vocab_size=VOCABULARY)


def shards() -> ShardsConfig:
    """All splits, packed."""
    return ShardsConfig()


def teacher() -> PretrainConfig:
    """Five times the student's parameters, eight times its distinct tokens, each seen once."""
    return PretrainConfig(
        model=_model(layers=4, d_model=128, heads=4, head_dim=32),
        train=TrainConfig(
            steps=TEACHER_TOKENS // (BATCH * SEQ_LEN), batch_size=BATCH, seq_len=SEQ_LEN,
            optim=OptimConfig(lr=4e-3), validate_every=260, save_every=130, compile=False,
        ),
        max_tokens=TEACHER_TOKENS,
        validation_tokens=10_000,
        held_out_tokens=60_000,
    )  # fmt: skip


def student(seed: int, lr: float, tokens: int = TOKENS) -> PretrainConfig:
    """The student, and with the same config its twin: which of them it is, the teacher decides."""
    return PretrainConfig(
        model=_model(layers=2, d_model=64, heads=2, head_dim=32),
        train=TrainConfig(
            steps=EPOCHS * TOKENS // (BATCH * SEQ_LEN), batch_size=BATCH, seq_len=SEQ_LEN,
            optim=OptimConfig(lr=lr), validate_every=130, save_every=130, seed=seed, compile=False,
        ),
        max_tokens=tokens,
        validation_tokens=10_000,
        held_out_tokens=60_000,
        seed=seed,
    )  # fmt: skip


def evaluation() -> EvaluationConfig:
    """Three benchmarks, so that there is an average as in the report's Table 6."""
    return EvaluationConfig()


def run(root: Path, corpus: Path | None = None, *, fresh: bool = False) -> Path:
    """Go through the recipe in `root` and write the report. Returns its path; errors as `pretrained`."""
    from gemwright.recipes.laptop_report import write

    page = write(root, *pretrained(root, corpus, fresh=fresh))
    say(
        f"the report is {page}. "
        f'Next: gemwright generate {root / "distilled"} "def __init__(self" --max-tokens 40; or go on to '
        "a chat model: gemwright run laptop --full"
    )
    return page


def pretrained(
    root: Path, corpus: Path | None = None, *, fresh: bool = False
) -> tuple[dict[str, Card], Curated]:
    """Every stage up to the evaluation, in `root`; their cards, and the text. Errors as `prepared`."""
    if fresh:
        move_aside(root)
    cards, text, questions = prepared(root, corpus)
    data = root / "shards"

    def train(kind: str, name: str, config: PretrainConfig) -> Card:
        cards[name] = pretrain.run(
            config, root / name, data, teacher=root / "teacher" if kind == "distilled" else None
        )
        return cards[name]

    for kind in ("distilled", "scratch"):
        tried = {
            lr: train(kind, f"sweep/{kind}-lr{lr:g}", student(SEEDS[0], lr)).results["validation"]
            for lr in RATES
        }
        best = min(tried, key=lambda lr: tried[lr])
        _adopt(root / f"sweep/{kind}-lr{best:g}", root / kind)
        for seed in SEEDS:
            train(kind, kind if seed == SEEDS[0] else f"{kind}-seed{seed}", student(seed, best))
        for distinct in CURVE:
            train(kind, f"curve/{kind}-{distinct}", student(SEEDS[0], best, distinct))
    judged = ["teacher", *(n for n in cards if n.split("-")[0] in ("distilled", "scratch"))]
    cards["evaluation"] = _evaluate(evaluation(), root, judged, questions)
    return cards, text


def prepared(root: Path, corpus: Path | None = None) -> tuple[dict[str, Card], Curated, tuple[Task, ...]]:
    """The stages up to the teacher, in `root`; their cards, the text, and the benchmarks made from it.

    Raises:
        ValueError: too little text, a corpus folder that holds `root`, or a `root` made from other text.
    """
    if corpus is not None and root.resolve().is_relative_to(corpus.resolve()):
        raise ValueError(f"the corpus {corpus} holds {root}, so results would become text. Move one of them.")
    cards: dict[str, Card] = {}
    tokens, data = root / "tokenizer", root / "shards"
    cards["curated"] = pipeline.curate(
        curated(), root / "curated", [str(corpus.resolve()) if corpus else LIBRARY]
    )
    text = Curated.open(root / "curated")
    text.require_splits()
    questions = build_tasks(
        [d.text for d in text.documents("held_out")], evaluation().items, evaluation().seed
    )
    cards["tokenizer"] = tokenizing.run(
        tokenizer(), tokens, lambda: (d.text for d in text.documents("train")), text.facts
    )
    cards["shards"] = packing.run(shards(), data, text, tokens)
    cards["teacher"] = pretrain.run(teacher(), root / "teacher", data)
    return cards, text, questions


def base(root: Path, corpus: Path | None = None) -> Base:
    """What studies vary. All but the student's own rate, which a sweep chose, was chosen by eye."""
    large = teacher()
    shape = {"model.num_heads": 2, "model.num_kv_heads": 1}
    return Base(
        name="laptop",
        root=root,
        prepare=lambda: prepared(root, corpus) and None,
        student=student(SEEDS[0], RATE),
        sizes={
            "small": {"model.d_model": 32, "model.d_ff": 128},
            "middle": {},
            "large": {"model.d_model": 96, "model.d_ff": 384, "train.optim.lr": 1.5e-2},
        },
        shapes={
            "wide": {"model.d_model": 96, "model.d_ff": 384, "train.optim.lr": 1.5e-2, **shape},
            "deep": {"model.pattern": alternating(6), "model.d_ff": 216, "train.optim.lr": 1.5e-2, **shape},
        },
        teachers={
            "small": large.but(model=_model(layers=2, d_model=64, heads=2, head_dim=32)),
            "middle": large.but(model=_model(layers=3, d_model=96, heads=4, head_dim=24)),
            "large": large,
        },
        tokens=(TOKENS // 10, CURVE[0], TOKENS, CURVE[1]),
    )


def _evaluate(config: EvaluationConfig, root: Path, names: list[str], questions: tuple[Task, ...]) -> Card:
    """The stage that asks each model every question, and lets it continue the prompts."""

    def work(folder: RunFolder) -> dict[str, Any]:
        for task in questions:
            task.save(folder.path)
        scores: dict[str, Any] = {}
        with folder.progress("evaluating", len(names)) as advance:
            for name in names:
                model = load(root / name)
                assert model.tokenizer is not None
                scores[name] = {task.name: accuracy(model.model, model.tokenizer, task) for task in questions}
                scores[name]["samples"] = {
                    prompt: model.generate(prompt, max_tokens=config.sample_tokens)
                    for prompt in config.prompts
                }
                advance(1)
        return {"scores": scores}

    inputs = {name: root / name for name in names}
    return run_stage("evaluate", config, root / "evaluation", work, inputs=inputs)


def _adopt(source: Path, target: Path) -> None:
    """Let the best run of a sweep be the first seed's run: the config is the same, why run it again."""
    if not target.exists():
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        partial.rename(target)


def _model(layers: int, d_model: int, heads: int, head_dim: int) -> GemmaConfig:
    """A small Gemma 2: d_ff = 4 d_model, two query heads to a key/value head, windows that bite at 128."""
    return GemmaConfig(
        d_model=d_model, d_ff=4 * d_model, num_heads=heads, num_kv_heads=heads // 2, head_dim=head_dim,
        pattern=alternating(layers), vocab_size=VOCABULARY, query_pre_attn_scalar=head_dim, window=64,
        max_seq_len=512,
    )  # fmt: skip
