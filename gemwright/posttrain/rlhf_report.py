"""The page of an RLHF run: reward, distance, entropy and length as they went."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemwright.report import Report, Series, text_table
from gemwright.run import read_metrics

_CURVES = {
    "reward": "reward",
    "kl": "nats from the start, a conversation",
    "entropy": "the policy's entropy, nats a token",
    "tokens": "tokens a reply",
}
_HELD_BACK = "held_back."


def write(folder: Path) -> Path:
    """Write `report.html` and `report.json` from a run's metrics; returns the page's path."""
    rows = read_metrics(folder)
    measured = [row for row in rows if f"{_HELD_BACK}reward" in row]
    last = measured[-1] if measured else {}  # no prompt was held back
    names = [name.removeprefix(_HELD_BACK) for name in last if name.startswith(_HELD_BACK)]
    header = ["update", *names]
    table = [
        [str(row["step"]), *(f"{row[_HELD_BACK + name]:.3f}" for name in names)]
        for row in (measured if len(measured) < 12 else [measured[0], measured[-1]])
    ]
    data = {"table": text_table(header, table), "measured": measured, "best_watched": best_watched(folder)}
    page = Report("RLHF: what was gained, and at what distance", data)
    page.text(
        "On prompts that are held back. The reward is what training sees; a watched reward is that of a "
        "second reward model, which only looks on: where the two part, the first is being fooled."
    )
    page.table(header, table)
    for name, label in _CURVES.items():
        shown = [one for one in names if one == name or (name == "reward" and one.endswith("_reward"))]
        lines = [_line(measured, _HELD_BACK + one, one) for one in shown]
        page.plot([*lines, _line(rows, name, f"{name}, in training")], x="updates", y=label)
    return page.write(folder)


def _line(rows: Sequence[Mapping[str, Any]], key: str, name: str) -> Series:
    told = [row for row in rows if key in row]
    return Series(name, [float(row["step"]) for row in told], [row[key] for row in told])


def best_watched(folder: Path) -> int | None:
    """The update after which the watched reward was highest on the prompts held back; None: none watched."""
    rows = [row for row in read_metrics(folder) if f"{_HELD_BACK}watched_reward" in row]
    return max(rows, key=lambda row: row[f"{_HELD_BACK}watched_reward"])["step"] if rows else None
