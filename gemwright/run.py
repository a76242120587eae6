"""A stage's folder: its card and lineage, its lock, its metrics, its progress bar, and atomic writes.

A stage is `run(config, out) -> Card`: it reads artefact folders and writes one. The folder's `card.json` says
which stage made it, from which config and inputs (by hash), with which code, in how many seconds, with which
results. Started again, a finished stage with the same config and inputs is not run again, and an unfinished
one goes on; a different config for an existing folder is an error that names the difference and the remedy.
"""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gemwright.config import Config, differences

CARD = "card.json"
METRICS = "metrics.jsonl"
RESUME = "resume"
_PRIVATE = (CARD, METRICS, RESUME)  # with hidden files, what a stage does not hand on: no part of its hash


@dataclass
class Card:
    """What `card.json` holds."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    code: dict[str, str]
    seed: int | None
    finished: bool = False
    seconds: float = 0.0
    results: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of every file that the stage hands on, by path inside the folder."""


class RunFolder:
    """What a stage's body gets: the folder, its metrics and its progress bar."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hashes: dict[str, str] = {}
        """SHA-256 of files, by path inside the folder, where the work found it on its way."""
        rows = read_metrics(path)
        if (path / METRICS).exists():
            _write_rows(path, rows)  # a line that a kill tore would swallow the next one
        self._before = max((row.get("elapsed_s", 0.0) for row in rows), default=0.0)
        self._start = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of work on this folder, those before a kill included (as far as the metrics tell)."""
        return self._before + time.monotonic() - self._start

    def log(self, **row: Any) -> None:
        """Append one line to `metrics.jsonl`, in one write, so that a kill tears at most the last line."""
        line = json.dumps({**row, "elapsed_s": round(self.elapsed, 3)}) + "\n"
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(line)

    def rewind(self, step: int) -> None:
        """Drop the metrics after `step`: the run goes on from the checkpoint of that step."""
        _write_rows(self.path, [row for row in read_metrics(self.path) if row.get("step", 0) <= step])

    @contextmanager
    def progress(self, what: str, total: int, done: int = 0, unit: str = "") -> Iterator[Callable[..., None]]:
        """A progress bar on stderr: `advance(n, loss="3.21")`. Without a terminal: a line now and then."""
        with progress(what, total, done=done, unit=unit) as advance:
            yield advance


def run_stage(
    stage: str,
    config: Config,
    out: Path,
    work: Callable[[RunFolder], dict[str, Any]],
    *,
    inputs: Mapping[str, Path] | None = None,
    facts: Mapping[str, str] | None = None,
    fresh: bool = False,
    next_step: str = "",
) -> Card:
    """Run `work` in the folder `out` once, under a lock, and leave a card.

    Args:
        inputs: artefact folders or files that the stage reads; their hashes go into the card.
        facts: further inputs that are no folder (the Python version behind a corpus), compared like inputs.
        fresh: move an existing folder aside (`out.old-1`, ...) and start anew.
        next_step: a command that makes sense once this stage is finished, told to the user.
    Raises:
        ValueError: `out` holds another stage's or another config's work, or an input is unfinished.
        FileNotFoundError: an input is missing.
        RuntimeError: another process works in `out`.
    """
    lineage = {
        name: {"path": _relative(path, out), "sha256": fingerprint(path)}
        for name, path in (inputs or {}).items()
    }
    lineage |= {name: {"value": value} for name, value in (facts or {}).items()}
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, and a stage writes a folder. Choose another --out.")
    if fresh and out.exists():
        with _locked(out):  # nobody's work is moved away while it is being done
            move_aside(out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / CARD).exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(
            f"{out} is not empty and no stage of gemwright made it (it has no {CARD}). Choose another --out."
        )
    with _locked(out):
        card = Card(stage, config.to_dict(), lineage, code_version(), config.to_dict().get("seed"))
        if (out / CARD).exists():
            old = read_card(out)
            _refuse_other_work(old, card, out)
            if old.finished:
                say(f"{stage}: {out} is finished already ({old.seconds:.0f} s), nothing to do")
                return old
            say(f"{stage}: going on in {out}")
        for leftover in out.rglob(".*.partial-*"):  # of a process that was killed while it wrote
            leftover.unlink()
        write_json(out / CARD, asdict(card))
        folder = RunFolder(out)
        try:
            card.results = work(folder)
        except BaseException:
            if all(path.name == CARD or path.name.startswith(".") for path in out.iterdir()):
                (out / CARD).unlink()  # nothing was made: the corrected command may have the folder
            raise
        card.seconds = round(folder.elapsed, 2)
        card.finished = True
        card.outputs = {
            (name := str(p.relative_to(out))): folder.hashes.get(name) or _sha256(p)
            for p in sorted(out.rglob("*"))
            if p.is_file() and p.relative_to(out).parts[0] not in _PRIVATE and not p.name.startswith(".")
        }
        write_json(out / CARD, asdict(card))
    say(f"{stage}: {out} finished in {card.seconds:.0f} s" + (f". Next: {next_step}" if next_step else ""))
    return card


