"""A study of training: a base recipe, named arms that each change something, a metric, seeds -> a finding.

All arms of a seed begin with the same weights and see the same tokens in the same order, so they are compared
seed by seed. Every run is a stage in a folder of its own, named after its config: a study that was killed
goes on, what is finished is not run again, and studies in one place share the runs that they have in common.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemwright.ablate.page import Finding, Plot
from gemwright.ablate.verdict import Claim, overall
from gemwright.benchmarks.made import Task
from gemwright.config import Config
from gemwright.distill import label, pretrain
from gemwright.distill.label import LabelConfig
from gemwright.distill.pretrain import PretrainConfig
from gemwright.evaluate.likelihood import accuracy
from gemwright.generate.language_model import LanguageModel, load
from gemwright.hub import fetch
from gemwright.report import Series, mean_std, plus_minus
from gemwright.run import Card, RunFolder, run_stage, say

NATS, PERPLEXITY, AVERAGE = "held-out nats", "perplexity", "average of three"
RECIPES = "teacher"
"""The name of the teacher that the recipe has."""

Measured = Mapping[str, float]


@dataclass(frozen=True)
class Arm:
    """One way to train the student."""

    name: str
    label: LabelConfig | None = None
    """It learns from targets that the teacher leaves so (a label for each seed draws with that seed)."""
    teacher: str | None = None
    """Who runs along: the recipe's teacher (`RECIPES`), or one of the study's; None: nobody."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changed settings of the base, as in `Config.but`."""


@dataclass(frozen=True)
class Study:
    """What is compared."""

    name: str
    title: str
    question: str
    base: Callable[[int], PretrainConfig]
    """The student for a seed."""
    arms: Sequence[Arm]
    seeds: Sequence[int]
    claims: Sequence[Claim] = ()
    """On `NATS`, `PERPLEXITY`, `AVERAGE`, or what `measure` gives."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """The report's own numbers, as in `Finding`."""
    teachers: Mapping[str, PretrainConfig | str] = field(default_factory=dict)
    """The study's own teachers: how each is trained from scratch, or the name of one that there is."""
    tasks: Sequence[Task] = ()
    """Benchmarks for `AVERAGE`."""
    measure: Callable[[LanguageModel], Measured] | None = None
    """What else is measured of a finished student."""
    against: str | None = None
    """The arm that a column of differences is taken from."""
    columns: Mapping[str, Callable[[Card, Card | None], float | None]] = field(default_factory=dict)
    """Further columns from the student's card and the label's, which is None where there is none."""
    curves: Mapping[str, Mapping[float, str]] = field(default_factory=dict)
    """Lines of the plot: name -> x -> arm."""
    levels: Sequence[str] = ()
    """Arms drawn as level lines."""
    x: str = ""
    shown: Sequence[str] = (NATS, PERPLEXITY)
    """Metrics of the table, `AVERAGE` and those of `measure` after them."""


class _Measuring(Config):
    """What is measured of a student."""

    items: int
    """Questions a benchmark."""


def run(study: Study, home: Path, shards: Path, teacher: Path) -> Finding:
    """Run every arm with every seed in `home`, which other studies may share.

    Raises what the stages raise, FileNotFoundError if shards or teacher are missing.
    """
    taught = {RECIPES: teacher}
    seconds = 0.0
    for name, config in study.teachers.items():
        if isinstance(config, str):
            taught[name] = fetch(config)
            continue
        taught[name] = home / "teachers" / f"{name}-{_digest(config)}"
        seconds += pretrain.run(config, taught[name], shards).seconds
    runs: dict[str, list[tuple[Card, Card | None]]] = {arm.name: [] for arm in study.arms}
    values: dict[str, dict[str, list[float]]] = {arm.name: {} for arm in study.arms}
    total, done = len(study.arms) * len(study.seeds), 0
    for seed in study.seeds:
        for arm in study.arms:
            done += 1
            say(f"{study.name}: {arm.name}, seed {seed} (run {done} of {total})")
            card, labelled = _train(study, arm, seed, home, shards, taught)
            runs[arm.name].append((card, labelled))
            nats = card.results["held_out"]
            found = {NATS: nats, PERPLEXITY: math.exp(nats)}
            for measured in _measure(study, arm, seed, home):
                seconds += measured.seconds
                found |= measured.results
            for name, value in found.items():
                values[arm.name].setdefault(name, []).append(value)
    seconds += sum(card.seconds for some in runs.values() for card, _ in some)
    # Where seeds share a label, its seconds count once.
    labels = {_outputs(c): c.seconds for some in runs.values() for _, c in some if c is not None}
    return _finding(study, runs, values, seconds + sum(labels.values()))


def student_of(study: Study, arm: Arm, seed: int, home: Path) -> Path:
    """Where the student of an arm lies: named after how it is taught, its seed and all its settings."""
    config, label_of = study.base(seed).but(**arm.changes), _label_of(arm, seed)
    how = label_of[1] if label_of else "distilled" if arm.teacher else "scratch"
    taught: Any = arm.teacher
    if arm.teacher is not None and arm.teacher in study.teachers:
        own = study.teachers[arm.teacher]
        taught = own if isinstance(own, str) else own.to_dict()
    key = _digest(config, taught, None if label_of is None else label_of[0].to_dict())
    return home / "students" / f"{how}-seed{seed}-{key}"


