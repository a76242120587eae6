"""`gemwright run`, `plan` and `ablate`: a whole pipeline, a model's cost, and a study of many runs."""

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

    Example: gemwright run laptop
    """
    import json

    if full:
        from gemwright.recipes.laptop_full import run as stages
    else:
        from gemwright.recipes.laptop import run as stages

    root = out or Path("runs") / (f"{recipe}-full" if full else recipe)
    page = stages(root, corpus, fresh=fresh)
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


class Study(StrEnum):
    """The studies there are."""

    TARGETS = "targets"
    MERGING = "merging"


def ablate(
    study: Annotated[Study, typer.Argument(help="Which study.")],
    recipe: Annotated[Recipe, typer.Option("--recipe", help="Of which recipe.")] = Recipe.LAPTOP,
    runs: Annotated[
        Path | None,
        typer.Option(
            "--runs",
            help="Folder of the finished recipe; runs/RECIPE by default, for merging runs/RECIPE-full.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for everything; runs/ablate-STUDY by default.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="targets: runs of every arm.")] = 3,
    as_json: Json = False,
) -> None:
    """Run a study: every arm with every seed, then a table with its spread and a plot, in report.html.

    `targets` asks what of a teacher's distribution has to be kept: all of it, 16, 50 or 256 draws a token
    (stratified, or independent), the 16, 50 or 256 largest probabilities with or without the rest's mass, or
    nothing but the next token. About fifteen minutes on two cores. Killed, the same command goes on.

    `merging` sets an average, SLERP and WARP against the policies that they were made of, and against one
    long run of the same cost; with the seeds of the recipe's long form. About two minutes.

    Example: gemwright ablate targets --runs runs/laptop
    """
    import json

    home = out or Path("runs") / f"ablate-{study}"
    if study is Study.MERGING:
        from gemwright.ablate import merging

        page = merging.run(merging.MergingConfig(), runs or Path("runs") / f"{recipe}-full", home)
    else:
        from gemwright.ablate import targets
        from gemwright.ablate.study import run as stage

        root = runs or Path("runs") / recipe
        page = stage(targets.study(seeds), home, root / "shards", root / "teacher")
    data = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    tell(as_json, {"report": str(page), **data}, f"{data['table']}\n\n{page}")


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.command()(run)
    app.command()(plan)
    app.command()(ablate)
