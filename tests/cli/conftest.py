"""The command line in this process, with what it writes to both screens."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest

from gemwright.cli.main import main


class Said(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


@contextmanager
def written_to(number: int) -> Iterator[Callable[[], str]]:
    """What anything in this process writes to a file descriptor, libraries in C included."""
    redirect = {1: redirect_stdout, 2: redirect_stderr}[number]
    with tempfile.TemporaryFile("w+", encoding="utf-8", buffering=1) as file:
        before = os.dup(number)
        os.dup2(file.fileno(), number)
        try:
            with redirect(file):
                yield lambda: (file.flush(), file.seek(0), file.read())[2]
        finally:
            os.dup2(before, number)
            os.close(before)


def call(*arguments: object) -> Said:
    argv, sys.argv = sys.argv, ["gemwright", *map(str, arguments)]
    try:
        with written_to(1) as out, written_to(2) as err:
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code
            return Said(code if isinstance(code, int) else 0 if code is None else 1, out(), err())
    finally:
        sys.argv = argv


@pytest.fixture(scope="session")
def gemwright() -> Callable[..., Said]:
    """`gemwright("shards", folder, "--out", out)`: run a command, get its exit code and its output."""
    return call
