"""`gemwright tokenizer` and `gemwright shards`: from text to packed ids."""

from pathlib import Path
from typing import Annotated

import typer

from gemwright.cli.options import Fresh, Json, Out, Set, tell

tokenizer = typer.Typer(
    help="Train a tokenizer with Gemma's properties.", no_args_is_help=True, rich_markup_mode=None
)
Corpus = Annotated[Path, typer.Argument(help="A folder of text files.")]


@tokenizer.command()
def train(
    corpus: Corpus,
    out: Out,
    size: Annotated[int, typer.Option("--size", help="Pieces in the vocabulary; Gemma has 256000.")] = 32_000,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a tokenizer on a folder of text: digits split, spaces kept, bytes for what is unknown.

    It is a SentencePiece model, with Gemma's control tokens at Gemma's ids. Only the training part of the
    corpus is read.

    Example: gemwright tokenizer train my_text --size 8000 --out out/tokenizer
    """
    from gemwright.config import parse_settings
    from gemwright.data.sources import Corpus as Texts
    from gemwright.tokenizer.train import TokenizerConfig
    from gemwright.tokenizer.train import run as stage

    texts = Texts.folder(corpus)
    config = TokenizerConfig.parse({"vocab_size": size}).but(**parse_settings(settings or []))
    card = stage(config, out, lambda: (d.text for d in texts.documents("train")), texts.facts, fresh=fresh)
    tell(as_json, {"out": str(out), "seconds": card.seconds, **card.results}, str(out))


def shards(
    corpus: Corpus,
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="Folder of the tokenizer.")],
    out: Out,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Tokenise a folder of text into packed, memory-mapped shards: train, validation and held-out.

    Example: gemwright shards my_text --tokenizer out/tokenizer --out out/shards
    """
    from gemwright.config import parse_settings
    from gemwright.data.shards import ShardsConfig
    from gemwright.data.shards import run as stage
    from gemwright.data.sources import Corpus as Texts

    config = ShardsConfig().but(**parse_settings(settings or []))
    card = stage(config, out, Texts.folder(corpus), tokenizer, fresh=fresh)
    tell(as_json, {"out": str(out), "seconds": card.seconds, **card.results}, str(out))


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.add_typer(tokenizer, name="tokenizer")
    app.command()(shards)
