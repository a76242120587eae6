"""`gemwright pretrain`, `label`, `targets` and `distill`: from shards to a checkpoint, with a teacher."""

from enum import StrEnum
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
    _run(shards, out, size, steps, batch_size, seq_len, settings, fresh, as_json)


stored = typer.Typer(
    help="Look after a teacher's targets on disk.", no_args_is_help=True, rich_markup_mode=None
)


class Kind(StrEnum):
    """What may be kept of a distribution."""

    STRATIFIED = "stratified"
    SAMPLED = "sampled"
    TOP_K = "top-k"


def label(
    teacher: Annotated[Path, typer.Argument(help="Folder of the teacher's checkpoint.")],
    shards: Annotated[
        Path,
        typer.Argument(
            help="Folder of the shards, whose training split is labelled; or conversations: a .jsonl file or "
            "a folder of `gemwright answer`."
        ),
    ],
    out: Out,
    samples: Annotated[int, typer.Option("--samples", help="Draws a position, or k with --kind top-k.")] = 50,
    kind: Annotated[
        Kind,
        typer.Option(
            "--kind", help="Draws, one from each stratum or independent; or the largest probabilities."
        ),
    ] = Kind.STRATIFIED,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens a window, as in training.")] = 128,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Label the subset that training with this max_tokens takes."),
    ] = None,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Let a teacher read text once and write its distribution for every position to disk.

    Then any number of students learn from it (distill --targets, or of conversations sft --targets) without
    the teacher, at about the cost of training from scratch. Killed, the same command goes on to the same
    bytes. On many GPUs:
    torchrun --nproc-per-node 8 -m gemwright.cli.main label ...

    Example: gemwright label runs/laptop/teacher runs/laptop/shards --out runs/laptop/targets
    """
    from gemwright.config import parse_settings
    from gemwright.distill.label import LabelConfig
    from gemwright.distill.label import run as stage

    given = {"samples": samples, "kind": kind.value, "seq_len": seq_len, "max_tokens": max_tokens}
    config = LabelConfig.parse(given).but(**parse_settings(settings or []))
    card = stage(config, out, teacher, shards, fresh=fresh)
    if card is None:  # one of many ranks; the first one tells
        return
    result = card.results
    text = (
        f"{out}: {result['tokens']:,} tokens, {result['ids_a_token']:.1f} ids and "
        f"{result['bytes_a_token']:.1f} bytes a token, {result['mass_covered']:.1%} of the teacher's mass"
    )
    tell(as_json, {"out": str(out), "seconds": card.seconds, **result}, text)


@stored.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of the targets.")], as_json: Json = False
) -> None:
    """Read every file of targets and compare its SHA-256 with the manifest: one flipped bit is found.

    Example: gemwright targets verify runs/laptop/targets
    """
    from gemwright.run import progress
    from gemwright.targets.store import Targets

    opened = Targets.open(folder)
    files = [file for split in opened.manifest.splits.values() for file in split.files]
    size = sum(file.bytes for file in files)
    with progress("verifying", size, unit="bytes") as advance:
        opened.verify(advance)
    text = f"{folder}: {len(files)} files, {size:,} bytes, as they were written"
    tell(as_json, {"folder": str(folder), "files": len(files), "bytes": size}, text)


def distill(
    out: Out,
    targets: Annotated[
        Path | None,
        typer.Option("--targets", help="What a teacher left on disk (label): no teacher, no shards needed."),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Folder of a teacher's checkpoint, to run along.")
    ] = None,
    shards: Annotated[
        Path | None, typer.Option("--shards", help="Folder of the shards; with --targets those labelled.")
    ] = None,
    size: Size = "0.5m",
    steps: Steps = 500,
    batch_size: Batch = 16,
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", help="Tokens a row; 128, or with --targets what was labelled."),
    ] = None,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a student on a teacher's whole distribution instead of the next token (the report, section 3.2).

    The loss is KL(teacher || student), soft-caps in, nothing mixed in. Either the teacher runs along (with
    --shards; its tokenizer must be theirs), or its targets are read from disk (--targets). Another
    divergence, temperature or mixture is set with --set objective.beta=0.5 and the like.

    Example: gemwright distill --targets runs/laptop/targets --out out/student
    """
    from gemwright.distill.pretrain import shards_of
    from gemwright.targets.store import Targets

    if (targets is None) == (teacher is None) or (teacher and not shards):
        raise ValueError(
            "a student learns from one teacher: give --targets, or --teacher together with --shards."
        )
    labelled: dict[str, int | None] = {}
    if targets is not None:
        manifest = Targets.open(targets).manifest
        shards, seq_len = shards or shards_of(targets), seq_len or manifest.seq_len
        labelled = {"max_tokens": manifest.splits["train"].max_tokens}
    assert shards is not None
    _run(shards, out, size, steps, batch_size, seq_len or 128, settings, fresh, as_json, teacher, targets,
         **labelled)  # fmt: skip


def _run(
    shards: Path, out: Path, size: str, steps: int, batch_size: int, seq_len: int, settings: list[str] | None,
    fresh: bool, as_json: bool, teacher: Path | None = None, targets: Path | None = None,
    max_tokens: int | None = None,
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
        max_tokens=max_tokens,
    ).but(**parse_settings(settings or []))
    card = stage(config, out, shards, teacher=teacher, targets=targets, fresh=fresh)
    result = card.results
    text = (
        f"{out}: {result['held_out']:.3f} nats a token on held-out text, {result['parameters']:,} parameters"
    )
    tell(as_json, {"out": str(out), "seconds": card.seconds, **result}, text)


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.command()(pretrain)
    app.command()(label)
    app.add_typer(stored, name="targets")
    app.command()(distill)
