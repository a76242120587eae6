"""The labelling stage: a teacher reads text once and leaves its distribution for every position on disk.

The text is shards, or conversations, which are labelled in the rows that `sft` packs them into.

Many students can then be trained from it, each at the cost of plain next-token training. The default is M
draws a position: unbiased, where the largest probabilities alone are not (arXiv 2503.16870). Drawing one from
each of M equal strata instead of M independent ones is ours: the targets are nearer to the distribution.

The teacher's distribution hangs on what stands before a position, so targets are made window by window for
the packing that the student will see, and training checks that it is the same. A file of windows appears when
it is whole: killed, the same command goes on behind the last one, to the same bytes. Under torchrun the files
are shared out among the ranks.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from gemwright.config import Config
from gemwright.data.conversations import ANSWERS, Conversations, ConversationsConfig
from gemwright.data.shards import Shards
from gemwright.data.windows import Rows, Windows
from gemwright.device import Ranks, keep_freed_memory, pick_device, process_group
from gemwright.distill.pretrain import tokenizer_of
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.run import Card, RunFolder, fingerprint, progress, run_stage, write_json
from gemwright.targets import draw, store
from gemwright.targets.store import Manifest, TargetSplit, UsedShards
from gemwright.tokenizer.tokenizer import SPECIAL, Tokenizer, require_same_tokenizer
from gemwright.train.loop import make_batch
from gemwright.train.teacher import Teacher

SPLIT = "train"
"""What is labelled: validation and held-out text are judged by the next token."""


class LabelConfig(Config):
    """What is kept of the teacher's distribution, and of which windows."""

    kind: store.Kind = "stratified"
    """Draws with replacement, one from each of `samples` equal strata or all independent; or the largest
    probabilities and the mass of the rest."""
    samples: PositiveInt = 50
    """Draws a position (arXiv 2503.16870: 50 are as good as the whole distribution), or k."""
    temperature: PositiveFloat = 1.0
    """The capped logits are divided by it; a student is trained at the same."""
    seq_len: int = Field(default=128, gt=1)
    """Tokens a window, as in training."""
    max_tokens: PositiveInt | None = None
    """Label the same subset of windows that a training run with this `max_tokens` takes; None: all."""
    batch_size: PositiveInt = 8
    """Windows that the teacher reads at a time."""
    windows_per_file: PositiveInt = 4096
    """A file is the unit that a killed run loses and that ranks share out."""
    compile: bool = True
    """Compile the teacher's layers where that is possible."""
    conversations: ConversationsConfig = ConversationsConfig()
    """How conversations are read; shards have none."""
    seed: int = 0
    """Of the draws."""


def run(config: LabelConfig, out: Path, teacher: Path, shards: Path, *, fresh: bool = False) -> Card | None:
    """Label the training split of `shards` with `teacher` into `out`. Killed, it goes on.

    Args:
        shards: a folder of them; or conversations, a .jsonl file or a folder of `gemwright answer`.
    Returns the card; None on all but the first rank of a torchrun.
    Raises:
        FileNotFoundError: no teacher, shards or conversations there.
        ValueError: another tokenizer, malformed conversations, or `out` holds other work.
        OSError: the disk is full; what is finished stays.
    """
    chats = shards.suffix == ".jsonl" or (shards / ANSWERS).exists()
    tokenizer = Tokenizer.load(teacher) if chats else tokenizer_of(shards)
    if not chats:
        require_same_tokenizer(teacher, tokenizer)
    _require_fitting(config, checkpoint.load_config(teacher), tokenizer, teacher)
    windows: Rows
    if chats:
        if config.max_tokens is not None:
            raise ValueError("conversations are labelled whole. Leave max_tokens out.")
        windows = Conversations.read(shards, tokenizer, config.seq_len, config.conversations)
    else:
        windows = Windows(Shards.open(shards), SPLIT, config.seq_len, max_tokens=config.max_tokens)

    with process_group() as ranks:

        def work(folder: RunFolder) -> dict[str, Any]:
            ranks.first_says("label")
            _label(config, folder.path, teacher, tokenizer, windows, ranks)
            ranks.wait()
            manifest = _manifest(config, folder.path, teacher, shards, tokenizer, windows)
            write_json(folder.path / store.MANIFEST, manifest.to_dict())
            return _summary(manifest)

        if ranks.rank == 0:
            inputs = {"teacher": teacher, "shards": shards}
            next_step = f"gemwright distill --targets {out} --out out/student"
            if chats:
                next_step = f"gemwright sft my_model {shards} --targets {out} --out out/sft"
            card = run_stage(store.STAGE, config, out, work, inputs=inputs, fresh=fresh, next_step=next_step)
            ranks.first_says("done")
            return card
        if ranks.first_says() == "label":
            _label(config, out, teacher, tokenizer, windows, ranks)
            ranks.wait()
            ranks.first_says()
    return None


