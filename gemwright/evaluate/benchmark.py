"""Benchmarks: what a model makes of their questions, with intervals; asked in batches, and resumable.

A choice is scored by its log-likelihood after the question, as it is and per character, so that long ones do
not lose for being long; both accuracies are told. What is written is written greedily, and checked; code is
run in a sandbox. Intervals are the bootstrap's over questions.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt

from gemwright.benchmarks import checks
from gemwright.benchmarks.files import read_benchmark
from gemwright.benchmarks.forms import Asked, Form, ask, form_of
from gemwright.benchmarks.questions import LIKELIHOOD, Benchmark, Question
from gemwright.benchmarks.sandbox import SandboxConfig, containment, run_programs
from gemwright.config import Config
from gemwright.evaluate.answers import Measure
from gemwright.evaluate.likelihood import log_likelihoods
from gemwright.generate.language_model import LanguageModel, batched, load
from gemwright.generate.sampling import Sampling
from gemwright.run import RESUME, Card, RunFolder, run_stage, write_text
from gemwright.tokenizer.chat import encode_prompt
from gemwright.tokenizer.tokenizer import Tokenizer

STAGE = "evaluate"
_FLAGS = ("too_long", "shortened")
_CHUNK = 256  # questions between two files of a run that can be resumed
_Z2 = 1.959964**2  # of the normal distribution, for 95 %
_NUMBERS = ("accuracy", "accuracy_per_character", "probability", "stereotypes", "right")


class BenchmarkConfig(Config):
    """How the questions are asked."""

    shots: NonNegativeInt | None = None
    """Examples before a question; None: as many as in the report."""
    limit: PositiveInt | None = None
    """Only so many questions, spread over the file."""
    form: Form | None = None
    """The wording; None: the benchmark's usual one."""
    chat: bool = False
    """Put each question as a user's turn, for a chat model. Of blanks and pairs whole sentences are scored,
    which are nobody's reply: those stay as they are."""
    max_tokens: PositiveInt = 256
    """Most tokens of a written answer."""
    max_batch: PositiveInt = 8
    """Answers written at a time."""
    window: PositiveInt | None = None
    """Of the local layers, instead of the checkpoint's."""
    sandbox: SandboxConfig = SandboxConfig()
    """In which code is run."""
    seed: NonNegativeInt = 0
    """Draws the examples."""


