"""What was kept, what was dropped and why: `report.html` and `report.json` of the stages that curate."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemwright.curate.dedup import NearConfig
from gemwright.curate.steps import EXAMPLES, Kept
from gemwright.report import Report, Series

_LANGUAGES = 20  # in the plot; report.json has all


@dataclass
class Tally:
    """The ledgers of all tasks, added up."""

    steps: list[str]
    """In the order in which documents meet them."""
    dropped: dict[str, dict[str, Counter[str]]]
    """By step, source, reason."""
    examples: dict[str, list[dict[str, str]]]
    """Of each reason: id, and the beginning of the text with personal information masked."""
    kept: dict[str, Kept]
    """By source; one of which nothing is left has an entry too."""

    @classmethod
    def add_up(cls, steps: Sequence[str], ledgers: Path, kept: Path) -> "Tally":
        """Read what the tasks of all steps left below `ledgers`, and of the last one below `kept`."""
        tally = cls(list(steps), {}, {}, defaultdict(Kept))
        for path in sorted(kept.glob("*.json")):
            for source, one in json.loads(path.read_text(encoding="utf-8")).items():
                tally.kept[source].merge(one)
        for step in steps:
            by_source = tally.dropped[step] = defaultdict(Counter)
            for path in sorted((ledgers / step).glob("*.json")):
                ledger = json.loads(path.read_text(encoding="utf-8"))
                for source, reasons in ledger["dropped"].items():
                    by_source[source].update(reasons)
                    tally.kept[source]  # an entry, even if nothing is left
                for reason, examples in ledger["examples"].items():
                    shown = tally.examples.setdefault(reason, [])
                    shown += examples[: EXAMPLES - len(shown)]
        return tally

    @property
    def total_kept(self) -> int:
        """Documents."""
        return sum(kept.documents for kept in self.kept.values())

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        """Documents, the most frequent reason first within each step."""
        reasons: dict[str, int] = {}
        for step in self.steps:
            for reason, count in sum(self.dropped[step].values(), Counter()).most_common():
                reasons[reason] = reasons.get(reason, 0) + count  # two steps may know one reason: `empty`
        return reasons

    @property
    def documents(self) -> int:
        """All that were read or set aside."""
        return self.total_kept + sum(self.dropped_by_reason.values())

    def dropped_of(self, source: str) -> Counter[str]:
        """A source's drops by reason."""
        return sum((self.dropped[step].get(source, Counter()) for step in self.steps), Counter())

    def funnel(self) -> list[tuple[str, int]]:
        """Documents left after each step."""
        left, stages = self.documents, [("all", self.documents)]
        for step in self.steps:
            left -= sum(sum(reasons.values()) for reasons in self.dropped[step].values())
            stages.append((f"after {step}", left))
        return stages


def write_report(stage: str, folder: Path, tally: Tally, near: NearConfig | None) -> Path:
    """Write the page and its numbers into a stage's folder; returns the page's path."""
    total = max(1, tally.documents)
    kept = [tally.kept[source] for source in sorted(tally.kept)]
    lengths, languages, redacted, tags = (
        sum((getattr(one, field) for one in kept), Counter())
        for field in ("lengths", "languages", "redacted", "tags")
    )
    data: dict[str, Any] = {
        "documents": tally.documents,
        "kept": tally.total_kept,
        "characters": sum(one.characters for one in kept),
        "dropped": tally.dropped_by_reason,
        "sources": {
            source: {
                "kept": one.documents, "characters": one.characters, "dropped": tally.dropped_of(source)
            }
            for source, one in sorted(tally.kept.items())
        },
        "funnel": dict(tally.funnel()),
        "lengths": {str(2**power): count for power, count in sorted(lengths.items())},
        "languages": dict(languages.most_common()),
        "redacted": dict(redacted.most_common()),
        "examples": tally.examples,
    } | ({"tags": dict(tags.most_common())} if tags else {})  # fmt: skip
    page = Report(f"{stage}: what was kept, and why the rest was not", data)
    page.text(
        f"{tally.total_kept:,} of {tally.documents:,} documents were kept ({tally.total_kept / total:.1%}), "
        f"{data['characters']:,} characters. The others are in rejects/, by step, each with its reason."
    )
    page.table(
        ["source", "documents", "kept", "share", "characters kept"],
        [_source_row(source, one, tally) for source, one in sorted(tally.kept.items())],
    )
    page.heading("The funnel")
    page.bars(
        [name for name, _ in tally.funnel()], [count for _, count in tally.funnel()], x="documents left"
    )
    page.heading("Why documents were dropped")
    if not tally.dropped_by_reason:
        page.text("None was.")
    sources = sorted(tally.kept)
    page.table(
        ["reason", "documents", "of all", *sources],
        [
            [reason, f"{count:,}", f"{count / total:.2%}"]
            + [f"{tally.dropped_of(source)[reason]:,}" for source in sources]
            for reason, count in tally.dropped_by_reason.items()
        ],
    )
    if any(example["text"] for shown in tally.examples.values() for example in shown):
        page.heading("Examples")
        page.text("The beginning of each; personal information is masked.", note=True)
        for reason, examples in sorted(tally.examples.items()):
            page.text(reason)
            for example in examples:
                page.code(f"{example['id']}\n{example['text']}")
    page.heading("What was kept: lengths")
    powers = sorted(lengths)
    page.bars(
        [f"{2**p:,} to {2 ** (p + 1) - 1:,}" for p in powers], [lengths[p] for p in powers], x="documents"
    )
    if languages:
        page.heading("Languages")
        page.text("As identified; source code is given one too.", note=True)
        shown = languages.most_common(_LANGUAGES)
        page.bars([code for code, _ in shown], [count for _, count in shown], x="documents")
    if tags:
        page.heading("Tags")
        page.bars(list(tags), list(tags.values()), x="documents")
    if redacted:
        page.heading("Personal information replaced")
        page.table(["kind", "pieces"], [[kind, f"{count:,}"] for kind, count in redacted.most_common()])
    if near is not None:
        page.heading("When two documents are near-duplicates")
        similarity = [step / 100 for step in range(101)]
        curve = Series("probability", similarity, [near.probability(one) for one in similarity])
        page.plot(
            [curve], x="Jaccard similarity of their shingles", y="dropped",
            caption=f"{near.buckets} buckets of {near.rows} hashes, shingles of {near.n_grams} words.",
        )  # fmt: skip
    return page.write(folder)


def _source_row(source: str, kept: Kept, tally: Tally) -> list[str]:
    documents = kept.documents + sum(tally.dropped_of(source).values())
    share = kept.documents / max(1, documents)
    return [source, f"{documents:,}", f"{kept.documents:,}", f"{share:.1%}", f"{kept.characters:,}"]
