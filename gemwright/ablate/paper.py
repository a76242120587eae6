"""The report's own ablations (arXiv 2408.00118, section 5): Tables 6 to 11, each a study of any recipe."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gemwright.ablate import study as training
from gemwright.ablate.page import Finding, Plot
from gemwright.ablate.study import AVERAGE, NATS, PERPLEXITY, RECIPES, Arm, Study
from gemwright.ablate.verdict import Claim, overall
from gemwright.benchmarks.forms import FORMS
from gemwright.benchmarks.questions import Benchmark, Question
from gemwright.data.shards import Shards
from gemwright.data.windows import Windows
from gemwright.evaluate.benchmark import BenchmarkConfig, measure
from gemwright.evaluate.likelihood import nats_per_token
from gemwright.generate.language_model import LanguageModel
from gemwright.model.cost import kv_cache_bytes, parameters
from gemwright.model.gemma import Gemma
from gemwright.recipes.base import Base
from gemwright.report import Series, mean_std, plus_minus

DECODE, OVER, HELD = "decoded tokens/s", "decoding over MHA", "KV bytes"
_ASKED = 100  # questions a benchmark that are put in all twelve forms
_TWO = (("distilled", RECIPES), ("scratch", None))


def distillation(base: Base, seeds: Sequence[int]) -> Study:
    """Table 6: a student distilled, and its twin from scratch on the same tokens."""
    return Study(
        name="distillation",
        title="Distilled against from scratch",
        question="The student learns from the teacher's distribution, its twin from the next token: the same "
        "weights to begin with, the same tokens in the same order.",
        base=base.seeded,
        arms=[Arm(how, teacher=teacher) for how, teacher in _TWO],
        seeds=seeds,
        claims=[Claim("distilled", "scratch", NATS), _more("distilled", "scratch")],
        report={
            "table": "Table 6", "rows": {"from scratch": 60.3, "distilled": 67.7},
            "says": "A 2B on 500B tokens, teacher 7B; an average of three benchmarks that it does not name.",
        },
        tasks=base.tasks(),
    )  # fmt: skip


def student_size(base: Base, seeds: Sequence[int]) -> Study:
    """Table 7: what distillation gains students of three sizes, with one teacher."""
    return Study(
        name="student-size",
        title="Students of three sizes",
        question="One teacher, students of three sizes, each distilled and from scratch on the same tokens: "
        "does distillation gain as much for the larger ones?",
        base=base.seeded,
        arms=[
            Arm(f"{name}, {how}", teacher=teacher, changes=changes)
            for name, changes in base.sizes.items()
            for how, teacher in _TWO
        ],
        seeds=seeds,
        claims=[Claim(f"{name}, distilled", f"{name}, scratch", PERPLEXITY, digits=2) for name in base.sizes],
        curves={
            how: {
                float(parameters(base.student.but(**changes).model)): f"{name}, {how}"
                for name, changes in base.sizes.items()
            }
            for how, _ in _TWO
        },
        x="parameters",
        report={
            "table": "Table 7",
            "rows": {"200M, scratch / distilled": "23 / 21", "400M": "19 / 17", "1B": "17 / 15"},
            "says": "Validation perplexity, 7B teacher; how many tokens, it does not tell.",
        },
    )  # fmt: skip


def attention(base: Base, seeds: Sequence[int]) -> Study:
    """Table 8: as many key/value heads as heads, or half as many."""
    heads = base.student.model.num_heads
    names = {"MHA": heads, "GQA": heads // 2}
    return Study(
        name="attention",
        title="MHA against GQA",
        question=f"{heads} query heads with {heads} key/value heads, or with {heads // 2}; both distilled. "
        "GQA has fewer parameters, and half the bytes of keys and values to hold and to read.",
        base=base.seeded,
        arms=[
            Arm(name, teacher=RECIPES, changes={"model.num_kv_heads": count})
            for name, count in names.items()
        ],
        seeds=seeds,
        claims=[Claim("GQA", "MHA", NATS, equal=True), Claim("GQA", "MHA", OVER, lower=False, digits=2)],
        report={
            "table": "Table 8", "rows": {"MHA": 50.3, "GQA": 50.8},
            "says": "A 9B, an average of four benchmarks; GQA for fewer parameters and faster inference.",
        },
        tasks=base.tasks(),
        measure=partial(_beside_mha, length=base.student.train.seq_len),
    )  # fmt: skip


def depth(base: Base, seeds: Sequence[int]) -> Study:
    """Table 9: few wide layers, or many narrow ones, of as many parameters."""
    return Study(
        name="depth",
        title="Wide against deep",
        question="Two students of as many parameters, one of fewer and wider layers; both distilled.",
        base=base.seeded,
        arms=[Arm(name, teacher=RECIPES, changes=changes) for name, changes in base.shapes.items()],
        seeds=seeds,
        claims=[Claim("deep", "wide", NATS), _more("deep", "wide")],
        report={
            "table": "Table 9", "rows": {"wide": 50.8, "deep": 52.0},
            "says": "A 9B, an average of four benchmarks.",
        },
        tasks=base.tasks(),
    )  # fmt: skip


def window(base: Base, seeds: Sequence[int], home: Path) -> Finding:
    """Table 10: the window of the local layers changed at inference, on texts of four trained windows."""
    length = base.student.train.seq_len
    trained = length // 4
    windows = [trained, trained // 2, trained // 4, trained // 8]
    shards = Shards.open(base.root / "shards")

    def measured(model: LanguageModel) -> dict[str, float]:
        found: dict[str, float] = {}
        held_out = Windows(shards, "held_out", length, max_tokens=base.student.held_out_tokens)
        for width in windows:
            other = LanguageModel(model.model.with_window(width), model.tokenizer)
            found[f"nats {width}"] = nats_per_token(other.model, held_out)
            found |= {f"{key} {width}": value for key, value in _held_and_decoded(other, length).items()}
        return found

    asked = Study(
        name="window", title="The window changed at inference",
        question=f"Students distilled with a window of {trained} tokens on rows of {length}, four windows, "
        "read held-out rows as long with smaller ones.",
        base=base.seeded, seeds=seeds, measure=measured,
        arms=[Arm("student", teacher=RECIPES, changes={"model.window": trained})],
    )  # fmt: skip
    found = training.run(asked, home, base.root / "shards", base.teacher_folder)
    values: Mapping[str, list[float]] = found.rows[0]["values"]
    by_window = {
        f"window {width}": {
            PERPLEXITY: [math.exp(nats) for nats in values[f"nats {width}"]],
            NATS: values[f"nats {width}"],
        }
        for width in windows
    }
    rows: list[dict[str, Any]] = []
    for width in windows:
        perplexity = mean_std(by_window[f"window {width}"][PERPLEXITY])
        speed, held = (mean_std(values[f"{key} {width}"]) for key in (DECODE, HELD))
        rows.append(
            {"window": width, "perplexity": perplexity["mean"], "std": perplexity["std"],
             "seeds": perplexity["seeds"], "kv_bytes": int(held["mean"]), "tokens_per_second": speed}
        )  # fmt: skip
    claims = [
        Claim(f"window {one}", f"window {trained}", NATS, equal=True, digits=4).judged(by_window)
        for one in windows[1:]
    ]
    table = [
        [
            str(row["window"]), plus_minus({**row, "mean": row["perplexity"]}), f"{row['kv_bytes']:,}",
            plus_minus(row["tokens_per_second"], 0),
        ]
        for row in rows
    ]  # fmt: skip
    line = Series(
        "student", [float(row["window"]) for row in rows], [row["perplexity"] for row in rows],
        [row["std"] for row in rows],
    )  # fmt: skip
    return Finding(
        study="window", title=asked.title, question=asked.question,
        header=["window", PERPLEXITY, HELD, DECODE], table=table, rows=rows,
        report={
            "table": "Table 10", "rows": {"4096": 1.63, "2048": 1.63, "1024": 1.64},
            "says": "A 9B; in what unit perplexity is so small, it does not tell.",
        },
        claims=claims, verdict=overall(claims), seeds=list(seeds), seconds=found.seconds, code=found.code,
        plots=[Plot("window at inference", "held-out perplexity", [line], log_x=True)],
        notes=["KV bytes of one sequence of a row's length, in the format of the weights."],
    )  # fmt: skip


def formatting(base: Base, seeds: Sequence[int], home: Path) -> Finding:
    """Table 11: how far a benchmark's score spreads over twelve forms of its questions."""
    questions = [
        (task.name, tuple(Question(one.context, one.choices, (one.answer,)) for one in task.items[:_ASKED]))
        for task in base.tasks()
    ]

    def measured(model: LanguageModel) -> dict[str, float]:
        scores: list[float] = []
        for form in FORMS:
            config, hits, count = BenchmarkConfig(form=form, shots=0), 0.0, 0
            for name, some in questions:
                score = measure(model, Benchmark(name, "choice", some), config).measures()
                key = "accuracy" if form.said == "letter" else "accuracy_per_character"
                hits, count = hits + float(score[key].over.sum()), count + len(some)
            scores.append(100 * hits / count)
        told = {f"form {number}": score for number, score in enumerate(scores)}
        return told | {"spread": statistics.stdev(scores), "mean": statistics.fmean(scores)}

    asked = Study(
        name="formatting", title="Twelve forms of a question",
        question="Four wordings; the choices hidden and their text scored, or shown and their text or letter "
        "scored: the standard deviation of the accuracy (in points) over the twelve.",
        base=base.seeded, seeds=seeds, measure=measured,
        arms=[Arm(how, teacher=teacher) for how, teacher in _TWO],
    )  # fmt: skip
    found = training.run(asked, home, base.root / "shards", base.teacher_folder)
    rows = [
        {
            "model": row["arm"], "spread": row["spread"], "mean": row["mean"],
            "forms": [row[f"form {number}"]["mean"] for number in range(len(FORMS))],
        }
        for row in found.rows
    ]  # fmt: skip
    values = {row["arm"]: {"spread": row["values"]["spread"]} for row in found.rows}
    claim = Claim("distilled", "scratch", "spread", digits=2).judged(values)
    lines = [Series(row["model"], [float(n) for n in range(1, len(FORMS) + 1)], row["forms"]) for row in rows]
    return Finding(
        study="formatting", title=asked.title, question=asked.question,
        header=["", "spread over forms", "mean accuracy"],
        table=[[row["model"], plus_minus(row["spread"], 2), plus_minus(row["mean"], 1)] for row in rows],
        rows=rows,
        report={
            "table": "Table 11",
            "rows": {
                "Gemma 1 2B": 1.5, "Gemma 2 2B": 2.1, "Mistral 7B": 6.9, "Gemma 1 7B": 0.7, "Gemma 2 9B": 0.9,
                "Gemma 2 27B": 1.0,
            },
            "says": "Standard deviation of MMLU over twelve combinations that it does not name.",
        },
        claims=[claim], verdict=overall([claim]), seeds=list(seeds), seconds=found.seconds, code=found.code,
        plots=[Plot("form", "accuracy, per cent (guessing: 25)", lines)],
        notes=[
            "The report compares families of models and expects nothing of distillation; that a distilled "
            "student is the steadier one is our question."
        ],
    )  # fmt: skip


