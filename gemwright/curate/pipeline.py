"""From raw text or chat logs to what may be learnt from: the stages `curate` and `prompts`.

The report names its aims (section 3.1, and Gemma 1's): fewer unwanted or unsafe utterances, certain personal
information filtered, evaluation sets removed, less recitation; for LMSYS-Chat its prompts, never its answers.
It names no method. The order below is ours: what is cheap and drops much comes first.

    read  |  exact  language  unsafe  self_identification  contamination  quality  personal  |  near

Between bars, each task runs on its own; across them, all tasks have to be finished. While a stage runs, its
`resume/` holds what each task wrote and the markers of those that are finished; at the end it is removed.
"""

import functools
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from pydantic import PositiveInt

from gemwright.config import Config
from gemwright.curate import dedup, steps
from gemwright.curate.dedup import NearConfig
from gemwright.curate.report import Tally, write_report
from gemwright.data.curated import (
    DOCUMENTS,
    FORMAT,
    MANIFEST,
    STAGE,
    CuratedManifest,
    read_rows,
    split_source,
)
from gemwright.data.executor import LOCAL, ExecutorConfig, execute
from gemwright.filters.decontaminate import Index, read_benchmarks
from gemwright.filters.quality import QualityConfig
from gemwright.filters.unsafe import Unsafe, UnsafeConfig
from gemwright.reading.prompts import PROMPTS
from gemwright.reading.records import ReadConfig
from gemwright.reading.units import Unit, plan
from gemwright.run import RESUME, Card, RunFolder, atomic, run_stage, write_json

_KEPT_PROMPTS = f"{RESUME}/kept"

_TASKS, _LEAST, _MOST = 8, 2**20, 2**26  # a task reads an eighth of the whole, within these bounds
_MOST_TASKS = 500  # a bucket of MinHash opens one file of each, and systems allow about a thousand


class FilterConfig(Config):
    """What every stage that filters has; None turns a filter off."""

    unsafe: UnsafeConfig | None = UnsafeConfig()
    """Word lists and a score."""
    personal: Literal["redact", "drop"] | None = "redact"
    """Replace personal information by its kind, or drop what holds any."""
    phone_regions: tuple[str, ...] = ("US", "GB")
    """Countries whose telephone numbers are known without their +code."""
    exact_duplicates: bool = True
    """Keep one of equal documents."""
    near_duplicates: NearConfig | None = NearConfig()
    """Keep one of nearly equal documents."""


class SourcesConfig(FilterConfig):
    """What both stages here read and filter."""

    read: ReadConfig = ReadConfig()
    """How files become records."""
    languages: tuple[str, ...] | None = None
    """Codes of the languages to keep; None keeps all."""


class CurateConfig(SourcesConfig):
    """Text to learn from."""

    quality: QualityConfig | None = QualityConfig()
    """Rules for prose; None for source code, which they would drop."""
    self_identification: bool = True
    """Drop text in which a model speaks of itself."""


class PromptsConfig(SourcesConfig):
    """Prompts to be answered by a teacher."""

    languages: tuple[str, ...] | None = ("en",)
    """English only, as in the report (section 5)."""
    min_characters: PositiveInt = 8
    """Of all turns of a conversation together: below, there is nothing to answer. Ours."""
    max_characters: PositiveInt = 16_000
    """About 4,000 tokens, half of Gemma 2's context, so that an answer has room. Ours."""


Checks = Iterator[tuple[str, Callable[[Document], str | None]]]
"""What a document goes through, in order, each with its step's name."""


@dataclass(frozen=True)
class _Stage:
    """In what the two stages differ."""

    name: str
    documents: Callable[..., Iterator[Document]]
    """Given a unit, and `config`: how files become records."""
    checks: Callable[[Path | None], Checks]
    """Given where the index of benchmarks lies, if there is one."""
    kept: str
    """Where the last pipeline writes, inside the stage's folder."""
    finish: Callable[[Path, Tally], None]
    """What is made of that."""
    next_step: str = ""


