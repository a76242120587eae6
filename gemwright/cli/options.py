"""The options that several verbs share, and the one line of JSON."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

Out = Annotated[
    Path, typer.Option("--out", help="Folder for the result. An unfinished one there is gone on with.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change one setting of the stage's config; an unknown one names the nearest. Repeatable.",
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Move an existing result aside and start anew.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON, last on stdout.")]


class Where(StrEnum):
    """Where tasks run."""

    LOCAL = "local"
    RAY = "ray"
    SLURM = "slurm"


Executor = Annotated[Where, typer.Option("--executor", help="Where the tasks run.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Tasks at once; one a core by default.")
]
Partition = Annotated[str | None, typer.Option("--partition", help="Slurm's partition.")]


def executor_config(kind: Where, workers: int | None, partition: str | None) -> Any:
    """Those three as an `ExecutorConfig`."""
    from gemwright.data.executor import ExecutorConfig

    return ExecutorConfig(kind=kind.value, workers=workers, partition=partition)


def tell(as_json: bool, data: dict[str, Any], text: str) -> None:
    """The verb's result on stdout: for programs one line of JSON, else a line for people."""
    print(json.dumps(data, ensure_ascii=False) if as_json else text, flush=True)
