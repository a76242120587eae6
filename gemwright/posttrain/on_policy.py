"""On-policy distillation: the student writes, the teacher says of every token what it would have written.

The report (section 4) distils "from the teacher on the student's distribution" and cites GKD (arXiv
2306.13649) and MiniLLM (arXiv 2306.08543); divergence and shares are not told. Here, as in GKD:

    with probability lambda  x ~ prompts, y ~ student(x)      else  (x, y) ~ answers of the teacher
    loss = sum over the tokens of y of D(teacher || student), over the whole vocabulary

No gradient goes through the sampling. lambda = 1 and reverse KL are the defaults: GKD found both best for
instruction tuning. The divergence is exact (`losses.dense`), not estimated from the tokens that were drawn.

An update is a function of its number and of the weights before it: prompts, draws and the choice between
student's and teacher's words hang on seeds, so that a killed run goes on as it would have.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveInt

from gemwright.config import Config
from gemwright.data.conversations import Conversations, ConversationsConfig, is_held_back, pack
from gemwright.data.windows import order_key, permuted
from gemwright.device import pick_device, seed_everything
from gemwright.generate.rollout import Rollout, rollouts
from gemwright.generate.sampling import Sampling
from gemwright.model import checkpoint, cost
from gemwright.model.gemma import Gemma
from gemwright.posttrain.sft import require_room
from gemwright.reading.prompts import Prompts, read_prompts
from gemwright.run import Card, RunFolder, run_stage
from gemwright.tokenizer.chat import encode_prompt
from gemwright.tokenizer.tokenizer import SPECIAL, Tokenizer, require_same_tokenizer
from gemwright.train import resume
from gemwright.train.loop import Batch, TrainConfig, batches_of, make_batch, train
from gemwright.train.teacher import ObjectiveConfig, Teacher, distillation

STAGE = "on-policy"
_VALIDATED = 64  # prompts, at most


class OnPolicyConfig(Config):
    """One run of on-policy distillation."""

    train: TrainConfig
    """Steps and optimiser. `batch_size` counts conversations, `seq_len` the tokens that one may have."""
    objective: ObjectiveConfig = ObjectiveConfig(beta=1.0)
    """The divergence; by default reverse KL, KL(student || teacher)."""
    on_policy: float = Field(default=1.0, ge=0, le=1)
    """GKD's lambda: the share of updates on the student's own words; the others need answers."""
    sampling: Sampling = Sampling(temperature=1.0, max_tokens=128)
    """How the student writes; its own distribution, unless temperature or cuts change it."""
    max_batch: PositiveInt = 32
    """Conversations written at a time."""
    conversations: ConversationsConfig = ConversationsConfig()
    """How the answers are read."""
    seed: int = 0
    """Of the choice between the student's words and answers; `train.seed` orders the prompts."""


def run(
    config: OnPolicyConfig,
    out: Path,
    model: Path,
    teacher: Path,
    prompts: Path,
    *,
    answers: Path | None = None,
    fresh: bool = False,
) -> Card:
    """Train the chat model `model` on its own replies to `prompts`, graded by `teacher`. Killed, it goes on.

    Args:
        prompts: a folder of `gemwright prompts`, or a file of prompts. Two in a hundred are held back, and
            tell how far the student still is from the teacher.
        answers: chat jsonl for the updates that are not on-policy.
    Raises:
        ValueError: the teacher has another tokenizer, no prompt fits a row, answers are missing where
            `on_policy` is below 1, or rows are longer than a model's context.
        NonFiniteError: the loss is not a number.
    """
    tokenizer = Tokenizer.load(model)
    require_same_tokenizer(teacher, tokenizer, "the student", "Use a teacher of its family.")
    for folder in (model, teacher):
        require_room(folder, config.train.seq_len)
    if (config.on_policy < 1) != (answers is not None):
        raise ValueError(
            f"on_policy={config.on_policy:g} and {'answers' if answers else 'no answers'}: what is not "
            "on-policy learns from answers. Give them together with a share below 1, or neither."
        )
    asked = _Asked(read_prompts(prompts), tokenizer, config)
    other = None
    if answers is not None:
        length, seed = config.train.seq_len, config.train.seed
        other = Conversations.read(answers, tokenizer, length, config.conversations, seed=seed)

    def work(folder: RunFolder) -> dict[str, Any]:
        return _work(config, folder, model, teacher, tokenizer, asked, other)

    named = {"model": model, "teacher": teacher, "prompts": prompts, "answers": answers}
    card = run_stage(
        STAGE, config, out, work, inputs={name: path for name, path in named.items() if path}, fresh=fresh,
        next_step=f"gemwright chat {out}",
    )  # fmt: skip
    resume.clear(out)
    return card


