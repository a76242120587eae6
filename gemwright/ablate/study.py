"""A study: a base recipe, named arms that each change something, a metric, seeds -> a table with spread.

All arms of a seed begin with the same weights and see the same tokens in the same order, so they are compared
seed by seed. Every run is a stage in a folder of its own: a study that was killed goes on, and what is
finished is not run again.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemwright.distill import label, pretrain
from gemwright.distill.label import LabelConfig
from gemwright.distill.pretrain import PretrainConfig
from gemwright.report import Report, Series, mean_std, plus_minus, text_table
from gemwright.run import Card, say


@dataclass(frozen=True)
class Arm:
    """One way to train the student."""

    name: str
    label: LabelConfig | None = None
    """It learns from targets that the teacher leaves so (a label for each seed draws with that seed)."""
    teacher: bool = False
    """The teacher runs along."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changed settings of the base, as in `Config.but`."""


@dataclass(frozen=True)
class Study:
    """What is compared, and against which arm."""

    name: str
    title: str
    base: Callable[[int], PretrainConfig]
    """The recipe for a seed."""
    arms: Sequence[Arm]
    against: str
    """The arm that the others are compared with."""
    seeds: Sequence[int]
    metric: str = "held_out"
    """A result on the student's card; lower is better."""
    columns: Mapping[str, Callable[[Card, Card | None], float | None]] = field(default_factory=dict)
    """Further columns from the student's card and the label's, which is None where there is none."""
    curves: Mapping[str, Mapping[float, str]] = field(default_factory=dict)
    """Lines of the plot: name -> x -> arm."""
    levels: Sequence[str] = ()
    """Arms drawn as level lines."""
    x: str = ""


def run(study: Study, out: Path, shards: Path, teacher: Path) -> Path:
    """Run every arm with every seed into `out`, and write `report.html` and `report.json`.

    Returns the page's path. Raises what the stages raise, FileNotFoundError if shards or teacher are missing.
    """
    cards: dict[str, list[tuple[Card, Card | None]]] = {arm.name: [] for arm in study.arms}
    total, done = len(study.arms) * len(study.seeds), 0
    for seed in study.seeds:
        for arm in study.arms:
            done += 1
            say(f"{study.name}: {arm.name}, seed {seed} (run {done} of {total})")
            cards[arm.name].append(_train(study, arm, seed, out, shards, teacher))
    return _report(study, cards, out)


def _train(
    study: Study, arm: Arm, seed: int, out: Path, shards: Path, teacher: Path
) -> tuple[Card, Card | None]:
    targets, labelled = None, None
    if arm.label is not None:
        sampled = arm.label.kind != "top-k"  # the largest probabilities are the same for every seed
        config = arm.label.but(seed=seed if sampled else 0)
        targets = out / "targets" / f"{config.kind}-{config.samples}{f'-seed{seed}' if sampled else ''}"
        labelled = label.run(config, targets, teacher, shards)
    folder = out / "students" / re.sub(r"\W+", "-", arm.name) / f"seed{seed}"
    card = pretrain.run(
        study.base(seed).but(**arm.changes), folder, shards,
        teacher=teacher if arm.teacher else None, targets=targets,
    )  # fmt: skip
    return card, labelled


def _report(study: Study, cards: dict[str, list[tuple[Card, Card | None]]], out: Path) -> Path:
    values = {name: [card.results[study.metric] for card, _ in runs] for name, runs in cards.items()}
    base = values[study.against]
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in cards.items():
        apart = [mine - theirs for mine, theirs in zip(values[name], base, strict=True)]
        rows[name] = {study.metric: mean_std(values[name]), "difference": mean_std(apart)}
        for column, of in study.columns.items():
            known = [value for value in (of(*run) for run in runs) if value is not None]
            rows[name][column] = mean_std(known) if known else None
    seconds = sum(card.seconds for runs in cards.values() for card, _ in runs)
    # Where seeds share a label, its seconds count once.
    labels = {_outputs(c): c.seconds for runs in cards.values() for _, c in runs if c is not None}
    seconds += sum(labels.values())
    header = ["", study.metric, f"less {study.against}", *study.columns]
    table = [
        [
            name, plus_minus(row[study.metric], 4), plus_minus(row["difference"], 4),
            *(f"{row[column]['mean']:.2f}" if row[column] else "-" for column in study.columns),
        ]
        for name, row in rows.items()
    ]  # fmt: skip
    data = {
        "study": study.name, "seeds": list(study.seeds), "metric": study.metric, "against": study.against,
        "values": values, "arms": rows, "seconds": round(seconds, 1), "code": cards[study.against][0][0].code,
        "table": text_table(header, table),
    }  # fmt: skip
    page = Report(study.title, data)
    page.text(
        f"{len(study.seeds)} seeds; ± is the standard deviation over them. The difference is taken seed by "
        "seed: the arms of a seed begin with the same weights and see the same tokens in the same order. "
        f"{seconds:.0f} s in all."
    )
    page.table(header, table)
    lines = [
        _line(name, list(places), [rows[arm][study.metric] for arm in places.values()])
        for name, places in study.curves.items()
    ]
    ends = sorted({place for places in study.curves.values() for place in places})
    lines += [
        _line(name, [ends[0], ends[-1]], [rows[name][study.metric]] * 2) for name in study.levels if ends
    ]
    if lines:
        page.plot(lines, x=study.x, y=study.metric, log_x=True)
    return page.write(out)


def _line(name: str, x: list[float], stats: list[dict[str, Any]]) -> Series:
    return Series(name, x, [row["mean"] for row in stats], [row["std"] for row in stats])


def _outputs(card: Card) -> str:
    """What tells one finished run from another."""
    return str(sorted(card.outputs.items()))