def curate(
    config: CurateConfig,
    out: Path,
    sources: Sequence[str],
    *,
    against: Sequence[Path] = (),
    executor: ExecutorConfig = LOCAL,
    fresh: bool = False,
) -> Card:
    """The stage that makes a curated folder: `documents/`, `rejects/`, `curated.json` and a report.

    Args:
        sources: as `reading.units.plan` takes them: files, folders, `hf:owner/name`, `python`.
        against: benchmark files or folders; documents that hold an item of theirs are dropped.
        executor: where the tasks run; changes nothing in the result.
    Raises:
        FileNotFoundError: a source or benchmark is missing.
        ValueError: nothing to read in them, a word list or score that does not load, or `out` holds other
            work.
    """

    def checks(index: Path | None) -> Checks:
        yield "language", functools.partial(steps.check_language, kept=config.languages)
        if config.unsafe is not None:
            yield "unsafe", functools.partial(steps.check_unsafe, unsafe=Unsafe(config.unsafe))
        if config.self_identification:
            yield "self_identification", steps.check_self_identification
        if index is not None:
            yield "contamination", functools.partial(steps.check_contamination, index=index)
        if config.quality is not None:
            yield "quality", functools.partial(steps.check_quality, config=config.quality)
        if config.personal is not None:
            yield "personal", personal(config)

    def finish(folder: Path, tally: Tally) -> None:
        manifest = CuratedManifest(
            format=FORMAT,
            sources={name: split_source(kept.documents, kept.sizes) for name, kept in tally.kept.items()},
            files=tuple(sorted(path.name for path in (folder / DOCUMENTS).glob("*"))),
        )
        write_json(folder / MANIFEST, manifest.to_dict())

    next_step = f"gemwright tokenizer train {out} --out {out.parent / 'tokenizer'}"
    stage = _Stage(STAGE, steps.texts, checks, DOCUMENTS, finish, next_step)
    return _run(stage, config, out, sources, against, executor, fresh)


def prompts(
    config: PromptsConfig,
    out: Path,
    sources: Sequence[str],
    *,
    against: Sequence[Path] = (),
    executor: ExecutorConfig = LOCAL,
    fresh: bool = False,
) -> Card:
    """The stage that makes `prompts.jsonl`: one record a conversation, its user turns and no answer.

    A record is `{"id", "turns", "language", "source"}`. Arguments and errors as `curate`.
    """

    def checks(index: Path | None) -> Checks:
        yield "log", steps.check_log
        length = {"least": config.min_characters, "most": config.max_characters}
        yield "length", functools.partial(steps.check_length, **length)
        yield "language", functools.partial(steps.check_language, kept=config.languages)
        if config.unsafe is not None:
            yield "unsafe", functools.partial(steps.check_unsafe, unsafe=Unsafe(config.unsafe))
        if index is not None:
            yield "contamination", functools.partial(steps.check_contamination, index=index)
        if config.personal is not None:
            yield "personal", personal(config)

    def finish(folder: Path, tally: Tally) -> None:
        with atomic(folder / PROMPTS) as partial, open(partial, "wb") as file:
            for path in sorted((folder / _KEPT_PROMPTS).glob("*.zst")):
                for row in read_rows(path):
                    about = row["metadata"]
                    record = {"id": row["id"], "turns": row["text"].split(steps.TURN)}
                    record |= {"language": about["language"], "source": about["source"]}
                    file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    stage = _Stage("prompts", steps.prompts, checks, _KEPT_PROMPTS, finish)
    return _run(stage, config, out, sources, against, executor, fresh)


def personal(config: FilterConfig) -> Callable[[Document], str | None]:
    """The check that replaces personal information, or drops what holds any."""
    how = {"action": config.personal, "regions": config.phone_regions}
    return functools.partial(steps.check_personal, **how)


def _run(
    stage: _Stage,
    config: SourcesConfig,
    out: Path,
    sources: Sequence[str],
    against: Sequence[Path],
    executor: ExecutorConfig,
    fresh: bool,
) -> Card:
    units = plan(sources)
    words = word_lists(config)

    def work(folder: RunFolder) -> dict[str, Any]:
        home = folder.path.resolve()  # a worker on another machine may stand elsewhere
        resume, index = home / RESUME, None
        if against:
            index = resume / "against.npz"
            Index.build(item for path in against for item in read_benchmarks(path)).save(index)
        tally = sift(
            home, _tasks(units), functools.partial(stage.documents, config=config.read), stage.checks(index),
            stage.kept, config, executor,
        )  # fmt: skip
        stage.finish(home, tally)
        write_report(stage.name, home, tally, config.near_duplicates)
        return {"documents": tally.documents, "kept": tally.total_kept, "dropped": tally.dropped_by_reason}

    card = run_stage(
        stage.name, config, out, work, inputs={str(path): path for path in (*against, *words)},
        facts={"sources": _identity(units)}, fresh=fresh, next_step=stage.next_step,
    )  # fmt: skip
    shutil.rmtree(out / RESUME, ignore_errors=True)  # after the card: until then a kill may want it
    return card


