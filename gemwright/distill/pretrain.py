"""The pre-training stage: shards in, a checkpoint out; distilled from a teacher, or trained from scratch.

The two differ in the loss alone (report, section 3.2: distillation INSTEAD of next-token prediction), so that
a student and its twin from scratch see the same tokens in the same order from the same weights.
"""

from pathlib import Path
from typing import Any

from pydantic import Field

from gemwright.config import Config
from gemwright.data.shards import Shards, Split, Windows
from gemwright.device import pick_device, seed_everything
from gemwright.evaluate.likelihood import nats_per_token
from gemwright.model import checkpoint, cost
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.run import Card, RunFolder, read_card, run_stage
from gemwright.tokenizer.tokenizer import MODEL_FILE, Tokenizer
from gemwright.train import resume
from gemwright.train.loop import TrainConfig, train
from gemwright.train.teacher import Teacher, distillation, next_token, require_same_tokenizer


class PretrainConfig(Config):
    """One pre-training run."""

    model: GemmaConfig
    """The model to be trained."""
    train: TrainConfig
    """Steps, batches, optimiser."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Distinct tokens to train on, the same ones for every run that asks for as many; None: all."""
    validation_tokens: int | None = Field(default=None, gt=0)
    """Tokens of each validation; None: all of the split."""
    held_out_tokens: int | None = Field(default=None, gt=0)
    """Tokens of the measurement at the end, on text that no run chooses by; None: all."""
    seed: int = 0
    """Of the weights; `train.seed` orders the data."""


def run(
    config: PretrainConfig, out: Path, shards: Path, *, teacher: Path | None = None, fresh: bool = False
) -> Card:
    """Train from scratch, or distil from `teacher`, and leave a checkpoint in `out`. Killed, it goes on.

    Raises:
        ValueError: the vocabulary does not fit the shards, or the teacher has another tokenizer.
        NonFiniteError: the loss is not a number.
    """
    inputs = {"shards": shards} | ({"teacher": teacher} if teacher else {})
    stage = "distill" if teacher else "pretrain"
    next_step = f'gemwright generate {out} "def "'
    data = Shards.open(shards)
    if config.model.vocab_size < data.manifest.vocab_size:
        raise ValueError(
            f"the model has {config.model.vocab_size} rows, but the shards use {data.manifest.vocab_size} "
            f"pieces. Set model.vocab_size={data.manifest.vocab_size}."
        )
    if config.train.seq_len > config.model.max_seq_len:
        raise ValueError(
            f"train.seq_len={config.train.seq_len} exceeds the model's max_seq_len="
            f"{config.model.max_seq_len}. Shorten the one or raise the other."
        )

    if teacher is not None and (teacher / MODEL_FILE).exists():  # before the folder is this teacher's work
        require_same_tokenizer(teacher, data.manifest.tokenizer_sha256)

    def work(folder: RunFolder) -> dict[str, Any]:
        return _work(config, folder, data, tokenizer_of(shards), teacher)

    card = run_stage(stage, config, out, work, inputs=inputs, fresh=fresh, next_step=next_step)
    resume.clear(out)  # not before the card is written: a kill during the last evaluation costs no training
    return card


def tokenizer_of(shards: Path) -> Tokenizer:
    """The tokenizer that made the shards, found through their card."""
    entry = read_card(shards).inputs["tokenizer"]
    path = (shards.parent / entry["path"]).resolve()
    if not path.exists():
        raise FileNotFoundError(
            f"{shards} was made with the tokenizer {path}, which is gone. Put it back there."
        )
    return Tokenizer.load(path)


def _work(
    config: PretrainConfig, folder: RunFolder, data: Shards, tokenizer: Tokenizer, teacher: Path | None
) -> dict[str, Any]:
    device = pick_device()
    seed_everything(config.seed)
    model = Gemma(config.model).to(device)
    loss = next_token
    if teacher is not None:
        loss = distillation(
            Teacher.load(teacher, data.manifest.tokenizer_sha256, device, compiled=config.train.compile)
        )

    def windows(split: Split, max_tokens: int | None) -> Windows:
        return Windows(data, split, config.train.seq_len, seed=config.train.seed, max_tokens=max_tokens)

    part = windows("validation", config.validation_tokens)
    trained_on = windows("train", config.max_tokens)
    last = train(
        model,
        loss,
        trained_on,
        config.train,
        folder,
        lambda model: {"validation": nats_per_token(model, part)},
    )
    checkpoint.save(model, folder.path)
    tokenizer.save(folder.path)
    return {
        "parameters": cost.parameters(config.model),
        "non_embedding_parameters": cost.non_embedding_parameters(config.model),
        "distinct_tokens": trained_on.tokens,
        "tokens_seen": config.train.steps * config.train.batch_size * config.train.seq_len,
        **last,
        "held_out": nats_per_token(model, windows("held_out", config.held_out_tokens)),
    }
