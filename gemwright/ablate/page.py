"""What a study found, as a page and as JSON; and one page for all of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemwright.report import Report, Series, text_table

SCALE = "The report's models have 2B to 27B parameters and read trillions of tokens: compare directions."


@dataclass(frozen=True)
class Plot:
    """Lines of a plot."""

    x: str
    y: str
    lines: Sequence[Series]
    log_x: bool = False


@dataclass(frozen=True)
class Finding:
    """What a study asked, and what came out."""

    study: str
    title: str
    question: str
    """What is to be decided, and what is held fixed."""
    header: Sequence[str]
    """Of the table."""
    table: Sequence[Sequence[str]]
    """Ours, for people."""
    rows: Sequence[Mapping[str, Any]]
    """Ours, for programs."""
    report: Mapping[str, Any]
    """The report's own: `table` (its number), `rows` (name -> number), `says`. Empty where it has none."""
    claims: Sequence[Mapping[str, Any]]
    """As `Claim.judged` gives them."""
    verdict: str
    """In a line."""
    seeds: Sequence[int | str]
    seconds: float
    """Of all runs that it is made of."""
    code: Mapping[str, str]
    plots: Sequence[Plot] = ()
    points: tuple[str, Mapping[str, Sequence[float]]] | None = None
    """A metric, and every arm's values of it, a seed each: drawn as dots."""
    notes: Sequence[str] = ()
    """What else a reader should know."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further data for the JSON file."""

    def text(self) -> str:
        """Table and verdict for a terminal."""
        lines = [text_table(list(self.header), [list(row) for row in self.table])]
        if self.report:
            told = ", ".join(f"{name} {value}" for name, value in self.report["rows"].items())
            lines.append(f"the report, {self.report['table']}: {told}. {self.report.get('says', '')}".strip())
        lines += [claim["text"] for claim in self.claims]
        return "\n\n".join([*lines, f"verdict: {self.verdict}"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `report.json` holds."""
        named = ("study", "title", "question", "rows", "report", "claims", "verdict", "seeds", "seconds")
        data = {name: getattr(self, name) for name in named} | {"code": dict(self.code), **self.extra}
        shown = {
            "header": list(self.header), "rows": [list(row) for row in self.table],
            "plots": [asdict(plot) for plot in self.plots], "notes": list(self.notes),
            "points": self.points,
        }  # fmt: skip
        return data | {"seeds": list(self.seeds), "table": self.text(), "shown": shown}

    def write(self, out: Path) -> Path:
        """Write `report.html` and `report.json`; returns the page's path."""
        data = json.loads(json.dumps(self.to_dict()))
        page = Report(self.title, data)
        _show(page, data)
        return page.write(out)


def write_all(out: Path, folders: Mapping[str, Path], missing: Mapping[str, str]) -> Path:
    """One page of the studies whose `report.json` lie in these folders.

    Args:
        missing: studies that were not run, and why.
    """
    found = {name: json.loads((f / "report.json").read_text(encoding="utf-8")) for name, f in folders.items()}
    seconds = sum(one["seconds"] for one in found.values())
    header = ["study", "the report", "verdict", "seeds", "seconds"]
    rows = [
        [
            name, one["report"].get("table", "-"), one["verdict"], str(len(one["seeds"])),
            f"{one['seconds']:.0f}",
        ]
        for name, one in found.items()
    ]  # fmt: skip
    rows += [[name, "-", f"not run: {why}", "-", "-"] for name, why in missing.items()]
    table = text_table(header, rows)
    page = Report("The report's ablations, measured again", {
        "studies": found, "missing": dict(missing), "seconds": round(seconds, 1), "table": table,
    })  # fmt: skip
    page.text(SCALE)
    page.table(header, rows)
    for one in found.values():
        page.heading(one["title"])
        _show(page, one)
    return page.write(out)


def _show(page: Report, data: Mapping[str, Any]) -> None:
    """A study's part of a page, from what its `report.json` holds."""
    page.text(data["question"])
    if report := data["report"]:
        page.text(f"The report (arXiv 2408.00118), {report['table']}. {report.get('says', '')}".strip())
        page.table(["", "the report's"], [[name, str(value)] for name, value in report["rows"].items()])
    page.table(["ours", *data["shown"]["header"][1:]], data["shown"]["rows"])
    if points := data["shown"]["points"]:
        page.points(points[1], x=points[0], caption="A dot a seed, a bar at their mean.")
    for plot in data["shown"]["plots"]:
        lines = [Series(**line) for line in plot["lines"]]
        page.plot(lines, x=plot["x"], y=plot["y"], log_x=plot["log_x"])
    for claim in data["claims"]:
        page.text(claim["text"])
    page.text(f"Verdict: {data['verdict']}.")
    for note in data["shown"]["notes"]:
        page.text(note, note=True)
    count = len(data["seeds"])
    page.text(
        f"{count} seed{'s' if count > 1 else ''}; ± is the standard deviation over them, p that of a "
        f"two-sided paired t-test. {data['seconds']:.0f} s of computing. {SCALE}",
        note=True,
    )
