"""Tables and plots -> one self-contained HTML file and one JSON file beside it.

Plots are SVG inside the page: no script, no network, and the same numbers give the same bytes.
"""

import html
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemwright.run import write_json, write_text

COLOURS = {"teacher": "#555555", "distilled": "#0b6e4f", "scratch": "#c8553d"}
_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .8rem; text-align: right; }
th { border-bottom: 2px solid #222; } td { border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } svg { max-width: 100%; height: auto; }
pre { background: #f6f6f4; padding: .8rem; overflow-x: auto; white-space: pre-wrap; } .note { color: #666; }
"""


@dataclass
class Series:
    """One line of a plot; `spread` is drawn as error bars."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    colour: str | None = None


@dataclass
class Report:
    """A page under construction: sections are added in reading order, then it is written."""

    title: str
    data: dict[str, Any]
    """What `report.json` will hold."""
    _parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, *, note: bool = False) -> None:
        """A paragraph; `note` for small print."""
        self._parts.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Preformatted text, such as a sample from a model."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of strings; the first column is left-aligned."""
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        self._parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")

    def plot(
        self, series: Sequence[Series], *, x: str, y: str, log_x: bool = False, caption: str = ""
    ) -> None:
        """A line plot with a legend."""
        below = f"<figcaption class=note>{html.escape(caption)}</figcaption>"
        self._parts.append(f"<figure>{_svg(series, x, y, log_x)}{below}</figure>")

    def bars(self, names: Sequence[str], values: Sequence[int], *, x: str) -> None:
        """Horizontal bars, the first on top, each with its value."""
        self._parts.append(f"<figure>{_bars(names, values, x)}</figure>")

    def points(self, groups: Mapping[str, Sequence[float]], *, x: str, caption: str = "") -> None:
        """A line a group, the first on top: a dot for each value, and a bar at their mean."""
        below = f"<figcaption class=note>{html.escape(caption)}</figcaption>"
        self._parts.append(f"<figure>{_points(groups, x)}{below}</figure>")

    def write(self, folder: Path) -> Path:
        """Write `report.html` and `report.json`; returns the page's path."""
        title = html.escape(self.title)
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_CSS}</style></head><body><h1>{title}</h1>{''.join(self._parts)}</body></html>\n"
        )
        write_json(folder / "report.json", self.data)
        write_text(folder / "report.html", page)
        return folder / "report.html"


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """`{mean, std, seeds}`: the sample standard deviation (0 for one value), and how many values it was."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return {"mean": round(mean, 5), "std": round(variance**0.5, 5), "seeds": len(values)}


def plus_minus(stats: Mapping[str, Any], digits: int = 3) -> str:
    """`2.812 ± 0.004`, without a spread where there is one value only."""
    spread = f" ± {stats['std']:.{digits}f}" if stats["seeds"] > 1 else ""
    return f"{stats['mean']:.{digits}f}{spread}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for a terminal: aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join(map(line, [header, ["-" * width for width in widths], *rows]))


def _svg(series: Sequence[Series], x: str, y: str, log_x: bool) -> str:
    def draw(axes: Any) -> None:
        for line in series:
            marker = "o" if len(line.x) < 10 else None
            axes.errorbar(
                line.x, line.y, yerr=line.spread, label=line.name, color=line.colour, marker=marker, capsize=3
            )
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if log_x:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    return _drawn(draw, height=4.0)


def _bars(names: Sequence[str], values: Sequence[int], x: str) -> str:
    def draw(axes: Any) -> None:
        bars = axes.barh(range(len(names)), values, color=COLOURS["distilled"])
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.bar_label(bars, labels=[f"{value:,}" for value in values], padding=3)
        axes.set_xlim(0, 1.15 * max([1, *values]))
        axes.set_xlabel(x)
        axes.spines[["top", "right"]].set_visible(False)

    return _drawn(draw, height=1 + 0.3 * max(2, len(names)))


def _points(groups: Mapping[str, Sequence[float]], x: str) -> str:
    def draw(axes: Any) -> None:
        for place, values in enumerate(groups.values()):
            mean = sum(values) / len(values)
            axes.scatter(values, [place] * len(values), color=COLOURS["distilled"], alpha=0.6, zorder=2)
            axes.scatter([mean], [place], color=COLOURS["teacher"], marker="|", s=300, zorder=3)
            axes.annotate(
                f"{mean:.3f}", (mean, place), xytext=(0, 9), textcoords="offset points", ha="center"
            )
        axes.set_yticks(range(len(groups)), groups.keys())
        axes.set_ylim(len(groups) - 0.5, -0.7)
        axes.set_xlabel(x)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)

    return _drawn(draw, height=1 + 0.55 * max(2, len(groups)))


def _drawn(draw: Callable[[Any], None], height: float) -> str:
    """What `draw` puts on a pair of axes, as SVG; `height` in inches."""
    # matplotlib takes most of a second to import, and says at INFO that it made a font cache
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "gemwright", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7.5, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().partition("<svg")[1] + buffer.getvalue().partition("<svg")[2]