class _Asked:
    """The prompts that fit a row, in the order of training, and those held back."""

    def __init__(self, prompts: Prompts, tokenizer: Tokenizer, config: OnPolicyConfig) -> None:
        room = config.train.seq_len + 1 - config.sampling.max_tokens
        fit: list[tuple[str, ...]] = []
        for prompt in prompts.asked:
            if len(encode_prompt(tokenizer, [{"role": "user", "content": prompt.turns[0]}])) < room:
                fit.append(prompt.turns)
        self.too_long = len(prompts.asked) - len(fit)
        self.held_back = [turns for turns in fit if is_held_back(turns[0])][:_VALIDATED]
        self._train = [turns for turns in fit if not is_held_back(turns[0])]
        self._seed = config.train.seed
        if not self._train:
            raise ValueError(
                f"none of {len(prompts.asked):,} prompts fits: with sampling.max_tokens="
                f"{config.sampling.max_tokens} a row of train.seq_len={config.train.seq_len} has room for "
                f"{max(0, room - 1)} tokens of a prompt. Raise seq_len or lower max_tokens."
            )

    def __len__(self) -> int:
        return len(self._train)

    def batch(self, step: int, size: int) -> list[tuple[int, tuple[str, ...]]]:
        """The prompts of an update, each with the number of its place in the run."""
        places = np.arange(step * size, (step + 1) * size, dtype=np.uint64)
        epoch, index = np.divmod(places, np.uint64(len(self._train)))
        chosen = permuted(index, len(self._train), order_key(self._seed, epoch))
        return [(int(place), self._train[int(i)]) for place, i in zip(places, chosen, strict=True)]


def _work(
    config: OnPolicyConfig, folder: RunFolder, model: Path, teacher: Path, tokenizer: Tokenizer,
    asked: _Asked, other: Conversations | None,
) -> dict[str, Any]:  # fmt: skip
    device = pick_device()
    seed_everything(config.seed)
    student = checkpoint.load(model, dtype=torch.float32, device=device)
    judge = Teacher.load(teacher, tokenizer, device, compiled=config.train.compile)
    loss = distillation(judge, config.objective)

    def on_own_words(step: int) -> list[Batch]:
        drawn = _write(student, tokenizer, asked.batch(step, config.train.batch_size), config)
        return _batches(drawn, config.train, device)

    batches = on_own_words
    if other is not None:
        few = max(1, round(config.train.batch_size * len(other) / other.counts["conversations"]))
        on_answers = batches_of(other, config.train.but(batch_size=few), device, other.weights)

        def batches(step: int) -> list[Batch]:
            draw = np.random.default_rng((config.seed, step)).random()
            return (on_own_words if draw < config.on_policy else on_answers)(step)

    def validate(model: Gemma) -> dict[str, float]:
        if not asked.held_back:
            return {}
        drawn = _write(model, tokenizer, list(enumerate(asked.held_back)), config)
        parts = _batches(drawn, config.train, device)
        with torch.no_grad():
            total = sum(float(loss(model, part)[0]) for part in parts)
        replies = [reply for one in drawn for reply in one.replies]
        return {
            "validation": total / sum(float(part.weights.sum()) for part in parts),
            "tokens_a_reply": sum(len(reply.ids) for reply in replies) / len(replies),
            "finished": sum(reply.finish == "stop" for reply in replies) / len(replies),
        }

    before = {f"{name}_before": value for name, value in validate(student).items()}
    last = train(student, loss, batches, config.train, folder, validate)
    checkpoint.save(student, folder.path)
    tokenizer.save(folder.path)
    return {
        "parameters": cost.parameters(student.config),
        "prompts": len(asked), "held_back": len(asked.held_back), "too_long": asked.too_long,
        "epochs": round(config.on_policy * config.train.steps * config.train.batch_size / len(asked), 3),
        **before, **last,
    }  # fmt: skip


def _write(
    model: Gemma, tokenizer: Tokenizer, prompts: Sequence[tuple[int, Sequence[str]]], config: OnPolicyConfig
) -> list[Rollout]:
    """The student's conversations, in the order of the prompts. Layers compiled for training run eagerly."""
    sampling = config.sampling.but(seed=(config.sampling.seed + config.seed) % 2**63)
    with torch.compiler.set_stance("force_eager"):
        found = dict(rollouts(model, tokenizer, prompts, sampling, max_batch=config.max_batch))
    return [found[number] for number, _ in prompts]


def _batches(drawn: Sequence[Rollout], config: TrainConfig, device: torch.device) -> list[Batch]:
    """Conversations packed into rows, and these into portions. What a row cannot hold of one is cut off."""
    most = config.seq_len + 1
    examples = [(one.ids[:most], [float(own) for own in one.mask[:most]]) for one in drawn]
    rows, weights = pack(examples, config.seq_len)
    few = config.micro_batch_size or len(rows)
    return [
        make_batch(part, SPECIAL["<bos>"], device, weights=w)
        for part, w in zip(rows.split(few), weights.split(few), strict=True)
    ]
