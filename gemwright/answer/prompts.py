"""A file of prompts -> a folder with what a model makes of them, many at a time. Killed, it goes on.

Prompts come one a line: as text (`.txt`), or as objects (`.jsonl`) with `prompt` (a text), `messages` (a
conversation, the user's turn last) or `turns` (one turn of a user, as `gemwright prompts` writes them).

`generations.jsonl` has an object a prompt, in the order in which they are finished: `line` (where it stands
in the file, from 1), `id` if it has one, `prompt` or `messages` (with the answer behind them), `text`,
`finish`, `prompt_tokens`, `tokens`, and `logprobs` if they were asked for.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from gemwright.config import Config
from gemwright.generate.engine import prepare
from gemwright.generate.language_model import Completion, LanguageModel, Prompt, batched, load
from gemwright.generate.quantize import Kind
from gemwright.generate.sampling import Sampling, Token
from gemwright.hub import fetch
from gemwright.run import Card, RunFolder, naming_lack_of_room, run_stage
from gemwright.tokenizer.tokenizer import Tokenizer

GENERATIONS = "generations.jsonl"


class PromptsConfig(Config):
    """How the prompts of a file are continued."""

    sampling: Sampling = Sampling()
    """The prompt on line n draws with `seed` + n."""
    chat: bool = False
    """A text is the turn of a user, to be answered instead of continued."""
    window: PositiveInt | None = None
    """Of the local layers, instead of the checkpoint's."""
    quantize: Kind | None = None
    """Weights in one byte each."""


@dataclass(frozen=True)
class Job:
    """One prompt of a file."""

    line: int
    """Where it stands, from 1."""
    id: Any
    """What the file calls it; None if it does not."""
    prompt: Prompt


def run(
    config: PromptsConfig,
    out: Path,
    model: str | Path,
    prompts: Path,
    *,
    max_batch: int = 8,
    fresh: bool = False,
) -> Card:
    """The stage: continue every prompt of a file into `out`/generations.jsonl.

    Args:
        model: a folder, or a name on Hugging Face.
        max_batch: prompts at a time; changes nothing in the result but what rounding changes.
    Raises:
        FileNotFoundError: there is no such model or file.
        ValueError: a line that is no prompt, or too long for the model, before anything is computed; or `out`
            holds other work.
    """
    if not prompts.is_file():
        raise FileNotFoundError(f"there is no file {prompts}. Name one with a prompt a line.")
    folder = fetch(model)

    def work(stage: RunFolder) -> dict[str, Any]:
        loaded = load(folder, quantize=config.quantize, window=config.window)
        total = _check(prompts, config, loaded)
        lines = Lines(stage.path / GENERATIONS)
        todo = (job for job in read(prompts, config.chat) if job.line not in lines.done)
        with stage.progress("generating", total, done=len(lines.done)) as advance:
            for job, completion in _answered(loaded, todo, config.sampling, max_batch):
                lines.append(_row(job, completion, loaded, config.sampling.logprobs is not None))
                advance(1, tokens=f"{lines.tokens:,}")
        return {"prompts": total, "tokens": lines.tokens, **dict(sorted(lines.finished.items()))}

    inputs = {"model": folder, "prompts": prompts}
    return run_stage("generate", config, out, work, inputs=inputs, fresh=fresh)


