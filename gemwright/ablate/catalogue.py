"""The studies there are, in the order of the report's tables, and how each is run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemwright.ablate import beyond, merging, page, paper, study
from gemwright.ablate.page import Finding
from gemwright.recipes.base import Base
from gemwright.run import say

Trained = Callable[[Base, Sequence[int]], study.Study]


@dataclass(frozen=True)
class Entry:
    """A study by its name."""

    summary: str
    """What it asks, in a line."""
    table: str
    """The report's, or a dash."""
    find: Callable[[Base, Sequence[int], Path], Finding]
    """Runs it in a place that studies share."""


def _trained(make: Trained) -> Callable[[Base, Sequence[int], Path], Finding]:
    def find(base: Base, seeds: Sequence[int], home: Path) -> Finding:
        return study.run(make(base, seeds), home, base.root / "shards", base.teacher_folder)

    return find


STUDIES: Mapping[str, Entry] = {
    "distillation": Entry("distilled against from scratch", "Table 6", _trained(paper.distillation)),
    "student-size": Entry("students of three sizes", "Table 7", _trained(paper.student_size)),
    "attention": Entry("MHA against GQA: quality, KV bytes, speed", "Table 8", _trained(paper.attention)),
    "depth": Entry("wide against deep at equal parameters", "Table 9", _trained(paper.depth)),
    "window": Entry("the window changed at inference", "Table 10", paper.window),
    "formatting": Entry("spread over twelve forms of a question", "Table 11", paper.formatting),
    "targets": Entry("what of a teacher's distribution to keep", "-", _trained(beyond.targets)),
    "student-tokens": Entry("where distillation stops paying", "-", _trained(beyond.student_tokens)),
    "teacher-size": Entry("teachers of three sizes", "-", _trained(beyond.teacher_size)),
    "temperature": Entry("the temperature of distillation", "-", _trained(beyond.temperature)),
    "merging": Entry("an average, SLERP and WARP against their parents", "-", merging.find),
}


def run(name: str, base: Base, seeds: Sequence[int], home: Path) -> Path:
    """Run a study and write its page into `home/NAME`; returns the page's path. What is finished is kept.

    Raises what the recipe's stages and the study's raise.
    """
    if name != "merging":
        base.prepare()
    return STUDIES[name].find(base, seeds, home).write(home / name)


def run_all(base: Base, seeds: Sequence[int], home: Path) -> Path:
    """Run every study, and write one page of all into `home`; what cannot run is named there, with why."""
    folders: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for number, name in enumerate(STUDIES, 1):
        say(f"study {number} of {len(STUDIES)}: {name} ({STUDIES[name].summary})")
        try:
            folders[name] = run(name, base, seeds, home).parent
        except FileNotFoundError as error:
            if name != "merging":
                raise
            missing[name] = str(error)
    return page.write_all(home, folders, missing)
