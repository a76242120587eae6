"""`gemwright run` and `plan`: a whole pipeline, and what a model costs."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gemwright.cli import options
from gemwright.cli.options import Fresh, Json, Recipe, tell


def run(
    recipe: Annotated[Recipe, typer.Argument(help="Which recipe.")],
    corpus: options.Corpus = None,
    teacher: options.Teacher = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for everything; runs/RECIPE by default.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Go on where the demo ends, to a chat model; in runs/RECIPE-full.")
    ] = False,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Go through a recipe, stage by stage; what is finished is skipped, what was killed goes on.

    `laptop` trains a tokenizer, a teacher, and twice over a student distilled from it and its twin from
    scratch, on two CPU cores in under ten minutes, and writes report.html with the comparison. With --full
    the teacher then learns to answer, the student from its answers and from its own, then from preferences
    (a reward model, RLHF, WARP): some forty minutes.

    `workstation` does the same with your text and a Gemma 2 of Hugging Face's for a teacher: a student of
    200M parameters and its twin, an evening on one GPU.

    Example: gemwright run laptop
    """
    import json

    root = out or Path("runs") / (f"{recipe}-full" if full else recipe)
    if recipe is Recipe.WORKSTATION:
        from gemwright.recipes import workstation

        if full or corpus is None:
            raise ValueError("the workstation recipe has no --full, and needs your text: --corpus SOURCE.")
        page = workstation.run(root, corpus, teacher or workstation.TEACHER, fresh=fresh)
    else:
        if teacher is not None:
            raise ValueError("the laptop recipe trains its own teacher. Leave --teacher out.")
        if full:
            from gemwright.recipes.laptop_full.stages import run as stages
        else:
            from gemwright.recipes.laptop import run as stages
        page = stages(root, Path(corpus) if corpus else None, fresh=fresh)
    data = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    tell(as_json, {"report": str(page), **data}, f"{data['table']}\n\n{page}")


class Numbers(StrEnum):
    """How weights are held."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"


def plan(
    size: Annotated[
        str,
        typer.Argument(help="A size by name (2b 9b 27b, 0.1m to 1b), or the folder of a checkpoint."),
    ],
    precision: Annotated[Numbers, typer.Option("--precision", help="How weights are held.")] = Numbers.BF16,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", min=1, help="Tokens of each, prompt and answer; the model's max_seq_len by default."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count what generating with a model will cost: weights, keys and values, FLOPs; and does it fit here?

    Nothing is loaded. If this machine has too little memory, it says what would fit. int8 is what
    `gemwright evaluate --quantize int8` judges.

    Example: gemwright plan 9b --precision int8 --batch 4 --context 8192
    """
    from dataclasses import asdict

    from gemwright.recipes import plan as recipe

    made = recipe.plan(size, recipe.config_of(size), precision.value, batch=batch, context=context)
    tell(as_json, asdict(made), made.told())


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.command()(run)
    app.command()(plan)
