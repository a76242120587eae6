"""The page: whole in itself, safe with any text, the same bytes for the same numbers."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gemwright.report import COLOURS, Report, Series, mean_std, plus_minus, text_table

EVIL = "<script>alert('x')</script> & \"<b>\" ]]>"


class Page(HTMLParser):
    """What a browser would see: tags, and the text outside of them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def filled(text: str = "text") -> Report:
    report = Report(f"Title {text}", {"value": 1.5, "text": text})
    report.heading(text)
    report.text(text)
    report.text(text, note=True)
    report.code(f"{text}\n  indented")
    report.table(["name", text], [["a", text], ["b", "2"]])
    report.plot(
        [
            Series(f"teacher {text}", [1.0, 10.0, 100.0], [3.0, 2.0, 1.0], spread=[0.1, 0.1, 0.1]),
            Series("distilled", [n / 2 for n in range(1, 30)], [1 / n for n in range(1, 30)], colour="#12a"),
        ],
        x=f"x {text}", y=f"y {text}", log_x=True, caption=text,
    )  # fmt: skip
    report.bars([text, "b"], [3, 1], x=f"x {text}")
    report.points({text: [3.0, 4.0], "b": [1.0]}, x=f"x {text}", caption=text)
    return report


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path):
    page = filled().write(tmp_path)
    links = [
        (tag, name, value)
        for tag, attributes in Page(page).tags
        for name, value in attributes.items()
        if name.split(":")[-1] in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert not [link for link in links if not (link[2] or "").startswith("#")]
    assert not {tag for tag, _ in Page(page).tags} & {"script", "link", "iframe", "img", "object"}
    text = page.read_text(encoding="utf-8")
    assert not [url for url in re.findall(r"url\(([^)]*)\)", text) if not url.startswith("#")]
    assert "@import" not in text


def test_text_is_shown_and_not_obeyed(tmp_path: Path):
    """In every place where text may stand: a model may write anything in its samples."""
    page = Page(filled(EVIL).write(tmp_path))
    assert not {tag for tag, _ in page.tags} & {"script", "b"}
    assert page.text.count("alert('x')") >= 10


def test_the_page_is_one_html_document_in_reading_order(tmp_path: Path):
    path = filled().write(tmp_path)
    tags = [tag for tag, _ in Page(path).tags]
    assert path.name == "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    order = [tag for tag in tags if tag in ("h1", "h2", "p", "pre", "table", "figure")]
    assert order == ["h1", "h2", "p", "p", "pre", "table", "figure", "figure", "figure"]
    assert tags.count("svg") == 3


def test_the_numbers_stand_beside_the_page_as_json(tmp_path: Path):
    filled("żółw").write(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == {
        "value": 1.5,
        "text": "żółw",
    }


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path):
    one, other = (filled().write(tmp_path / name).read_bytes() for name in "ab")
    assert one == other


def test_other_numbers_give_another_plot():
    def drawn(value: float) -> str:
        report = Report("a", {})
        report.plot([Series("teacher", [1.0, 2.0], [1.0, value])], x="x", y="y")
        return "".join(report._parts)

    assert drawn(2.0) == drawn(2.0)
    assert drawn(2.0) != drawn(3.0)


def test_the_labels_of_a_plot_are_text_and_its_colours_say_who_is_who():
    report = Report("a", {})
    report.plot(
        [
            Series("teacher", [1.0, 2.0], [1.0, 2.0], colour=COLOURS["teacher"]),
            Series("other", [1.0], [2.0], colour="#123456"),
        ],
        x="updates",
        y="nats",
    )
    (svg,) = report._parts
    assert all(f">{word}</text>" in svg for word in ("updates", "nats", "teacher", "other"))
    assert "#555555" in svg
    assert "#123456" in svg


def test_bars_are_named_from_the_top_and_say_their_values(tmp_path: Path):
    report = Report("Bars", {})
    report.bars(["all", "after <b>"], [12_345, 0], x="documents left")
    page = report.write(tmp_path).read_text(encoding="utf-8")
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", page)
    assert {"all", "12,345", "documents left"} <= set(texts)
    assert "after <b>" not in page
    heights = {name: float(y) for y, name in re.findall(r'y="([0-9.]+)"[^>]*>(all|after [^<]*)</text>', page)}
    assert heights["all"] < min(height for name, height in heights.items() if name != "all")


def test_mean_and_spread_over_seeds():
    stats = mean_std([2.0, 4.0, 9.0])
    assert stats == {"mean": 5.0, "std": round(math.sqrt(13), 5), "seeds": 3}


def test_one_seed_has_no_spread():
    assert mean_std([2.5]) == {"mean": 2.5, "std": 0.0, "seeds": 1}


def test_a_mean_with_its_spread_is_written_short():
    assert plus_minus({"mean": 2.81249, "std": 0.00414, "seeds": 3}) == "2.812 ± 0.004"
    assert plus_minus({"mean": 67.66, "std": 0.25, "seeds": 2}, 1) == "67.7 ± 0.2"


def test_of_one_seed_no_spread_is_shown():
    assert plus_minus({"mean": 2.81249, "std": 0.0, "seeds": 1}) == "2.812"


def test_a_table_for_the_terminal_is_aligned():
    told = text_table(["", "loss"], [["teacher", "2.5"], ["twin", "13.25"]])
    assert told == "          loss\n-------  -----\nteacher    2.5\ntwin     13.25"


@pytest.mark.parametrize("header", [["one"], ["one", "two", "three"]])
def test_a_table_may_have_any_number_of_columns(header: list[str]):
    lines = text_table(header, [header]).splitlines()
    assert lines[0].split() == lines[2].split() == header