def _label_of(arm: Arm, seed: int) -> tuple[LabelConfig, str] | None:
    """The label that a student learns from, and its name; the largest probabilities serve every seed."""
    if arm.label is None:
        return None
    sampled = arm.label.kind != "top-k"
    config = arm.label.but(seed=seed if sampled else 0)
    return config, f"{config.kind}-{config.samples}{f'-seed{seed}' if sampled else ''}"


def _train(
    study: Study, arm: Arm, seed: int, home: Path, shards: Path, teachers: Mapping[str, Path]
) -> tuple[Card, Card | None]:
    targets, labelled = None, None
    if label_of := _label_of(arm, seed):
        config, name = label_of
        targets = home / "targets" / f"{name}-{_digest(config)}"
        labelled = label.run(config, targets, teachers[RECIPES], shards)
    card = pretrain.run(
        study.base(seed).but(**arm.changes), student_of(study, arm, seed, home), shards,
        teacher=teachers[arm.teacher] if arm.teacher else None, targets=targets,
    )  # fmt: skip
    return card, labelled


def _measure(study: Study, arm: Arm, seed: int, home: Path) -> Iterator[Card]:
    """The benchmarks, and what the study alone measures; a stage each."""
    student = student_of(study, arm, seed, home)

    def answered(_: RunFolder) -> dict[str, Any]:
        model = load(student)
        told = {
            task.name: 100 * accuracy(model.model, model.require_tokenizer(), task) for task in study.tasks
        }
        return told | {AVERAGE: sum(told.values()) / len(told)}

    def measured(_: RunFolder) -> dict[str, Any]:
        assert study.measure is not None
        return dict(study.measure(load(student)))

    config = _Measuring(items=sum(len(task.items) for task in study.tasks))
    places = home / "measured" / student.name
    if study.tasks:
        yield run_stage("measure", config, places / "tasks", answered, inputs={"model": student})
    if study.measure:
        yield run_stage("measure", config, places / study.name, measured, inputs={"model": student})


def _digest(*parts: Any) -> str:
    plain = [part.to_dict() if isinstance(part, Config) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]


def _finding(
    study: Study, runs: Mapping[str, list[tuple[Card, Card | None]]],
    values: Mapping[str, Mapping[str, list[float]]], seconds: float,
) -> Finding:  # fmt: skip
    tasks = {task.name for task in study.tasks}
    others = [name for name in next(iter(values.values())) if name not in (NATS, PERPLEXITY, *tasks)]
    metrics = [*study.shown, *others]
    rows: list[dict[str, Any]] = []
    for name, some in runs.items():
        stats: dict[str, Any] = {metric: mean_std(each) for metric, each in values[name].items()}
        if study.against is not None:
            base = values[study.against][NATS]
            apart = [mine - theirs for mine, theirs in zip(values[name][NATS], base, strict=True)]
            stats["difference"] = mean_std(apart)
        for column, of in study.columns.items():
            known = [value for value in (of(*one) for one in some) if value is not None]
            stats[column] = mean_std(known) if known else None
        parameters = some[0][0].results["parameters"]
        rows.append({"arm": name, "parameters": parameters, **stats, "values": dict(values[name])})
    header = ["", "parameters", *metrics]
    header += [f"less {study.against}"] * (study.against is not None) + [*study.columns]
    table = [
        [
            row["arm"], f"{row['parameters']:,}", *(_cell(metric, row[metric]) for metric in metrics),
            *([plus_minus(row["difference"], 4)] if study.against is not None else []),
            *(f"{row[column]['mean']:.2f}" if row[column] else "-" for column in study.columns),
        ]
        for row in rows
    ]  # fmt: skip
    claims = [claim.judged(values) for claim in study.claims]
    stats = {row["arm"]: row[NATS] for row in rows}
    lines = [
        _line(name, list(places), [stats[arm] for arm in places.values()])
        for name, places in study.curves.items()
    ]
    ends = sorted({place for places in study.curves.values() for place in places})
    lines += [_line(name, [ends[0], ends[-1]], [stats[name]] * 2) for name in study.levels if ends]
    return Finding(
        study=study.name, title=study.title, question=study.question, header=header, table=table, rows=rows,
        report=study.report, claims=claims, verdict=overall(claims), seeds=list(study.seeds),
        seconds=round(seconds, 1), code=next(iter(runs.values()))[0][0].code,
        plots=[Plot(study.x, NATS, lines, log_x=True)] if lines else [],
        points=(NATS, {name: each[NATS] for name, each in values.items()}),
    )  # fmt: skip


def _cell(metric: str, stats: Mapping[str, Any]) -> str:
    if stats["mean"] >= 1000:  # a count, as of bytes
        return f"{stats['mean']:,.0f}" + (f" ± {stats['std']:,.0f}" if stats["std"] else "")
    return plus_minus(stats, {NATS: 4, AVERAGE: 1}.get(metric, 2))


def _line(name: str, x: list[float], stats: list[dict[str, Any]]) -> Series:
    return Series(name, x, [row["mean"] for row in stats], [row["std"] for row in stats])


def _outputs(card: Card) -> str:
    """What tells one finished run from another."""
    return str(sorted(card.outputs.items()))
