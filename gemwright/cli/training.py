"""`gemwright pretrain` and `gemwright distill`: from shards to a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from gemwright.cli.options import Fresh, Json, Out, Set, tell

Shards = Annotated[Path, typer.Option("--shards", help="Folder of the shards.")]
Size = Annotated[
    str, typer.Option("--size", help="A size by name: 0.1m 0.5m 1m 6m 30m 100m 200m 400m 1b 2b 9b 27b.")
]
Steps = Annotated[int, typer.Option("--steps", help="Updates.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Rows an update.")]
Length = Annotated[int, typer.Option("--seq-len", help="Tokens a row.")]


def pretrain(
    shards: Shards,
    out: Out,
    size: Size = "1m",
    steps: Steps = 500,
    batch_size: Batch = 16,
    seq_len: Length = 128,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a model from scratch by next-token prediction: a teacher, or a student's twin.

    Killed at any moment, the same command goes on to the same bits. Every setting of model and training can
    be changed with --set, as in --set model.window=256 or --set train.optim.lr=0.002.

    Example: gemwright pretrain --shards runs/laptop/shards --size 6m --out out/teacher
    """
    _run(shards, out, size, steps, batch_size, seq_len, settings, fresh, as_json, None)


def distill(
    shards: Shards,
    teacher: Annotated[Path, typer.Option("--teacher", help="Folder of the teacher's checkpoint.")],
    out: Out,
    size: Size = "0.5m",
    steps: Steps = 500,
    batch_size: Batch = 16,
    seq_len: Length = 128,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a student on a teacher's whole distribution instead of the next token (the report, section 3.2).

    The loss is KL(teacher || student) over the vocabulary, soft-caps in, nothing mixed in. The teacher runs
    along; its tokenizer must be the shards'.

    Example: gemwright distill --shards runs/laptop/shards --teacher runs/laptop/teacher --out out/student
    """
    _run(shards, out, size, steps, batch_size, seq_len, settings, fresh, as_json, teacher)


def _run(
    shards: Path, out: Path, size: str, steps: int, batch_size: int, seq_len: int, settings: list[str] | None,
    fresh: bool, as_json: bool, teacher: Path | None,
) -> None:  # fmt: skip
    from gemwright.config import parse_settings
    from gemwright.data.shards import Shards as Packed
    from gemwright.distill.pretrain import PretrainConfig
    from gemwright.distill.pretrain import run as stage
    from gemwright.model.config import size as named
    from gemwright.train.loop import TrainConfig

    config = PretrainConfig(
        model=named(size).but(vocab_size=Packed.open(shards).manifest.vocab_size),
        train=TrainConfig.parse({"steps": steps, "batch_size": batch_size, "seq_len": seq_len}),
        validation_tokens=20_000,
    ).but(**parse_settings(settings or []))
    card = stage(config, out, shards, teacher=teacher, fresh=fresh)
    result = card.results
    text = (
        f"{out}: {result['held_out']:.3f} nats a token on held-out text, {result['parameters']:,} parameters"
    )
    tell(as_json, {"out": str(out), "seconds": card.seconds, **result}, text)


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.command()(pretrain)
    app.command()(distill)
