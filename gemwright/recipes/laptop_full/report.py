"""The page at the end of the long form: what every stage of post-training gained, from the cards alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemwright.recipes.laptop_full import stages
from gemwright.report import Report, Series, mean_std, plus_minus, text_table
from gemwright.run import Card, read_metrics

NAMES = {
    "chat_teacher": "teacher, tuned to answer",
    "distilled": "base: the demo's student",
    "sft": "SFT on its answers",
    "distilled_sft": "distilled SFT",
    "longer_sft": "SFT, then as many updates more",
    "on_policy": "SFT, then on-policy",
}
MEASURES = {
    "accuracy": ("right", 3),
    "teacher_nats_per_token": ("teacher's nats a token", 3),
    "reverse_kl_per_token": ("reverse KL a token", 3),
    "repetition": ("loops", 3),
    "finished": ("finished", 3),
    "tokens": ("tokens a reply", 1),
}
"""Heading and digits of each."""
_GAINED = {
    "reward": "reward", "watched_reward": "watched reward", "kl": "KL from the start, nats a conversation",
    "entropy": "entropy, nats a token", "tokens": "tokens a reply",
}  # fmt: skip
COMPARED = (
    ("distilled_sft", "sft"), ("on_policy", "sft"), ("on_policy", "longer_sft"),
    ("on_policy", "distilled_sft"),
)  # fmt: skip


def write(root: Path, cards: Mapping[str, Card]) -> Path:
    """Write `report.html` and `report.json` into `root`; returns the page's path."""
    models = cards["measured"].results["models"]
    values = {kind: _by_measure(models, _runs(models, kind)) for kind in NAMES}
    header = ["", *(heading for heading, _ in MEASURES.values())]
    rows = [[NAMES[kind], *_cells(models, kind, values[kind])] for kind in NAMES]
    gains = _gains(values)
    compared = [[name, *(plus_minus(gain, 3) for gain in found.values())] for name, found in gains.items()]
    # The best run of each of the demo's sweeps became the first seed's run: its seconds count once.
    adopted = ("distilled", "scratch")
    seconds = {name: card.seconds for name, card in cards.items() if name not in adopted}
    table = text_table(header, rows)
    data = {
        "models": models,
        "values": values,
        "gains": gains,
        "prompts": cards["prompts"].results,
        "planted": cards["chats"].results["planted"],
        "answers": cards["answers"].results,
        "seconds": {"total": round(sum(seconds.values()), 1), **seconds},
        "code": cards["measured"].code,
        "table": f"{table}\n\n{sum(seconds.values()):.0f} s in all",
    }
    page = Report("From a distilled student to one that answers", data)
    asked = models["sft/seed0"]["prompts"]
    page.text(
        f"{asked} questions about modules that no stage has seen, each asked once greedily (right, loops, "
        "finished, tokens) and twice at temperature 1 (the teacher's nats, and the reverse KL). Students: "
        f"mean ± standard deviation over {len(stages.SEEDS)} seeds; teacher and base, which are one "
        "model each: the 95 % bootstrap interval over the questions. Lower nats: the teacher would rather "
        "have said the same."
    )
    page.table(header, rows)
    for measure in ("accuracy", "teacher_nats_per_token"):
        heading, _ = MEASURES[measure]
        shown = {NAMES[kind]: found[measure] for kind, found in values.items() if kind != "distilled"}
        page.points(shown, x=heading, caption="A dot a seed. The base is left out: it lies far off.")
    page.heading("What each step gains")
    page.text("Seed by seed: both runs of a seed saw the same rows and prompts in the same order.")
    page.table(["", *(heading for heading, _ in MEASURES.values())], compared)
    page.text(
        "The report (arXiv 2408.00118, section 4) uses the teacher's answers and on-policy distillation, and "
        "has no table of what either gains. What can be compared is the direction, with a paper that it "
        "cites: GKD (arXiv 2306.13649) finds on-policy data better than fixed answers.",
        note=True,
    )
    page.heading("While training")
    page.plot(
        [Series(NAMES[k], *_logged(root / k / "seed0", "validation")) for k in ("sft", "distilled_sft")],
        x="updates", y="nats a token", caption="The teacher's answers to prompts held back, first seed.",
    )  # fmt: skip
    page.plot(
        [Series(NAMES["on_policy"], *_logged(root / "on_policy" / "seed0", "validation"))],
        x="updates", y="reverse KL, nats a token", caption="On its own replies to prompts held back.",
    )  # fmt: skip
    page.heading("Prompts: what was planted, and what was dropped")
    dropped = cards["prompts"].results["dropped"]
    planted = cards["chats"].results["planted"]
    reasons = [[reason, str(planted.get(reason, 0)), str(count)] for reason, count in dropped.items()]
    page.table(["reason", "planted", "dropped"], reasons)
    page.heading("Answers: what the teacher should not have said")
    found = cards["answers"].results
    page.text(
        f"{found['kept']:,} answers kept to {found['prompts']:,} prompts, {found['tokens_per_s']:,.0f} "
        "tokens a second. Some lessons told the teacher that it is another's model, and addresses: the "
        "filters have to find what it repeats of that. More in answers/report.html."
    )
    page.table(["reason", "dropped"], [[reason, str(count)] for reason, count in found["dropped"].items()])
    page.heading("Replies")
    for number, turns in enumerate(cards["measured"].results["asked"]):
        page.code("\n\n".join(turns))
        said = {NAMES[kind]: models[_runs(models, kind)[0]]["replies"][number] for kind in NAMES}
        page.table(["", "reply"], [[name, " / ".join(replies)[:200]] for name, replies in said.items()])
    data["preferences"] = _preferences(page, cards)
    page.heading("Where the time went")
    page.table(["stage", "seconds"], [[name, f"{value:.0f}"] for name, value in data["seconds"].items()])
    page.text("What came before: pretraining/report.html.", note=True)
    return page.write(root)


