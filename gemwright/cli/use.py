"""`gemwright generate`: use a model."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from gemwright.cli.options import Json, tell


def generate(
    model: Annotated[
        Path, typer.Argument(help="Folder of a checkpoint: ours, or Gemma 2 from Hugging Face.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most new tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the likeliest token; 1 draws.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Continue a text; it is printed as it comes, the prompt included.

    Example: gemwright generate runs/laptop/distilled "def __init__(self" --max-tokens 40
    """
    from gemwright.generate.language_model import load

    loaded = load(model)
    start = time.monotonic()
    pieces = loaded.stream(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
    # With --json stdout holds one line only, so people read along on stderr.
    screen = sys.stderr if as_json else sys.stdout
    print(prompt, end="", file=screen, flush=True)
    text = ""
    for piece in pieces:
        print(piece, end="", file=screen, flush=True)
        text += piece
    print(file=screen)
    if as_json:
        assert loaded.tokenizer is not None
        tokens = len(loaded.tokenizer.encode(text))
        tell(True, {"text": text, "tokens_per_s": round(tokens / (time.monotonic() - start), 1)}, "")


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.command()(generate)