def _held_and_decoded(model: LanguageModel, length: int) -> dict[str, float]:
    """Bytes of keys and values of a row, and how fast a batch is written: the middle one of three tries."""
    prompt = [2, *(300 + number % 300 for number in range(length // 2 - 1))]
    speeds: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        done = list(model.batch([prompt] * 4, max_batch=4, max_tokens=length // 2, stop_ids=()))
        speeds.append(sum(len(one.tokens) for _, one in done) / (time.perf_counter() - start))
    size = model.model.unembedding.element_size()
    return {HELD: float(kv_cache_bytes(model.config, length, size)), DECODE: statistics.median(speeds)}


def _beside_mha(model: LanguageModel, length: int) -> dict[str, float]:
    """How fast a student writes, over a model of its shape with as many key/value heads as heads; by turns,
    so that what else the machine does meets both."""
    config = model.config
    twin = Gemma(config.but(num_kv_heads=config.num_heads)).to(model.model.device).eval()
    other = LanguageModel(twin, model.tokenizer)
    told: dict[str, float] = {}
    ratios: list[float] = []
    for _ in range(5):
        told = _held_and_decoded(model, length)
        ratios.append(told[DECODE] / _held_and_decoded(other, length)[DECODE])
    return {HELD: told[HELD], OVER: statistics.median(ratios)}


def _more(better: str, worse: str) -> Claim:
    return Claim(better, worse, AVERAGE, lower=False, digits=1)