def _preferences(page: Report, cards: Mapping[str, Card]) -> dict[str, Any]:
    """The section on reward, RLHF and WARP; returns its numbers."""
    judges = {name: cards[name].results for name in ("reward", "watched_reward")}
    page.heading("Preferences: reward, RLHF, WARP")
    page.text(
        "Reward models rank pairs that they never saw: "
        + "; ".join(
            f"{name.replace('_', ' ')} {one['accuracy']:.3f} ({one['accuracy_low']:.3f} to "
            f"{one['accuracy_high']:.3f}) of {one['measured_on']:,}"
            for name, one in judges.items()
        )
        + ". Below: replies to prompts held back, drawn at temperature 1; mean ± standard deviation over "
        "seeds. The watched reward is that of a model which no policy was trained for."
    )
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for name, kind, of in (
        ("SFT, the start", "rlhf", lambda found: found["before"]),
        ("RLHF, one long run", "rlhf", lambda found: found["after"]),
        ("WARP, as many updates", "warp", lambda found: found["front"][-1]),
    ):
        ends = [of(card.results) for place, card in cards.items() if place.startswith(f"{kind}/")]
        rows[name] = {key: mean_std([end[key] for end in ends]) for key in _GAINED}
    table = [[name, *(plus_minus(value) for value in row.values())] for name, row in rows.items()]
    page.table(["", *_GAINED.values()], table)
    first = next(place for place in cards if place.startswith("warp/"))
    points = cards[first].results["front"]
    page.plot(
        [
            Series(_GAINED[key], [point["kl"] for point in points], [point[key] for point in points])
            for key in ("reward", "watched_reward")
        ],
        x=_GAINED["kl"], y="reward", caption="WARP's line, first seed: from the start to its end.",
    )  # fmt: skip
    page.text("WARP against its parents and the long run at equal distance: gemwright ablate merging.")
    return {"judges": judges, "rows": rows}


def _runs(models: Mapping[str, Any], kind: str) -> list[str]:
    """The names of a kind's runs: one a seed, or the one there is."""
    return [name for name in models if name.split("/")[0] == kind]


def _by_measure(models: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[float]]:
    return {measure: [models[name][measure]["value"] for name in names] for measure in MEASURES}


def _cells(models: Mapping[str, Any], kind: str, values: Mapping[str, list[float]]) -> list[str]:
    cells: list[str] = []
    for measure, (_, digits) in MEASURES.items():
        if len(values[measure]) > 1:
            cells.append(plus_minus(mean_std(values[measure]), digits))
        else:
            one = models[_runs(models, kind)[0]][measure]
            cells.append(f"{one['value']:.{digits}f} ({one['low']:.{digits}f} to {one['high']:.{digits}f})")
    return cells


def _gains(values: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Differences of two ways to train, seed by seed."""
    gains: dict[str, dict[str, Any]] = {}
    for better, worse in COMPARED:
        gains[f"{NAMES[better]}, less {NAMES[worse]}"] = {
            measure: mean_std(
                [a - b for a, b in zip(values[better][measure], values[worse][measure], strict=True)]
            )
            for measure in MEASURES
        }
    return gains


def _logged(folder: Path, name: str) -> tuple[list[float], list[float]]:
    rows = [row for row in read_metrics(folder) if name in row]
    return [float(row["step"]) for row in rows], [row[name] for row in rows]