def word_lists(config: FilterConfig) -> list[Path]:
    """The lists of unsafe words that a stage reads; raises if one, or a score, does not load."""
    if config.unsafe is None:
        return []
    Unsafe(config.unsafe)
    return list(map(Path, config.unsafe.words))


def sift(
    home: Path,
    tasks: Sequence[Sequence[Any]],
    documents: Callable[[Any], Iterator[Document]],
    checks: Checks,
    kept: str,
    config: FilterConfig,
    executor: ExecutorConfig = LOCAL,
) -> Tally:
    """Read, check and deduplicate, inside any stage's work; returns the count of what was kept and dropped.

    A pipeline's last step either keeps documents, or leaves them with signatures to the next pipeline.

    Args:
        home: the stage's folder, resolved. In its `resume/` finished tasks leave their markers, so a stage
            that was killed has to come with the same tasks again; rejects go to its `rejects/`.
        tasks, documents: as `steps.Read` takes them.
        kept: the folder inside `home` for what is left, a file a task.
        config: of this, which duplicates are removed; the other filters are among the checks.
    """
    resume, ledgers, number = home / RESUME, home / RESUME / "ledgers", len(tasks)
    rejects = functools.partial(steps.Rejects, home, ledgers)

    def go(name: str, pipeline: Sequence[PipelineStep], number: int = number) -> None:
        execute(pipeline, number, resume / "tasks" / name, executor, name)

    pipeline: list[PipelineStep] = [steps.Read(tasks, documents, rejects("read"))]
    names = ["read"]
    if config.exact_duplicates:
        found, read = resume / "exact", resume / "read"
        # The finder merges sorted files one entry after the other, so large corpora get several of them.
        finders = max(1, number // _TASKS)
        go("read", [*pipeline, steps.writer(read), dedup.ExactSignature(found / "signatures", finders)])
        go("find-exact", [dedup.find_exact(found / "signatures", found / "removals")], finders)
        dropper = dedup.drop_exact(found / "removals", rejects("exact", "exact_duplicate"))
        pipeline, names = [steps.Documents(read), dropper], ["read", "exact"]
    for name, check in checks:
        pipeline.append(steps.Check(name, check, rejects(name)))
        names.append(name)
    if (near := config.near_duplicates) is not None:
        found, filtered = resume / "near", resume / "filtered"
        signatures = dedup.near_signature(found / "signatures", near)
        go("filter", [*pipeline, steps.writer(filtered), signatures])
        go("find-near", [dedup.find_near(found / "signatures", found / "pairs", near)], near.buckets)
        go("cluster", [dedup.cluster_near(found / "pairs", found / "removals", near)], 1)
        dropper = dedup.drop_near(found / "removals", rejects("near", "near_duplicate"))
        pipeline = [steps.Documents(filtered), dropper]
        names.append("near")
    go("keep", [*pipeline, steps.Keep(home / kept, resume / "tally")])
    return Tally.add_up(names, ledgers, resume / "tally")


def _tasks(units: Sequence[Unit]) -> list[list[Unit]]:
    """Neighbouring units together, so that tasks read about the same amount, whatever the machine."""
    total = sum(unit.size for unit in units)
    wanted = max(min(max(total / _TASKS, _LEAST), _MOST), total / _MOST_TASKS)
    tasks: list[list[Unit]] = []
    filled = math.inf
    for unit in units:
        if filled + unit.size / 2 > wanted and len(tasks) < _MOST_TASKS:
            tasks.append([])
            filled = 0
        tasks[-1].append(unit)
        filled += unit.size
    return tasks


def _identity(units: Sequence[Unit]) -> str:
    """What identifies the text before it is read: each file's place in its source, size and time of change.

    Its content would be better, but reading all of it twice is not worth it at scale.
    """
    digest = hashlib.sha256()
    for source, file, path in dict.fromkeys((unit.source, unit.file, unit.path) for unit in units):
        known = [source, file]
        if isinstance(path, Path):
            about = path.stat()
            known += [str(about.st_size), str(about.st_mtime_ns)]
        else:
            known.append(str(path))
        digest.update(repr(known).encode())
    return digest.hexdigest()