@dataclass(frozen=True)
class Score:
    """What came of a benchmark."""

    benchmark: Benchmark
    """What was asked."""
    shots: int
    """Examples before each question."""
    records: tuple[dict[str, Any], ...]
    """One a question: its number, scores or what was written, and whether that is right."""

    def measures(self) -> dict[str, Measure]:
        """The measures that there are, over all questions."""
        return _measures(self.records)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: of every measure value, low and high (95 %), and what was not asked, or cut."""
        told: dict[str, Any] = {
            "name": self.benchmark.name, "kind": self.benchmark.kind, "questions": len(self.records),
            "shots": self.shots,
        }  # fmt: skip
        told |= {name: _told(one) for name, one in self.measures().items()}
        if self.benchmark.setting.report:
            told["report"] = dict(self.benchmark.setting.report)
        if self.benchmark.kind in ("function", "program"):
            told["contained"] = containment()
        if left_out := dict(self.benchmark.left_out):
            told["left_out"] = left_out
        told |= self._flagged()
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in self.records:
            if group := self.benchmark.questions[record["number"]].group:
                groups[group].append(record)
        if 1 < len(groups) <= 60:
            told["groups"] = {
                group: {name: round(one.value, 4) for name, one in _measures(some).items()}
                for group, some in sorted(groups.items())
            }
        return told

    def told(self) -> str:
        """A line for people."""
        parts = [f"{name} {_percent(one)}" for name, one in self.measures().items()]
        report = ", ".join(f"{size} {value:g}" for size, value in self.benchmark.setting.report.items())
        cut = self._flagged()
        return (
            f"{self.benchmark.name}, {self.shots}-shot, {len(self.records):,} questions: {', '.join(parts)}"
            + "".join(f"; {count:,} {flag.replace('_', ' ')}" for flag, count in cut.items())
            + (f" (the report's: {report})" if report else "")
        )

    def _flagged(self) -> dict[str, int]:
        """How many questions lost their beginning, or did not fit."""
        counts = {flag: sum(bool(one.get(flag)) for one in self.records) for flag in _FLAGS}
        return {flag: count for flag, count in counts.items() if count}


def measure(
    model: LanguageModel, benchmark: Benchmark, config: BenchmarkConfig,
    examples: Sequence[Question] | None = None, advance: Callable[[int], None] | None = None,
) -> Score:  # fmt: skip
    """Ask a model the questions of a benchmark.

    Args:
        examples: what shots are drawn from; None: the benchmark's own other questions.
    Raises:
        ValueError: too few examples; a checkpoint without a tokenizer.
    """
    records = []
    for some in _chunks(benchmark, config):
        records += _answered(model, benchmark, config, some, examples)
        if advance is not None:
            advance(len(some))
    return Score(benchmark, _shots(benchmark, config), tuple(records))


def run(
    config: BenchmarkConfig, out: Path, model: Path, tasks: Sequence[Path], *, examples: Path | None = None,
    fresh: bool = False,
) -> tuple[Card, list[Score]]:  # fmt: skip
    """Ask the questions of some files; `out` gets a line a question, `NAME.jsonl`. Killed, it goes on.

    Raises:
        FileNotFoundError, ValueError: as `read_benchmark` and `measure`.
    """
    benchmarks, pools = opened(tasks, examples)

    def work(folder: RunFolder) -> dict[str, Any]:
        loaded: list[LanguageModel] = []
        told: list[dict[str, Any]] = []
        for benchmark, pool in zip(benchmarks, pools, strict=True):
            parts: list[str] = []
            chunks = _chunks(benchmark, config)
            with folder.progress(benchmark.name, sum(map(len, chunks)), unit="questions") as advance:
                for some in chunks:
                    part = folder.path / RESUME / benchmark.name / f"{some[0]}.jsonl"
                    if not part.exists():
                        loaded = loaded or [load(model, window=config.window)]
                        part.parent.mkdir(parents=True, exist_ok=True)
                        found = _answered(loaded[0], benchmark, config, some, pool)
                        write_text(part, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in found))
                    parts.append(part.read_text(encoding="utf-8"))
                    advance(len(some))
            write_text(folder.path / f"{benchmark.name}.jsonl", "".join(parts))
            told.append(_scored(folder.path, benchmark, config).to_dict())
        return {"scores": told}

    inputs = {"model": model, **{f"task-{number}": path for number, path in enumerate(tasks)}}
    card = run_stage(
        STAGE, config, out, work, inputs=inputs | ({"examples": examples} if examples else {}), fresh=fresh
    )
    shutil.rmtree(out / RESUME, ignore_errors=True)
    return card, [_scored(out, benchmark, config) for benchmark in benchmarks]


def opened(
    tasks: Sequence[Path], examples: Path | None
) -> tuple[list[Benchmark], list[Sequence[Question] | None]]:
    """The benchmarks, and of each what its shots are drawn from: the file of examples, if it is of that name.

    Raises:
        ValueError: as `read_benchmark`; or the examples are of no task.
    """
    benchmarks = [read_benchmark(path) for path in tasks]
    if examples is None:
        return benchmarks, [None] * len(benchmarks)
    others = read_benchmark(examples)
    names = [benchmark.name for benchmark in benchmarks]
    if others.name not in names:
        raise ValueError(
            f"{examples} has examples of {others.name}, and asked are {', '.join(names)}. Name a file of one "
            "of those."
        )
    return benchmarks, [others.questions if name == others.name else None for name in names]


def _scored(folder: Path, benchmark: Benchmark, config: BenchmarkConfig) -> Score:
    lines = (folder / f"{benchmark.name}.jsonl").read_text(encoding="utf-8").split("\n")
    return Score(benchmark, _shots(benchmark, config), tuple(json.loads(line) for line in lines if line))


def _shots(benchmark: Benchmark, config: BenchmarkConfig) -> int:
    return benchmark.setting.shots if config.shots is None else config.shots


def _chunks(benchmark: Benchmark, config: BenchmarkConfig) -> list[list[int]]:
    """The numbers of the questions, some at a time: all, or `limit` of them spread over the file."""
    total = len(benchmark.questions)
    few = min(config.limit or total, total)
    numbers = [place * total // few for place in range(few)]
    return [numbers[start : start + _CHUNK] for start in range(0, few, _CHUNK)]


def _answered(
    model: LanguageModel, benchmark: Benchmark, config: BenchmarkConfig, numbers: Sequence[int],
    examples: Sequence[Question] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    form, shots = config.form or form_of(benchmark), _shots(benchmark, config)
    pool = benchmark.questions if examples is None else examples
    asked = {number: ask(benchmark, number, form, shots, pool, config.seed) for number in numbers}
    if benchmark.kind in LIKELIHOOD:
        return list(_chosen(model, benchmark, config, asked))
    return _written(model, benchmark, config, asked)


def _chosen(
    model: LanguageModel, benchmark: Benchmark, config: BenchmarkConfig, asked: dict[int, Asked]
) -> Iterator[dict[str, Any]]:
    tokenizer, room = model.require_tokenizer(), model.config.max_seq_len
    requests: list[tuple[list[int], list[int]]] = []
    places: dict[int, range] = {}
    flags: dict[int, str] = {}
    chat = config.chat and benchmark.kind in ("choice", "truths")
    for number, one in asked.items():
        pairs = [_ids(tokenizer, *pair, chat=chat) for pair in one.pairs]
        if any(len(after) >= room for _, after in pairs):
            flags[number] = "too_long"
            continue
        most = max(len(before) + len(after) for before, after in pairs)
        if most > room:  # alike for all choices of a question
            flags[number] = "shortened"
            cut = most - room
            pairs = [(before[:1] + before[1 + min(cut, len(before) - 1) :], after) for before, after in pairs]
        places[number] = range(len(requests), len(requests) + len(pairs))
        requests += pairs
    found = [one.log_p for one in log_likelihoods(model.model, requests)] if requests else []
    for number, one in asked.items():
        flag = {flags[number]: True} if number in flags else {}
        scores = [found[place] for place in places.get(number, ())]
        yield {"number": number, **_judged(benchmark, number, one, scores), **flag}


def _judged(benchmark: Benchmark, number: int, asked: Asked, scores: list[float]) -> dict[str, Any]:
    """What the scores of a question's choices say. A question that does not fit counts as not known."""
    question, kind = benchmark.questions[number], benchmark.kind
    right = set(question.right)
    if kind == "truths":
        values = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist() if scores else []
        known = sum(value for place, value in enumerate(values) if place in right)
        return {"scores": scores, "probability": known if scores else 0.0}
    name = "stereotypes" if kind == "pair" else "accuracy"
    told: dict[str, Any] = {"scores": scores, name: float(bool(scores) and _best(scores) in right)}
    if kind == "choice":
        each = [score / max(1, len(said)) for score, (_, said) in zip(scores, asked.pairs, strict=False)]
        told["accuracy_per_character"] = float(bool(each) and _best(each) in right)
    return told


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _written(
    model: LanguageModel, benchmark: Benchmark, config: BenchmarkConfig, asked: dict[int, Asked]
) -> list[dict[str, Any]]:
    tokenizer, room = model.require_tokenizer(), model.config.max_seq_len - config.max_tokens
    if room < 2:
        raise ValueError(
            f"max_tokens={config.max_tokens} leaves no room for a question: the model reads "
            f"{model.config.max_seq_len} tokens. Lower max_tokens."
        )
    prompts, flags = list[tuple[int, list[int]]](), dict[int, str]()
    for number, one in asked.items():
        ids = _ids(tokenizer, one.prompt, "", chat=config.chat)[0]
        if len(ids) > room:
            flags[number] = "shortened"
            ids = ids[:1] + ids[len(ids) - room + 1 :]
        prompts.append((number, ids))
    stops = () if config.chat else next(iter(asked.values())).stops  # a chat model ends its turn by itself
    sampling = Sampling(temperature=0.0, max_tokens=config.max_tokens, stop=stops)
    said = {number: done.text for number, done in batched(model, prompts, sampling, config.max_batch)}
    right = _checked(benchmark, config, {number: said[number] for number in asked})
    return [
        {
            "number": number, "said": said[number], **right[number],
            **({flags[number]: True} if number in flags else {}),
        }
        for number in asked
    ]  # fmt: skip


