"""The pre-training stage: shards in, a checkpoint out; distilled from a teacher, or trained from scratch.

The two differ in the loss alone (report, section 3.2: distillation INSTEAD of next-token prediction), so that
a student and its twin from scratch see the same tokens in the same order from the same weights.
"""

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from gemwright.config import Config
from gemwright.data.shards import Shards
from gemwright.data.sources import Split
from gemwright.data.windows import Mixture, Windows
from gemwright.device import pick_device, seed_everything
from gemwright.evaluate.likelihood import nats_per_token
from gemwright.model import checkpoint, cost
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.run import Card, RunFolder, fingerprint, read_card, run_stage
from gemwright.targets.store import Targets
from gemwright.tokenizer.tokenizer import MODEL_FILE, SPECIAL, Tokenizer, require_same_tokenizer
from gemwright.train import resume
from gemwright.train.diagnostics import watch
from gemwright.train.loop import TrainConfig, batches_of, make_batch, train
from gemwright.train.teacher import (
    REPORT,
    ObjectiveConfig,
    StoredTeacher,
    Teacher,
    distillation,
    next_token,
)

_WATCHED = 2048  # tokens that the diagnostics look at


class PretrainConfig(Config):
    """One pre-training run."""

    model: GemmaConfig
    """The model to be trained."""
    train: TrainConfig
    """Steps, batches, optimiser."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Distinct tokens to train on, the same ones for every run that asks for as many; None: all."""
    mixture: Mixture = ()
    """How sources are mixed, stage by stage; by default each has its share of the text."""
    validation_tokens: int | None = Field(default=None, gt=0)
    """Tokens of each validation; None: all of the split."""
    held_out_tokens: int | None = Field(default=None, gt=0)
    """Tokens of the measurement at the end, on text that no run chooses by; None: all."""
    objective: ObjectiveConfig = REPORT
    """What a distilled student is trained for; from scratch, only its z_loss counts."""
    seed: int = 0
    """Of the weights; `train.seed` orders the data."""


def run(
    config: PretrainConfig,
    out: Path,
    shards: Path,
    *,
    teacher: Path | None = None,
    targets: Path | None = None,
    fresh: bool = False,
) -> Card:
    """Train from scratch, or distil, and leave a checkpoint in `out`. Killed, it goes on.

    Args:
        teacher: a checkpoint to run along with the student.
        targets: what a teacher left on disk about these shards, instead (`label`).
    Raises:
        ValueError: the vocabulary does not fit the shards, the mixture names a source that they have not, the
            teacher has another tokenizer, the targets are of other shards or another packing, or the
            objective needs another kind of teacher.
        NonFiniteError: the loss is not a number.
    """
    assert teacher is None or targets is None, (teacher, targets)
    named = {"shards": shards, "teacher": teacher, "targets": targets}
    inputs = {name: path for name, path in named.items() if path}
    stage = "distill" if teacher or targets else "pretrain"
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
        require_same_tokenizer(teacher, tokenizer_of(shards))
    trained_on = _training_windows(config, data)
    stored = None if targets is None else _stored(config, targets, shards, trained_on)
    if stage == "pretrain" and config.objective.but(z_loss=0.0) != REPORT:
        raise ValueError(
            "from scratch there is the next token alone, and objective asks for more than a z_loss. "
            "Leave that out, or give a teacher."
        )

    def work(folder: RunFolder) -> dict[str, Any]:
        return _work(config, folder, trained_on, tokenizer_of(shards), teacher, stored)

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


def _stored(config: PretrainConfig, targets: Path, shards: Path, trained_on: Windows) -> StoredTeacher:
    """The targets, if they are of these shards in this packing."""
    opened = Targets.open(targets)
    if opened.manifest.shards.sha256 != fingerprint(shards):
        raise ValueError(
            f"{targets} has targets for other shards than {shards}, which were made again since or are not "
            "those that were labelled. Label them: gemwright label."
        )
    return StoredTeacher(opened, trained_on, config.objective)


def shards_of(targets: Path) -> Path:
    """The shards that targets belong to, as their manifest says; errors as `Targets.open`."""
    path = (targets.parent / Targets.open(targets).manifest.shards.path).resolve()
    if not path.exists():
        raise FileNotFoundError(f"{targets} is about the shards {path}, which are gone. Put them back there.")
    return path


def _training_windows(config: PretrainConfig, data: Shards) -> Windows:
    return Windows(
        data, "train", config.train.seq_len, seed=config.train.seed, max_tokens=config.max_tokens,
        mixture=config.mixture, total_windows=config.train.steps * config.train.batch_size,
    )  # fmt: skip


def _judged(trained_on: Windows, split: Split, max_tokens: int | None) -> Windows:
    """What is measured on: never mixed, and the same whatever was trained on."""
    return Windows(trained_on.shards, split, trained_on.seq_len, max_tokens=max_tokens)


def _work(
    config: PretrainConfig, folder: RunFolder, trained_on: Windows, tokenizer: Tokenizer,
    teacher: Path | None, stored: StoredTeacher | None,
) -> dict[str, Any]:  # fmt: skip
    device = pick_device()
    seed_everything(config.seed)
    model = Gemma(config.model).to(device)
    source = stored
    if teacher is not None:
        source = Teacher.load(teacher, tokenizer, device, compiled=config.train.compile)
    part = _judged(trained_on, "validation", config.validation_tokens)

    def no_teacher(_: Gemma) -> dict[str, float]:
        return {}

    loss, look = partial(next_token, z_loss=config.objective.z_loss), no_teacher
    if source is not None:
        loss = distillation(source, config.objective)
        numbers = trained_on.numbers(0, config.train.batch_size)[: max(1, _WATCHED // config.train.seq_len)]
        first = make_batch(trained_on.take(numbers), SPECIAL["<bos>"], device, numbers)
        look = watch(source, config.objective, first)
    last = train(
        model,
        loss,
        batches_of(trained_on, config.train, device),
        config.train,
        folder,
        lambda model: {"validation": nats_per_token(model, part), **look(model)},
    )
    checkpoint.save(model, folder.path)
    tokenizer.save(folder.path)
    return {
        "parameters": cost.parameters(config.model),
        "non_embedding_parameters": cost.non_embedding_parameters(config.model),
        "distinct_tokens": trained_on.tokens,
        "tokens_seen": config.train.steps * config.train.batch_size * config.train.seq_len,
        **last,
        "held_out": nats_per_token(model, _judged(trained_on, "held_out", config.held_out_tokens)),
    }
