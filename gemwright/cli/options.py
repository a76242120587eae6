"""The options that several verbs share, and the one line of JSON."""

import json
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


def tell(as_json: bool, data: dict[str, Any], text: str) -> None:
    """The verb's result on stdout: for programs one line of JSON, else a line for people."""
    print(json.dumps(data, ensure_ascii=False) if as_json else text, flush=True)
