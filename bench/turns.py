"""Implementations side by side: each in a process of its own, working only when it is its turn.

So a noisy machine is noisy for all of them, and nobody's allocator, threads or compiled code are another's.
"""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

Ask = Callable[[str], Any]
"""A question by name -> whatever the implementation answers."""


def in_turns(
    names: Sequence[str], make: Callable[..., Ask], arguments: tuple[Any, ...], questions: Sequence[str]
) -> dict[str, list[Any]]:
    """Ask every implementation the first question, then all of them the second, and so on.

    `make(name, *arguments)` runs in the implementation's process. Returns the answers by name, in order.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    workers = []
    for name in names:
        pipes[name], theirs = context.Pipe()
        workers.append(context.Process(target=_worker, args=(make, name, arguments, theirs), daemon=True))
        workers[-1].start()
        theirs.close()  # else a worker that died would leave us waiting
    answers: dict[str, list[Any]] = {name: [] for name in names}
    for turn, question in enumerate(questions, 1):
        for name, pipe in pipes.items():
            pipe.send(question)
            answers[name].append(pipe.recv())
        print(f"round {turn} of {len(questions)}: {question}", file=sys.stderr, flush=True)
    for pipe, worker in zip(pipes.values(), workers, strict=True):
        pipe.send("")
        worker.join()
    return answers


def _worker(make: Callable[..., Ask], name: str, arguments: tuple[Any, ...], pipe: Connection) -> None:
    ask = make(name, *arguments)
    while question := pipe.recv():
        pipe.send(ask(question))
