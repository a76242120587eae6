"""Supervised fine-tuning: a checkpoint and conversations in, a chat model out.

The report (section 4) clones a teacher's behaviour: its answers to the prompts are learnt, word by word. With
a teacher, or what it left on disk (`gemwright label`), its whole distribution on the same tokens is learnt
instead, the fine-tuning side of the report's distillation. Loss is on what the model itself says: each
answer and its `<end_of_turn>`, and the final `<eos>`.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gemwright.config import Config
from gemwright.data.conversations import Conversations, ConversationsConfig
from gemwright.device import pick_device, seed_everything
from gemwright.evaluate.likelihood import nats_per_token
from gemwright.model import checkpoint, cost
from gemwright.model.gemma import Gemma
from gemwright.run import Card, RunFolder, run_stage
from gemwright.targets.store import Targets
from gemwright.tokenizer.tokenizer import Tokenizer, require_same_tokenizer
from gemwright.train import resume
from gemwright.train.loop import TrainConfig, batches_of, train
from gemwright.train.teacher import (
    REPORT,
    ObjectiveConfig,
    StoredTeacher,
    Teacher,
    distillation,
    next_token,
)

STAGE = "sft"


class SftConfig(Config):
    """One fine-tuning run."""

    train: TrainConfig
    """Steps, batches (of packed rows), optimiser."""
    conversations: ConversationsConfig = ConversationsConfig()
    """How the conversations are read."""
    objective: ObjectiveConfig = REPORT
    """What is learnt from a teacher; without one, only its z_loss counts."""
    seed: int = 0
    """Of anything random but the order of the rows, which `train.seed` decides."""


def run(
    config: SftConfig,
    out: Path,
    model: Path,
    conversations: Path,
    *,
    epochs: float | None = None,
    teacher: Path | None = None,
    targets: Path | None = None,
    fresh: bool = False,
) -> Card:
    """Fine-tune the checkpoint `model` and leave one in `out`. Killed, it goes on.

    Args:
        conversations: chat jsonl, or a folder of `gemwright answer`. One prompt in fifty is held back to
            validate on.
        epochs: how often every conversation is seen, at least; in place of `train.steps`.
        teacher: a checkpoint to run along with the student.
        targets: what a teacher left on disk about these conversations, instead (`label`).
    Raises:
        ValueError: two teachers, malformed conversations, none that fits a row, a row longer than the model's
            context, a teacher with another tokenizer, or targets of other conversations or another packing.
        NonFiniteError: the loss is not a number.
    """
    if teacher is not None and targets is not None:
        raise ValueError("a student learns from one teacher. Give a teacher or its targets, not both.")
    tokenizer = Tokenizer.load(model)
    for folder in filter(None, (model, teacher)):
        require_room(folder, config.train.seq_len)
    if teacher is not None:
        require_same_tokenizer(teacher, tokenizer, "the student", "Use a teacher of its family.")
    elif targets is None and config.objective.but(z_loss=0.0) != REPORT:
        raise ValueError(
            "without a teacher there is the next token alone, and objective asks for more than a z_loss. "
            "Leave that out, or give a teacher."
        )
    read = partial(_read, config, conversations, tokenizer)
    data, held_back = read("train"), read("validation")
    if epochs is not None:
        config = config.but(**{"train.steps": math.ceil(epochs * len(data) / config.train.batch_size)})
    stored = None if targets is None else _stored(targets, data, tokenizer, config.objective)

    def work(folder: RunFolder) -> dict[str, Any]:
        return _work(config, folder, model, tokenizer, data, held_back, teacher, stored)

    named = {"model": model, "conversations": conversations, "teacher": teacher, "targets": targets}
    inputs = {name: path for name, path in named.items() if path}
    card = run_stage(STAGE, config, out, work, inputs=inputs, fresh=fresh, next_step=f"gemwright chat {out}")
    resume.clear(out)  # after the card, as in pre-training
    return card


def require_room(model: Path, seq_len: int) -> None:
    """Raise ValueError for a checkpoint whose context is shorter than a row, or that lacks some pieces."""
    shape, pieces = checkpoint.load_config(model), Tokenizer.load(model).vocab_size
    if seq_len > shape.max_seq_len:
        raise ValueError(
            f"train.seq_len={seq_len} exceeds max_seq_len={shape.max_seq_len} of {model}. Shorten the rows."
        )
    if pieces > shape.vocab_size:
        raise ValueError(
            f"{model} has {shape.vocab_size:,} rows, fewer than its tokenizer's {pieces:,} pieces. Use the "
            "tokenizer that it was trained with."
        )


def _read(config: SftConfig, path: Path, tokenizer: Tokenizer, split: Any) -> Conversations:
    return Conversations.read(
        path, tokenizer, config.train.seq_len, config.conversations, split=split, seed=config.train.seed
    )


def _stored(
    targets: Path, data: Conversations, tokenizer: Tokenizer, objective: ObjectiveConfig
) -> StoredTeacher:
    """The targets, if they are of these conversations in this packing."""
    opened = Targets.open(targets)
    manifest = opened.manifest
    if (manifest.shards.sha256, manifest.tokenizer_sha256) != (data.sha256, tokenizer.sha256):
        raise ValueError(
            f"{targets} has targets for other conversations than {data.path}, or for other rows of them: "
            f"text, tokenizer, seq_len={manifest.seq_len} and how they are read have to be the same. "
            "Label them: gemwright label."
        )
    return StoredTeacher(opened, data, objective)


def _work(
    config: SftConfig, folder: RunFolder, start: Path, tokenizer: Tokenizer, data: Conversations,
    held_back: Conversations, teacher: Path | None, stored: StoredTeacher | None,
) -> dict[str, Any]:  # fmt: skip
    device = pick_device()
    seed_everything(config.seed)
    model = checkpoint.load(start, dtype=torch.float32, device=device)
    loss: Callable[..., Any] = partial(next_token, z_loss=config.objective.z_loss)
    if teacher is not None:
        source = Teacher.load(teacher, tokenizer, device, compiled=config.train.compile)
        loss = distillation(source, config.objective)
    elif stored is not None:
        loss = distillation(stored, config.objective)

    def validate(model: Gemma) -> dict[str, float]:
        return {"validation": nats_per_token(model, held_back)} if held_back.tokens else {}

    before = {f"{name}_before": value for name, value in validate(model).items()}
    batches = batches_of(data, config.train, device, data.weights)
    last = train(model, loss, batches, config.train, folder, validate)
    checkpoint.save(model, folder.path)
    tokenizer.save(folder.path)
    return {
        "parameters": cost.parameters(model.config),
        **data.counts,
        "rows": len(data), "fill": round(data.fill, 4),
        "epochs": round(config.train.steps * config.train.batch_size / len(data), 3),
        **before, **last,
    }  # fmt: skip