def _label(
    config: LabelConfig, out: Path, teacher: Path, tokenizer: Tokenizer, windows: Rows, ranks: Ranks
) -> None:
    """Write this rank's share of the files, those that are there already excepted."""
    todo: list[tuple[Path, np.ndarray]] = []
    for path, numbers in _files(config, out, windows)[ranks.rank :: ranks.size]:
        if not path.exists():
            todo.append((path, numbers))
        elif store.read_entry(path).windows != len(numbers):
            raise ValueError(f"{path} holds other windows. Delete it, and run the same command again.")
    if not todo:
        return
    keep_freed_memory()
    device = pick_device()
    reader = Teacher.load(teacher, tokenizer, device, compiled=config.compile)
    total = sum(len(numbers) for _, numbers in todo) * config.seq_len
    with progress("labelling", total, unit="tokens") as advance:
        for path, numbers in todo:
            store.write_file(path, _windows(config, reader, tokenizer, windows, numbers, advance))


def _windows(
    config: LabelConfig, teacher: Teacher, tokenizer: Tokenizer, windows: Rows, numbers: np.ndarray,
    advance: Callable[..., None],
) -> Iterator[store.Window]:  # fmt: skip
    """The targets of some windows, a batch at a time."""
    model = teacher.model
    weight = model.unembedding[: tokenizer.vocab_size]  # a padded head's other rows are no pieces
    how = {"cap": model.config.final_softcap, "temperature": config.temperature}
    for start in range(0, len(numbers), config.batch_size):
        few = numbers[start : start + config.batch_size]
        batch = make_batch(windows.take(few), SPECIAL["<bos>"], weight.device)
        hidden = teacher.hidden(batch).flatten(0, 1)
        if config.kind == "top-k":
            drawn = draw.top_hidden(hidden, weight, config.samples, **how)
        else:
            uniforms = draw.uniforms(
                config.seed, few.tolist(), config.seq_len, config.samples,
                stratified=config.kind == "stratified",
            )  # fmt: skip
            drawn = draw.sample_hidden(hidden, weight, uniforms.flatten(0, 1), **how)
        yield from store.packed(drawn, config.seq_len, tokenizer.vocab_size)
        advance(len(few) * config.seq_len)


def _files(config: LabelConfig, out: Path, windows: Rows) -> list[tuple[Path, np.ndarray]]:
    """Every file's path, and the numbers of its windows."""
    numbers, size = windows.in_order(), config.windows_per_file
    return [
        (out / f"{SPLIT}-{start // size:05d}.targets", numbers[start : start + size])
        for start in range(0, len(numbers), size)
    ]


def _manifest(
    config: LabelConfig, out: Path, teacher: Path, shards: Path, tokenizer: Tokenizer, windows: Rows
) -> Manifest:
    files = tuple(store.read_entry(path) for path, _ in _files(config, out, windows))
    sha256 = windows.sha256 if isinstance(windows, Conversations) else fingerprint(shards)
    split = TargetSplit(
        total=windows.total,
        max_tokens=config.max_tokens,
        subset_seed=windows.subset_seed if isinstance(windows, Windows) else 0,
        files=files,
    )
    where = os.path.relpath(shards.resolve(), out.resolve().parent)
    return Manifest(
        format=store.FORMAT, kind=config.kind, samples=config.samples, temperature=config.temperature,
        seed=config.seed, vocab_size=tokenizer.vocab_size, seq_len=config.seq_len,
        teacher_sha256=fingerprint(teacher), tokenizer_sha256=tokenizer.sha256,
        shards=UsedShards(path=where, sha256=sha256), splits={SPLIT: split},
    )  # fmt: skip


def _summary(manifest: Manifest) -> dict[str, Any]:
    """What the card says: how much was labelled, what it takes on disk, and what the teacher was like."""
    split = manifest.splits[SPLIT]
    tokens, ids = split.windows * manifest.seq_len, sum(file.ids for file in split.files)
    size = sum(file.bytes for file in split.files)
    entropy = sum(file.entropy * file.windows for file in split.files) / split.windows
    covered = sum(file.covered * file.windows for file in split.files) / split.windows
    return {
        "tokens": tokens, "ids_a_token": round(ids / tokens, 3), "bytes": size,
        "bytes_a_token": round(size / tokens, 3), "bytes_an_id": round(size / ids, 4),
        "teacher_entropy": round(entropy, 5), "mass_covered": round(covered, 5),
    }  # fmt: skip


def _require_fitting(config: LabelConfig, model: GemmaConfig, tokenizer: Tokenizer, teacher: Path) -> None:
    if model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the teacher {teacher} has {model.vocab_size:,} rows, fewer than its tokenizer's "
            f"{tokenizer.vocab_size:,} pieces. Use the checkpoint that belongs to the tokenizer."
        )
    if config.seq_len > model.max_seq_len:
        raise ValueError(
            f"seq_len={config.seq_len} exceeds the teacher's max_seq_len={model.max_seq_len}. Shorten it."
        )
    if config.kind == "top-k" and config.samples > tokenizer.vocab_size:
        raise ValueError(
            f"the top {config.samples:,} of {tokenizer.vocab_size:,} pieces cannot be kept. Lower samples."
        )