def _checked(
    benchmark: Benchmark, config: BenchmarkConfig, said: dict[int, str]
) -> dict[int, dict[str, Any]]:
    kind, questions = benchmark.kind, benchmark.questions
    if kind in ("number", "words"):
        same = checks.same_number if kind == "number" else checks.exact
        return {number: {"right": float(same(text, questions[number].gold))} for number, text in said.items()}
    programs: list[str] = []
    for number, text in said.items():
        question = questions[number]
        if kind == "function":
            test, name = question.tests
            programs.append(checks.humaneval_program(question.text, text, test, name))
        else:
            programs.append(checks.mbpp_program(text, question.tests))
    done = run_programs(programs, config.sandbox)
    return {
        number: {"right": float(one.passed), "outcome": one.reason}
        for number, one in zip(said, done, strict=True)
    }


def _ids(tokenizer: Tokenizer, context: str, said: str, *, chat: bool) -> tuple[list[int], list[int]]:
    """Context and answer, tokenised apart, alike for every choice."""
    if not chat:
        return tokenizer.encode(context, bos=True), tokenizer.encode(said) if said else []
    ids = encode_prompt(tokenizer, [{"role": "user", "content": context.strip()}])
    return ids, tokenizer.encode(said.strip()) if said else []


def _measures(records: Sequence[dict[str, Any]]) -> dict[str, Measure]:
    found = {
        name: [record[name] for record in records] for name in _NUMBERS if records and name in records[0]
    }
    return {name: Measure(np.array(values), np.ones(len(values))) for name, values in found.items()}


def _interval(one: Measure) -> tuple[float, float]:
    """The bootstrap's; where all are right, or none, it sees no spread, and Wilson's bound is told."""
    low, high = one.interval()
    if low == high and low in (0.0, 1.0):
        edge = _Z2 / (len(one.over) + _Z2)
        return (0.0, edge) if low == 0 else (1 - edge, 1.0)
    return low, high


def _told(one: Measure) -> dict[str, float]:
    low, high = _interval(one)
    return {"value": round(one.value, 5), "low": round(low, 5), "high": round(high, 5)}


def _percent(one: Measure) -> str:
    low, high = _interval(one)
    return f"{100 * one.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