def read_card(folder: Path) -> Card:
    """The card of an artefact folder. Raises FileNotFoundError or ValueError with the remedy."""
    path = folder / CARD
    try:
        return Card(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} has no {CARD}: it is not the work of a gemwright stage.") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Run its stage again with --fresh.") from None


def read_manifest(path: Path, card: Card, format: int, remedy: str) -> dict[str, Any]:
    """A manifest that the stage behind `card` wrote, as plain data.

    Raises FileNotFoundError or ValueError with the remedy: gone, edited, or of another format.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is gone. {remedy}")
    if fingerprint(path) != card.outputs.get(path.name):
        raise ValueError(f"{path} is not what its stage wrote: it was edited or damaged. {remedy}")
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["format"] != format:
        raise ValueError(f"{path} has format {data['format']}, and this version reads {format}. {remedy}")
    return data


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without a last line torn by a kill; an empty list if there is no file."""
    path = folder / METRICS
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows))


def fingerprint(path: Path) -> str:
    """SHA-256 of an artefact: of what its card lists if a stage made it, else of the bytes of its files."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Run the stage that makes it, or name another path.")
    if path.is_file():
        return _sha256(path)
    if (path / CARD).exists():
        card = read_card(path)
        if not card.finished:
            raise ValueError(
                f"{path} is not finished: its stage ({card.stage}) was interrupted. Run it again first."
            )
        listed = card.outputs
    else:
        listed = {str(p.relative_to(path)): _sha256(p) for p in sorted(path.rglob("*")) if p.is_file()}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()


def code_version() -> dict[str, str]:
    """The package's version and, inside a checkout, its commit (`+` marks uncommitted changes)."""
    here = Path(__file__).parent
    code = {"gemwright": version("gemwright")}
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        if (here.parent / ".git").exists():
            code["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # no git, or no commit yet: the version has to do
    return code


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is synced to disk and takes `path`'s place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with naming_lack_of_room(path):
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming_lack_of_room(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                f"no room to write {path} ({error.strerror}). Free some space and run the same command "
                "again: what is finished stays."
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically, indented, with a newline at the end."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def move_aside(folder: Path) -> None:
    """Rename a folder to the first free `NAME.old-N`; nothing is ever deleted for the user."""
    if folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(aside)
        say(f"moved {folder} to {aside}")


def say(text: str) -> None:
    """A line for people, on stderr: stdout is for results."""
    print(f"gemwright: {text}", file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int, *, done: int = 0, unit: str = "") -> Iterator[Callable[..., None]]:
    """A progress bar on stderr with speed and time left. Yields `advance(n, **fields)`."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        fields = ("description}", "percentage:>3.0f}%", "fields[speed]}", "fields[note]}")
        texts = [TextColumn("{task." + field) for field in fields]
        columns = (texts[0], BarColumn(), *texts[1:], TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, completed=done, note="", speed="")
            start, count = time.monotonic(), 0

            def advance(n: int = 1, **note: str) -> None:
                nonlocal count
                count += n
                speed = f"{count / max(time.monotonic() - start, 1e-9):,.0f} {unit}/s" if unit else ""
                text: dict[str, Any] = (
                    {"note": " ".join(f"{key} {value}" for key, value in note.items())} if note else {}
                )
                bar.update(task, advance=n, speed=speed, **text)

            yield advance
        return
    start, count, told = time.monotonic(), done, time.monotonic()

    def advance_quietly(n: int = 1, **note: str) -> None:
        nonlocal count, told
        count += n
        if time.monotonic() - told > 20 or count >= total > count - n:
            told = time.monotonic()
            speed = (count - done) / max(told - start, 1e-9)
            left = (total - count) / speed if speed else 0.0
            texts = [f"{what}: {count / max(total, 1):.0%}", *([f"{speed:,.0f} {unit}/s"] if unit else [])]
            say(" ".join([*texts, f"{left:.0f} s left", *(f"{key} {value}" for key, value in note.items())]))

    yield advance_quietly


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another process works in {folder}. Wait for it, or choose another --out."
            ) from None
        yield  # the lock goes with the process, so a killed run leaves none behind


def _refuse_other_work(old: Card, new: Card, out: Path) -> None:
    if old.stage != new.stage:
        raise ValueError(
            f"{out} holds the stage {old.stage!r}, not {new.stage!r}. Choose another --out, or --fresh."
        )

    def hashes(card: Card) -> dict[str, Any]:
        return {name: entry.get("sha256") or entry["value"] for name, entry in card.inputs.items()}

    changed = differences(old.config, new.config) + differences(hashes(old), hashes(new), "input ")
    if changed:
        raise ValueError(
            f"{out} was made with other settings: {'; '.join(changed)}. "
            "Choose another --out, or --fresh to move the old folder aside and start anew."
        )


def _relative(path: Path, out: Path) -> str:
    """Inputs are named relative to the folder's parent where they share it, so that runs/ can be moved."""
    return os.path.relpath(path.resolve(), out.parent.resolve())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
