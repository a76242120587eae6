"""`gemwright run`: a whole pipeline."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gemwright.cli.options import Fresh, Json, tell


class Recipe(StrEnum):
    """The recipes there are."""

    LAPTOP = "laptop"


def run(
    recipe: Annotated[Recipe, typer.Argument(help="Which recipe.")],
    corpus: Annotated[
        Path | None,
        typer.Option("--corpus", help="A folder of text to use instead of Python's standard library."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for everything; runs/RECIPE by default.")
    ] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Go through a recipe, stage by stage; what is finished is skipped, what was killed goes on.

    `laptop` trains a tokenizer, a teacher, and twice over a student distilled from it and its twin from
    scratch, on two CPU cores in under ten minutes, and writes report.html with the comparison.

    Example: gemwright run laptop
    """
    import json

    from gemwright.recipes import laptop

    root = out or Path("runs") / recipe
    page = laptop.run(root, corpus, fresh=fresh)
    data = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    tell(as_json, {"report": str(page), **data}, f"{data['table']}\n\n{page}")


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.command()(run)
