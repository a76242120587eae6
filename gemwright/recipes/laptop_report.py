"""The page at the end of the laptop recipe: teacher, student and twin side by side, from the cards alone."""

import math
from pathlib import Path
from typing import Any

from gemwright.data.curated import Curated
from gemwright.recipes import laptop
from gemwright.report import COLOURS, Report, Series, mean_std, plus_minus, text_table
from gemwright.run import Card, read_metrics

KINDS = ("teacher", "distilled", "scratch")
NAMES = {"teacher": "teacher", "distilled": "student, distilled", "scratch": "twin, from scratch"}


def write(root: Path, cards: dict[str, Card], corpus: Curated, out: Path | None = None) -> Path:
    """Write `report.html` and `report.json` into `out`, by default `root`; returns the page's path."""
    runs = {kind: [kind, *(n for n in cards if n.startswith(f"{kind}-seed"))] for kind in KINDS}
    nats = {
        kind: mean_std([cards[name].results["held_out"] for name in names]) for kind, names in runs.items()
    }
    scores = cards["evaluation"].results["scores"]
    tasks = [key for key in scores["teacher"] if key != "samples"]
    accuracy = {
        kind: {task: mean_std([scores[name][task] for name in names]) for task in tasks}
        | {"average": mean_std([sum(scores[name][task] for task in tasks) / len(tasks) for name in names])}
        for kind, names in runs.items()
    }
    recovered = (nats["scratch"]["mean"] - nats["distilled"]["mean"]) / (
        nats["scratch"]["mean"] - nats["teacher"]["mean"]
    )
    header = ["", "parameters", "nats a token", "perplexity", *tasks, "average"]
    rows = [
        [
            NAMES[kind], f"{cards[kind].results['parameters']:,}", plus_minus(nats[kind]),
            f"{math.exp(nats[kind]['mean']):.1f}",
            *(plus_minus(_percent(accuracy[kind][task]), 1) for task in [*tasks, "average"]),
        ]
        for kind in KINDS
    ]  # fmt: skip
    table = text_table(header, rows)
    seconds = {name: card.seconds for name, card in cards.items()}
    # The best run of each sweep became the first seed's run, so its seconds would count twice.
    seconds |= {kind: 0.0 for kind in ("distilled", "scratch")}
    curve = _curve(cards)
    data = {
        "nats_per_token": nats,
        "recovered_share": round(recovered, 4),
        "accuracy": accuracy,
        "sweep": _sweep(cards),
        "curve": curve,
        "seconds": {"total": round(sum(seconds.values()), 1), **seconds},
        "corpus": corpus.facts,
        "code": cards["teacher"].code,
        "table": f"{table}\n\nrecovered: {recovered:.0%} of the gap; {sum(seconds.values()):.0f} s in all",
    }
    page = Report("A student distilled, and its twin from scratch", data)
    page.text(
        f"Text: {' and '.join(corpus.manifest.sources)}, curated (curated/report.html). "
        "The student and its twin begin with the same weights and see the same "
        f"{laptop.TOKENS:,} tokens {laptop.EPOCHS} times; the one learns from the teacher's distribution, "
        "the other from the next token. "
        f"Distillation recovers {recovered:.0%} of the distance from twin to teacher."
    )
    page.table(header, rows)
    page.text(
        "Nats a token and accuracy (per cent; guessing: 25) are measured on held-out modules or files. "
        f"Spread: standard deviation over {len(laptop.SEEDS)} seeds of student and twin; the teacher is one. "
        "The report (arXiv 2408.00118, Table 6) has 67.7 for a 2B distilled from a 7B against 60.3 from "
        "scratch, an average of three benchmarks that it does not name: compare direction, not size.",
        note=True,
    )
    page.heading("Validation while training")
    page.plot(
        [Series(NAMES[k], *_validation(root / k), colour=COLOURS[k]) for k in KINDS[1:]],
        x="updates", y="nats a token", caption="First seed.",
    )  # fmt: skip
    page.heading("Learning rates")
    page.text(
        "Chosen apart for each, by validation loss with the first seed; the other seeds take the chosen rate."
    )
    sweep = data["sweep"]
    rates = [[rate, *(f"{sweep[kind][rate]:.3f}" for kind in KINDS[1:])] for rate in sweep["scratch"]]
    page.table(["learning rate", *(NAMES[kind] for kind in KINDS[1:])], rates)
    page.heading("The gain shrinks as the student sees more")
    page.text(
        "The same number of updates over fewer or more distinct tokens. "
        "With enough text of its own a student needs the teacher less (arXiv 2502.08606)."
    )
    page.plot(
        [Series(NAMES[k], curve["tokens"], curve[k], colour=COLOURS[k]) for k in KINDS[1:]],
        x="distinct tokens", y="held-out nats a token", log_x=True,
    )  # fmt: skip
    page.heading("Samples")
    for prompt in laptop.PROMPTS:
        for kind in KINDS:
            page.text(NAMES[kind], note=True)
            page.code(prompt + scores[kind]["samples"][prompt])
    page.heading("Where the time went")
    page.table(["stage", "seconds"], [[name, f"{value:.0f}"] for name, value in data["seconds"].items()])
    return page.write(out or root)


def _percent(stats: dict[str, Any]) -> dict[str, Any]:
    return stats | {"mean": 100 * stats["mean"], "std": 100 * stats["std"]}


def _validation(folder: Path) -> tuple[list[float], list[float]]:
    rows = [row for row in read_metrics(folder) if "validation" in row]
    return [float(row["step"]) for row in rows], [row["validation"] for row in rows]


def _sweep(cards: dict[str, Card]) -> dict[str, dict[str, float]]:
    return {
        kind: {f"{lr:g}": cards[f"sweep/{kind}-lr{lr:g}"].results["validation"] for lr in laptop.RATES}
        for kind in KINDS[1:]
    }


def _curve(cards: dict[str, Card]) -> dict[str, list[float]]:
    """Held-out nats of student and twin by distinct tokens, and what distillation gains (first seed)."""
    points = sorted([laptop.TOKENS, *laptop.CURVE])
    curve: dict[str, list[float]] = {"tokens": [float(point) for point in points]}
    for kind in KINDS[1:]:
        names = [kind if point == laptop.TOKENS else f"curve/{kind}-{point}" for point in points]
        curve[kind] = [cards[name].results["held_out"] for name in names]
    curve["gain"] = [b - a for a, b in zip(curve["distilled"], curve["scratch"], strict=True)]
    return curve
