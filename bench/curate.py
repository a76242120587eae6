"""What does curating cost over the same steps written straight on datatrove?

The same passages (the standard library's, and with GEMWRIGHT_DATA two editions of a book), as jsonl, go
through the same checks: language, unsafe words, contamination, quality and repetition, personal
information, exact and near-duplicates. "Plain" is what one would write with datatrove alone: its reader, a
filter class around each check, its dedup stages, its writer, a folder between every two. What ours adds is
in the difference: rejects with ledgers, lineage, report, and the reader that sets aside what it cannot
read. Both take turns, with the same tasks and workers.

    python -m bench.curate --json
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import ExactDedupConfig, ExactDedupFilter, ExactDedupSignature, ExactFindDedups
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from gemwright.curate import dedup, steps
from gemwright.curate.dedup import NearConfig
from gemwright.curate.pipeline import CurateConfig, curate
from gemwright.data.executor import ExecutorConfig
from gemwright.filters.decontaminate import Index, Item
from gemwright.filters.quality import QualityConfig
from gemwright.filters.unsafe import Unsafe, UnsafeConfig
from gemwright.reading.records import ReadConfig, read
from gemwright.reading.units import plan
from gemwright.run import write_text

WORKERS = 2
FILES = 8
"""Of input, and so tasks."""


class Lambda(BaseFilter):
    """A check of ours in datatrove's clothes, without ledger or rejects."""

    name = "check"

    def __init__(self, check: Callable[..., str | None], **settings: Any) -> None:
        super().__init__()
        self.check, self.settings = check, settings

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """As datatrove asks for it."""
        reason = self.check(doc, **self.settings)
        return True if reason is None else (False, reason)


def _text(document: Document) -> str:
    return document.text


def plain(inputs: Path, index: Path, out: Path) -> int:
    """The steps on datatrove's own blocks. Returns how many documents are left."""
    near = NearConfig()
    exact = ExactDedupConfig(_text)

    def go(name: str, pipeline: list[Any], tasks: int = FILES) -> None:
        LocalPipelineExecutor(pipeline, tasks, min(tasks, WORKERS), str(out / "logs" / name)).run()

    def reader(folder: Path) -> JsonlReader:
        return JsonlReader(str(folder), compression=None if folder == inputs else "zstd")

    def writer(name: str) -> JsonlWriter:
        return JsonlWriter(str(out / name), compression="zstd")

    go("exact-1", [reader(inputs), ExactDedupSignature(str(out / "e1"), exact)])
    go("exact-2", [ExactFindDedups(str(out / "e1"), str(out / "e2"), exact)], 1)
    go("filter", [
        reader(inputs), ExactDedupFilter(str(out / "e2"), exact),
        Lambda(steps.check_language, kept=None), Lambda(steps.check_unsafe, unsafe=Unsafe(UnsafeConfig())),
        Lambda(steps.check_self_identification), Lambda(steps.check_contamination, index=index),
        Lambda(steps.check_quality, config=QualityConfig()),
        Lambda(steps.check_personal, action="redact", regions=("US", "GB")), writer("filtered"),
    ])  # fmt: skip
    go("near-1", [reader(out / "filtered"), dedup.near_signature(out / "n1", near)])
    go("near-2", [dedup.find_near(out / "n1", out / "n2", near)], near.buckets)
    go("near-3", [dedup.cluster_near(out / "n2", out / "n3", near)], 1)
    go("near-4", [reader(out / "filtered"), dedup.drop_near(out / "n3", None), writer("kept")])
    return sum(len(list(steps.curated.read_rows(path))) for path in (out / "kept").glob("*.zst"))


def ours(inputs: Path, benchmark: Path, out: Path) -> int:
    """The stage. Returns how many documents are left."""
    config = CurateConfig()
    card = curate(config, out, [str(inputs)], against=[benchmark], executor=ExecutorConfig(workers=WORKERS))
    return card.results["kept"]


def prepare(folder: Path, repeat: int) -> int:
    """Write the passages as jsonl; returns how many."""
    sources = ["python"]
    if "GEMWRIGHT_DATA" in os.environ:
        sources += map(str, sorted(Path(os.environ["GEMWRIGHT_DATA"], "text").glob("war*.txt")))
    records = [record for unit in plan(sources) for record in read(unit, ReadConfig()) if not record.problem]
    (folder / "input").mkdir()
    for number in range(FILES):
        with open(folder / "input" / f"{number}.jsonl", "wb") as file:
            for copy in range(repeat):
                for record in records[number::FILES]:
                    about = {"source": "input", "file": record.file}
                    row = {"text": record.text, "id": f"{copy}/{record.id}", "metadata": about}
                    file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    questions = [record.text[:300] for record in records[:: len(records) // 200]]
    write_text(folder / "benchmark.jsonl", "".join(json.dumps({"question": q}) + "\n" for q in questions))
    Index.build(Item("benchmark", question) for question in questions).save(folder / "index.npz")
    return repeat * len(records)


def main() -> None:
    """Measure, and print a table or one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument("--repeat", type=int, default=1, help="copies of the text (default 1)")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    kept: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = prepare(folder, options.repeat)
        for _ in range(options.rounds):
            for which, run, given in (
                ("ours", ours, folder / "benchmark.jsonl"),
                ("plain", plain, folder / "index.npz"),
            ):
                start = time.perf_counter()
                kept[which] = run(folder / "input", given, folder / which)
                seconds[which].append(time.perf_counter() - start)
                shutil.rmtree(folder / which)
            print(f"{seconds['ours'][-1]:.1f} s, plain {seconds['plain'][-1]:.1f} s", file=sys.stderr)
    ratios = [plain / ours for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    result = {
        "docs_per_s": round(documents / statistics.median(seconds["ours"]), 1),
        "docs_per_s_plain_datatrove": round(documents / statistics.median(seconds["plain"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "documents": documents,
        "kept": kept["ours"],
        "kept_plain": kept["plain"],
    }
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:28} {value}")


if __name__ == "__main__":
    main()
