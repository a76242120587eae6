"""The options that several verbs share, and the one line of JSON."""

import json
import os
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


class Recipe(StrEnum):
    """The recipes there are."""

    LAPTOP = "laptop"
    WORKSTATION = "workstation"


Corpus = Annotated[
    str | None,
    typer.Option("--corpus", help="Text: a folder. laptop takes Python's standard library without it."),
]
Teacher = Annotated[
    str | None,
    typer.Option("--teacher", help="workstation: a checkpoint's folder or OWNER/NAME; google/gemma-2-2b."),
]


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


Model = Annotated[
    str,
    typer.Argument(help="A checkpoint's folder, ours or Hugging Face's; or its name there: OWNER/NAME."),
]


class Quantised(StrEnum):
    """What weights may be rounded to."""

    INT8 = "int8"


Quantize = Annotated[
    Quantised | None,
    typer.Option("--quantize", help="Hold the weights in one byte each: faster, less exact."),
]
Window = Annotated[
    int | None, typer.Option("--window", help="Of the local layers, instead of the checkpoint's.")
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft", help="A smaller model with the same tokenizer, whose guesses are judged: faster."
    ),
]
Lookahead = Annotated[
    int, typer.Option("--lookahead", min=1, help="Tokens that the draft guesses at a time.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0 takes the likeliest token; 1 draws from the model.")
]
TopK = Annotated[int | None, typer.Option("--top-k", help="Draw from so many of the likeliest tokens only.")]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", help="Draw from the likeliest that together reach this probability."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", help="Draw from tokens with this share of the likeliest one's probability only."),
]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1, what stands there already gets less likely.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the draws.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="A text to end before; it is not shown. Repeatable.")
]


ApiKeyEnv = Annotated[
    str | None,
    typer.Option("--api-key-env", help="Endpoint: the environment variable that holds its key."),
]


def api_key(variable: str | None) -> str | None:
    """The key in a variable; none is read unless it is named, as a key must not go to whatever URL is given.

    Raises:
        ValueError: the variable is not set.
    """
    key = os.environ.get(variable) if variable else None
    if variable and not key:
        raise ValueError(f"the environment variable {variable} is not set. Put the endpoint's key there.")
    return key


def executor_config(kind: Where, workers: int | None, partition: str | None) -> Any:
    """Those three as an `ExecutorConfig`."""
    from gemwright.data.executor import ExecutorConfig

    return ExecutorConfig(kind=kind.value, workers=workers, partition=partition)


def tell(as_json: bool, data: dict[str, Any], text: str) -> None:
    """The verb's result on stdout: for programs one line of JSON, else a line for people."""
    print(json.dumps(data, ensure_ascii=False) if as_json else text, flush=True)