def read(path: Path, chat: bool = False) -> Iterator[Job]:
    """The prompts of a file. With `chat`, a text becomes a user's turn.

    Raises:
        ValueError: another kind of file, or a line that is no prompt; the message names it.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path} is neither .txt (a prompt a line) nor .jsonl (an object a line with prompt, messages or "
            "turns). Rename or convert it."
        )
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                id, prompt = _parse(line) if path.suffix == ".jsonl" else (None, line.rstrip("\n"))
                yield Job(number, id, _turn(prompt) if chat and isinstance(prompt, str) else prompt)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}). Convert it.") from None
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None


def describe(tokens: Iterable[Token], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Tokens as plain data: id, piece and log-probability of each, and of the likeliest in its place."""
    piece = tokenizer.piece
    return [
        {"id": one.id, "piece": piece(one.id), "logprob": one.logprob}
        | {"top": [{"id": id, "piece": piece(id), "logprob": logprob} for id, logprob in one.top]}
        for one in tokens
    ]


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _parse(line: str) -> tuple[Any, Prompt]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error}). Correct or drop it.") from None
    match record:
        case {"prompt": str(prompt)}:
            found: Prompt = prompt
        case {"messages": [*messages]} if all(isinstance(message, dict) for message in messages):
            found = messages
        case {"turns": [str(only)]}:
            found = _turn(only)
        case {"turns": [str(), *_]}:
            raise ValueError(
                f"it has {len(record['turns'])} turns, and one is answered here. Keep the first, or give "
                "messages, with the model's answers between the user's turns."
            )
        case _:
            raise ValueError("it holds neither prompt (a text) nor messages (objects) nor turns (texts).")
    return record.get("id"), found


def _check(path: Path, config: PromptsConfig, model: LanguageModel) -> int:
    """Refuse, before anything is computed, what cannot be continued; returns how many prompts there are."""
    total = 0
    for job in read(path, config.chat):
        try:
            prepare(model.model, model.encode(job.prompt), config.sampling)
        except ValueError as error:
            raise ValueError(f"{path}, line {job.line}: {error}") from None
        total += 1
    if not total:
        raise ValueError(f"{path} holds no prompt. Write one a line.")
    return total


def _answered(
    model: LanguageModel, jobs: Iterable[Job], sampling: Sampling, max_batch: int
) -> Iterator[tuple[Job, Completion]]:
    running: dict[int, Job] = {}

    def prompts() -> Iterator[tuple[int, Prompt]]:
        for job in jobs:
            running[job.line] = job
            yield job.line, job.prompt

    for line, completion in batched(model, prompts(), sampling, max_batch):
        yield running.pop(line), completion


def _row(job: Job, completion: Completion, model: LanguageModel, logprobs: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"line": job.line} | ({} if job.id is None else {"id": job.id})
    if isinstance(job.prompt, str):
        row["prompt"] = job.prompt
    else:
        row["messages"] = [*job.prompt, {"role": "model", "content": completion.text}]
    row |= {"text": completion.text, "finish": completion.finish}
    row |= {"prompt_tokens": completion.prompt_tokens, "tokens": len(completion.tokens)}
    if logprobs:
        row["logprobs"] = describe(completion.tokens, model.require_tokenizer())
    return row


class Lines:
    """A file of what came of prompts, a JSON object a line: which are done, what of them, and one line more.

    It begins with the first line that is written. Opened again after a kill, it loses a line that was torn.

    Args:
        key: where an object has its prompt's number. They also have `tokens` and `finish`, which are counted.
    """

    def __init__(self, path: Path, key: str = "line") -> None:
        self.path, self.key = path, key
        self.done: dict[int, int] = {}
        """Where in the file, in bytes, the line of each number begins."""
        self.tokens = 0
        self.finished: Counter[str] = Counter()
        self._size = 0
        if path.exists():
            with open(path, "rb") as file:
                for line in file:
                    if line.endswith(b"\n"):  # else a kill tore it
                        self._count(json.loads(line), len(line))
            os.truncate(path, self._size)

    def append(self, row: dict[str, Any]) -> None:
        """Write one line and close the file: a kill tears at most this one."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        self.path.parent.mkdir(exist_ok=True)
        with naming_lack_of_room(self.path), open(self.path, "ab") as file:
            file.write(line)
        self._count(row, len(line))

    def _count(self, row: dict[str, Any], size: int) -> None:
        self.done[row[self.key]] = self._size
        self._size += size
        self.tokens += row["tokens"]
        self.finished[row["finish"]] += 1
