"""`gemwright curate`, `prompts`, `tokenizer` and `shards`: from raw text to packed ids."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gemwright.cli.options import (
    Executor,
    Fresh,
    Json,
    Out,
    Partition,
    Set,
    Where,
    Workers,
    executor_config,
    tell,
)

tokenizer = typer.Typer(
    help="Train a tokenizer with Gemma's properties; compare tokenizers.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Sources = Annotated[
    list[str],
    typer.Argument(
        help="Files or folders (text, zip, jsonl, parquet; gz, zst), hf:OWNER/NAME for a data set of the "
        "Hugging Face hub, or python for the standard library."
    ),
]
Against = Annotated[
    list[Path] | None,
    typer.Option("--against", help="Benchmark files or a folder of them; what holds their items is dropped."),
]
Words = Annotated[
    list[str] | None,
    typer.Option(
        "--unsafe-words", help="A list of words, one a line, that no document may hold. Repeatable."
    ),
]
Languages = Annotated[
    str | None, typer.Option("--languages", help="Codes of the languages to keep, as in en,fr; or all.")
]
Corpus = Annotated[
    list[Path],
    typer.Argument(help="Curated text (gemwright curate), or a folder of text files as it is; or several."),
]


def curate(
    sources: Sources,
    out: Out,
    against: Against = None,
    unsafe_words: Words = None,
    languages: Languages = None,
    executor: Executor = Where.LOCAL,
    workers: Workers = None,
    partition: Partition = None,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Filter raw text: unsafe, personal, contaminated, of low quality, duplicate; say of each drop why.

    Files are cut into passages at blank lines. What is left lies in OUT/documents, what is not in
    OUT/rejects with its reason; report.html has counts, examples and plots. The quality rules are for prose:
    --set quality=null for source code. Killed, the same command goes on where it stopped.

    Example: gemwright curate my_text --against my_benchmarks --out out/curated
    """
    from gemwright.curate import pipeline

    config = _with_options(pipeline.CurateConfig(), unsafe_words, languages, settings)
    where = executor_config(executor, workers, partition)
    card = pipeline.curate(config, out, sources, against=against or (), executor=where, fresh=fresh)
    _tell(as_json, out, card)


def prompts(
    sources: Sources,
    out: Out,
    against: Against = None,
    unsafe_words: Words = None,
    languages: Languages = None,
    executor: Executor = Where.LOCAL,
    workers: Workers = None,
    partition: Partition = None,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Take the users' turns out of chat logs, and never an answer; filter them, say of each drop why.

    Reads LMSYS-Chat-1M, WildChat, ShareGPT, MT-bench, Arena-hard, self-instruct, and lists of messages. What
    moderation flagged, redacted conversations, other languages than English (--languages all keeps them),
    duplicates and the rest go to OUT/rejects. OUT/prompts.jsonl has a record a conversation.

    Example: gemwright prompts lmsys-chat-1m --against my_benchmarks --out out/prompts
    """
    from gemwright.curate import pipeline

    config = _with_options(pipeline.PromptsConfig(), unsafe_words, languages, settings)
    where = executor_config(executor, workers, partition)
    card = pipeline.prompts(config, out, sources, against=against or (), executor=where, fresh=fresh)
    _tell(as_json, out, card)


@tokenizer.command()
def train(
    corpus: Corpus,
    out: Out,
    size: Annotated[int, typer.Option("--size", help="Pieces in the vocabulary; Gemma has 256000.")] = 32_000,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a tokenizer on text: digits split, spaces kept, bytes for what is unknown.

    It is a SentencePiece model, with Gemma's control tokens at Gemma's ids. Only the training part of the
    corpus is read.

    Example: gemwright tokenizer train my_text --size 8000 --out out/tokenizer
    """
    from gemwright.config import parse_settings
    from gemwright.data.curated import open_text
    from gemwright.tokenizer.train import TokenizerConfig
    from gemwright.tokenizer.train import run as stage

    texts = open_text(*corpus)
    config = TokenizerConfig.parse({"vocab_size": size}).but(**parse_settings(settings or []))
    card = stage(config, out, lambda: (d.text for d in texts.documents("train")), texts.facts, fresh=fresh)
    tell(as_json, {"out": str(out), "seconds": card.seconds, **card.results}, str(out))


@tokenizer.command()
def fertility(
    tokenizers: Annotated[list[Path], typer.Argument(help="Folders of tokenizers, or .model files.")],
    texts: Annotated[Path, typer.Option("--texts", help="A folder or a zip of text files, one a language.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the report.")] = Path("runs/fertility"),
    as_json: Json = False,
) -> None:
    """Compare what texts in many languages cost: tokens a character and a word, and what falls to bytes.

    Writes a page with all of it, and report.json beside it.

    Example: gemwright tokenizer fertility out/tokenizer gemma-2-2b --texts udhr.zip
    """
    from gemwright.tokenizer.fertility import compare, tables

    data = compare(tokenizers, texts, out)
    short = {
        label: {key: value for key, value in entry.items() if key != "languages"}
        for label, entry in data["tokenizers"].items()
    }
    told = {"out": str(out), **data, "tokenizers": short}
    tell(as_json, told, f"{tables(data)}\n\n{out / 'report.html'}")


def shards(
    corpus: Corpus,
    tokenizer: Annotated[Path, typer.Option("--tokenizer", help="Folder of the tokenizer.")],
    out: Out,
    executor: Executor = Where.LOCAL,
    workers: Workers = None,
    partition: Partition = None,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Tokenise text into packed, memory-mapped shards: train, validation and held-out.

    Example: gemwright shards my_text --tokenizer out/tokenizer --out out/shards
    """
    from gemwright.config import parse_settings
    from gemwright.data.curated import open_text
    from gemwright.data.packing import ShardsConfig
    from gemwright.data.packing import run as stage

    config = ShardsConfig().but(**parse_settings(settings or []))
    where = executor_config(executor, workers, partition)
    card = stage(config, out, open_text(*corpus), tokenizer, executor=where, fresh=fresh)
    tell(as_json, {"out": str(out), "seconds": card.seconds, **card.results}, str(out))


def _with_options(
    config: Any, words: list[str] | None, languages: str | None, settings: list[str] | None
) -> Any:
    from gemwright.config import parse_settings

    changes: dict[str, Any] = {}
    if words:
        changes["unsafe.words"] = words
    if languages:
        changes["languages"] = None if languages == "all" else languages.split(",")
    return config.but(**changes, **parse_settings(settings or []))


def _tell(as_json: bool, out: Path, card: Any) -> None:
    results = card.results
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in results["dropped"].items())
    text = (
        f"{out}: {results['kept']:,} of {results['documents']:,} documents kept; dropped: {dropped or 'none'}"
    )
    tell(as_json, {**results, "seconds": card.seconds, "out": str(out)}, f"{text}\n{out / 'report.html'}")


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.command()(curate)
    app.command()(prompts)
    app.add_typer(tokenizer, name="tokenizer")
    app.command()(shards)
